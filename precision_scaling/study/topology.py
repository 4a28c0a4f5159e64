"""Whether the runs of a config fit devices that are not here, what each chip holds and sends, and what were better."""

import ml_collections
from absl import flags

from precision_scaling.config import experiment
from precision_scaling.errors import UserError
from precision_scaling.model import attention
from precision_scaling.runtime import sharding, targets
from precision_scaling.runtime.targets import Target
from precision_scaling.study import division
from precision_scaling.study.division import GIB, Setting, Tried
from precision_scaling.training.compiled import MEMORY_SHARE
from precision_scaling.training.forecast import Forecast, TooLargeError

SENT_LESS = 0.95  # a setting is better if it sends less than this share
FREE = ("mesh.fsdp", "train.microbatches", "model.remat")  # what another setting may have otherwise


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
    for i, cohort in enumerate(resolved.cohorts):
        slices = f" in {target.slices} slices" if target.slices > 1 else ""
        chips = f"{len(target.devices)} x {target.name.partition(':')[0]}{slices}"
        where = f"{cohort.shape.size} on {chips}, by its compiler, "
        where += attention.described(cohort.shape.model, cohort.static)
        try:
            found = division.compile_step(config, resolved.optimizer, cohort, target)
        except TooLargeError as error:
            raise UserError(f"{where}: {error}; {_nearest(config, i, target)}") from None
        lines.append(f"{where}: {_figures(found, target)}")
        if found.peak > MEMORY_SHARE * target.memory:
            raise UserError(f"{lines[-1]}: too much; {_nearest(config, i, target)}")
        if len(target.devices) > 1:
            lines += _better(found, _other(config, i, target), target)
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


def _nearest(config, cohort: int, target: Target) -> str:
    if (other := _other(config, cohort, target)) is None or other.found is None:
        return "no mesh, microbatches or remat make it fit: take a larger slice or a smaller batch"
    return f"nearest that fits: {other.setting} ({_figures(other.found, target)})"


def _better(found: Forecast, other: Tried | None, target: Target) -> list[str]:
    if other is None or other.found is None or other.found.counts.sent >= SENT_LESS * found.counts.sent:
        return ["  no setting that was tried sends less"]
    return [f"  better: {other.setting}", f"    {_figures(other.found, target)}"]


def _other(config, cohort: int, target: Target) -> Tried | None:
    """The first setting that the cohort of that number fits in; its own is not tried again, where it is one of them."""
    sizes = sharding.make_layout(config.mesh, target.devices).sizes
    own = Setting(sizes["fsdp"], config.train.microbatches, config.model.remat, sizes["run"], sizes["tensor"])
    start = Setting(1, 1, "none")
    for group in division.search(config, target, start, FREE, lambda resolved: [resolved.cohorts[cohort]], skipped=own):
        if group and group[0].fits:
            return group[0]
    return None
