"""What "auto" stands for: the fewest microbatches and the least traffic that fit, kept in the workdir."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from precision_scaling.config import base, experiment
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.runtime import hlo, targets
from precision_scaling.runtime.files import read_sealed
from precision_scaling.runtime.targets import Target
from precision_scaling.study import automatic, division, workspace
from precision_scaling.study.workspace import open_workspace, reopen_workspace
from precision_scaling.training.compiled import MEMORY_SHARE
from precision_scaling.training.forecast import Forecast

ROOT = Path(__file__).parent.parent
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of which nothing but its kind is asked."""

    device_kind: str = "toy"
    platform: str = "gpu"
    process_index: int = 0


def says(peaks, sent=lambda sizes: 0.0):
    """A compiler: peaks(cohort, sizes of the mesh, lanes) GiB on each device, sent(sizes) bytes."""

    def compile_step(config, optimizer, cohort, target, most_lanes=None):
        rest = len(target.devices) // (config.mesh.run * config.mesh.fsdp * config.mesh.tensor)
        sizes = {"run": config.mesh.run, "data": rest, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
        if cohort.shape.batch_size // cohort.shape.microbatches % (rest * sizes["fsdp"]):
            raise ConfigError("train.batch_size", cohort.shape.batch_size, "a multiple")
        peak = int(GIB * peaks(cohort, sizes, most_lanes))
        traffic = hlo.Collective("all-gather", 1, sent(sizes), 8, overlapped=False)
        return Forecast(0, peak, 0, peak, hlo.Counts((traffic,), {}, 0, 0), 0.0)

    return compile_step


@pytest.fixture
def toys(monkeypatch):
    """Makes devices of 10 GiB and their compiler, see `says`."""

    def make(count: int, *compiler, memory: int | None = 10 * GIB, kind: str = "toy") -> Target:
        if compiler:
            monkeypatch.setattr(division, "compile_step", says(*compiler))
        monkeypatch.setattr(automatic, "_own", lambda config, target, free: (division.Setting(1, 1, "none"), 1))
        return Target(f"{count} toys", [Chip(kind)] * count, memory)

    return make


def chosen(config, target) -> dict[str, int | str]:
    choice = automatic.choose(config, target)
    assert choice is not None and not automatic.asked(choice.config)
    for name, value in choice.values.items():
        section, leaf = name.split(".")
        assert choice.config[section][leaf] == value
    return dict(choice.values)


@pytest.mark.slow  # four compiled steps
def test_microbatches_are_the_fewest_whose_compiled_step_fits(tiny_config, quick_compile):
    config = tiny_config(train__batch_size=2, study__lanes=1, train__steps_per_dispatch=1)
    here = Target("here", jax.devices()[:1], 10 * GIB)

    def peak(microbatches: int) -> int:
        config.train.microbatches = microbatches
        (cohort,) = (resolved := experiment.resolve(config, 257)).cohorts
        return division.compile_step(config, resolved.optimizer, cohort, here).peak

    one, two = peak(1), peak(2)
    assert two < one
    config.train.microbatches = base.AUTO
    between = dataclasses.replace(here, memory=int((one + two) / 2 / MEMORY_SHARE))
    choice = automatic.choose(config, between)
    assert choice.values == {"train.microbatches": 2}
    assert f"train.microbatches=1 needs {division.shown(one)}" in choice.why and "\n" not in str(choice)


def test_the_mesh_is_the_one_that_sends_least_of_those_that_fit(tiny_config, toys):
    config = tiny_config(train__batch_size=64, train__tokens=64 * 64)
    config.mesh.fsdp = config.mesh.run = base.AUTO
    traffic = lambda sizes: {1: 3e6, 8: 2e6, 16: 1e6}[sizes["fsdp"]]
    assert chosen(config, toys(16, lambda *_: 5, traffic)) == {"mesh.run": 1, "mesh.fsdp": 8}
    alone = lambda cohort, sizes, lanes: 5 if sizes["data"] == 16 else 20
    assert chosen(config, toys(16, alone, traffic)) == {"mesh.run": 1, "mesh.fsdp": 1}
    choice = automatic.choose(config, toys(16, lambda *_: 5, traffic))
    assert "sends 2 MB a step" in choice.why and "mesh.run=1 mesh.fsdp=1 sends 3 MB" in choice.why


def test_less_recomputation_comes_before_fewer_microbatches(tiny_config, toys):
    config = tiny_config(train__batch_size=64, train__tokens=64 * 64)
    config.train.microbatches = config.model.remat = base.AUTO
    holds = {"none": 20, "dots": 15, "full": 12}
    full = lambda cohort, sizes, lanes: holds[cohort.shape.model.remat] / cohort.shape.microbatches
    assert chosen(config, toys(4, full)) == {"train.microbatches": 2, "model.remat": "full"}
    less = lambda *more: 0.7 * full(*more)
    assert chosen(config, toys(4, less)) == {"train.microbatches": 1, "model.remat": "full"}
    assert chosen(config, toys(4, lambda *_: 1)) == {"train.microbatches": 1, "model.remat": "none"}


def test_runs_of_a_study_train_on_devices_of_their_own_where_they_fit(study_config, toys):
    config = copy.deepcopy(study_config)
    config.study.lanes, config.train.batch_size = 4, 8
    fewest = min(len({run.trunk for run in one.runs}) for one in experiment.resolve(config, 257).cohorts)
    config.mesh.run = config.mesh.fsdp = base.AUTO
    apart = chosen(config, toys(8, lambda *_: 1, lambda sizes: 8e6 / sizes["run"]))["mesh.run"]
    assert apart == max(size for size in (1, 2, 4) if size <= fewest)
    together = lambda cohort, sizes, lanes: 20 if sizes["run"] > 1 else 1
    assert chosen(config, toys(8, together))["mesh.run"] == 1
    # Fewer runs at once where all of them do not fit.
    assert chosen(config, toys(8, lambda cohort, sizes, lanes: 1 if lanes == 1 else 20))["mesh.run"] >= 1


def test_a_batch_that_no_mesh_divides_is_refused_as_such(tiny_config, toys):
    config = tiny_config(train__batch_size=4)
    config.mesh.fsdp = base.AUTO
    with pytest.raises(ConfigError, match=r"train.batch_size = 4"):
        automatic.choose(config, toys(8, lambda *_: 1))
    said = r"allowed is what fits 4 x toy of 10 GiB each; nothing does \(mesh.fsdp=. needs 99 GiB\): take more"
    with pytest.raises(ConfigError, match=said):
        automatic.choose(config, toys(4, lambda *_: 99))


def test_a_workdir_keeps_what_was_chosen(tiny_config, toys, tmp_path, monkeypatch, capsys):
    config = tiny_config(train__batch_size=8)
    config.train.microbatches = config.mesh.fsdp = base.AUTO
    halves = lambda cohort, sizes, lanes: 12 / cohort.shape.microbatches
    first = toys(1, halves)
    monkeypatch.setattr(targets, "here", lambda: first)
    opened = open_workspace(config, tmp_path)
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("auto: "))
    assert said.startswith("auto: train.microbatches=2 mesh.fsdp=1 for 1 x toy: by its compiler each holds 6 GiB of 10")
    explicit = tiny_config(train__batch_size=8, train__microbatches=2)
    (run,) = opened.experiment.runs
    assert [run.id] == [one.id for one in experiment.resolve(explicit, opened.corpus.vocab_size).runs]
    kept = read_sealed(tmp_path / "config.json")
    assert kept["config"]["train"]["microbatches"] == 2 and kept["config"]["mesh"]["fsdp"] == 1
    assert kept["chosen"]["options"] == {"train.microbatches": 2, "mesh.fsdp": 1}

    toys(1, lambda *_: 99)  # nothing is compiled for the same devices
    assert open_workspace(config, tmp_path).experiment.runs == opened.experiment.runs
    assert "as the workdir has it" in capsys.readouterr().err

    larger = toys(1, lambda *_: 5, kind="larger")  # on which one microbatch would fit
    monkeypatch.setattr(targets, "here", lambda: larger)
    assert open_workspace(config, tmp_path).experiment.runs == opened.experiment.runs
    said = capsys.readouterr().err.splitlines()[-1]
    assert "as the runs of the workdir have it, chosen for 1 x toy; the mesh is new, as it was chosen for 1 x" in said

    # Other commands, and the config without "auto", keep what is known of the choice.
    assert reopen_workspace(tmp_path).experiment.runs == open_workspace(explicit, tmp_path).experiment.runs
    assert read_sealed(tmp_path / "config.json")["chosen"]["devices"] == "1 x larger"
    with pytest.raises(UserError, match="microbatches was 2 and is 4 now"):
        open_workspace(tiny_config(train__batch_size=8, train__microbatches=4), tmp_path)


def test_of_two_workers_the_choice_of_the_first_is_the_workdirs(tiny_config, toys, tmp_path, monkeypatch):
    config = tiny_config(train__batch_size=8)
    config.train.microbatches = base.AUTO
    slow, fast = toys(1, lambda cohort, *_: 12 / cohort.shape.microbatches), toys(1, kind="fast")
    monkeypatch.setattr(targets, "here", lambda: slow)
    prepare = workspace.prepare

    def meanwhile(**data):
        monkeypatch.setattr(workspace, "prepare", prepare)
        other = tiny_config(train__batch_size=8, train__microbatches=4)
        assert open_workspace(other, tmp_path).experiment.runs[0].shape.microbatches == 4
        return prepare(**data)

    monkeypatch.setattr(workspace, "prepare", meanwhile)
    assert open_workspace(config, tmp_path).experiment.runs[0].shape.microbatches == 4
    assert fast.kind == "fast"


def test_on_a_cpu_it_is_the_default(tiny_config, tmp_path, capsys):
    config = tiny_config()
    config.train.microbatches = config.mesh.run = config.mesh.fsdp = config.model.remat = base.AUTO
    (run,) = open_workspace(config, tmp_path).experiment.runs
    (plain,) = experiment.resolve(tiny_config(), 257).runs
    assert run.shape.microbatches == plain.shape.microbatches and run.id == plain.id
    assert "auto: train.microbatches=1 mesh.run=1 mesh.fsdp=1 model.remat=none for 1 x cpu: the defaults" in (
        capsys.readouterr().err
    )


def test_auto_is_a_value_for_nothing_else(tiny_config):
    config = tiny_config()
    config.mesh.fsdp = base.AUTO
    with pytest.raises(ConfigError, match=r"mesh.fsdp = 'auto': allowed is a value of its own"):
        experiment.resolve(config, 257)
    config.mesh.fsdp = "many"
    with pytest.raises(ConfigError, match=r"mesh.fsdp = 'many': allowed is a whole number .*, or auto"):
        automatic.choose(config, Target("toy", [Chip()], GIB)) or experiment.resolve(config, 257)


def test_settings_are_tried_from_the_least_traffic_on(tiny_config):
    config = tiny_config(train__batch_size=8, study__lanes=1)
    target = Target("v5e:4x4", range(16), 16 * GIB)
    free = ("mesh.fsdp", "train.microbatches", "model.remat")
    start, needs = division.Setting(1, 1, "none"), division.Needs(state=12 * 10**9)
    groups = list(division.settings(start, free, config, needs, target))
    assert {one.fsdp for group in groups for one in group} == {8}  # half a chip does not hold the state
    assert [(group[0].microbatches, group[0].remat) for group in groups] == [
        *((1, remat) for remat in ("none", "dots", "full")),
        *((microbatches, "full") for microbatches in (2, 4, 8)),
    ]
    changed = groups[3][0].applied(config)
    assert (changed.mesh.fsdp, changed.mesh.data, changed.train.microbatches) == (8, -1, 2)
    for memory, sizes in ((2 * needs.state, [8, 1]), (2 * needs.state // 8 - 1, [16])):
        of_size = dataclasses.replace(target, memory=memory)
        assert [one.fsdp for one in next(division.settings(start, free, config, needs, of_size))] == sizes
    config.train.batch_size = 27
    parts = division.settings(groups[0][0], ("train.microbatches",), config, needs, target)
    assert [[(one.fsdp, one.microbatches, one.remat) for one in group] for group in parts] == [
        [(8, microbatches, "none")] for microbatches in (1, 3, 9, 27)
    ]


EIGHT = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
from precision_scaling.config import base
from precision_scaling.runtime.targets import Target
from precision_scaling.study import automatic
c = base.get_config()
c.model.update({"width": 64, "depth": 1, "heads": 2, "mlp_width": 64, "sequence_length": 8})
c.train.update({"batch_size": 8, "steps_per_dispatch": 1, "microbatches": base.AUTO})
c.mesh.fsdp, c.study.lanes = base.AUTO, 1
for memory in json.loads(sys.argv[1]):
    print(json.dumps(dict(automatic.choose(c, Target("toy", jax.devices(), memory)).values)))
"""


@pytest.mark.slow  # compiled for eight devices, which this process does not have
def test_eight_devices_share_the_state_that_one_cannot_hold():
    # 74k parameters with their moments are 0.9 MB: a device of 16 MB holds them, one of 0.7 MB an eighth.
    arguments = [sys.executable, "-c", EIGHT, json.dumps([16_000_000, 700_000])]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    roomy, tight = map(json.loads, done.stdout.splitlines())
    # In float32 a gathered parameter is sent three times, a summed gradient twice.
    assert roomy == {"train.microbatches": 1, "mesh.fsdp": 1} and tight == {"train.microbatches": 1, "mesh.fsdp": 8}
