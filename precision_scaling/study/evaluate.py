"""The validation loss of a model on a study's fixed held-out sequences."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.ptq.activations import Stream, memory_limit
from precision_scaling.ptq.forward import forward
from precision_scaling.quantize.static import StaticPrecision, of_layer
from precision_scaling.runtime import compilation, sharding
from precision_scaling.runtime.progress import progress_bar
from precision_scaling.runtime.sharding import BATCH, Layout
from precision_scaling.study.workspace import Workspace
from precision_scaling.training import run, step
from precision_scaling.training.blocks import Blocks, Stacked
from precision_scaling.training.step import StepConfig


def evaluator(
    workspace: Workspace, shape: run.Shape, static: StaticPrecision, progress: bool = False
) -> Callable[[Any, Any], float]:
    """(params, table) -> validation loss on the study's fixed held-out sequences, compiled once per program.

    progress: a bar, for which each batch is a dispatch of its own.
    """
    config = workspace.experiment.config.evaluate
    windows_NxS1 = workspace.loader(shape).validation_windows(config.sequences)
    windows_NxBxS1 = windows_NxS1.reshape(-1, config.batch_size, windows_NxS1.shape[-1])
    parts = np.split(windows_NxBxS1, len(windows_NxBxS1) if progress else 1)
    # Every axis that a batch can be split over has its share of the work, whatever it is for in training.
    place = workspace.layout.of_shape(parts[0].shape, None, ("run", *BATCH))
    tokens = [jax.make_array_from_callback(part.shape, place, part.__getitem__) for part in parts]
    loss = validation_loss(StepConfig(shape.model, static, workspace.experiment.optimizer), workspace.layout)

    def mean_loss(params, grids) -> float:
        params = jax.device_put(params, workspace.layout.of_tree(params))  # in place they are, after training
        bar = progress_bar(tokens, desc="evaluating", unit=" batches", disable=not progress)
        return float(np.mean([float(loss(params, grids, part)) for part in bar]))

    return mean_loss


class BlockwiseLoss:
    """The same loss of a model whose blocks come one by one: holds the held-out text's residual stream between them."""

    def __init__(self, workspace: Workspace, shape: run.Shape, static: StaticPrecision, grids: Any, top: Any):
        config = workspace.experiment.config.evaluate
        windows = workspace.loader(shape).validation_windows(config.sequences)
        self._windows_NxBxS1 = windows.reshape(-1, config.batch_size, windows.shape[-1])
        step_config = StepConfig(shape.model, static, workspace.experiment.optimizer)
        self._forward, self._grids, self._top = forward(step_config, workspace.layout), grids, top
        self._layer = 0
        self._starts = [self._forward.starts(batch[:, :-1]) for batch in self._windows_NxBxS1]
        batches = (self._forward.embed(top, grids, batch[:, :-1]) for batch in self._windows_NxBxS1)
        self._stream = Stream(batches, memory_limit(workspace.layout))

    def advance(self, block: Any) -> None:
        """The text goes through the next block."""
        grids = of_layer(self._grids, self._layer)
        pairs = zip(self._stream, self._starts, strict=True)
        batches = (self._forward.through(block, grids, *pair) for pair in pairs)
        self._stream = Stream(batches, self._stream.limit)
        self._layer += 1

    def loss(self) -> float:
        """In nats per token, after the last block."""
        pairs = zip(self._stream, self._windows_NxBxS1, strict=True)
        found = [float(self._forward.loss(self._top, self._grids, x, batch[:, 1:])) for x, batch in pairs]
        return float(np.mean(found))


class WholeLoss:
    """As `BlockwiseLoss`, by the program that evaluates runs after training: to the bit the loss that it would give."""

    def __init__(self, workspace: Workspace, shape: run.Shape, static: StaticPrecision, grids: Any, top: Any):
        self._loss, self._grids, self._top = evaluator(workspace, shape, static), grids, top
        self._blocks: list[Any] = []

    def advance(self, block: Any) -> None:
        """Keeps the block."""
        self._blocks.append(block)

    def loss(self) -> float:
        """In nats per token, after the last block."""
        block = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self._blocks)
        return self._loss({**self._top, "layers": {"block": block}}, self._grids)


def by_blocks(blocks: Blocks) -> type[BlockwiseLoss] | type[WholeLoss]:
    """How the loss of a run was measured that these blocks are of, so that another loss may be compared with it: a
    model from elsewhere was never in memory as a whole."""
    return WholeLoss if isinstance(blocks, Stacked) else BlockwiseLoss


@functools.lru_cache(maxsize=8)
def validation_loss(step_config: StepConfig, layout: Layout):
    """(params, grids, tokens (N, B, S + 1)) -> mean loss, compiled."""

    def loss(params, grids, tokens_NxBxS1):
        with sharding.splitting(layout, ("run", *BATCH)):
            return step.validation_loss(step_config, params, grids, tokens_NxBxS1)

    return compilation.jit(loss, out_shardings=layout.place())
