"""Activations of a text, batch by batch: in memory as far as they fit, the others in a file."""

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from precision_scaling.runtime.sharding import Layout

HOST_LIMIT = 1 << 27  # bytes of a stream in the memory of a host; some four are there at a time


def memory_limit(layout: Layout) -> float:
    """Bytes of a stream that stay in memory: an eighth of what accelerators have, see HOST_LIMIT for CPUs."""
    if layout.platform == "cpu":
        return HOST_LIMIT
    found = [(device.memory_stats() or {}).get("bytes_limit", np.inf) for device in layout.mesh.devices.flat]
    return sum(found) / 8


class Stream:
    """The arrays of an iterable, in their order; read as often as wanted. Those beyond `limit` bytes go into a
    temporary file without a name, which ends with the stream."""

    def __init__(self, batches: Iterable[Any], limit: float):
        self.limit = limit
        self._kept: list[Any] = []
        self._file: Any = None
        left = limit
        for batch in batches:
            if batch.nbytes <= left:
                left -= batch.nbytes
                self._kept.append(batch)
            else:
                self._kept.append(self._spilled(np.asarray(batch)))

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._kept:
            yield batch if isinstance(batch, jax.Array) else self._read(*batch)

    def _spilled(self, batch: np.ndarray) -> tuple[int, np.ndarray]:
        """(its place in the file, an array of its type and shape that takes no memory)."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(np.ascontiguousarray(batch).view(np.uint8).data)
        return place, np.broadcast_to(np.zeros((), batch.dtype), batch.shape)

    def _read(self, place: int, like: np.ndarray) -> np.ndarray:
        self._file.seek(place)
        content = self._file.read(like.size * like.dtype.itemsize)
        return np.frombuffer(content, like.dtype).reshape(like.shape)
