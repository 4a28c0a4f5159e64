"""What training would take on devices that are not here, by their compiler: bytes on each, traffic, and products."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from precision_scaling.data.tokens import token_dtype
from precision_scaling.runtime import compilation, hlo, sharding
from precision_scaling.runtime.sharding import BATCH, Layout
from precision_scaling.training import step
from precision_scaling.training.compiled import bytes_in_use, compiled_cohort, stacked
from precision_scaling.training.feed import abstract_tokens, most_steps
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.run import Cohort
from precision_scaling.training.step import RunInputs, StepConfig


class TooLargeError(Exception):
    """The compiler gives up, as the program takes more memory than a device has; the message is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A compiled program on one device, in bytes, by the compiler.

    arguments: what the program is given: the state (parameters and moments) and the tokens. temporary: activations,
    gathered parameters, gradients. peak: all that is held while it runs. counts: its collectives, products and copies.
    """

    arguments: int
    temporary: int
    code: int
    peak: int
    counts: hlo.Counts
    seconds: float  # that compiling took here

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        counts = self.counts
        return {
            "bytes": {name: getattr(self, name) for name in ("arguments", "temporary", "code", "peak")},
            "bytes_sent": round(counts.sent),
            "bytes_sent_between_slices": round(counts.sent_between_slices),
            "collectives": {
                kind: {name: round(value) for name, value in values.items()}
                for kind, values in counts.by_kind().items()
            },
            "blocking_collectives": counts.blocking,
            "products": dict(counts.products),
            "kernels": counts.kernels,
            "copies": {"count": counts.copies, "bytes": counts.copied_bytes},
            "compile_seconds": round(self.seconds, 1),
        }


def train_step(
    cohort: Cohort, optimizer: OptimizerConfig, layout: Layout, lanes: int, steps_per_dispatch: int = 1
) -> Forecast:
    """One step of a cohort with so many lanes. Nothing is allocated. Raises TooLargeError.

    steps_per_dispatch: whose tokens a dispatch is given, at most; the program of a run is that of its own number.
    """
    shape, run = cohort.shape, cohort.runs[0]
    config = StepConfig(shape.model, cohort.static, optimizer, shape.microbatches)
    these = compiled_cohort(config, layout, lanes)
    state = layout.abstract(stacked(these.one, lanes), lanes=True)
    inputs = RunInputs(cohort.static.grids(run.precision, shape.model.depth), run.schedule, np.int32(run.seed))
    sequences = shape.batch_size // shape.microbatches
    dtype = token_dtype(shape.model.vocab_size)
    steps = most_steps(steps_per_dispatch, lanes, shape.batch_size, shape.model.sequence_length, dtype)
    tokens = abstract_tokens(layout, steps, lanes, shape.microbatches, sequences, shape.model.sequence_length, dtype)
    in_lanes = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], lanes, axis=0), inputs)
    return _compiled(functools.partial(these.train.lower, state, in_lanes, tokens, 1), layout)


def evaluation(cohort: Cohort, optimizer: OptimizerConfig, layout: Layout, batch_size: int) -> Forecast:
    """The validation loss of one run on a batch, as a study evaluates it."""
    shape, run, static = cohort.shape, cohort.runs[0], cohort.static.evaluation()
    config = StepConfig(shape.model, static, optimizer)
    params = layout.abstract(jax.eval_shape(functools.partial(step.init_state, config), 0).params)
    windows = (1, batch_size, shape.model.sequence_length + 1)
    place = layout.of_shape(windows, None, ("run", *BATCH))
    tokens = jax.ShapeDtypeStruct(windows, token_dtype(shape.model.vocab_size), sharding=place)

    def loss(params, grids, tokens_NxBxS1):
        with sharding.splitting(layout, ("run", *BATCH)):
            return step.validation_loss(config, params, grids, tokens_NxBxS1)

    program = compilation.jit(loss, platform=layout.platform, out_shardings=layout.place())
    grids = static.grids(run.precision, shape.model.depth)
    return _compiled(functools.partial(program.lower, params, grids, tokens), layout)


def _compiled(lower, layout: Layout) -> Forecast:
    started = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in first:
            raise
        raise TooLargeError(first.removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")) from None
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    return Forecast(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        bytes_in_use(memory),
        hlo.count(compiled.as_text(), layout.mesh.size, layout.slices),
        seconds,
    )
