"""What the compilers of TPUs and GPUs say of the project's programs, on a machine without the device: JSON lines.

    python -m benchmarks.aot --target=v5e:8x8 --size=220M --precision=bf16,paper --config.mesh.fsdp=8
    python -m benchmarks.aot --target=h100 --size=220M --precision=bf16 --config.train.batch_size=8

One object a case on stdout: bytes per device (arguments, temporary, peak) against the chip's memory, collectives by
kind with the bytes that each chip sends in a step, products by their operands' types, copies. Nothing is allocated and
nothing runs: no times come from here but the compiler's own. A target needs its compiler (extras `tpu`, `cuda`), not
its device. Precisions are those of a study's grid, presets among them; sizes are named sizes.
"""

import itertools
import json
import sys

from absl import flags

from precision_scaling.config import command_line
from precision_scaling.errors import UserError
from precision_scaling.runtime import cli

PROGRAMS = ("train", "evaluate")
FLAGS = flags.FlagValues()
_TARGET = flags.DEFINE_string(
    "target", None, "v5e:8x8, v6e:8x8, v5p:2x2x4, v5e:8x8*2 (two slices), h100, h100:8, cpu:64, ...", flag_values=FLAGS
)
_SIZES = flags.DEFINE_list("size", ["220M"], "Named sizes.", flag_values=FLAGS)
_PRECISIONS = flags.DEFINE_list("precision", ["bf16"], "Precisions, as in a study's grid.", flag_values=FLAGS)
_PROGRAMS = flags.DEFINE_list("program", ["train"], f"Of {', '.join(PROGRAMS)}.", flag_values=FLAGS)
_LANES = flags.DEFINE_integer("lanes", 1, "Runs that train at once.", lower_bound=1, flag_values=FLAGS)
_CONFIG = command_line.define_config(FLAGS)


def main() -> None:
    """Print a line of JSON for each case. Raises UserError."""
    for program in _PROGRAMS.value:
        if program not in PROGRAMS:
            raise UserError(f"--program={program}: allowed is one of {', '.join(PROGRAMS)}")
    from precision_scaling.runtime import targets

    target = targets.target(_TARGET.value)
    for size, precision, program in itertools.product(_SIZES.value, _PRECISIONS.value, _PROGRAMS.value):
        print(json.dumps(_case(target, size, precision, program)), flush=True)


def _case(target, size: str, precision: str, program: str) -> dict:
    from precision_scaling.config import base, experiment
    from precision_scaling.model.accounting import count_parameters
    from precision_scaling.runtime import sharding
    from precision_scaling.study import automatic
    from precision_scaling.training import forecast

    config = _CONFIG.value.copy_and_resolve_references()
    with config.unlocked():
        config.study.grid = {"one": base.grid((size,), (10**9,), (precision,))}
        config.study.lanes = _LANES.value
    if choice := automatic.choose(config, target):
        print(choice, file=sys.stderr)
        config = choice.config
    layout = sharding.make_layout(config.mesh, target.devices)
    resolved = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
    (cohort,) = resolved.cohorts
    sharding.check(layout, config, [cohort.shape.model])
    print(f"compiling {program} at {size}, {precision} for {target.name} ...", file=sys.stderr)
    if program == "train":
        found = forecast.train_step(cohort, resolved.optimizer, layout, _LANES.value)
    else:
        found = forecast.evaluation(cohort, resolved.optimizer, layout, config.evaluate.batch_size)
    non_embedding, parameters = count_parameters(cohort.shape.model)
    return {
        "target": target.name,
        "devices": layout.mesh.size,
        "program": program,
        "size": size,
        "N": non_embedding,
        "parameters": parameters,
        "precision": precision,
        "dtype": cohort.shape.model.dtype,
        "mesh": layout.sizes,
        "slices": layout.slices,
        "lanes": _LANES.value,
        "batch_size": cohort.shape.batch_size,
        "sequence_length": cohort.shape.model.sequence_length,
        "microbatches": cohort.shape.microbatches,
        "remat": cohort.shape.model.remat,
        "memory": target.memory,
        "fits": None if target.memory is None else found.peak <= target.memory,
        **found.as_json(),
    }


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, required=("target",), defaults=("--config=configs/paper.py",)))
