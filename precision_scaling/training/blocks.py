"""A decoder's parameters a block at a time, so that no more than one block of a large model need be in memory.

`top` is all but the blocks: embedding, last norm, head. Models from elsewhere are kept this way on disk, each block a
checkpoint of its own; of a run trained here the stacked parameters are cut.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from precision_scaling.model import decoder
from precision_scaling.model.accounting import bytes_of
from precision_scaling.model.config import ModelConfig
from precision_scaling.runtime import paths
from precision_scaling.runtime.sharding import Layout
from precision_scaling.training import checkpoint


class Blocks(Protocol):
    """Where the parameters of a decoder come from."""

    @property
    def depth(self) -> int:
        """Blocks that there are."""

    def top(self) -> Any:
        """The parameters outside of the blocks."""

    def block(self, layer: int) -> Any:
        """The parameters of one block, without the axis of layers."""


@dataclasses.dataclass(frozen=True)
class Stacked:
    """The blocks of parameters that are in memory as a whole."""

    params: Any

    @property
    def depth(self) -> int:
        """Blocks that there are."""
        return len(jax.tree.leaves(self.params["layers"])[0])

    def top(self) -> Any:
        """See `Blocks`."""
        return {name: value for name, value in self.params.items() if name != "layers"}

    def block(self, layer: int) -> Any:
        """See `Blocks`."""
        return jax.tree.map(lambda leaf: leaf[layer], self.params["layers"]["block"])


@dataclasses.dataclass(frozen=True)
class Stored:
    """Blocks in a directory that `store` filled. UserError where one cannot be read."""

    directory: Path
    model: ModelConfig
    layout: Layout

    @property
    def depth(self) -> int:
        """Blocks that there are."""
        return self.model.depth

    def top(self) -> Any:
        """See `Blocks`."""
        return self._read(self.directory / paths.TOP, Stacked(decoder.abstract(self.model)).top())

    def block(self, layer: int) -> Any:
        """See `Blocks`."""
        return self._read(self.directory / paths.block(layer), abstract_block(self.model))

    def _read(self, path: Path, abstract: Any) -> Any:
        return checkpoint.restore(path, self.layout.abstract(abstract))


@dataclasses.dataclass
class ReadAhead:
    """Stored blocks in their order, the next one read while one is worked on; only where blocks are small beside the
    memory that a command takes anyway, and one process reads."""

    blocks: Stored
    _next: tuple[int, Future[Any]] | None = None

    LARGEST = 1 << 27  # bytes of a block

    def __post_init__(self) -> None:
        size = bytes_of(abstract_block(self.blocks.model))
        alone = jax.process_count() == 1 and size <= self.LARGEST
        self._reader = ThreadPoolExecutor(1, "read-ahead") if alone else None

    @property
    def depth(self) -> int:
        """Blocks that there are."""
        return self.blocks.depth

    def top(self) -> Any:
        """See `Blocks`."""
        return self.blocks.top()

    def block(self, layer: int) -> Any:
        """See `Blocks`."""
        if self._reader is None:
            return self.blocks.block(layer)
        ahead, self._next = self._next, None
        found = ahead[1].result() if ahead and ahead[0] == layer else self.blocks.block(layer)
        if layer + 1 < self.depth:
            self._next = layer + 1, self._reader.submit(self.blocks.block, layer + 1)
        return found


def is_stored(directory: Path) -> bool:
    """Whether a directory holds a whole model by blocks."""
    return checkpoint.exists(directory / paths.TOP)


def store(directory: Path, blocks: Blocks, done: Callable[[Any], None]) -> None:
    """Writes all of a model, block by block; the top is last, and without it the directory does not count.

    done: is given each block when it is on disk, so that it is read once for whatever else is done with it.
    """
    for layer in range(blocks.depth):
        block = blocks.block(layer)
        checkpoint.save(directory / paths.block(layer), block)
        done(block)
    checkpoint.save(directory / paths.TOP, blocks.top())


def stack(blocks: Blocks) -> Any:
    """The parameters as a whole, blocks on a leading axis."""
    layers = [blocks.block(layer) for layer in range(blocks.depth)]
    return {**blocks.top(), "layers": {"block": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


def abstract_block(model: ModelConfig) -> Any:
    """Shapes and dtypes of one block."""
    block = decoder.abstract(model)["layers"]["block"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), block)
