"""What simulated quantization costs: tokens per second of a training step with it, side by side with steps without.

    python benchmarks/train_step.py [--size=1M] [--depth=4] [--batch_size=16] [--lanes=1] [--repeats=5]

Three programs of the same model, batch and optimizer:
  quantized    the paper's setting (weights per channel; activations, keys and values per tensor) at int4, traced
  passing      the same program with every grid passing through: nothing is quantized, and the same work is done
  plain        quantization is not traced at all
Repeats are interleaved, so that what else the machine does falls on all three. CPU time is the process's, which tells
more than wall time on a machine that is shared. Also prints the time to trace and to compile each.
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from precision_scaling.model import sizes
from precision_scaling.model.accounting import count_parameters
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import formats
from precision_scaling.quantize.static import UNQUANTIZED, StaticPrecision, StaticQuantizer
from precision_scaling.runtime import cli, compilation
from precision_scaling.training import optimizer, schedule, step

FLAGS = flags.FlagValues()
_SIZE = flags.DEFINE_string("size", None, "Named size; default 1M on a CPU, 110M elsewhere.", flag_values=FLAGS)
_DEPTH = flags.DEFINE_integer("depth", 0, "Layers; 0: by size.", flag_values=FLAGS)
_SEQUENCE = flags.DEFINE_integer(
    "sequence_length", None, "Tokens per sequence; default 64 on a CPU, 1024 elsewhere.", flag_values=FLAGS
)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Sequences per step.", flag_values=FLAGS)
_LANES = flags.DEFINE_integer("lanes", 1, "Runs that train at once.", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps per measurement.", flag_values=FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each program.", flag_values=FLAGS)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ("float32", "bfloat16"), "Default float32 on a CPU, bfloat16 elsewhere.", flag_values=FLAGS
)
_BITS = flags.DEFINE_integer("bits", 4, "Bits of the quantized program.", flag_values=FLAGS)
_VOCAB = flags.DEFINE_integer("vocab_size", 257, "Vocabulary.", flag_values=FLAGS)

PAPER = StaticPrecision(
    tuple(
        (name, StaticQuantizer(formats.parse("int4").kind, "channel" if name == "w" else "tensor")) for name in "wakv"
    )
)


def _model() -> ModelConfig:
    on_cpu = jax.default_backend() == "cpu"
    size = sizes.named(_SIZE.value or ("1M" if on_cpu else "110M"))
    depth = _DEPTH.value or size.depth
    return ModelConfig(
        vocab_size=_VOCAB.value,
        width=size.width,
        depth=depth,
        heads=size.heads,
        mlp_width=size.mlp_width,
        sequence_length=_SEQUENCE.value or (64 if on_cpu else 1024),
        base_width=size.width,
        base_depth=depth,
        dtype=_DTYPE.value or ("float32" if on_cpu else "bfloat16"),
    )


class Measured:
    """One program, its state and the times of its repeats."""

    def __init__(self, config: ModelConfig, static: StaticPrecision, bits: int):
        lanes = _LANES.value
        adamw = optimizer.OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)
        step_config = step.StepConfig(config, static, adamw)
        grids = {name: formats.parse(bits).grid() for name, _ in static.quantizers}
        stacked = lambda tree: jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], lanes, axis=0), tree)
        self.inputs = step.RunInputs(
            grids=stacked(grids),
            schedule=stacked(schedule.of("cosine", 1e-3, 1000, 10, 0)),
        )
        initialize = compilation.jit(functools.partial(step.init_state, step_config), level=1)
        self.state = stacked(initialize(0))
        shape = (lanes, _BATCH.value, config.sequence_length + 1)
        self.tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape), jnp.int32)

        def train(state, inputs, tokens, steps):
            return step.train_chunk(step_config, state, inputs, lambda t: tokens, steps, _STEPS.value)

        started = time.perf_counter(), time.process_time()
        lowered = compilation.jit(train, donate_argnums=0).lower(self.state, self.inputs, self.tokens, _STEPS.value)
        self.trace_seconds = time.perf_counter() - started[0]
        self.run = lowered.compile()
        self.compile_seconds = time.perf_counter() - started[0] - self.trace_seconds
        self.compile_cpu_seconds = time.process_time() - started[1]
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def repeat(self, counts: bool) -> None:
        """Runs the steps once; keeps the times if it counts."""
        started = time.perf_counter(), time.process_time()
        self.state, metrics = self.run(self.state, self.inputs, self.tokens, _STEPS.value)
        assert np.isfinite(np.asarray(metrics.loss)).all()
        if counts:
            self.wall.append(time.perf_counter() - started[0])
            self.cpu.append(time.process_time() - started[1])


def _main() -> None:
    config = _model()
    statics = {
        "quantized": Measured(config, PAPER, _BITS.value),
        "passing": Measured(config, PAPER, 16),
        "plain": Measured(config, UNQUANTIZED, 16),
    }
    for i in range(_REPEATS.value + 1):
        for measured in statics.values():
            measured.repeat(counts=i > 0)
    tokens = _LANES.value * _BATCH.value * config.sequence_length * _STEPS.value
    non_embedding, _ = count_parameters(config)
    print(
        f"{jax.devices()[0].device_kind}, N = {non_embedding:,}, {config.depth} layers, {config.dtype}, "
        f"{_LANES.value} lanes x {_BATCH.value} sequences x {config.sequence_length} tokens"
    )
    print(
        f"{'':>10} {'tokens/s best':>14} {'median':>10} {'wall ratio':>11} {'CPU ratio':>10} {'trace s':>8} compile s"
    )
    plain = statics["plain"]
    for name, measured in statics.items():
        print(
            f"{name:>10} {tokens / min(measured.wall):>14,.0f} {tokens / statistics.median(measured.wall):>10,.0f} "
            f"{min(measured.wall) / min(plain.wall):>11.2f} {min(measured.cpu) / min(plain.cpu):>10.2f} "
            f"{measured.trace_seconds:>8.1f} {measured.compile_seconds:.1f} ({measured.compile_cpu_seconds:.1f} CPU "
            "with tracing)"
        )


if __name__ == "__main__":
    sys.exit(cli.run(_main, FLAGS))
