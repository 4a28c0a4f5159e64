"""Dolma from json.gz shards: found anywhere, read by Beam where it is installed, tokenized like any other corpus."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from precision_scaling.data import DataError, tokens
from precision_scaling.data.shards import find_files, read_shard

ROOT = Path(__file__).parent.parent
OPTIONS = {
    **{"name": "dolma", "split": "train", "validation_split": "", "feature": "text", "tokenizer": "bytes"},
    **{"validation_fraction": 0.3, "split_seed": 0, "hash": "", "tfds_dir": "", "workers": 1, "beam_options": ""},
    "progress": False,
}


def shard(path: Path, texts: list[str]) -> list[dict[str, str]]:
    rows = [{"id": f"{path.name}-{i}", "source": "test", "text": text, "added": "x"} for i, text in enumerate(texts)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dolma")
    (root / "more").mkdir()
    shard(root / "cc_en_head-0000.json.gz", [f"document {i} é 中\nof two lines" for i in range(20)])
    shard(root / "cc_en_head-0001.json.gz", [f"paper {i}" for i in range(10)] + ["document 3 é 中\nof two lines"])
    shard(root / "more" / "wiki-0000.json.gz", ["encyclopedia"])
    (root / "README.txt").write_text("no shard")
    return root


def test_shards_are_found_by_directory_pattern_and_list(shards, tmp_path):
    names = lambda found: [file.rsplit("/", 1)[1] for file in found[0]]
    everything = find_files(str(shards))
    assert names(everything) == ["cc_en_head-0000.json.gz", "cc_en_head-0001.json.gz", "wiki-0000.json.gz"]
    pattern = find_files(str(shards / "cc_en_*.json.gz"))
    assert names(pattern) == ["cc_en_head-0000.json.gz", "cc_en_head-0001.json.gz"]
    listed = tmp_path / "urls.txt"
    listed.write_text(f"\n{shards}/cc_en_head-0001.json.gz\nfile://{shards}/cc_en_head-0000.json.gz\n")
    assert find_files(str(listed))[1] == pattern[1] != everything[1]
    import fsspec

    with fsspec.open("memory://bucket/v1_7/cc-0.json.gz", "wb") as file:
        file.write((shards / "more" / "wiki-0000.json.gz").read_bytes())
    assert names(find_files("memory://bucket/v1_7/*.json.gz")) == ["cc-0.json.gz"]
    (row,) = read_shard("memory://bucket/v1_7/cc-0.json.gz")
    assert row == ("cc-0.json.gz:1", {"text": "encyclopedia", "id": "wiki-0000.json.gz-0", "source": "test"})


def test_a_shard_that_is_cut_off_or_no_shard_is_named_with_the_line(shards, tmp_path):
    good = (shards / "cc_en_head-0000.json.gz").read_bytes()
    broken = {
        "cut.json.gz": good[:-20],
        "text.json.gz": b"no gzip",
        "rows.json.gz": gzip.compress(b'{"id": "a", "source": "b", "text": "c"}\n{"id": 3}\n'),
        "list.json.gz": gzip.compress(b"[1]\n"),
    }
    said = {}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}, line .*: not a shard of Dolma") as error:
            list(read_shard(str(tmp_path / name)))
        said[name] = str(error.value)
    assert "line 2: " in said["rows.json.gz"] and "'text'" in said["rows.json.gz"]
    assert "EOFError" in said["cut.json.gz"]


@pytest.mark.parametrize(
    ("root", "named"),
    [
        ("", "data.root='': for data.name='dolma' it names the json.gz shards"),
        ("{0}/nothing", "no .json.gz file there; allowed is a directory"),
        ("{0}/nothing.txt", "FileNotFoundError"),
        ("nosuch://bucket/*.json.gz", "nosuch"),
    ],
)
def test_a_root_without_shards_is_one_line(tmp_path, root, named):
    with pytest.raises(DataError, match=r"^data\.root=") as error:
        tokens.prepare(**OPTIONS, root=root.format(tmp_path), cache_dir=str(tmp_path))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_two_shards_of_one_name_are_refused(shards, tmp_path):
    shard(shards / "more" / "cc_en_head-0000.json.gz", ["again"])
    try:
        with pytest.raises(DataError, match=r"several files are called 'cc_en_head-0000\.json\.gz'"):
            find_files(str(shards))
    finally:
        (shards / "more" / "cc_en_head-0000.json.gz").unlink()


def documents(corpus: tokens.Corpus) -> set[bytes]:
    ids = np.concatenate([corpus.train, corpus.validation])
    pieces = np.split(ids, np.flatnonzero(ids == corpus.end_of_text) + 1)[:-1]
    return {corpus.load_tokenizer().decode(piece) for piece in pieces}


def test_beam_prepares_every_document_once_and_the_tokens_are_found_again_without_it(shards, tmp_path):
    pytest.importorskip("apache_beam")
    options = OPTIONS | {"root": str(shards), "cache_dir": str(tmp_path)}
    corpus = tokens.prepare(**options | {"beam_options": "--direct_num_workers=1"})
    expected = {f"document {i} é 中\nof two lines" for i in range(20)} | {f"paper {i}" for i in range(10)}
    assert documents(corpus) == {text.encode() for text in expected | {"encyclopedia"}}
    assert corpus.meta["duplicates_dropped"] == 1
    assert list(tmp_path.rglob("*.array_record*")) and not list(tmp_path.rglob("*.tfrecord*"))
    program = (
        "import sys; from precision_scaling.data import tokens;"
        f"print(tokens.prepare(**{options!r}).directory);"
        "assert not {'tensorflow', 'tensorflow_datasets', 'apache_beam'} & set(sys.modules)"
    )
    again = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == str(corpus.directory)
    # In another place and order of work, the same documents have the same order.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in shards.rglob("*.json.gz"):
        (moved / path.name).write_bytes(path.read_bytes())
    elsewhere = tokens.prepare(**options | {"root": str(moved), "cache_dir": str(tmp_path / "elsewhere")})
    assert elsewhere.meta["content_hash"] == corpus.meta["content_hash"]


def test_a_broken_shard_leaves_no_dataset(tmp_path):
    pytest.importorskip("apache_beam")
    (tmp_path / "bad.json.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(DataError, match=r"bad\.json\.gz, line 1") as error:
        tokens.prepare(**OPTIONS, root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("dataset_info.json"))


def test_without_beam_one_line_says_what_to_install(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[beam\]'"):
        tokens.prepare(**OPTIONS, root=str(shards), cache_dir=str(tmp_path))
