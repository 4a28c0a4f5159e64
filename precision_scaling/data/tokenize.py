"""Documents to token parts, by several processes, continued where it was stopped. Used by `tokens.prepare`.

Two passes over the documents: `scan` leaves what tells duplicates and sides, `write_part` tokenizes one part. Which
documents make up a part depends on the corpus alone, so the same bytes are written by any number of processes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from precision_scaling.data import DataError, corpora
from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.data.parts import TokenFile
from precision_scaling.data.source import Source
from precision_scaling.runtime import files
from precision_scaling.runtime.progress import progress_bar

SIDES = ("train", "validation")
TRAIN, VALIDATION, DROPPED = range(3)
_ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at a time: enough for its threads, little memory
_SCAN_DOCUMENTS = 4096  # documents of one scan at least; at most 4096 scans
_PART_BYTES = 16 << 20  # text of one part at least; at most 1024 parts
_PROCESS_BYTES = 32 << 20  # text that is worth a process of its own
_DIGEST_BYTES = 16
_LEARN_BYTES = 1 << 30  # text that a BPE is learned from, at most: the first documents

# What one document leaves in the first pass.
_SCANNED = np.dtype([("digest", "<u8", 2), ("bytes", "<u4"), ("side", "u1"), ("decodable", "u1")])


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents of one split, which the config's `option` names.

    All go to `side`, or, where that is None, a `fraction` to validation, by a hash of their content and `salt`.
    """

    source: Source
    split: str
    option: str
    feature: str
    side: int | None
    fraction: float
    salt: bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the first pass found.

    Attributes:
      parts: (texts, first, stop) of every part: documents first to stop - 1 of texts[...].
      sides: of every document of every texts, (documents,) uint8: TRAIN, VALIDATION or DROPPED.
      bytes: of every document, (documents,).
      counts: duplicates_dropped, empty_dropped, undecodable_skipped.
    """

    parts: tuple[tuple[int, int, int], ...]
    sides: tuple[np.ndarray, ...]
    bytes: tuple[np.ndarray, ...]
    counts: dict[str, int]


def size(texts: Sequence[Texts]) -> int:
    """Bytes of the datasets that hold the texts, about those of the texts."""
    return max(_documents(one).bytes for one in texts)


def processes(asked: int, size: int) -> int:
    """How many to use for `size` bytes of text when `asked` for (0: one per core)."""
    return max(1, min(asked or len(os.sched_getaffinity(0)), math.ceil(size / _PROCESS_BYTES)))


def plan(texts: Sequence[Texts], directory: Path, run, progress: bool) -> Plan:
    """First pass. Where a document occurs again, in any of the texts, the first in their order stays.

    `directory` keeps what was scanned. `run` and `progress` as for `write`.
    """
    lengths = [len(_documents(one)) for one in texts]
    tasks = []
    for i, (one, length) in enumerate(zip(texts, lengths, strict=True)):
        step = max(_SCAN_DOCUMENTS, -(-length // 4096))
        for start in range(0, length, step):
            tasks.append((one, start, min(start + step, length), directory / f"scan-{i}-{start:012}.bin"))
    missing = [task for task in tasks if _scanned(*task[1:]) is None]
    with progress_bar(total=sum(lengths), desc="reading", unit=" documents", disable=not progress) as bar:
        bar.update(sum(lengths) - sum(stop - start for _, start, stop, _ in missing))
        for count in run(scan, missing):
            bar.update(count)
    scanned = [_scanned(*task[1:]) for task in tasks]
    if any(one is None for one in scanned):
        raise OSError(f"{directory}: what was written there cannot be read back")
    found = np.concatenate([*scanned, np.zeros(0, _SCANNED)])
    empty = found["bytes"] == 0
    repeated = _repeated(found["digest"]) & ~empty
    undecodable = (found["decodable"] == 0) & ~empty & ~repeated
    sides = np.where(empty | repeated | undecodable, DROPPED, found["side"]).astype(np.uint8)
    cuts = np.cumsum(lengths)[:-1]
    split_sides, split_bytes = np.split(sides, cuts), np.split(found["bytes"].astype(np.int64), cuts)
    counts = {
        "duplicates_dropped": int(repeated.sum()),
        "empty_dropped": int(empty.sum()),
        "undecodable_skipped": int(undecodable.sum()) + _documents(texts[-1]).undecodable,
    }
    part_bytes = max(_PART_BYTES, -(-int(found["bytes"].sum()) // 1024))
    parts = []
    for i, (side, size) in enumerate(zip(split_sides, split_bytes, strict=True)):
        kept = np.cumsum(np.where(side == DROPPED, 0, size))
        ends = np.searchsorted(kept, np.arange(part_bytes, kept[-1] if len(kept) else 0, part_bytes)) + 1
        bounds = np.unique([0, *ends, len(side)])
        parts += [(i, int(first), int(stop)) for first, stop in itertools.pairwise(bounds)]
    return Plan(tuple(parts), tuple(split_sides), tuple(split_bytes), counts)


def scan(texts: Texts, start: int, stop: int, path: Path) -> int:
    """One task of the first pass; returns the number of documents."""
    threshold = texts.fraction * 2.0**64
    found = np.zeros(stop - start, _SCANNED)
    for row, text in zip(found, _documents(texts).read(start, stop), strict=True):
        side = texts.side
        if side is None:
            draw = int.from_bytes(hashlib.blake2b(text, digest_size=8, key=texts.salt).digest(), "big")
            side = int(draw < threshold)
        digest = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8")
        row["digest"], row["bytes"], row["side"] = digest, len(text), side
        try:
            text.decode("utf-8")
            row["decodable"] = 1
        except UnicodeDecodeError:
            pass
    with files.replacing(path) as file:
        file.write(found.data)
        file.write(hashlib.blake2b(found.data, digest_size=_DIGEST_BYTES).digest())
    return stop - start


def _scanned(start: int, stop: int, path: Path) -> np.ndarray | None:
    """What a task of the first pass has left; None where it has not, or that was damaged since."""
    try:
        content = files.read(path)
    except (OSError, files.NotAFile):
        return None
    found, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.blake2b(found, digest_size=_DIGEST_BYTES).digest() != digest:
        return None
    if len(found) != (stop - start) * _SCANNED.itemsize:
        return None
    return np.frombuffer(found, _SCANNED)


def training_documents(texts: Sequence[Texts], plan: Plan) -> Iterator[bytes]:
    """What a BPE is learned from."""
    size = 0
    for i, first, stop in plan.parts:
        sides = plan.sides[i][first:stop]
        for side, text in zip(sides, _documents(texts[i]).read(first, stop), strict=True):
            if side == TRAIN:
                yield text
                size += len(text)
                if size >= _LEARN_BYTES:
                    return


def text_of_tokenizer(directory: Path, learn: Callable[[], str]) -> str:
    """The text of a tokenizer that is learned once and kept in `directory`."""
    path = directory / "learned.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return files.read_sealed(path)["text"]
    text = learn()
    files.write_sealed(path, {"text": text})
    return text


def write(
    texts: Sequence[Texts], plan: Plan, spec: str, directory: Path, dtype: np.dtype, run, progress: bool
) -> list[dict[str, Any]]:
    """Second pass: writes the parts that are missing in `directory`; returns what every part says of itself.

    `spec` names the tokenizer, whose tokenizer.json is in `directory`; `run` is of `workers.pool`; `progress` shows how
    far it is.
    """
    missing, there, total = [], 0, 0
    for number, (i, first, stop) in enumerate(plan.parts):
        sides = plan.sides[i][first:stop]
        size = int(plan.bytes[i][first:stop][sides != DROPPED].sum())
        total += size
        if _record(directory, number, dtype):
            there += size
        else:
            missing.append((texts[i], first, sides.tobytes(), spec, directory, number, dtype.name))
    units: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1000}
    with progress_bar(total=total, initial=there, desc="tokenizing", disable=not progress, **units) as bar:
        for size in run(write_part, missing):
            bar.update(size)
    return [files.read_sealed(_record_path(directory, number)) for number in range(len(plan.parts))]


def write_part(texts: Texts, first: int, sides: bytes, spec: str, directory: Path, number: int, dtype: str) -> int:
    """One task of the second pass: train-NUMBER.bin, validation-NUMBER.bin, and last what is in them; returns bytes."""
    tokenizer = _tokenizer(spec, directory)
    counts = {key: dict.fromkeys(SIDES, 0) for key in ("tokens", "documents", "bytes")}
    digests = [hashlib.blake2b(digest_size=16) for _ in SIDES]
    paths = [directory / part_name(side, number) for side in SIDES]
    with files.replacing(paths[TRAIN]) as train, files.replacing(paths[VALIDATION]) as validation:
        for block in _blocks(sides, _documents(texts).read(first, first + len(sides))):
            for side, file in enumerate((train, validation)):
                kept = [text for text_side, text in block if text_side == side]
                encoded = tokenizer.encode(kept)
                if (largest := max((int(ids.max()) for ids in encoded if len(ids)), default=0)) >= tokenizer.vocab_size:
                    raise DataError(
                        f"data.tokenizer={spec!r}: gives the id {largest}, its vocabulary is {tokenizer.vocab_size}"
                    )
                stream = _join(encoded, tokenizer.end_of_text, np.dtype(dtype))
                with files.naming(paths[side]):
                    file.write(stream.data)
                digests[side].update(stream.data)
                for key, value in (("tokens", stream.size), ("documents", len(kept)), ("bytes", sum(map(len, kept)))):
                    counts[key][SIDES[side]] += value
    hashes = {side: digest.hexdigest() for side, digest in zip(SIDES, digests, strict=True)}
    files.write_sealed(_record_path(directory, number), {**counts, "hash": hashes})
    return sum(counts["bytes"].values())


def _record_path(directory: Path, number: int) -> Path:
    return directory / f"part-{number:05}.json"


def _record(directory: Path, number: int, dtype: np.dtype) -> dict[str, Any] | None:
    """What a part that was written says of itself; None where it was not, or its files were damaged since."""
    try:
        record = files.read_sealed(_record_path(directory, number))
        for side in SIDES:
            content = TokenFile(directory / part_name(side, number), record["tokens"][side], dtype)
            if content.digest() != record["hash"][side]:
                return None
        return record
    except (OSError, ValueError):
        return None


def part_name(side: str, number: int) -> str:
    return f"{side}-{number:05}.bin"


def sync(path: Path) -> None:
    """Makes a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _repeated(digest_Dx2: np.ndarray) -> np.ndarray:
    order = np.lexsort(digest_Dx2.T)  # stable: of equal ones, the first comes first
    ordered = digest_Dx2[order]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = np.all(ordered[1:] == ordered[:-1], axis=1)
    return repeated


def _blocks(sides: bytes, documents: Iterator[bytes]) -> Iterator[list[tuple[int, bytes]]]:
    block, size = [], 0
    for side, text in zip(sides, documents, strict=True):
        if side == DROPPED:
            continue
        block.append((side, text))
        size += len(text)
        if size >= _ENCODE_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _join(encoded: list[np.ndarray], end_of_text: int, dtype: np.dtype) -> np.ndarray:
    stream = np.full(sum(map(len, encoded)) + len(encoded), end_of_text, dtype)
    start = 0
    for ids in encoded:
        stream[start : start + len(ids)] = ids
        start += len(ids) + 1
    return stream


@functools.lru_cache(maxsize=4)
def _documents(texts: Texts) -> corpora.Documents:
    return corpora.Documents(texts.source, texts.split, texts.feature, split_option=texts.option)


@functools.lru_cache(maxsize=1)
def _tokenizer(spec: str, directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.load(spec, directory / "tokenizer.json")


def forget() -> None:
    """Closes what the tasks of this process have opened."""
    _documents.cache_clear()
    _tokenizer.cache_clear()
