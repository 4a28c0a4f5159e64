"""Whether the runs of a config fit devices that are not here, what each chip holds and sends, and what were better."""

import dataclasses
import sys
from collections.abc import Iterator

import ml_collections
from absl import flags

from precision_scaling.config import experiment
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.model import attention
from precision_scaling.runtime import sharding, targets
from precision_scaling.runtime.targets import Target
from precision_scaling.training import forecast, optimizer
from precision_scaling.training.compiled import MEMORY_SHARE
from precision_scaling.training.forecast import Forecast, TooLargeError
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.run import Cohort

GIB = 2**30
MOST_MICROBATCHES = 64
SENT_LESS = 0.95  # a setting is better if it sends less than this share
STATE_SHARE = 0.5  # of a chip's memory, which the state alone may take in a setting that is proposed


@dataclasses.dataclass(frozen=True)
class Setting:
    """What divides the work over a slice, or several; other options stay as they are."""

    fsdp: int
    microbatches: int
    remat: str

    def applied(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """The config with it; data takes the devices that fsdp leaves."""
        config = config.copy_and_resolve_references()
        config.mesh.update({"slices": -1, "run": 1, "data": -1, "fsdp": self.fsdp, "tensor": 1})
        config.train.microbatches, config.model.remat = self.microbatches, self.remat
        return config

    def __str__(self) -> str:
        options = {"mesh.data": -1, "mesh.fsdp": self.fsdp, "mesh.tensor": 1, "train.microbatches": self.microbatches}
        return " ".join(f"--config.{name}={value}" for name, value in {**options, "model.remat": self.remat}.items())


def define_flag(values: flags.FlagValues) -> None:
    """The command-line option --topology."""
    text = (
        "With --dry_run: devices to compile for, without having them (v5e:8x8, v6e:8x8, v5p:2x2x4, h100, h100:8, ...; "
        "v5e:8x8*2: two slices). "
        "Says what each chip holds and sends, and which mesh, microbatches and remat would be better."
    )
    flags.DEFINE_string("topology", "", text, flag_values=values)


def asked_for(values: flags.FlagValues) -> Target | None:
    """The devices of --topology, None without; to be called before anything asks JAX for its own. Raises UserError."""
    if not values.topology:
        return None
    if not values.dry_run:
        raise UserError(f"--topology={values.topology}: allowed with --dry_run only")
    return targets.target(values.topology)


def report(config: ml_collections.ConfigDict, target: Target) -> str:
    """What each cohort of a config takes on a target's devices, and a setting that sends less where there is one.

    UserError for a cohort that does not fit, with the nearest setting that does.
    """
    if target.memory is None:
        raise UserError(f"--topology={target.name}: allowed are TPUs and GPUs, whose memory is known")
    vocab_size = experiment.vocab_size(config.data.tokenizer)
    resolved = experiment.resolve(config, vocab_size)
    lines = []
    for cohort in resolved.cohorts:
        slices = f" in {target.slices} slices" if target.slices > 1 else ""
        chips = f"{len(target.devices)} x {target.name.partition(':')[0]}{slices}"
        where = f"{cohort.shape.size} on {chips}, by its compiler, "
        where += attention.described(cohort.shape.model, cohort.static)
        try:
            found = _compile(config, resolved.optimizer, cohort, target)
        except TooLargeError as error:
            raise UserError(f"{where}: {error}; {_nearest(config, vocab_size, cohort, target)}") from None
        lines.append(f"{where}: {_figures(found, target)}")
        if found.peak > MEMORY_SHARE * target.memory:
            raise UserError(f"{lines[-1]}: too much; {_nearest(config, vocab_size, cohort, target)}")
        if len(target.devices) > 1:
            lines += _better(found, next(_fitting(config, vocab_size, cohort, target), None), target)
    return "\n".join(lines)


def _figures(found: Forecast, target: Target) -> str:
    assert target.memory is not None
    counts = found.counts
    number = sum(one.times for one in counts.collectives)
    between = f" and {counts.sent_between_slices / 1e9:.3g} GB to other slices" if target.slices > 1 else ""
    return (
        f"each chip holds {found.peak / GIB:.3g} of {target.memory / GIB:.3g} GiB ({found.arguments / GIB:.3g} of "
        f"state and tokens, {found.temporary / GIB:.3g} temporary) and sends {counts.sent / 1e9:.3g} GB{between} "
        f"a step in {number} collectives, {counts.blocking} of them blocking"
    )


def _nearest(config, vocab_size: int, cohort: Cohort, target: Target) -> str:
    for setting, found in _fitting(config, vocab_size, cohort, target):
        return f"nearest that fits: {setting} ({_figures(found, target)})"
    return "no mesh, microbatches or remat make it fit: take a larger slice or a smaller batch"


def _better(found: Forecast, other: tuple[Setting, Forecast] | None, target: Target) -> list[str]:
    if other is None or other[1].counts.sent >= SENT_LESS * found.counts.sent:
        return ["  no setting that was tried sends less"]
    return [f"  better: {other[0]}", f"    {_figures(other[1], target)}"]


def _fitting(config, vocab_size: int, cohort: Cohort, target: Target) -> Iterator[tuple[Setting, Forecast]]:
    """Settings that fit: the least recomputation and the fewest microbatches first, as they send the least."""
    assert target.memory is not None
    shape, layout = cohort.shape, sharding.make_layout(config.mesh, target.devices)
    own = Setting(layout.sizes["fsdp"], shape.microbatches, shape.model.remat)
    state, _ = optimizer.cost(experiment.resolve(config, vocab_size).optimizer, shape.model)
    for setting in settings(config.train.batch_size, state, target):
        if setting == own and layout.sizes["tensor"] == layout.sizes["run"] == 1:
            continue
        changed = setting.applied(config)
        try:
            resolved = experiment.resolve(changed, vocab_size)
            same = next(one for one in resolved.cohorts if one.shape.size == cohort.shape.size)
            found = _compile(changed, resolved.optimizer, same, target)
        except (ConfigError, TooLargeError):  # the batch cannot be divided so, or the compiler gives it up
            continue
        if found.peak <= MEMORY_SHARE * target.memory:
            yield setting, found


def settings(batch_size: int, state: int, target: Target) -> Iterator[Setting]:
    """Those to try, from the least traffic on: parameters gathered over as few chips as hold the state, once a step.

    Each further microbatch gathers all parameters again. state: bytes of parameters and optimizer.
    """
    assert target.memory is not None
    devices = len(target.devices) // target.slices
    # From 8 chips on gradients are scattered; over fewer there is no less traffic.
    enough = (
        size
        for size in range(min(8, devices), devices + 1)
        if devices % size == 0 and state / size <= STATE_SHARE * target.memory
    )
    fsdp = next(enough, devices)
    for remat in ("none", "dots", "full"):
        yield Setting(fsdp, 1, remat)
    microbatches = 2
    while microbatches <= min(MOST_MICROBATCHES, batch_size):
        yield Setting(fsdp, microbatches, "full")
        microbatches *= 2


def _compile(config, optimizer: OptimizerConfig, cohort: Cohort, target: Target) -> Forecast:
    layout, shape = sharding.make_layout(config.mesh, target.devices), cohort.shape
    sharding.check(layout, config, [shape.model])
    setting = Setting(layout.sizes["fsdp"], shape.microbatches, shape.model.remat)
    print(f"compiling {shape.size} for {target.name}: {setting}", file=sys.stderr)
    lanes = max(layout.sizes["run"], min(config.study.lanes, len(cohort.runs)))
    return forecast.train_step(cohort, optimizer, layout, lanes)
