"""What a config leaves to the devices, "auto" in `mesh`, `train.microbatches` and `model.remat`: by the compiler.

It is chosen before anything else, because microbatches and recomputation are part of a run's id, and kept in the
workdir's config.json: whoever opens the workdir again takes the same.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from precision_scaling.config import base, options
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.runtime import hosts, sharding
from precision_scaling.runtime.targets import Target
from precision_scaling.study import division
from precision_scaling.study.division import Setting, Tried, shown

# Options that the ids of runs contain: a workdir has one value of each.
_OF_RUNS = ("train.microbatches", "model.remat")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A config without "auto". values: {option: what was chosen}. devices: for which. why: in one line."""

    config: ml_collections.ConfigDict
    values: Mapping[str, int | str]
    devices: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """What config.json keeps of it."""
        return {"options": dict(self.values), "devices": self.devices, "why": self.why}

    def __str__(self) -> str:
        values = " ".join(f"{name}={value}" for name, value in self.values.items())
        return f"auto: {values} for {self.devices}: {self.why}"


def asked(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The options of a config that are "auto"."""
    return tuple(name for name in options.AUTOMATIC if options.get(config, name) == options.AUTO)


def choose(config: ml_collections.ConfigDict, target: Target, held: Mapping[str, Any] | None = None) -> Choice | None:
    """What the options that are "auto" are on these devices; None where there are none.

    held: the config.json of the workdir, where there is one: its runs keep what they were begun with, and its mesh
    stays for as long as the devices are the same. ConfigError where nothing fits.
    """
    free = asked(config)
    if not free:
        return None
    on_mesh = [name for name in free if name.startswith("mesh.")]
    if on_mesh and config.mesh.data != -1:
        raise ConfigError("mesh.data", config.mesh.data, f"-1 with {on_mesh[0]} = auto: the devices that are left")
    devices = f"{len(target.devices)} x {target.kind}"
    choice = _kept(config, target, free, devices, held) if held else _made(config, target, free, devices)
    _agree(choice)
    return choice


def _made(config, target: Target, free: Iterable[str], devices: str, said: str = "") -> Choice:
    """The first choice, or that of a mesh for other devices."""
    free = tuple(free)
    if target.memory is None:
        defaults = base.get_config()
        values = {name: options.get(defaults, name) for name in free}
        why = "the defaults, because CPUs have no memory of their own to fit"
        return Choice(options.replaced(config, values), values, devices, said + why)
    own, slices = _own(config, target, free)
    memory = target.memory
    target = dataclasses.replace(target, slices=slices)
    passed: list[Tried] = []
    # Fewer runs at once where all of them do not fit.
    for most_lanes in (None, 1) if division.lanes_at_once(config, own) > 1 else (None,):
        for group in division.search(config, target, own, free, division.largest, most_lanes):
            if group[0].fits:
                values = {name: group[0].setting.options[name] for name in free}
                return Choice(
                    options.replaced(config, values), values, devices, said + _reasons(group, passed, target, free)
                )
            passed += group
    if (errors := [one.error for one in passed if one.error]) and len(errors) == len(passed):
        raise errors[0]
    least = min(passed, key=lambda one: one.found.peak if one.found else math.inf)
    raise ConfigError(
        free[0],
        options.AUTO,
        f"what fits {devices} of {shown(memory)} each; nothing does ({_named(least, free)} {_needs(least)}): take more "
        "devices, a smaller train.batch_size or model.remat=full",
    )


def _kept(config, target: Target, free: tuple[str, ...], devices: str, held: Mapping[str, Any]) -> Choice:
    """As in a workdir. Its chosen mesh is made anew for devices that are not those that it was made for."""
    then, before = held["config"], held.get("chosen") or {"options": {}, "devices": ""}
    values = {name: options.get(then, name) for name in free if name in _OF_RUNS}
    mesh = tuple(name for name in free if name not in _OF_RUNS)
    config = options.replaced(config, values)
    same = devices == before["devices"]
    of_runs = f"as the runs of the workdir have it{'' if same else _chosen_for(before)}"
    if not mesh:
        return Choice(config, values, devices, of_runs)
    if same and set(mesh) <= set(before["options"]):
        values |= {name: before["options"][name] for name in mesh}
        return Choice(
            options.replaced(config, values), values, devices, "as the workdir has it, chosen for such devices"
        )
    said = f"{of_runs}; " if values else ""
    said += f"the mesh is new, as it was chosen for {before['devices']}: " if before["devices"] else "the mesh is new: "
    new = _made(config, target, mesh, devices, said)
    return dataclasses.replace(new, values={**values, **new.values})


def _chosen_for(before: Mapping[str, Any]) -> str:
    return f", chosen for {before['devices']}" if before["devices"] else ""


def _reasons(group: list[Tried], passed: list[Tried], target: Target, free: Iterable[str]) -> str:
    best, *others = group
    assert best.found is not None and target.memory is not None
    parts = [
        f"by its compiler each holds {shown(best.found.peak)} of {shown(target.memory)} and sends "
        f"{best.found.counts.sent / 1e6:,.3g} MB a step"
    ]
    for one in others:
        if one.found and one.fits:
            parts.append(f"{_named(one, free)} sends {one.found.counts.sent / 1e6:,.3g} MB")
    # The last that did not is the nearest.
    parts += [f"{_named(one, free)} {_needs(one)}" for one in passed[-1:]]
    return "; ".join(parts)


def _named(one: Tried, free: Iterable[str]) -> str:
    return " ".join(f"{name}={one.setting.options[name]}" for name in free)


def _needs(one: Tried) -> str:
    return f"needs {shown(one.found.peak)}" if one.found else f"does not go: {one.why}"


def _own(config, target: Target, free: Iterable[str]) -> tuple[Setting, int]:
    """(the setting of the options that are not "auto", slices)."""
    of_one = {name.removeprefix("mesh."): 1 for name in free if name.startswith("mesh.")}
    layout = sharding.make_layout({**config.mesh, **of_one}, target.devices)
    sizes = layout.sizes
    microbatches = 1 if "train.microbatches" in free else config.train.microbatches
    remat = "full" if "model.remat" in free else config.model.remat
    return Setting(sizes["fsdp"], microbatches, remat, sizes["run"], sizes["tensor"]), layout.slices


def _agree(choice: Choice) -> None:
    """UserError where processes of one run have not chosen the same."""
    mine = zlib.crc32(json.dumps(dict(choice.values), sort_keys=True).encode()) >> 1
    if not mine == hosts.largest(mine) == -hosts.largest(-mine):
        raise UserError(f"the processes of the run see another workdir or other devices each: {choice}")
