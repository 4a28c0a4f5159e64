"""Windows of tokens and their order: token files in, the batches of a step out. Last stage of the data flow.

Example g of a run (g = step * batch_size + row) is window g of an endless stream: epoch after epoch, each a permutation
of all windows of its own, by Grain's random access. Data order is therefore a pure function of (seed, step): the number
of hosts and what each of them reads cannot change it, and resuming needs the step alone.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from precision_scaling.data import DataError
from precision_scaling.data.parts import TokenParts, forget_pages
from precision_scaling.data.tokens import Corpus

_BLOCK = 4096  # positions of the stream ordered at a time


@dataclasses.dataclass(frozen=True)
class Loader:
    """Windows of seq_len inputs and their targets, by number and in the order of a seed.

    Shapes: B batch_size, S seq_len. Window i holds tokens i*S to i*S + S inclusive: inputs are [:S], targets [1:], so
    every token but the first (and a rest shorter than S at the end) is a target once an epoch.

    Raises (on construction):
      DataError: a corpus shorter than one window, or a length or batch size below 1.
    """

    corpus: Corpus
    seq_len: int
    batch_size: int

    def __post_init__(self):
        for key in ("seq_len", "batch_size"):
            if getattr(self, key) < 1:
                raise DataError(f"{key}={getattr(self, key)}: allowed is 1 or more")
        for split, tokens in (("train", self.corpus.train), ("validation", self.corpus.validation)):
            if len(tokens) <= self.seq_len:
                raise DataError(f"seq_len={self.seq_len}: the {split} tokens ({len(tokens)}) must be more than that")

    @property
    def n_windows(self) -> int:
        """Windows in the training tokens; an epoch is n_windows * seq_len training tokens."""
        return _count(self.corpus.train, self.seq_len)

    @property
    def n_validation_windows(self) -> int:
        """Windows in the validation tokens."""
        return _count(self.corpus.validation, self.seq_len)

    def epochs(self, tokens: int) -> float:
        """Passes over the training text that `tokens` training tokens (D) make."""
        return tokens / (self.n_windows * self.seq_len)

    def window_indices(self, seed: int, first_step: int, n_steps: int) -> np.ndarray:
        """Windows of steps first_step to first_step + n_steps - 1: int32 (n_steps, B)."""
        start = first_step * self.batch_size
        order = _order("train", seed, self.n_windows, start, start + n_steps * self.batch_size)
        return order.reshape(n_steps, self.batch_size)

    def windows(self, index: np.ndarray) -> np.ndarray:
        """Training windows by number: index.shape + (S + 1,), in the type of the token file."""
        return _windows(self.corpus.train, index, self.seq_len)

    def validation_windows(self, n: int) -> np.ndarray:
        """The fixed validation set: n windows evenly spread over the held-out text, int32 (n, S + 1)."""
        available = self.n_validation_windows
        if not 1 <= n <= available:
            raise DataError(f"{n} validation windows of seq_len={self.seq_len}: allowed is 1 to {available}")
        spread = (2 * np.arange(n) + 1) * available // (2 * n)
        return _read(self.corpus.validation, spread, self.seq_len)

    def calibration_windows(self, n: int, seed: int) -> np.ndarray:
        """n distinct windows of training text drawn by `seed`, for post-training quantization: int32 (n, S + 1)."""
        if not 1 <= n <= self.n_windows:
            raise DataError(f"{n} calibration windows of seq_len={self.seq_len}: allowed is 1 to {self.n_windows}")
        return _read(self.corpus.train, _order("calibration", seed, self.n_windows, 0, n), self.seq_len)


def _count(tokens: np.ndarray | TokenParts, seq_len: int) -> int:
    return (len(tokens) - 1) // seq_len  # the last target needs one token more


def _windows(tokens: np.ndarray | TokenParts, index: np.ndarray, seq_len: int) -> np.ndarray:
    if isinstance(tokens, TokenParts):
        return tokens.windows(index, seq_len)
    shape, strides = (_count(tokens, seq_len), seq_len + 1), (seq_len * tokens.itemsize, tokens.itemsize)
    windows = np.lib.stride_tricks.as_strided(tokens, shape, strides, writeable=False)[index]
    forget_pages(tokens)
    return windows


def _read(tokens: np.ndarray | TokenParts, index: np.ndarray, seq_len: int) -> np.ndarray:
    return _windows(tokens, index, seq_len).astype(np.int32)


def _order(purpose: str, seed: int, n_windows: int, start: int, stop: int) -> np.ndarray:
    """Positions start to stop - 1 of the endless stream of windows: int32 (stop - start,)."""
    # Grain needs about 15 µs an index, longer by 65536 / n_windows where there are fewer: at most an epoch at a time.
    size = min(_BLOCK, n_windows)
    first, last = start // size, -(-stop // size)
    blocks = [_order_block(purpose, seed, n_windows, i * size, size) for i in range(first, max(last, first + 1))]
    return np.concatenate(blocks)[start - first * size : stop - first * size]


@functools.lru_cache(maxsize=4096)  # 64 MB at most; runs of one seed share their order whatever their length
def _order_block(purpose: str, seed: int, n_windows: int, start: int, size: int) -> np.ndarray:
    import grain

    # Grain shuffles epoch e with its seed + e: neighbouring seeds would share epochs, so ours is hashed first.
    grain_seed = int.from_bytes(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=4).digest(), "big")
    stream = grain.MapDataset.range(n_windows).shuffle(grain_seed).repeat()
    order = np.fromiter((stream[i] for i in range(start, start + size)), np.int32, size)
    order.flags.writeable = False
    return order
