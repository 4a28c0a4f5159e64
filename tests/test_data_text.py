"""Text files of every kind: their documents, in order; what is left out and counted; what is refused in one line."""

import dataclasses
import gzip
import json
import logging
import os
import tracemalloc
from pathlib import Path

import pytest

from precision_scaling.data import DataError, corpora, text_files
from precision_scaling.data.source import Kind
from precision_scaling.data.tokens import prepare

OPTIONS = {
    **{"name": "text", "split": "train", "validation_split": "", "feature": "text", "tokenizer": "bytes"},
    **{"validation_fraction": 0.3, "split_seed": 0, "hash": "", "tfds_dir": "", "workers": 1, "beam_options": ""},
}
RECORDS = [{"text": "one"}, {"text": "two\nlines", "id": 7}, {"text": "drei ß"}]


def lines(records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path: Path, records=RECORDS) -> Path:
    name = path.name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(records)))
    elif name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(lines(records)))
    elif name.endswith(".parquet"):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": [record["text"] for record in records]}), path)
    else:
        path.write_bytes(lines(records))
    return path


def read(path: Path, feature: str = "text"):
    broken = text_files.Broken()
    return list(text_files.documents(path, path.name, feature, broken)), broken


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst", "a.parquet", "A.JSONL"]
)
def test_a_record_is_a_document(tmp_path, name):
    found, broken = read(write(tmp_path / name))
    assert found == ["one", "two\nlines", "drei ß"] and broken.count == 0


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_file_is_a_document(tmp_path, name):
    (tmp_path / name).write_bytes("\ufeffwhole\n\nfile ü".encode())  # without the mark of its byte order
    assert read(tmp_path / name)[0] == ["whole\n\nfile ü"]


def test_broken_records_are_counted_and_the_first_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n\n{"text": 5}\n[1]\nnot json\n{"body": "x"}\n{"text": "\\ud800"}\n{"text": "last"}\n\xff\n'
    )
    found, broken = read(tmp_path / "a.jsonl")
    assert found == ["good", "last"] and broken.count == 6
    assert broken.named[0] == "a.jsonl line 3: 'text' is no text"
    assert broken.named[1] == "a.jsonl line 4: no object" and broken.named[2].startswith("a.jsonl line 5: no JSON")
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    found, broken = read(tmp_path / "b.txt")
    assert found == [] and broken.named == ["b.txt: not UTF-8 at byte 3"]


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "no", "content": "yes"}]))
    assert read(tmp_path / "a.jsonl", "content")[0] == ["yes"]
    with pytest.raises(DataError, match=r"data\.feature='content'.*has the columns text"):
        read(write(tmp_path / "a.parquet"), "content")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.jsonl.gz", "cannot be read after line"),
        ("a.jsonl.zst", "after line .*cut off"),
        ("a.parquet", "no parquet file"),
    ],
)
def test_a_file_that_is_cut_off_is_named(tmp_path, name, said):
    path = write(tmp_path / name, [{"text": os.urandom(40).hex()} for _ in range(500)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=said):
        read(path)


def test_files_come_in_the_order_of_their_paths(tmp_path, caplog):
    for name in ("b/z.txt", "b/a.md", "a.jsonl", "c.pdf", ".hidden/x.txt", "b/.x.txt", "d.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        names = [name for name, _ in text_files.find_files(str(tmp_path))]
    assert names == ["a.jsonl", "b/a.md", "b/z.txt", "d.TXT"]
    assert "not read: 1;" in caplog.text  # c.pdf
    assert [name for name, _ in text_files.find_files(f"{tmp_path}/b/*")] == ["a.md", "z.txt"]
    assert [name for name, _ in text_files.find_files(f"{tmp_path}/**/*.md")] == ["a.md"]
    assert [name for name, _ in text_files.find_files(f"{tmp_path}/a.jsonl")] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("", "it names a file, a directory or a pattern"),
        ("gs://bucket/x", "a path on this machine"),
        ("{0}/nothing", "no such file, directory or pattern"),
        ("{0}/a.pdf", "allowed are files"),
        ("{0}/empty", "holds no file"),
        ("{0}/pipe.txt", "pipe.txt"),
        ("{0}/*.docx", "no such file, directory or pattern"),
    ],
)
def test_what_names_no_text_is_refused_in_one_line(tmp_path, root, said):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=said) as error:
        corpora.find("text", root=root.format(tmp_path), cache_dir=tmp_path / "cache", tfds_dir="")
    assert str(error.value).startswith("data.root=") and "\n" not in str(error.value)


def corpus(tmp_path, root, **options):
    return prepare(**{**OPTIONS, "root": str(root), "cache_dir": str(tmp_path / "cache"), **options}, progress=False)


def text_of(tokens) -> list[bytes]:
    return [bytes(part) for part in bytes(tokens[tokens < 256].astype("uint8")).split(b"|") if part]


def test_a_corpus_of_many_kinds_is_tokenized_once_and_found_again(tmp_path, monkeypatch, caplog):
    root = tmp_path / "books"
    root.mkdir()
    documents = [f"document {i}|" for i in range(20)]
    (root / "a.jsonl").write_bytes(lines([{"text": text} for text in documents[:10]]) + b"broken\n")
    (root / "b.txt").write_text(documents[10])
    write(root / "c.json.gz", [{"text": text} for text in documents[11:]])
    (root / "copy.txt").write_text(documents[3])  # an exact duplicate
    with caplog.at_level(logging.WARNING):
        found = corpus(tmp_path, root)
    assert "1 records are left out: a.jsonl line 11: no JSON" in caplog.text
    assert sorted(text_of(found.train[:]) + text_of(found.validation[:])) == sorted(
        text[:-1].encode() for text in documents
    )
    assert found.meta["duplicates_dropped"] == 1 and found.meta["undecodable_skipped"] == 1
    # Neither read nor built again; and the same elsewhere, where the note is not.
    monkeypatch.setattr(text_files, "documents", None)
    assert corpus(tmp_path, root).meta["hash"] == found.meta["hash"]
    moved = tmp_path / "moved"
    root.rename(moved)
    assert corpora.find("text", root=str(moved), cache_dir=tmp_path / "other", tfds_dir="").fingerprint
    assert corpus(tmp_path, moved).meta["hash"] == found.meta["hash"]
    (moved / "b.txt").write_text("changed|")
    with pytest.raises(TypeError):  # another corpus, which has to be read
        corpus(tmp_path, moved)


def test_files_without_a_document_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n')
    with pytest.raises(DataError, match=r"no document in 1 files \(a\.jsonl line 1: no field 'text'"):
        corpus(tmp_path, tmp_path / "a.jsonl")


def test_a_kind_of_corpus_is_one_entry(tmp_path, monkeypatch):
    """A corpus of one's own: documents are the words of a file."""

    def find(request):
        words = tmp_path / "words"
        words.mkdir(exist_ok=True)
        for i, word in enumerate(Path(request.root).read_text().split()):
            (words / f"{i:03}.txt").write_text(f"{word}|")
        return text_files.find(dataclasses.replace(request, root=str(words)))

    monkeypatch.setitem(corpora.KINDS, "words", Kind(find, text_files.KIND.builder))
    (tmp_path / "list").write_text("alpha beta gamma delta epsilon")
    found = corpus(tmp_path, tmp_path / "list", name="words")
    words = sorted(text_of(found.train[:]) + text_of(found.validation[:]))
    assert words == [b"alpha", b"beta", b"delta", b"epsilon", b"gamma"] and found.meta["name"] == "words"


def test_zstandard_of_several_frames_and_long_lines(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(text_files, "_BLOCK", 100)
    records = [{"text": "x" * i} for i in range(1, 400, 7)]
    frames = b"".join(zstandard.compress(lines(records[i : i + 9])) for i in range(0, len(records), 9))
    (tmp_path / "a.jsonl.zst").write_bytes(frames + zstandard.compress(b'{"text": "no end of line"}'))
    found, broken = read(tmp_path / "a.jsonl.zst")
    assert found == [*(record["text"] for record in records), "no end of line"] and broken.count == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_record_that_is_too_large_is_left_out_and_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "LARGEST", 1000)
    records = [{"text": "one"}, {"text": "x" * 5000}, {"text": "y" * 980}, {"text": "ß" * 990}, {"text": "last"}]
    found, broken = read(write(tmp_path / name, records))
    assert [len(text) for text in found] == [3, 980, 4] and broken.count == 2
    assert "larger than 1,000 bytes" in broken.named[0] and (" 2:" in broken.named[0] and " 4:" in broken.named[1])


def test_a_line_without_end_takes_no_more_memory_than_a_document_may(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(text_files, "LARGEST", 1 << 20)
    line = lines([{"text": "x" * (64 << 20)}])  # packed, six kilobytes
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line) + zstandard.compress(lines([{"text": "after"}])))
    (tmp_path / "a.jsonl").write_bytes(line + lines([{"text": "after"}]))
    del line
    tracemalloc.start()
    for name in ("a.jsonl", "a.jsonl.zst"):
        tracemalloc.reset_peak()
        found, broken = read(tmp_path / name)
        assert found == ["after"] and broken.count == 1
        # Beside a document: what comes out of the compressed bytes that are read at a time.
        assert tracemalloc.get_traced_memory()[1] < (80 << 20 if name.endswith("zst") else 8 << 20)
    tracemalloc.stop()


def test_lines_across_many_zstd_frames_and_blocks_are_whole(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = lines([{"text": f"{i} " * (i % 97)} for i in range(3000)] + [{"text": os.urandom(1 << 20).hex()}])
    frames = [zstandard.compress(content[i : i + 700]) for i in range(0, len(content), 700)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(tmp_path / "a.jsonl.zst")[0] == read(tmp_path / "a.jsonl")[0]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames)[:-5])
    with pytest.raises(DataError, match="cut off"):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("root", ["", "/*.txt", "/*"])
def test_a_pipe_is_refused_wherever_it_is_found(tmp_path, root):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"^data\.root=.*b\.txt"):
        text_files.find_files(f"{tmp_path}{root}")


def test_a_file_that_is_too_large_for_a_document_is_refused(tmp_path):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(DataError, match=r"a\.txt is one document of 268,435,457 bytes; allowed is up to 268,435,456"):
        text_files.find_files(str(tmp_path))
