"""Checkpoints: what is damaged is noticed, and a study killed at any moment ends with the bits of one left alone."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.runtime import files
from precision_scaling.training import checkpoint
from precision_scaling.training.preemption import Preemption

ROOT = Path(__file__).parent.parent


class State(NamedTuple):
    step: np.ndarray
    kernel: np.ndarray


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return State(np.array([seed, 7], np.int32), rng.normal(size=(2, 64, 64)).astype(np.float32))


def abstract(lanes=2):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes, *x.shape[1:]), x.dtype), tree())


def data_file(directory: Path) -> Path:
    """The file that holds the arrays."""
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_arrays_come_back_bit_for_bit_and_are_replaced_by_the_next(tmp_path):
    for seed in (0, 1):
        checkpoint.save(tmp_path / "one", tree(seed))
        jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(tmp_path / "one", abstract()), tree(seed))


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "empty", "missing", "other shape", "no checkpoint"])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, damage):
    path, wanted = tmp_path / "one", abstract()
    checkpoint.save(path, tree())
    file = data_file(path)
    if damage == "flipped bit":
        flip_bit(file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "missing":
        file.unlink()
    elif damage == "other shape":
        wanted = wanted._replace(kernel=jax.ShapeDtypeStruct((2, 32, 64), np.float32))
    else:
        shutil.rmtree(path)
    with pytest.raises(UserError) as error:
        checkpoint.restore(path, wanted)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert ("no checkpoint there" if damage == "no checkpoint" else "damaged or of another model") in str(error.value)


def test_the_newest_readable_state_of_a_cohort_is_restored(tmp_path, caplog):
    checkpoints = checkpoint.CohortCheckpoints(tmp_path / "cohort")
    assert checkpoints.restore(abstract) is None
    for seed in range(4):
        checkpoints.save([{"run": "a", "step": seed}, {"run": None, "step": 0}], tree(seed))
    directories = sorted(tmp_path.glob("cohort/*"))
    assert [path.name for path in directories] == ["3", "4"]

    def newest():
        lanes, state = checkpoints.restore(abstract)
        jax.tree.map(np.testing.assert_array_equal, state, tree(lanes[0]["step"]))
        return lanes[0]["step"]

    assert newest() == 3
    flip_bit(data_file(directories[1]))
    assert newest() == 2
    assert "going back to the checkpoint before it" in caplog.text and str(directories[1]) in caplog.text
    # One whose lanes were never written does not count, and its place is taken.
    (directories[1] / "lanes.json").unlink()
    assert newest() == 2
    checkpoints.save([{"run": "a", "step": 5}, {"run": None, "step": 0}], tree(5))
    assert newest() == 5
    (directories[0] / "lanes.json").write_text('[{"run":')
    checkpoints.clear()
    assert checkpoints.restore(abstract) is None and not (tmp_path / "cohort").exists()


def test_the_next_steps_may_take_the_arrays_of_a_checkpoint_under_way(tmp_path, monkeypatch):
    gate, write = threading.Event(), files.write_sealed
    monkeypatch.setattr(files, "write_sealed", lambda *arguments: (gate.wait(60), write(*arguments)))
    checkpoints, others = (checkpoint.CohortCheckpoints(tmp_path / "cohort") for _ in range(2))
    state = jax.tree.map(jnp.asarray, tree(7))
    checkpoints.begin_save([{"run": "a", "step": 7}, {"run": None, "step": 0}], state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    for _ in range(3):
        state = step(state)
    assert checkpoints.end_save(wait=False) is None
    assert others.restore(abstract) is None  # it does not count yet
    gate.set()
    assert checkpoints.end_save() > 0
    assert checkpoints.end_save() is None
    jax.tree.map(np.testing.assert_array_equal, others.restore(abstract)[1], tree(7))


def test_a_checkpoint_under_way_that_fails_is_told_when_it_ends(tmp_path, monkeypatch):
    checkpoints = checkpoint.CohortCheckpoints(tmp_path / "cohort")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(files, "write_sealed", mock.Mock(side_effect=full))
    checkpoints.begin_save([{"run": "a", "step": 0}], tree())
    with pytest.raises(OSError, match="No space left"):
        checkpoints.end_save()
    assert checkpoints.end_save() is None


def test_a_checkpoint_says_what_it_took(tmp_path):
    started = time.monotonic()
    took = checkpoint.CohortCheckpoints(tmp_path / "cohort").save([{"run": "a", "step": 0}], tree())
    noted = json.loads((tmp_path / "cohort" / "1" / "lanes.json").read_text())["seconds"]
    assert 0 < noted <= took + 0.005 and took <= time.monotonic() - started


def test_a_checkpoint_that_a_preemption_would_lose_is_one_warning(caplog):
    preemption = Preemption()
    assert preemption.described() == {}
    preemption.dispatched(4.0)
    preemption.saved(26.0)
    assert preemption.described() == {"save_seconds": 26.0} and not caplog.records
    for _ in range(3):
        preemption.saved(26.004)
    (record,) = caplog.records
    assert "took 26 s after steps of 4 s" in record.getMessage() and "study.lanes" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_lane_at_another_step_than_its_state_is_refused(tmp_path, caplog):
    checkpoints = checkpoint.CohortCheckpoints(tmp_path / "cohort")
    for step in (32, 33):
        checkpoints.save([{"run": "a", "step": step}, {"run": None, "step": 0}], tree(step))
    newest = tmp_path / "cohort" / "2" / "lanes.json"
    text = newest.read_text()
    newest.write_text(text.replace("33", "73"))  # what is written is sealed
    assert checkpoints.restore(abstract)[0][0]["step"] == 32
    assert "fingerprint" in caplog.text
    files.write_sealed(newest, {"lanes": [{"run": "a", "step": 73}, {"run": None, "step": 0}]})
    assert checkpoints.restore(abstract)[0][0]["step"] == 32
    assert "the state of a is at step 33, not 73" in caplog.text
    # Of the time before there were fingerprints.
    newest.write_text(json.dumps([{"run": "a", "step": 33}, {"run": None, "step": 0}]))
    assert checkpoints.restore(abstract)[0][0]["step"] == 33
    newest.write_text(json.dumps([{"run": "a", "step": 73}, {"run": None, "step": 0}]))
    assert checkpoints.restore(abstract)[0][0]["step"] == 32


CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.data.update({data!r})
    c.update_from_flattened_dict({options!r})
    c.study.grid.full = base.grid(("25k",), (64 * 12, 64 * 7), ("bf16", "w3_a4_kv4"), ptq=True)
    c.study.grid.low = base.grid(("25k",), (64 * 12,), ("w4",))
    return c
"""
# Each is the end of a process: the N-th time that something happens in it.
MOMENTS = (
    "after-cohort-checkpoint:2",
    "in-cohort-checkpoint:4",
    "before-lanes:1",
    "between-metrics-of-two-runs:4",
    "between-parameters-and-row:2",
    "after-row:1",
)

NAMES = {*(moment.partition(":")[0] for moment in MOMENTS), "asked-to-stop", "full-disk", "end"}


@pytest.fixture(scope="module")
def killed(tiny_config, data_options, tmp_path_factory):
    """Runs the study command in processes that end at the given moments: (exit statuses, stderr)."""
    directory = tmp_path_factory.mktemp("killed")
    config = tiny_config(train__log_every=1, train__checkpoint_seconds=0.0).to_dict()
    flat = {
        f"{section}.{name}": value
        for section, options in config.items()
        if section in ("model", "train", "evaluate", "ptq")
        for name, value in options.items()
    }
    flat |= {"study.lanes": 2, "compilation_cache": config["compilation_cache"]}
    (directory / "study.py").write_text(CONFIG.format(data=data_options, options=flat))

    def run(workdir: str, *moments: str) -> tuple[list[int], str]:
        script = [sys.executable, "tests/killed_study.py", ",".join(moments)]
        arguments = [f"--config={directory / 'study.py'}", f"--workdir={directory / workdir}"]
        done = subprocess.run(
            [*script, *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        lines = [line.split() for line in done.stdout.splitlines() if re.split("[: ]", line)[0] in NAMES]
        assert [line[0] for line in lines] == list(moments), done.stderr[-3000:]
        return [int(line[1]) for line in lines], done.stderr

    run.directory = directory
    assert run("whole", "end")[0] == [0]
    return run


def assert_same_study(one: Path, other: Path) -> None:
    """The same table byte by byte, the same final parameters bit by bit, and every line of metrics once."""
    assert (one / "runs.csv").read_bytes() == (other / "runs.csv").read_bytes()
    names = sorted(path.name for path in (one / "runs").iterdir())
    assert len(names) == 5 and names == sorted(path.name for path in (other / "runs").iterdir())
    for name in names:
        lines = [
            [json.loads(line) for line in (study / "runs" / name / "metrics.jsonl").read_text().splitlines()]
            for study in (one, other)
        ]
        for all_ in lines:
            assert [line.pop("step") for line in all_] == list(range(1, 13 if "D768" in name else 8))
            for line in all_:  # without how fast it went
                for timing in ("tokens_per_second", "flops_per_second", "data_wait", "save_seconds"):
                    line.pop(timing, None)
        assert lines[0] == lines[1]
        parameters = [checkpoint_arrays(study / "runs" / name / "checkpoint") for study in (one, other)]
        assert len(parameters[0]) == len(parameters[1]) > 5
        for a, b in zip(*parameters, strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def checkpoint_arrays(path: Path) -> list[np.ndarray]:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpointer.restore(path.absolute())["arrays"])]


@pytest.mark.slow
def test_a_study_killed_at_every_kind_of_moment_ends_with_the_same_bits(killed):
    statuses, _ = killed("often", *MOMENTS, "end")
    assert statuses == [-9] * len(MOMENTS) + [0]
    assert_same_study(killed.directory / "whole", killed.directory / "often")
    assert not any((killed.directory / "often" / "cohorts").glob("*"))


@pytest.mark.slow
def test_sigterm_and_a_full_disk_end_the_process_with_a_line_and_cost_nothing(killed):
    statuses, errors = killed("stopped", "asked-to-stop:3", "full-disk:2", "end")
    assert statuses == [75, 2, 0]
    assert "stopped: by SIGTERM; run the same command again to go on" in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "cannot be written (File too large)" in line and str(killed.directory / "stopped") in line
    assert "Traceback" not in errors
    assert_same_study(killed.directory / "whole", killed.directory / "stopped")


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(killed):
    assert killed("damaged", "after-cohort-checkpoint:2")[0] == [-9]
    newest = max((killed.directory / "damaged").glob("cohorts/*/*"), key=lambda path: int(path.name))
    flip_bit(data_file(newest / "state"))
    statuses, errors = killed("damaged", "end")
    assert statuses == [0]
    assert str(newest) in errors and "going back to the checkpoint before it" in errors
    assert_same_study(killed.directory / "whole", killed.directory / "damaged")


def test_a_directory_that_cannot_be_made_is_one_line_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cohorts: cannot be written \(File exists\)") as error:
        checkpoint.save(tmp_path / "file" / "cohorts", {"x": np.zeros(3)})
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 5


def test_orbax_is_imported_with_the_first_checkpoint_alone():
    """It takes a quarter of the time that a command needs to be there, and --help and --dry_run have no use for it."""
    modules = "precision_scaling.train, precision_scaling.study.__main__, precision_scaling.ptq.__main__"
    code = f"import sys, {modules}; print(*(name for name in sys.modules if name.split('.')[0] == 'orbax'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
