"""A token stream kept in several files: memory-mapped, read across their boundaries. Between `tokens` and `loader`."""

import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def open_tokens(paths: Sequence[Path], counts: Sequence[int], dtype: np.dtype) -> "np.ndarray | TokenParts":
    """The tokens of consecutive files, memory-mapped; an array where one file holds them all.

    Raises:
      ValueError: a file's size is not its count of tokens. OSError: a file is missing.
    """
    parts = []
    for path, count in zip(paths, counts, strict=True):
        if path.stat().st_size != count * dtype.itemsize:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {count * dtype.itemsize}")
        if count:
            parts.append(np.memmap(path, dtype, mode="r", shape=(count,)))
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
        tokens._mmap.madvise(mmap.MADV_DONTNEED)
