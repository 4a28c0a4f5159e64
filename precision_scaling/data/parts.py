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
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self._starts = self._ends - [len(part) for part in parts]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.concatenate(self._parts, dtype=dtype)

    def windows(self, index: np.ndarray, seq_len: int) -> np.ndarray:
        """Tokens i*S to i*S + S inclusive for every i in `index`: index.shape + (S + 1,)."""
        first = index.astype(np.int64).reshape(-1) * seq_len
        windows = np.empty((first.size, seq_len + 1), self.dtype)
        home = np.searchsorted(self._ends, first, side="right")
        for i in np.unique(home):
            part, rows = self._parts[i], np.flatnonzero(home == i)
            local = first[rows] - self._starts[i]
            inside = local + seq_len < len(part)
            if inside.any():
                windows[rows[inside]] = np.lib.stride_tricks.sliding_window_view(part, seq_len + 1)[local[inside]]
            for row in rows[~inside]:
                windows[row] = self._span(int(first[row]), seq_len + 1)
            forget_pages(part)
        return windows.reshape(*index.shape, seq_len + 1)

    def _span(self, start: int, count: int) -> np.ndarray:
        pieces, stop = [], start + count
        i = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            pieces.append(self._parts[i][start - self._starts[i] : stop - self._starts[i]])
            start, i = int(self._ends[i]), i + 1
        return np.concatenate(pieces)


def forget_pages(tokens: np.ndarray) -> None:
    """Lets go of what was read of a memory-mapped file, or the process would come to hold all of it."""
    if isinstance(tokens, np.memmap):
        tokens._mmap.madvise(mmap.MADV_DONTNEED)
