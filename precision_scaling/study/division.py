"""How work may be divided over devices, and which of the ways fit, by the compiler: from the least traffic on.

One search serves `topology`, which names what were better, and `automatic`, which chooses for a run.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator

import ml_collections

from precision_scaling.config import experiment, options
from precision_scaling.config.experiment import Experiment
from precision_scaling.errors import ConfigError
from precision_scaling.model.accounting import count_parameters
from precision_scaling.runtime import hosts, sharding
from precision_scaling.runtime.targets import Target
from precision_scaling.training import forecast, optimizer
from precision_scaling.training.compiled import MEMORY_SHARE
from precision_scaling.training.forecast import Forecast, TooLargeError
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.run import Cohort

GIB = 2**30
MOST_MICROBATCHES = 64
STATE_SHARE = 0.5  # of a chip's memory, which the state alone may take in a setting that is proposed
REMATS = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What divides the work over a slice, or several; other options stay as they are."""

    fsdp: int
    microbatches: int
    remat: str
    run: int = 1
    tensor: int = 1

    def applied(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """The config with it; data takes the devices that are left."""
        return options.replaced(config, self.options)

    @property
    def options(self) -> dict[str, int | str]:
        """{option of the config: value}."""
        mesh = {"mesh.run": self.run, "mesh.data": -1, "mesh.fsdp": self.fsdp, "mesh.tensor": self.tensor}
        return {**mesh, "train.microbatches": self.microbatches, "model.remat": self.remat}

    def __str__(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.options.items())


@dataclasses.dataclass(frozen=True)
class Tried:
    """A setting, and what the compiler says of it; of several cohorts, of the one that holds most.

    found: None where the compiler gives it up, or where the batch or the heads cannot be divided so; `why` says it.
    sent: bytes that each chip sends in a step of all cohorts, by the steps that each of them has.
    """

    setting: Setting
    found: Forecast | None
    fits: bool = False
    sent: float = 0.0
    why: str = ""
    error: ConfigError | None = None


def search(
    config: ml_collections.ConfigDict,
    target: Target,
    own: Setting,
    free: Collection[str],
    chosen: Callable[[Experiment], list[Cohort]],
    most_lanes: int | None = None,
    skipped: Setting | None = None,
) -> Iterator[list[Tried]]:
    """Settings in groups of equal recomputation and microbatches, the least of both first, but for `skipped`.

    In a group those that fit come first, and of them the one that sends least. own: what a setting has for the options
    that are not among `free`, of `options.AUTOMATIC`. chosen: from the runs of a config the cohorts that are to fit.
    most_lanes: runs at once, where fewer are to fit than `study.lanes`.
    """
    vocab_size = experiment.vocab_size(config.data.tokenizer)
    for group in settings(own, free, config, _needed(config, vocab_size, own, chosen, most_lanes), target):
        others = [setting for setting in group if setting != skipped]
        tried = [_try(config, vocab_size, setting, target, chosen, most_lanes) for setting in others]
        yield sorted(tried, key=lambda one: (not one.fits, one.sent))


def settings(
    own: Setting, free: Collection[str], config: ml_collections.ConfigDict, needs: "Needs", target: Target
) -> Iterator[list[Setting]]:
    """Those to try, in groups: parameters gathered over as few chips as hold the state, and nowhere if one holds it.

    Each further microbatch gathers all parameters again.
    """
    assert target.memory is not None
    batch_size, most = config.train.batch_size, STATE_SHARE * target.memory
    remats = REMATS if "model.remat" in free else (own.remat,)
    parts = [own.microbatches]
    if "train.microbatches" in free:
        parts = [1]
        for size in range(2, min(MOST_MICROBATCHES, batch_size) + 1):
            if batch_size % size == 0 and size >= 2 * parts[-1]:
                parts.append(size)
    runs: tuple[int, ...] = (own.run,)
    if "mesh.run" in free:  # runs send each other nothing
        chips = _chips(target, own)
        apart = [size for size in range(1, needs.apart + 1) if config.study.lanes % size == 0 == chips % size]
        runs = tuple(dict.fromkeys((apart[-1], 1)))
    for run in runs:
        devices = _chips(target, own) // run
        sizes = [own.fsdp]
        if "mesh.fsdp" in free:
            state = needs.state * -(-needs.lanes // run)  # of the lanes that share a chip
            # From 8 chips on gradients are scattered; over fewer there is no less traffic.
            enough = (
                size for size in range(min(8, devices), devices + 1) if devices % size == 0 and state / size <= most
            )
            sizes = list(dict.fromkeys((next(enough, devices), *((1,) if state <= most else ()))))
        for remat, microbatches in (*((remat, parts[0]) for remat in remats), *((remats[-1], m) for m in parts[1:])):
            yield [Setting(fsdp, microbatches, remat, run, own.tensor) for fsdp in sizes]


@dataclasses.dataclass(frozen=True)
class Needs:
    """state: bytes of a run's parameters and optimizer. lanes: runs that train at once. apart: and may do so on devices
    of their own, in every cohort."""

    state: int
    lanes: int = 1
    apart: int = 1


def lanes_at_once(config: ml_collections.ConfigDict, own: Setting) -> int:
    """Runs that train at once in the largest cohorts, where all that `study.lanes` allows fit."""
    resolved = _plain(config, experiment.vocab_size(config.data.tokenizer), own)
    return max(_trunks(cohort, config.study.lanes) for cohort in largest(resolved))


def _plain(config, vocab_size: int, own: Setting) -> Experiment:
    # One microbatch and full recomputation go with every precision and batch.
    return experiment.resolve(dataclasses.replace(own, microbatches=1, remat="full").applied(config), vocab_size)


def _needed(config, vocab_size: int, own: Setting, chosen, most_lanes: int | None) -> Needs:
    resolved = _plain(config, vocab_size, own)
    cohorts = chosen(resolved)
    state = max(optimizer.cost(resolved.optimizer, cohort.shape.model)[0] for cohort in cohorts)
    lanes = max(_trunks(cohort, config.study.lanes) for cohort in cohorts)
    apart = min(_trunks(cohort, config.study.lanes) for cohort in resolved.cohorts)
    return Needs(state, min(lanes, most_lanes or lanes), apart)


def _chips(target: Target, own: Setting) -> int:
    """Of a slice, for each part of a layer."""
    return len(target.devices) // target.slices // own.tensor


def _trunks(cohort: Cohort, lanes: int) -> int:
    """Runs of a cohort that train at once, as `study` trains them."""
    return min(lanes, len({run.trunk for run in cohort.runs}))


def _try(config, vocab_size: int, setting: Setting, target: Target, chosen, most_lanes: int | None) -> Tried:
    assert target.memory is not None
    changed = setting.applied(config)
    found, error, why, sent = [], None, "", 0.0
    try:
        resolved = experiment.resolve(changed, vocab_size)
        for cohort in chosen(resolved):
            one = compile_step(changed, resolved.optimizer, cohort, target, most_lanes)
            found.append(one)
            sent += (one.counts.sent + one.counts.sent_between_slices) * sum(run.steps for run in cohort.runs)
            if one.peak > MEMORY_SHARE * target.memory:  # the others need not be compiled
                break
    except TooLargeError as refused:
        why = str(refused)
    except ConfigError as refused:  # the batch cannot be divided so
        error, why = refused, str(refused)
    most = max(found, key=lambda one: one.peak, default=None)
    fits = not why and most is not None and most.peak <= MEMORY_SHARE * target.memory
    # All processes of a run have to go on with the same one.
    fits = not hosts.largest(int(not fits))
    return Tried(setting, None if why else most, fits, sent, why, error)


def compile_step(
    config, optimizer: OptimizerConfig, cohort: Cohort, target: Target, most_lanes: int | None = None
) -> Forecast:
    """A training step of a cohort on a target's devices. Raises ConfigError and TooLargeError.

    most_lanes: runs at once, where not all that `study.lanes` allows are to fit.
    """
    layout, shape = sharding.make_layout(config.mesh, target.devices), cohort.shape
    sharding.check(layout, config, [shape.model])
    sizes = layout.sizes
    setting = Setting(sizes["fsdp"], shape.microbatches, shape.model.remat, sizes["run"], sizes["tensor"])
    if hosts.primary():
        print(f"compiling {shape.size} for {target.name}: {setting}", file=sys.stderr)
    spread = sizes["run"]
    lanes = -(-_trunks(cohort, config.study.lanes) // spread) * spread
    lanes = min(lanes, config.study.lanes, max(spread, most_lanes or lanes))
    steps = config.train.steps_per_dispatch if target.here else 1  # here it is the program that will run
    return forecast.train_step(cohort, optimizer, layout, max(spread, lanes), steps)


def shown(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.3g} GiB" if size >= GIB / 10 else f"{size / 2**20:.3g} MiB"


def largest(resolved: Experiment) -> list[Cohort]:
    """The cohorts that decide what fits: of the largest shape one without and one with all scores of attention."""
    most = max(count_parameters(cohort.shape.model)[1] for cohort in resolved.cohorts)
    of_shape = [cohort for cohort in resolved.cohorts if count_parameters(cohort.shape.model)[1] == most]
    by_attention = {cohort.static.exact_attention: cohort for cohort in of_shape}
    return list(by_attention.values())
