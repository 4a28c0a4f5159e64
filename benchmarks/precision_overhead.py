"""Step time at each precision over the bf16 step, measured in turns in one process.

    python -m benchmarks.precision_overhead --size=1M --batch_size=8 --sequence_length=128
    python -m benchmarks.precision_overhead --size=1.7B --dtype=bfloat16 --batch_size=8 --sequence_length=1024   # a GPU

Wall time is what a user waits; CPU time is what the machine's other users cannot take away. Ratios are medians over
rounds, each of which runs every precision once.
"""

import functools
import statistics
import sys
import time

import jax
import numpy as np
from absl import flags

from precision_scaling.config import base, experiment
from precision_scaling.errors import ConfigError
from precision_scaling.quantize import native
from precision_scaling.runtime import cli, compilation
from precision_scaling.training import step as step_lib

FLAGS = flags.FlagValues()
_SIZE = flags.DEFINE_string("size", "1M", "Model size, as in precision_scaling/model/sizes.py.", flag_values=FLAGS)
_DTYPE = flags.DEFINE_string("dtype", "float32", "Compute dtype.", flag_values=FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences per step.", flag_values=FLAGS)
_SEQUENCE_LENGTH = flags.DEFINE_integer("sequence_length", 128, "Tokens per sequence.", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds that are measured.", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 3, "Steps of each precision in a round.", flag_values=FLAGS)
_PRECISIONS = flags.DEFINE_list(
    "precisions",
    [
        "bf16",
        "w4_a4_kv4",
        "qat",
        "low_precision",
        "fp8",
        "int8_full",
        "mxfp4",
        "nvfp4",
        "nvfp4_train",
        "mxfp8_train",
        "int8_full native",
        "fp8 native",
    ],
    "Presets and shorthand as in a study's grid, native ones with the word behind; the first is the denominator.",
    flag_values=FLAGS,
)


def _compile(text: str):
    """(step, state, inputs, tokens, seconds of the first step) of a precision; ConfigError where it does not fit."""
    name, mode = (text.removesuffix(" native"), "native") if text.endswith(" native") else (text, "")
    config = base.get_config()
    config.model.size = _SIZE.value
    config.model.dtype = _DTYPE.value
    config.model.sequence_length = _SEQUENCE_LENGTH.value
    config.train.batch_size = _BATCH_SIZE.value
    config.train.tokens = 1000 * _BATCH_SIZE.value * _SEQUENCE_LENGTH.value
    config.precision.mode = mode
    config.study.grid.one = base.grid((_SIZE.value,), (config.train.tokens,), (name,))
    resolved = experiment.resolve(config, 256)
    (group,) = resolved.cohorts
    (run,) = group.runs
    native.check_device(run.precision)
    step_config = step_lib.StepConfig(group.shape.model, group.static, resolved.optimizer)
    inputs = step_lib.RunInputs(group.static.grids(run.precision, group.shape.model.depth), run.schedule, np.int32(0))
    tokens = np.random.default_rng(0).integers(0, 256, (_BATCH_SIZE.value, _SEQUENCE_LENGTH.value + 1)).astype(np.int32)
    state = compilation.jit(functools.partial(step_lib.init_state, step_config), level=1)(0)
    started = time.perf_counter()
    step = compilation.jit(functools.partial(step_lib.train_step, step_config), donate_argnums=0)
    state, _ = jax.block_until_ready(step(state, inputs, tokens))
    return step, state, inputs, tokens, time.perf_counter() - started


def _main() -> None:
    compiled, skipped = {}, {}
    for text in _PRECISIONS.value:
        try:
            compiled[text] = _compile(text)
        except ConfigError as error:
            skipped[text] = error
    states = {text: entry[1] for text, entry in compiled.items()}
    wall, cpu = {text: [] for text in compiled}, {text: [] for text in compiled}
    for _ in range(_ROUNDS.value):
        for text, (step, _, inputs, tokens, _) in compiled.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(_STEPS.value):
                states[text], metrics = step(states[text], inputs, tokens)
            jax.block_until_ready((states[text], metrics))
            wall[text].append((time.perf_counter() - started) / _STEPS.value)
            cpu[text].append((time.process_time() - cpu_started) / _STEPS.value)
    device = jax.devices()[0]
    print(f"{_SIZE.value}, {_DTYPE.value}, {_BATCH_SIZE.value} × {_SEQUENCE_LENGTH.value} tokens, {device.device_kind}")
    print(f"{'precision':>18} {'ms/step':>9} {'wall ratio':>11} {'CPU ratio':>10} {'first step, s':>14}")
    first = next(iter(compiled))
    for text, entry in compiled.items():
        ratio = lambda times, text=text: statistics.median(
            ours / theirs for ours, theirs in zip(times[text], times[first], strict=True)
        )
        milliseconds = 1e3 * statistics.median(wall[text])
        print(f"{text:>18} {milliseconds:9.2f} {ratio(wall):11.3f} {ratio(cpu):10.3f} {entry[-1]:14.1f}")
    for text, error in skipped.items():
        print(f"{text:>18} left out: {error}")


if __name__ == "__main__":
    sys.exit(cli.run(_main, FLAGS))
