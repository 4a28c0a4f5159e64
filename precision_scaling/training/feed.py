"""Chunks of batches from the token file to the devices: read ahead by a thread, each process reading its part alone.

Stands between `data.loader`, which says which tokens a step has, and `cohort`, which trains on them. The corpus stays
on disk, so that it may be larger than any memory.
"""

import concurrent.futures
import time
from typing import NamedTuple

import jax
import numpy as np

from precision_scaling.data.loader import Loader
from precision_scaling.runtime.sharding import BATCH, Layout

CHUNK_BYTES = 64 << 20  # of tokens that a process holds for one dispatch; there are two at a time


class Chunk(NamedTuple):
    """The next `steps` batches of every lane. lanes: (seed, first step) of its run, or None for a free lane."""

    lanes: tuple[tuple[int, int] | None, ...]
    steps: int


def abstract_tokens(
    layout: Layout, steps: int, lanes: int, microbatches: int, sequences: int, seq_len: int, dtype
) -> jax.ShapeDtypeStruct:
    """(T, R, M, B, S + 1), placed on the devices: what a dispatch of so many steps is given."""
    shape = (steps, lanes, microbatches, sequences, seq_len + 1)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.of_shape(shape, None, "run", None, BATCH))


def most_steps(wanted: int, lanes: int, batch_size: int, seq_len: int, dtype) -> int:
    """Steps of a dispatch, at most `wanted`, whose tokens a process holds in CHUNK_BYTES."""
    step_bytes = lanes * batch_size * (seq_len + 1) * np.dtype(dtype).itemsize // jax.process_count()
    return min(wanted, max(1, CHUNK_BYTES // step_bytes))


class Prefetcher:
    """Chunks as arrays on the devices, of a fixed number of steps T: (T, R, M, B, S + 1).

    R lanes, M microbatches, B sequences in each, S sequence length; zeros past a chunk's steps and in free lanes. The
    lanes are split over the mesh's axis run, the sequences over data and fsdp.
    """

    def __init__(self, loader: Loader, layout: Layout, lanes: int, microbatches: int, max_steps: int):
        sequences = loader.batch_size // microbatches
        dtype = loader.corpus.train.dtype
        self.lanes = lanes
        self.max_steps = most_steps(max_steps, lanes, loader.batch_size, loader.seq_len, dtype)
        self.abstract = abstract_tokens(layout, self.max_steps, lanes, microbatches, sequences, loader.seq_len, dtype)
        self.shape, self.sharding = self.abstract.shape, self.abstract.sharding
        self.wait_seconds = 0.0  # that `take` has waited for tokens, in all
        self._loader = loader
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._ahead: tuple[Chunk, concurrent.futures.Future] | None = None

    def read_ahead(self, chunk: Chunk) -> None:
        """Starts reading the chunk that `take` will probably be asked for next."""
        self._ahead = chunk, self._thread.submit(self._read, chunk)

    def take(self, chunk: Chunk) -> jax.Array:
        """The chunk's tokens."""
        started = time.monotonic()
        ahead, self._ahead = self._ahead, None
        tokens = ahead[1].result() if ahead is not None and ahead[0] == chunk else self._read(chunk)
        self.wait_seconds += time.monotonic() - started
        return tokens

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self, chunk: Chunk) -> jax.Array:
        parts: dict[tuple[range, range], np.ndarray] = {}  # devices along the axis tensor have the same

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX has None for arrays of no dimension
            lanes, rows = (range(*index[axis].indices(self.shape[axis])) for axis in (1, 3))
            if (lanes, rows) not in parts:
                parts[lanes, rows] = self._windows(chunk, lanes, rows)
            return parts[lanes, rows]

        return jax.make_array_from_callback(self.shape, self.sharding, part)

    def _windows(self, chunk: Chunk, lanes: range, rows: range) -> np.ndarray:
        """The part with these lanes and these sequences of every microbatch."""
        steps, _, microbatches, sequences, length = self.shape
        shape = (steps, len(lanes), microbatches, len(rows), length)
        tokens_TxRxMxBxS1 = np.zeros(shape, self._loader.corpus.train.dtype)
        for i, lane in enumerate(chunk.lanes[lanes.start : lanes.stop]):
            if lane is not None:
                windows_TxB = self._loader.window_indices(*lane, chunk.steps)
                windows_TxMxB = windows_TxB.reshape(chunk.steps, microbatches, sequences)
                mine_TxMxB = windows_TxMxB[:, :, rows.start : rows.stop]
                tokens_TxRxMxBxS1[: chunk.steps, i] = self._loader.windows(mine_TxMxB)
        return tokens_TxRxMxBxS1
