"""Compiles the training program of configs/paper.py for many devices from shapes alone: what each would hold.

    python -m benchmarks.aot --config.mesh.data=1 --config.mesh.fsdp=64 --config.train.microbatches=4

Nothing is allocated: the devices are forced host devices of the CPU backend, and the arrays are abstract. Memory per
device is what the compiler's analysis says of the CPU's program; another backend's buffers differ, arguments do not.
"""

import math
import os
import sys
import time

from absl import flags

from precision_scaling.config import command_line
from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_DEVICES = flags.DEFINE_integer("devices", 64, "Forced host devices.", lower_bound=1, flag_values=FLAGS)
_SIZES = flags.DEFINE_list("sizes", ["220M", "1.7B"], "Named sizes to compile.", flag_values=FLAGS)
_BITS = flags.DEFINE_string(
    "precision", "w4_a8_kv8", "Precision of the run, as in a study's grid; bf16 for none.", flag_values=FLAGS
)
_CONFIG = command_line.define_config(FLAGS)


def _main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_DEVICES.value}"
    import jax

    from precision_scaling.config import base, experiment
    from precision_scaling.runtime import sharding

    config = _CONFIG.value
    layout = sharding.make_layout(config.mesh)
    for size in _SIZES.value:
        config.model.size = size
        with config.unlocked():
            config.study.grid = {"one": base.grid((size,), (10**9,), (_BITS.value,))}
        resolved = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
        (group,) = resolved.cohorts
        sharding.check(layout, config, [group.shape.model])
        _report(size, jax, layout, resolved, group)


def _report(size: str, jax, layout, resolved, group) -> None:
    import numpy as np

    from precision_scaling.model.accounting import count_parameters
    from precision_scaling.runtime import sharding
    from precision_scaling.training.compiled import compiled_cohort, stacked
    from precision_scaling.training.step import RunInputs, StepConfig

    shape, (run,) = group.shape, group.runs
    step_config = StepConfig(shape.model, group.static, resolved.optimizer, shape.microbatches)
    statics = compiled_cohort(step_config, layout, 1)
    state = layout.abstract(stacked(statics.one, 1), lanes=True)
    # Steps, lanes, microbatches, sequences and tokens of one, as `feed.Prefetcher` has them.
    windows = (shape.batch_size // shape.microbatches, shape.model.sequence_length + 1)
    tokens_shape = (1, 1, shape.microbatches, *windows)
    place = layout.of_shape(tokens_shape, None, "run", None, sharding.BATCH)
    tokens = jax.ShapeDtypeStruct(tokens_shape, np.uint16, sharding=place)
    run_inputs = RunInputs(group.static.grids(run.precision), run.schedule, np.int32(run.seed))
    inputs = jax.tree.map(lambda x: np.asarray(x)[None], run_inputs)
    started = time.perf_counter()
    lowered = statics.train.lower(state, inputs, tokens, 1)
    traced = time.perf_counter() - started
    compiled = lowered.compile()
    seconds = time.perf_counter() - started - traced
    memory = compiled.memory_analysis()
    bytes_ = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    parts = layout.sizes["fsdp"] * layout.sizes["tensor"]
    gib = 2.0**30
    non_embedding, parameters = count_parameters(shape.model)
    print(
        f"{size}: N = {non_embedding:,}, {parameters:,} parameters, {shape.model.dtype}, {run.precision.describe()}; "
        f"mesh {dict(layout.mesh.shape)}; traced in {traced:.1f} s, compiled in {seconds:.1f} s"
    )
    print(
        f"  state {bytes_ / gib:.2f} GiB, a device's share of {parts} is {bytes_ / parts / gib:.3f} GiB; "
        f"per device: arguments {memory.argument_size_in_bytes / gib:.3f}, of which reused for results "
        f"{memory.alias_size_in_bytes / gib:.3f}, temporary {memory.temp_size_in_bytes / gib:.3f}, "
        f"code {memory.generated_code_size_in_bytes / gib:.3f} GiB"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(cli.run(_main, FLAGS, defaults=("--config=configs/paper.py",)))
