"""Tokens in many parts, written by many processes: the same as in one, whatever was killed on the way."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from precision_scaling.data import DataError, parts, remote, tokenize, tokenizer, tokens, workers
from precision_scaling.data.loader import Loader
from precision_scaling.data.parts import TokenFile, TokenParts, open_tokens
from precision_scaling.data.tokens import Corpus
from precision_scaling.errors import UserError
from precision_scaling.runtime import files

ROOT = Path(__file__).parent.parent
OPTIONS = {
    **{"name": "python_stdlib", "split": "train", "validation_split": "", "feature": "text", "tokenizer": "bpe:300"},
    **{"validation_fraction": 0.25, "split_seed": 0, "hash": "", "tfds_dir": "", "beam_options": "", "progress": False},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for i in range(120):
        text = f"value_{i % 100} = {i % 100}  # é 中 {'word ' * (i % 100)}\n"  # the last 20 are copies
        (root / f"module{i:03}.py").write_text(text * 3)
    return root


@pytest.fixture
def small_parts(monkeypatch):
    """Scans of 16 documents, parts of 4 kB and a process for every kB."""
    for name, value in (("_SCAN_DOCUMENTS", 16), ("_PART_BYTES", 4000), ("_PROCESS_BYTES", 1000)):
        monkeypatch.setattr(tokenize, name, value)


def prepare(cache: Path | str, tree: Path, **options) -> Corpus:
    return tokens.prepare(**OPTIONS | {"root": str(tree), "cache_dir": str(cache), "workers": 1} | options)


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory) -> Corpus:
    return prepare(tmp_path_factory.mktemp("cache"), tree)


def same(corpus: Corpus, other: Corpus) -> bool:
    return all(np.array_equal(getattr(corpus, side), getattr(other, side)) for side in ("train", "validation"))


@pytest.mark.slow
def test_the_tokens_do_not_depend_on_the_number_of_processes_or_parts(tmp_path, tree, whole, small_parts):
    assert isinstance(whole.train, np.memmap)
    corpora = [prepare(tmp_path / str(n), tree, workers=n) for n in (1, 2)]
    assert len(corpora[0].meta["parts"]["train"]) > 4
    assert isinstance(corpora[0].train, TokenParts)
    assert all(same(corpus, whole) for corpus in corpora)
    files = [{path.name: path.read_bytes() for path in corpus.directory.iterdir()} for corpus in corpora]
    assert files[0] == files[1]
    assert len(files[0]) == 2 + 2 * len(corpora[0].meta["parts"]["train"])  # the parts, meta.json and the tokenizer
    for key in ("tokens", "documents", "bytes", "duplicates_dropped"):
        assert corpora[0].meta[key] == whole.meta[key]
    assert whole.meta["duplicates_dropped"] == 20


SLOW = """
import sys, time
from precision_scaling.data import tokenize, tokens
tokenize._SCAN_DOCUMENTS, tokenize._PART_BYTES = 16, 4000
write_part = tokenize.write_part
def slowly(*task):
    time.sleep(0.2)
    return write_part(*task)
tokenize.write_part = slowly
tokens.prepare(**{options!r})
"""


@pytest.mark.slow
def test_what_a_killed_process_had_finished_is_kept(tmp_path, tree, whole, small_parts):
    options = OPTIONS | {"root": str(tree), "cache_dir": str(tmp_path), "workers": 1}
    process = subprocess.Popen([sys.executable, "-c", SLOW.format(options=options)], cwd=ROOT)
    while len(list(tmp_path.glob("tokens/.*.partial/part-*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = tmp_path.glob("tokens/.*.partial")
    finished = [path.name[5:10] for path in sorted(partial.glob("part-*.json"))]
    kept = {
        name: (partial / name).stat().st_ino for n in finished for name in (f"train-{n}.bin", f"validation-{n}.bin")
    }
    (partial / f"train-{int(finished[-1]) + 1:05}.bin").write_bytes(b"torn")
    corpus = prepare(tmp_path, tree)
    assert same(corpus, whole)
    assert {name: (corpus.directory / name).stat().st_ino for name in kept} == kept
    assert len(corpus.meta["parts"]["train"]) > len(finished)
    assert [path.name for path in tmp_path.glob("tokens/.*")] == []


def test_windows_across_parts_are_those_of_one_array():
    draw = np.random.default_rng(0)
    stream = draw.integers(0, 60_000, 1000).astype(np.uint16)
    for cuts in ([500], [1, 2, 3], [40, 41, 300, 999], sorted(draw.choice(999, 60, replace=False) + 1)):
        parts = TokenParts(np.split(stream, cuts))
        assert (len(parts), parts.dtype, parts.itemsize) == (1000, np.uint16, 2)
        np.testing.assert_array_equal(parts, stream)
        for seq_len in (1, 7, 100, 999):
            index = draw.integers(0, 999 // seq_len, (3, 5))
            expected = stream[index[..., None] * seq_len + np.arange(seq_len + 1)]
            np.testing.assert_array_equal(parts.windows(index, seq_len), expected)


def test_a_loader_reads_the_same_batches_from_parts_as_from_one_file(tmp_path, tree, whole, small_parts):
    parted = Loader(prepare(tmp_path, tree), seq_len=24, batch_size=8)
    loader = Loader(whole, seq_len=24, batch_size=8)
    assert (parted.n_windows, parted.n_validation_windows) == (loader.n_windows, loader.n_validation_windows)
    index = loader.window_indices(3, first_step=0, n_steps=12)
    np.testing.assert_array_equal(parted.window_indices(3, first_step=0, n_steps=12), index)
    np.testing.assert_array_equal(parted.windows(index), loader.windows(index))
    np.testing.assert_array_equal(parted.validation_windows(9), loader.validation_windows(9))
    np.testing.assert_array_equal(parted.calibration_windows(9, 0), loader.calibration_windows(9, 0))


def test_files_that_are_not_what_they_should_be_are_refused(tmp_path):
    dtype = np.dtype(np.uint16)
    of_counts = lambda *counts: [TokenFile(tmp_path / "abc"[i], count, dtype) for i, count in enumerate(counts)]
    for name, count in (("a", 3), ("b", 2)):
        np.arange(count, dtype=dtype).tofile(tmp_path / name)
    assert np.asarray(open_tokens(of_counts(3, 2), dtype)).tolist() == [0, 1, 2, 0, 1]
    assert len(open_tokens([], dtype)) == 0
    with pytest.raises(ValueError, match="b has 4 bytes, not 6"):
        open_tokens(of_counts(3, 3), dtype)
    with pytest.raises(FileNotFoundError):
        open_tokens(of_counts(3, 2, 1), dtype)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    np.array([0, 299, 7], np.uint16).tofile(tmp_path / "a.bin")
    content = TokenFile(tmp_path / "a.bin", 3, np.dtype(np.uint16))
    written = hashlib.blake2b((tmp_path / "a.bin").read_bytes(), digest_size=16).hexdigest()
    assert content.digest() == content.digest(300) == written
    with pytest.raises(ValueError, match=r"a\.bin has the id 299, the vocabulary is 299"):
        content.digest(299)


def test_a_tokenizer_that_leaves_its_vocabulary_is_named(tmp_path, tree, monkeypatch):
    encode = tokenizer.ByteTokenizer.encode
    beyond = lambda self, texts: [np.where(ids == 32, 257, ids.astype(np.uint16)) for ids in encode(self, texts)]
    monkeypatch.setattr(tokenizer.ByteTokenizer, "encode", beyond)
    with pytest.raises(DataError, match=r"data.tokenizer='bytes': gives the id 257, its vocabulary is 257"):
        prepare(tmp_path, tree, tokenizer="bytes")


@pytest.mark.usefixtures("small_parts")
def test_large_token_files_are_read_once_and_again_when_they_were_touched(tmp_path, tree, whole, monkeypatch):
    corpus = prepare(tmp_path, tree)
    read = []
    digest = TokenFile.digest
    monkeypatch.setattr(TokenFile, "digest", lambda self, *most: read.append(self.path.name) or digest(self, *most))
    prepare(tmp_path, tree)
    count = len(read)
    assert count == 2 * len(corpus.meta["parts"]["train"])  # small ones: always
    monkeypatch.setattr(parts, "ALWAYS_CHECKED_BYTES", 0)
    prepare(tmp_path, tree)
    assert len(read) == 2 * count
    assert same(prepare(tmp_path, tree), whole) and len(read) == 2 * count
    first = corpus.directory / "train-00000.bin"
    content = first.read_bytes()
    os.utime(first)
    assert same(prepare(tmp_path, tree), whole) and read[2 * count :] == [first.name]
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert same(prepare(tmp_path, tree), whole) and first.read_bytes() == content
    # A note that is damaged is made anew.
    note = corpus.directory.with_name(f"{corpus.directory.name}.checked")
    note.write_text(note.read_text().replace("0", "1"))
    del read[:]
    assert same(prepare(tmp_path, tree), whole) and len(read) == count
    assert same(prepare(tmp_path, tree), whole) and len(read) == count


def test_token_files_without_a_fingerprint_are_checked_by_their_hashes_and_sealed(tmp_path, tree, whole, monkeypatch):
    corpus = prepare(tmp_path, tree)
    path = corpus.directory / "meta.json"
    older = {name: value for name, value in corpus.meta.items() if name != "tokenizer_hash"}
    monkeypatch.setattr(tokens, "_write", None)  # nothing is written again
    path.write_text(json.dumps(older))
    assert same(prepare(tmp_path, tree), whole)
    assert files.read_sealed(path) == corpus.meta
    monkeypatch.undo()
    path.write_text(json.dumps(older))
    first = corpus.directory / "train-00000.bin"
    content = first.read_bytes()
    first.write_bytes(bytes(2) + content[2:])
    assert same(prepare(tmp_path, tree), whole) and first.read_bytes() == content


def test_what_is_no_file_among_what_is_tokenized_is_refused(tmp_path, tree):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"data.tokenizer='file:.*is a pipe"):
        prepare(tmp_path / "cache", tree, tokenizer=f"file:{tmp_path / 'tokenizer.json'}")
    shutil.copytree(tree, tmp_path / "tree")
    os.mkfifo(tmp_path / "tree" / "module.py")
    with pytest.raises(UserError, match=r"module\.py: is a pipe"):
        prepare(tmp_path / "cache", tmp_path / "tree")
    os.mkfifo(tmp_path / "shard.json.gz")
    with pytest.raises(DataError, match=r"shard.json.gz: is no file"):
        prepare(tmp_path / "cache", tmp_path / "shard*", name="dolma")
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"list.txt: is no file"):
        prepare(tmp_path / "cache", tmp_path / "list.txt", name="dolma")


def test_token_files_on_an_object_store_are_made_once_for_all_machines(tmp_path, tree, whole, small_parts, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    made = prepare("memory://bucket/cache/", tree)
    assert same(made, whole)
    stored = fsspec.filesystem("memory").ls("/bucket/cache/tokens/" + made.directory.name, detail=False)
    assert {Path(path).name for path in stored} == {path.name for path in made.directory.iterdir()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(tokens, "_write", None)  # it is not written again
    copied = prepare("memory://bucket/cache", tree)
    assert copied.directory == tmp_path / "another" / "precision_scaling" / "tokens" / made.directory.name
    assert same(copied, whole)
    # A copy that was broken off is not taken for whole.
    shutil.rmtree(copied.directory)
    fsspec.filesystem("memory").rm("/bucket/cache/tokens/" + made.directory.name + "/meta.json")
    assert not remote.fetch("memory://bucket/cache/tokens/" + made.directory.name, copied.directory)


def test_an_object_store_without_a_driver_is_named_in_one_line(tree):
    with pytest.raises(DataError, match=r"^data\.cache_dir='nosuch://bucket/tokens/.*nosuch") as error:
        prepare("nosuch://bucket", tree)
    assert "\n" not in str(error.value)


def test_tasks_run_in_processes_and_what_they_raise_is_raised_here():
    with workers.pool(2) as run:
        assert sorted(run(max, [(1, 2), (5, 3), (4, 4)])) == [2, 4, 5]
        here, there = {os.getpid()}, set(run(os.getpid, [()] * 4))
        assert there and not here & there
        with pytest.raises(NotADirectoryError):
            list(run(os.listdir, [(f"{__file__}/x",)]))
        with pytest.raises(DataError, match="truediv: ZeroDivisionError"):
            list(run(__import__("operator").truediv, [(1, 0)]))
        with pytest.raises(OSError, match="has died"):
            list(run(os._exit, [(1,)]))


def test_small_corpora_are_not_worth_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [tokenize.processes(0, size << 20) for size in (0, 31, 33, 10_000)] == [1, 1, 2, 8]
    assert [tokenize.processes(3, size << 20) for size in (0, 10_000)] == [1, 3]
    with pytest.raises(DataError, match=r"data\.workers=-1"):
        prepare("nowhere", Path("nowhere"), workers=-1)
