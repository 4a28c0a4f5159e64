"""The corpus "text": files of one's own, a document in each .txt or .md and in each record of .jsonl or .parquet.

Documents come in the order of the files' paths, and within a file in its own. No TFDS here: it is not needed where a
corpus is already tokenized.
"""

import contextlib
import functools
import glob
import gzip
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from precision_scaling.data import DataError
from precision_scaling.data.source import Kind, Request, Source
from precision_scaling.runtime import files
from precision_scaling.runtime.progress import progress_bar

NAME = "text"
WHOLE = (".txt", ".md")  # a document each
LINES = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")  # a record in each line
TABLES = (".parquet",)
ALLOWED = ", ".join(WHOLE + LINES + TABLES)
LARGEST = 1 << 28  # bytes of a document, or of the line that holds it: what memory must have room for
_BLOCK = 1 << 20
_PACKED = 1 << 13  # compressed bytes at a time: of zstd, they can become 32,768 times as many
_NAMED = 3  # broken records that are named; the others are counted
_EXTRA = "pip install 'precision_scaling[text]'"


class Broken:
    """Records that are no documents: all are counted, the first are kept by place and reason."""

    def __init__(self) -> None:
        self.count = 0
        self.named: list[str] = []

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{place}: {reason}")


def find_files(root: str) -> list[tuple[str, Path]]:
    """(name, path) of the files that `data.root` names, sorted by name: a file, all below a directory, or a pattern.

    Names are relative to the directory, or to what the matches of a pattern have in common. Hidden files and
    directories are passed over; files of other kinds too, with a warning. Links to directories are not followed.
    Raises DataError where there is no file, or one that is named is of no kind that can be read.
    """
    if not root:
        raise DataError(f"data.root='': for data.name={NAME!r} it names a file, a directory or a pattern of {ALLOWED}")
    if "://" in root:
        raise DataError(f"data.root={root!r}: allowed with data.name={NAME!r} is a path on this machine")
    path = files.expanded(root, "data.root")
    if path.is_dir():
        found = [(each.relative_to(path).as_posix(), each) for each in _below(path)]
    elif os.path.lexists(path):
        if not _suffix(path):
            raise DataError(f"data.root={root!r}: allowed are files {ALLOWED}")
        found = [(path.name, path)]
    else:
        globbed = sorted(glob.glob(os.fspath(path), recursive=True), key=lambda each: (len(each), each))
        # A pattern follows links to directories, in circles, too: each file counts once, under its shortest name.
        matches = list(
            {os.path.realpath(each): Path(each) for each in reversed(globbed) if not os.path.isdir(each)}.values()
        )
        if not matches:
            raise DataError(f"data.root={root!r}: no such file, directory or pattern; allowed are files {ALLOWED}")
        common = Path(os.path.commonpath([each.parent for each in matches]))
        found = [(each.relative_to(common).as_posix(), each) for each in matches]
    usable = sorted((name, each) for name, each in found if _suffix(each))
    if not usable:
        raise DataError(f"data.root={root!r}: holds no file {ALLOWED}")
    if left_out := len(found) - len(usable):
        _say_left_out(root, left_out)
    for _, each in usable:
        try:
            files.check_regular(each)
            size = os.stat(each).st_size
        except (OSError, ValueError) as error:
            raise DataError(f"data.root={root!r}: {error}") from None
        if size > LARGEST and _suffix(each) in WHOLE:
            raise DataError(
                f"data.root={root!r}: {each} is one document of {size:,} bytes; allowed is up to {LARGEST:,}: "
                "split it, or make its documents records of a .jsonl"
            )
    return usable


@functools.cache  # once in a process
def _say_left_out(root: str, number: int) -> None:
    logging.warning(
        "data.root=%s: files of other kinds that are not read: %d; those read are %s", root, number, ALLOWED
    )


def _below(directory: Path) -> Iterator[Path]:
    for parent, names, entries in os.walk(directory):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(parent, name) for name in entries if not name.startswith("."))


def _suffix(path: Path) -> str:
    """The suffix by which a file is read; "" for none of them."""
    return next((suffix for suffix in WHOLE + LINES + TABLES if path.name.lower().endswith(suffix)), "")


def documents(path: Path, name: str, feature: str, broken: Broken) -> Iterator[str]:
    """The documents of one file; what is none goes to `broken`. DataError for a file that cannot be read to its end."""
    suffix = _suffix(path)
    try:
        if suffix in WHOLE:
            yield files.read(path).decode("utf-8-sig")
        elif suffix in TABLES:
            yield from _of_table(path, name, feature, broken)
        else:
            yield from _of_lines(path, name, feature, broken)
    except UnicodeDecodeError as error:
        broken.add(name, f"not UTF-8 at byte {error.start}")


def _of_lines(path: Path, name: str, feature: str, broken: Broken) -> Iterator[str]:
    number = 0
    try:
        with files.open_regular(path) as packed, _unpacked(packed, path) as lines:
            for number, line in enumerate(_bounded(lines), start=1):
                if len(line) > LARGEST:
                    broken.add(f"{name} line {number}", f"larger than {LARGEST:,} bytes")
                    continue
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    broken.add(f"{name} line {number}", f"no JSON ({error})")
                    continue
                yield from _text(record, f"{name} line {number}", feature, broken)
    except DataError:
        raise
    except Exception as error:  # gzip and zstandard have errors of several kinds for a file that is cut off
        message = str(error).splitlines()[0] if str(error) else "no message"
        raise DataError(
            f"data.root: {path} cannot be read after line {number} ({type(error).__name__}: {message})"
        ) from error


def _bounded(lines: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is larger than LARGEST, the beginning: one byte more than that."""
    while line := lines.readline(LARGEST + 1):
        yield line
        if len(line) > LARGEST:
            while line and not line.endswith(b"\n"):
                line = lines.readline(_BLOCK)


@contextlib.contextmanager
def _unpacked(packed: BinaryIO, path: Path) -> Iterator[Any]:
    if path.name.lower().endswith(".gz"):
        with gzip.open(packed, "rb") as lines:
            yield lines
    elif path.name.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"data.root: {path} needs zstandard: {_EXTRA}") from None
        yield io.BufferedReader(_Zstd(packed, zstandard.ZstdDecompressor), _BLOCK)
    else:
        yield packed


class _Zstd(io.RawIOBase):
    """What the frames of a file hold, one after the other. EOFError for a file that is cut off, which zstandard's own
    reader takes for its end."""

    def __init__(self, packed: BinaryIO, decompressor: Any):
        self._packed, self._decompressor = packed, decompressor
        self._frame, self._left, self._ready = decompressor().decompressobj(), b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not (block := self._left or self._packed.read(_PACKED)):
                if not self._frame.eof:
                    raise EOFError("it is cut off")
                return 0
            if self._frame.eof:
                self._frame = self._decompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(block))
            self._left = self._frame.unused_data
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _of_table(path: Path, name: str, feature: str, broken: Broken) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"data.root: {path} needs pyarrow: {_EXTRA}") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if feature not in columns:
            raise DataError(f"data.feature={feature!r}: {path} has the columns {', '.join(columns)}")
        number = 0
        for batch in table.iter_batches(columns=[feature], batch_size=256):
            for value in batch.column(0).to_pylist():
                number += 1
                yield from _text({feature: value}, f"{name} row {number}", feature, broken)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"data.root: {path} is no parquet file ({str(error).splitlines()[0]})") from error


def _text(record: Any, place: str, feature: str, broken: Broken) -> Iterator[str]:
    text = record.get(feature) if isinstance(record, dict) else None
    if not isinstance(record, dict):
        broken.add(place, "no object")
    elif feature not in record:
        broken.add(place, f"no field {feature!r} (data.feature) among {', '.join(map(str, record))[:100]}")
    elif not isinstance(text, str):
        broken.add(place, f"{feature!r} is no text")
    else:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            broken.add(place, "not encodable as UTF-8")
            return
        if size > LARGEST:
            broken.add(place, f"larger than {LARGEST:,} bytes")
        else:
            yield text


def find(request: Request) -> Source:
    """The files that `data.root` names, by what is in them. Raises DataError."""
    found = find_files(request.root)
    digest = hashlib.blake2b(request.feature.encode(), digest_size=16)
    for (name, _), of_file in zip(found, _digests(found, request.notes_dir / "resolved"), strict=True):
        digest.update(f"{name}\0{of_file}\0".encode())
    config = f"files-{digest.hexdigest()[:12]}"
    dataset_dir = request.notes_dir / "tfds" / NAME / config / "1.0.0"
    root = os.path.abspath(files.expanded(request.root, "data.root"))
    return Source(f"{NAME}/{config}:1.0.0", digest.hexdigest(), os.fspath(dataset_dir), root, request.feature)


def _digests(found: list[tuple[str, Path]], notes: Path) -> list[str]:
    """A digest of the content of each file. A note spares reading those whose size, time and inode are as they were."""
    listed = hashlib.blake2b("\0".join(str(path.absolute()) for _, path in found).encode(), digest_size=8)
    note = notes / f"text-{listed.hexdigest()}.json"
    known: dict[str, list] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
        known = files.read_sealed(note)["files"]
    stats = {str(path.absolute()): (os.stat(path), path) for _, path in found}
    states = {key: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for key, (stat, _) in stats.items()}
    missing = [key for key, state in states.items() if (known.get(key) or [None])[:-1] != state]
    digests = {key: known[key][-1] for key in states if key not in missing}
    total = sum(states[key][0] for key in missing)
    with progress_bar(total=total, desc="hashing", unit="B", unit_scale=True, disable=total < _BLOCK << 6) as bar:
        for key in missing:
            digest = hashlib.blake2b(digest_size=16)
            with files.open_regular(stats[key][1]) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    bar.update(len(block))
            digests[key] = digest.hexdigest()
    if missing:
        files.write_sealed(note, {"files": {key: [*states[key], digests[key]] for key in states}})
    return [digests[str(path.absolute())] for _, path in found]


KIND = Kind(find, "precision_scaling.data.text_dataset")
