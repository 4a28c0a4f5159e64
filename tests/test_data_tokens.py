"""Corpora, tokenizers and token files: real TFDS datasets of small trees of sources, and once of the whole library."""

import json
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers

from precision_scaling.data import DataError, tokens

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "name": "python_stdlib",
    "root": "",
    "split": "train",
    "validation_split": "",
    "feature": "text",
    "tokenizer": "bytes",
    "validation_fraction": 0.25,
    "split_seed": 0,
    "hash": "",
    "cache_dir": "",
    "tfds_dir": "",
    "workers": 0,
    "beam_options": "",
}


class ThreePoems(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset of another name: two splits, a document of train repeated in test."""

    VERSION = tfds.core.Version("2.3.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"title": text, "verse": text, "year": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("abc"), "test": self._generate_examples("cd")}

    def _generate_examples(self, letters):
        for letter in letters:
            yield letter, {"title": "t" + letter, "verse": letter * 5, "year": 1900}


def prepare(cache: Path, root: Path | str = "", **options) -> tokens.Corpus:
    return tokens.prepare(**OPTIONS | {"cache_dir": str(cache), "root": str(root)} | options, progress=False)


def write_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def documents(ids: np.ndarray, corpus: tokens.Corpus) -> list[bytes]:
    """Decoded documents of a token stream, which must end with end-of-text."""
    ids = np.asarray(ids)
    assert ids[-1] == corpus.end_of_text
    decode = corpus.load_tokenizer().decode
    parts = np.split(ids, np.flatnonzero(ids == corpus.end_of_text) + 1)
    return [decode(part[:-1]) for part in parts[:-1]]


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory) -> Path:
    files = {f"package{i % 4}/module{i:02d}.py": f"value_{i} = {i}  # é 中 {'x' * i}\n" for i in range(40)}
    return write_tree(tmp_path_factory.mktemp("tree"), files)


@pytest.fixture(scope="module")
def small_bytes(small_tree, tmp_path_factory) -> tokens.Corpus:
    return prepare(tmp_path_factory.mktemp("cache"), small_tree)


@pytest.fixture(scope="module")
def small_bpe(small_tree, tmp_path_factory) -> tokens.Corpus:
    return prepare(tmp_path_factory.mktemp("cache"), small_tree, tokenizer="bpe:300")


@pytest.mark.slow
def test_the_standard_library_becomes_two_disjoint_sets_that_hold_every_distinct_source_once(tmp_path):
    corpus = prepare(tmp_path, validation_fraction=0.05)
    expected, undecodable, empty = [], 0, 0
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.relative_to(library).parts):
            content = path.read_bytes()
            try:
                content.decode()
            except UnicodeDecodeError:
                undecodable += 1
                continue
            if content:
                expected.append(content)
            else:
                empty += 1
    train, validation = documents(corpus.train, corpus), documents(corpus.validation, corpus)
    assert sorted(train + validation) == sorted(set(expected))
    assert not set(train) & set(validation)
    assert 0.02 < len(validation) / len(train + validation) < 0.1
    meta = corpus.meta
    assert meta["documents"] == {"train": len(train), "validation": len(validation)}
    assert meta["bytes"] == {"train": sum(map(len, train)), "validation": sum(map(len, validation))}
    assert meta["tokens"] == {"train": len(corpus.train), "validation": len(corpus.validation)}
    assert (meta["undecodable_skipped"], meta["empty_dropped"]) == (undecodable, empty)
    assert meta["duplicates_dropped"] == len(expected) - len(set(expected))
    assert f"stdlib-py{platform.python_version()}-" in meta["source"]
    assert (corpus.vocab_size, corpus.end_of_text, corpus.train.dtype) == (257, 256, np.uint16)


def test_bytes_are_the_documents_in_path_order_each_followed_by_end_of_text(tmp_path):
    root = write_tree(tmp_path / "tree", {"b.py": "hi", "a/z.py": "é", "notes.txt": "no", "site-packages/x.py": "no"})
    corpus = prepare(tmp_path / "cache", root, validation_fraction=0.5, split_seed=4)
    both = sorted([corpus.train.tolist(), corpus.validation.tolist()])
    assert both == [[104, 105, 256], [0xC3, 0xA9, 256]]
    ordered = write_tree(tmp_path / "ordered", {f"{name}.py": name * 9 for name in "dacb"} | {"c/a.py": "n"})
    corpus = prepare(tmp_path / "cache", ordered, validation_fraction=0.2)
    train = documents(corpus.train, corpus)
    assert train == [text for text in (b"a" * 9, b"b" * 9, b"c" * 9, b"d" * 9, b"n") if text in train]


def test_copies_empty_files_and_files_that_are_not_utf8_are_left_out_and_counted(tmp_path, small_tree, small_bytes):
    copies = {f"copy/{path.name}": path.read_bytes() for path in small_tree.rglob("*.py")}
    root = write_tree(tmp_path / "tree", copies | {f"again/{k}": v for k, v in copies.items()})
    write_tree(root, {"bad.py": b"# \xe9\n", "empty.py": "", "empty2.py": ""})
    corpus = prepare(tmp_path / "cache", root)
    counts = [corpus.meta[key] for key in ("duplicates_dropped", "empty_dropped", "undecodable_skipped")]
    assert counts == [len(copies), 2, 1]
    # The side of a document depends on its content alone, wherever and however often it occurs.
    assert set(documents(corpus.train, corpus)) == set(documents(small_bytes.train, small_bytes))
    assert set(documents(corpus.validation, corpus)) == set(documents(small_bytes.validation, small_bytes))


def test_another_split_seed_holds_out_other_documents(tmp_path, small_tree, small_bytes):
    other = prepare(tmp_path, small_tree, split_seed=1)
    assert set(documents(other.validation, other)) != set(documents(small_bytes.validation, small_bytes))


def test_bpe_decodes_to_the_same_documents_as_bytes_in_fewer_tokens(small_bytes, small_bpe):
    for split in ("train", "validation"):
        assert documents(getattr(small_bpe, split), small_bpe) == documents(getattr(small_bytes, split), small_bytes)
    assert len(small_bpe.train) < len(small_bytes.train)
    assert small_bpe.vocab_size == 300
    assert small_bpe.train.max() < 300
    assert small_bpe.meta["bytes"] == small_bytes.meta["bytes"]


def test_bpe_training_is_deterministic(tmp_path, small_tree, small_bpe):
    again = prepare(tmp_path, small_tree, tokenizer="bpe:300")
    assert again.meta == small_bpe.meta


def test_bpe_learns_from_train_documents_only(tmp_path):
    word = "zqzqzqzq"
    candidates = write_tree(tmp_path / "candidates", {f"{i}.py": f"{word} " * 20 + str(i) for i in range(40)})
    corpus = prepare(tmp_path / "cache", candidates)
    held_out = documents(corpus.validation, corpus)
    assert held_out
    mixed = write_tree(tmp_path / "mixed", {f"held{i}.py": text for i, text in enumerate(held_out)})
    write_tree(mixed, {f"plain{i}.py": f"import a{i}\n" * 20 for i in range(40)})
    trained = prepare(tmp_path / "cache", mixed, tokenizer="bpe:280")
    vocabulary = json.loads((trained.directory / "tokenizer.json").read_text())["model"]["vocab"]
    assert "import" in vocabulary
    assert not [token for token in vocabulary if "zq" in token]


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_a_document_that_spells_end_of_text_does_not_end_itself(tmp_path, spec):
    files = {f"{i}.py": f"eot_{i} = '<|endoftext|>'\n" * 3 for i in range(20)}
    corpus = prepare(tmp_path / "cache", write_tree(tmp_path / "tree", files), tokenizer=spec)
    assert np.sum(corpus.train == corpus.end_of_text) == corpus.meta["documents"]["train"]
    everything = documents(corpus.train, corpus) + documents(corpus.validation, corpus)
    assert sorted(everything) == sorted(text.encode() for text in files.values())


def test_a_given_tokenizer_json_is_used_and_a_vocabulary_above_65536_is_stored_in_32_bits(tmp_path, small_tree):
    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000, "value_": 70_001, "[UNK]": 70_002}
    given = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    given.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"value_|\d+"), "isolated")
    given.save(str(tmp_path / "tokenizer.json"))
    corpus = prepare(tmp_path / "cache", small_tree, tokenizer=f"file:{tmp_path / 'tokenizer.json'}")
    assert (corpus.vocab_size, corpus.end_of_text, corpus.train.dtype) == (70_003, 70_000, np.uint32)
    assert corpus.train[0] == 70_001
    # The file's content stands in the name, so an edited file makes other tokens.
    given.add_tokens(["zzz"])
    given.save(str(tmp_path / "tokenizer.json"))
    assert prepare(tmp_path / "cache", small_tree, tokenizer=f"file:{tmp_path / 'tokenizer.json'}").vocab_size == 70_004


def test_any_tfds_dataset_with_text_goes_the_same_way_and_its_own_validation_split_is_kept_out_of_train(tmp_path):
    corpus = prepare(tmp_path, name="three_poems", feature="verse", validation_split="test")
    assert sorted(documents(corpus.train, corpus)) == [b"aaaaa", b"bbbbb"]
    assert sorted(documents(corpus.validation, corpus)) == [b"ccccc", b"ddddd"]
    assert (corpus.meta["source"], corpus.meta["duplicates_dropped"]) == ("three_poems:2.3.0", 1)
    both = prepare(tmp_path, name="three_poems:2.3.0", feature="title", split="train+test", validation_fraction=0.5)
    assert sorted(documents(both.train, both) + documents(both.validation, both)) == [b"ta", b"tb", b"tc", b"td"]
    assert both.meta["duplicates_dropped"] == 1
    assert not list(tmp_path.rglob("*.tfrecord*"))


@pytest.mark.parametrize("name", ["python_stdlib", "three_poems"])
def test_a_second_call_finds_the_tokens_without_tfds(tmp_path, small_tree, name):
    own = {"root": str(small_tree)} if name == "python_stdlib" else {"feature": "verse", "validation_split": "test"}
    options = OPTIONS | {"cache_dir": str(tmp_path), "name": name} | own
    first = tokens.prepare(**options)
    program = (
        "import sys, time; from precision_scaling.data import tokens; start = time.perf_counter();"
        f"corpus = tokens.prepare(**{options!r}); seconds = time.perf_counter() - start;"
        "assert not {'tensorflow_datasets', 'tensorflow', 'grain', 'jax'} & set(sys.modules);"
        "print(corpus.directory, int(corpus.train.sum()), seconds)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    out = run.stdout.split()
    assert (out[0], int(out[1])) == (str(first.directory), int(first.train.sum()))
    assert float(out[2]) < 1  # about 0.01 s for a small tree; TFDS alone takes longer to import


def test_an_edited_source_file_gives_new_tokens_and_leaves_the_old_ones(tmp_path):
    root = write_tree(tmp_path / "tree", {f"{i}.py": f"x = {i}\n" for i in range(20)})
    before = prepare(tmp_path / "cache", root)
    (root / "3.py").write_text("x = 'edited'\n")
    after = prepare(tmp_path / "cache", root)
    assert b"x = 'edited'\n" in documents(after.train, after) + documents(after.validation, after)
    assert before.directory != after.directory
    assert b"x = 3\n" in documents(before.train, before) + documents(before.validation, before)


@pytest.mark.parametrize("damage", ["truncated", "missing", "meta"])
def test_damaged_token_files_and_leftovers_of_a_killed_writer_are_replaced(tmp_path, small_tree, small_bytes, damage):
    directory = prepare(tmp_path, small_tree).directory
    leftover = directory.parent / f".{directory.name}.killed"
    leftover.mkdir()
    if damage == "truncated":
        (directory / "train-00000.bin").write_bytes((directory / "train-00000.bin").read_bytes()[:-2])
    elif damage == "missing":
        (directory / "validation-00000.bin").unlink()
    else:
        (directory / "meta.json").write_text("{")
    again = prepare(tmp_path, small_tree)
    assert again.directory == directory
    assert np.array_equal(again.train, small_bytes.train)
    assert sorted(p.name for p in directory.parent.iterdir()) == sorted([directory.name, f"{directory.name}.lock"])


def test_a_dataset_that_cannot_be_read_is_named_in_one_line(tmp_path, small_tree):
    prepare(tmp_path, small_tree)
    (records,) = tmp_path.rglob("*.array_record*")
    records.write_bytes(b"\0" * records.stat().st_size)
    with pytest.raises(DataError, match=r"^data\.name='python_stdlib/tree-") as error:
        prepare(tmp_path, small_tree, split_seed=9)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_processes_that_prepare_at_once_all_get_the_same_whole_corpus(tmp_path, small_tree, small_bytes):
    options = OPTIONS | {"cache_dir": str(tmp_path), "root": str(small_tree)}
    program = f"from precision_scaling.data import tokens as t; print(t.prepare(**{options!r}).meta['content_hash'])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) for _ in range(4)]
    results = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 4, results
    assert {out.strip() for out, _ in results} == {str(small_bytes.meta["content_hash"])}
    assert len([p for p in (tmp_path / "tokens").iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokenizer": "bpe:256"}, ["data.tokenizer='bpe:256'", "257"]),
        ({"tokenizer": "sentencepiece"}, ["data.tokenizer='sentencepiece'", "bytes"]),
        ({"tokenizer": "file:nowhere.json"}, ["data.tokenizer='file:nowhere.json'", "no such file"]),
        ({"tokenizer": f"file:{__file__}"}, ["data.tokenizer='file:", "not a tokenizer.json"]),
        ({"validation_fraction": 0.0}, ["data.validation_fraction=0.0", "0 < fraction < 1"]),
        (
            {"validation_fraction": 1e-12},
            ["data.validation_fraction=1e-12", "no validation document", "40 distinct ones"],
        ),
        (
            {"validation_fraction": 1 - 1e-12},
            ["data.validation_fraction=0.999", "no train document", "40 distinct ones"],
        ),
        ({"feature": "code"}, ["data.feature='code'", "['path', 'text']"]),
        ({"split": "test"}, ["data.split='test'", "['train']"]),
        ({"validation_split": "dev"}, ["data.validation_split='dev'", "['train']"]),
        ({"root": "/nonexistent"}, ["data.root='/nonexistent'", "no .py file"]),
        ({"name": "no_such_dataset", "root": ""}, ["data.name='no_such_dataset'", "not found"]),
        ({"name": "three_poems"}, ["data.root=", "three_poems"]),
        ({"cache_dir": f"{__file__}/cache"}, ["data.cache_dir='", "Not a directory"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option_and_leaves_no_tokens(tmp_path, small_tree, options, named):
    with pytest.raises(DataError) as error:
        prepare(**{"cache": tmp_path, "root": small_tree} | options)
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)
    assert not list(tmp_path.glob("tokens/*/"))


def test_a_corpus_of_another_hash_is_refused(tmp_path, small_tree):
    found = prepare(tmp_path, small_tree).meta["hash"]
    assert prepare(tmp_path, small_tree, hash=found).meta["hash"] == found
    with pytest.raises(DataError, match=f"data.hash='0123': .* has the hash '{found}'"):
        prepare(tmp_path, small_tree, hash="0123")
    with pytest.raises(DataError, match="has the hash"):  # the same documents, split otherwise
        prepare(tmp_path, small_tree, hash=found, split_seed=3)
