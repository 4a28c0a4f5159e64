"""Compiles one training step of configs/paper.py for many devices from shapes alone, and prints what each would hold.

    python -m benchmarks.aot --config.mesh.data=1 --config.mesh.fsdp=64 --config.train.microbatches=4

Nothing is allocated: the devices are forced host devices of the CPU backend, and the arrays are abstract. Memory per
device is what the compiler's analysis says of the CPU's program; another backend's buffers differ, arguments do not.
"""

import functools
import math
import os
import sys
import time

from absl import flags
from ml_collections import config_flags

from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_DEVICES = flags.DEFINE_integer("devices", 64, "Forced host devices.", lower_bound=1, flag_values=FLAGS)
_SIZES = flags.DEFINE_list("sizes", ["220M", "1.7B"], "Named sizes to compile.", flag_values=FLAGS)
_BITS = flags.DEFINE_string(
    "precision", "w4_a8_kv8", "Precision of the run, as in a study's grid; bf16 for none.", flag_values=FLAGS
)
_CONFIG = config_flags.DEFINE_config_file("config", "configs/paper.py", "Config file.", flag_values=FLAGS)


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

    from precision_scaling.model import decoder
    from precision_scaling.runtime import compilation, sharding
    from precision_scaling.training import cohort
    from precision_scaling.training import step as step_lib
    from precision_scaling.training.step import RunInputs, Static

    shape, (run,) = group.shape, group.runs
    static = Static(shape.model, group.program, resolved.optimizer, shape.microbatches)
    one = jax.eval_shape(functools.partial(step_lib.init_state, static), 0)
    state = layout.abstract(one)
    tokens_shape = (shape.microbatches, shape.batch_size // shape.microbatches, shape.model.sequence_length + 1)
    place = layout.of_shape(tokens_shape, None, sharding.BATCH)
    tokens = jax.ShapeDtypeStruct(tokens_shape, np.int32, sharding=place)
    inputs = RunInputs(cohort.table_of(run, group.program), run.schedule, np.int32(run.seed))
    out = (layout.of_tree(one), layout.place())

    def train_step(state, inputs, tokens):
        with sharding.splitting(layout):
            return step_lib.train_step(static, state, inputs, tokens)

    step = compilation.jit(train_step, donate_argnums=0, out_shardings=out)
    started = time.perf_counter()
    lowered = step.lower(state, inputs, tokens)
    traced = time.perf_counter() - started
    compiled = lowered.compile()
    seconds = time.perf_counter() - started - traced
    memory = compiled.memory_analysis()
    bytes_ = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    parts = layout.sizes["fsdp"] * layout.sizes["tensor"]
    gib = 2.0**30
    non_embedding, parameters = decoder.count_parameters(shape.model)
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
    sys.exit(cli.run(_main, FLAGS))
