"""A token stream kept in several files: memory-mapped, read across their boundaries, and checked against the digest it
was written with. Between `tokens` and `loader`.
"""

import concurrent.futures
import dataclasses
import hashlib
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from precision_scaling.runtime import files
from precision_scaling.runtime.progress import progress_bar

# Token files up to this size are read and checked whenever they are opened, which takes about a second.
ALWAYS_CHECKED_BYTES = 1 << 30
_READ_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of `count` token ids."""

    path: Path
    count: int
    dtype: np.dtype

    def check_size(self) -> None:
        """Raises ValueError for a file of another size, NotAFile, and OSError where there is none."""
        files.check_regular(self.path)
        found, wanted = self.path.stat().st_size, self.count * self.dtype.itemsize
        if found != wanted:
            raise ValueError(f"{self.path.name} has {found} bytes, not {wanted}")

    def digest(self, vocab_size: int | None = None) -> str:
        """Of the bytes: BLAKE2b of 16 bytes in hex. ValueError for an id that is not in the vocabulary."""
        self.check_size()
        digest = hashlib.blake2b(digest_size=16)
        with files.naming(self.path), files.open_regular(self.path) as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                if vocab_size is not None and (largest := int(np.frombuffer(block, self.dtype).max())) >= vocab_size:
                    raise ValueError(f"{self.path.name} has the id {largest}, the vocabulary is {vocab_size}")
        return digest.hexdigest()


def digests(contents: Sequence[TokenFile], vocab_size: int, note: Path) -> list[str]:
    """`TokenFile.digest` of every file, read by several threads.

    Where they are larger than ALWAYS_CHECKED_BYTES together, a digest is kept in the file `note`, and holds as long as
    size, times and inode of its file are the same: terabytes are read once. A bit that a disk loses later is not seen.
    """
    large = sum(one.count * one.dtype.itemsize for one in contents) > ALWAYS_CHECKED_BYTES
    known = _noted(note) if large else {}
    identities = [[vocab_size, *_identity(one.path)] for one in contents]

    def digest(one: TokenFile, identity: list[int]) -> str:
        before = known.get(one.path.name)
        return before[1] if before and before[0] == identity else one.digest(vocab_size)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        bar = {"total": len(contents), "desc": "checking tokens", "unit": " files", "disable": not large}
        found = list(progress_bar(threads.map(digest, contents, identities), **bar))
    noted = {one.path.name: [*pair] for one, *pair in zip(contents, identities, found, strict=True)}
    if large and noted != known:
        try:
            files.write_sealed(note, noted)
        except OSError as error:
            logging.warning("%s; the tokens will be read and checked again by the next process", error)
    return found


def _noted(note: Path) -> dict[str, Any]:
    try:
        return files.read_sealed(note)
    except (OSError, ValueError):  # none yet, or damaged: all is read again
        return {}


def _identity(path: Path) -> tuple[int, ...]:
    """What changes with the content of a file, short of a fault of the disk."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def open_tokens(contents: Sequence[TokenFile], dtype: np.dtype) -> "np.ndarray | TokenParts":
    """The tokens of consecutive files, memory-mapped; an array where one file holds them all.

    Raises:
      ValueError: a file's size is not its count of tokens. OSError: a file is missing.
    """
    parts = []
    for one in contents:
        one.check_size()
        if one.count:
            parts.append(np.memmap(one.path, dtype, mode="r", shape=(one.count,)))
    if not parts:
        return np.zeros(0, dtype)
    return parts[0] if len(parts) == 1 else TokenParts(parts)


class TokenParts:
    """Arrays end to end: what the loader needs of one long array. Nothing but the windows asked for is copied."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.dtype, self.itemsize = parts[0].dtype, parts[0].itemsize
        self._files = tuple(parts)
        self._parts = tuple(np.asarray(part) for part in parts)  # a slice of a memmap costs ten times that of an array
        self._ends = np.cumsum([len(part) for part in parts])
        self._starts = self._ends - [len(part) for part in parts]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def last(self) -> int:
        """The last element."""
        return int(self._parts[-1][-1])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.concatenate(self._parts, dtype=dtype)

    def windows(self, index: np.ndarray, seq_len: int) -> np.ndarray:
        """Tokens i*S to i*S + S inclusive for every i in `index`: index.shape + (S + 1,)."""
        starts = index.astype(np.int64).reshape(-1) * seq_len
        windows = np.empty((starts.size, seq_len + 1), self.dtype)
        homes = np.searchsorted(self._ends, starts, side="right")
        for window, home, start in zip(windows, homes.tolist(), (starts - self._starts[homes]).tolist(), strict=True):
            filled = 0
            while filled <= seq_len:  # once, but for a window that reaches into the next part
                piece = self._parts[home][start : start + seq_len + 1 - filled]
                window[filled : filled + len(piece)] = piece
                filled, home, start = filled + len(piece), home + 1, 0
        for home in set(homes.tolist()):
            forget_pages(self._files[home])
        return windows.reshape(*index.shape, seq_len + 1)


def forget_pages(tokens: np.ndarray) -> None:
    """Lets go of what was read of a memory-mapped file, or the process would come to hold all of it."""
    if isinstance(tokens, np.memmap):
        pages: mmap.mmap = tokens._mmap  # type: ignore[attr-defined]  # NumPy has no public name for it
        pages.madvise(mmap.MADV_DONTNEED)
