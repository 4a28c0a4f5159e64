"""Several processes as one, over the loopback: the same curve, a checkpoint on other numbers of them, one that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.runtime import hosts
from precision_scaling.study import locks
from tests.same_process import do

ROOT = Path(__file__).parent.parent

CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.data.update({data!r})
    c.update_from_flattened_dict({options!r})
    c.study.grid.all = base.grid(("25k",), (128 * 24,), ("bf16", "w4"), ptq=True)
    return c
"""


class Processes:
    """The study command in two or more processes that work together."""

    def __init__(self, config: Path, workdir: Path, count: int, *more: str):
        with socket.create_server(("localhost", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
        self.running = []
        for i in range(count):
            arguments = [f"--config={config}", f"--workdir={workdir}", *more]
            arguments += [f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={i}"]
            process = subprocess.Popen(
                [sys.executable, "tests/quick_command.py", "precision_scaling.study", *arguments],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.running.append(process)

    def wait(self) -> list[tuple[int, str]]:
        """(exit status, stderr) of each."""
        said = [process.communicate(timeout=300)[1] for process in self.running]
        return [(process.returncode, text) for process, text in zip(self.running, said, strict=True)]


def losses(workdir: Path) -> dict[str, list[float]]:
    found = {}
    for path in workdir.glob("runs/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        found[path.parent.name] = [line["loss"] for line in lines]
    return found


def wait_for_step(workdir: Path, step: int, processes: Processes) -> None:
    """Returns once a run has come to that step and its checkpoint is there."""
    for _ in range(3000):
        assert all(process.poll() is None for process in processes.running), processes.wait()
        if any(len(values) >= step for values in losses(workdir).values()) and any(
            workdir.glob("cohorts/*/*/lanes.json")
        ):
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {workdir}")


def rows(workdir: Path) -> list[list[str]]:
    return [line.split(",")[:8] for line in (workdir / "runs.csv").read_text().splitlines()]


@pytest.mark.slow
def test_processes_come_and_go_and_the_curve_is_that_of_one(tiny_config, data_options, tmp_path, quick_compile):
    config = tiny_config(
        train__log_every=1, train__checkpoint_seconds=0.0, train__batch_size=8, train__steps_per_dispatch=2
    ).to_dict()
    flat = {
        f"{section}.{name}": value
        for section in ("model", "train", "evaluate", "ptq")
        for name, value in config[section].items()
    }
    flat |= {"study.lanes": 2, "compilation_cache": config["compilation_cache"]}
    path, workdir, whole = tmp_path / "study.py", tmp_path / "shared", tmp_path / "whole"
    path.write_text(CONFIG.format(data=data_options, options=flat))

    study = ("precision_scaling.study", f"--config={path}")
    seldom = "--config.train.checkpoint_seconds=1000"
    do(*study, f"--workdir={whole}", seldom)
    assert [len(values) for values in losses(whole).values()] == [24, 24]

    # Four processes, of which one is asked to stop: all do, after a checkpoint that each has written its part of. Two
    # and two stand for slices: parameters are split inside of each, the batch over both.
    four = Processes(
        path, workdir, 4, "--config.mesh.slices=2", "--config.mesh.fsdp=2", "--config.train.microbatches=auto"
    )
    wait_for_step(workdir, 4, four)
    four.running[2].send_signal(signal.SIGTERM)
    ended = four.wait()
    assert [status for status, _ in ended] == [75] * 4, ended
    done = max(map(len, losses(workdir).values()))
    assert 4 <= done < 24
    assert any("save_seconds" in path.read_text() for path in workdir.glob("runs/*/metrics.jsonl"))

    # Two go on from it, until one is killed in the middle of a step: the other ends soon, and says why.
    two = Processes(path, workdir, 2)
    wait_for_step(workdir, done + 2, two)
    two.running[1].kill()
    killed = time.monotonic()
    (status, said), _ = two.wait()
    assert time.monotonic() - killed < 2 * hosts.HEARTBEAT_SECONDS
    if status == 75:  # the broken connection was seen
        assert "error: process 0 of 2: another process of the run is gone" in said and "Traceback" not in said
    else:  # it was in no step, but waiting: JAX missed a heartbeat
        assert status == -signal.SIGABRT and "another task died" in said
    assert done + 2 <= max(map(len, losses(workdir).values())) < 24

    # What they left is finished by one.
    do(*study, f"--workdir={workdir}", seldom)
    for run, expected in losses(whole).items():
        np.testing.assert_allclose(losses(workdir)[run], expected, rtol=1e-5)
    assert len(rows(workdir)) == len(rows(whole)) == 1 + 2 + 2 * 2
    for row, expected in zip(rows(workdir)[1:], rows(whole)[1:], strict=True):
        assert row[:7] == expected[:7]
        assert float(row[7]) == pytest.approx(float(expected[7]), rel=1e-4)
    assert not any(workdir.glob("cohorts/*"))


def test_flags_that_do_not_go_together_are_one_line(run_command, tmp_path):
    for wrong, named in ((["--num_processes=2"], "--coordinator_address"),):
        done = run_command("precision_scaling.train", "--config=configs/base.py", f"--workdir={tmp_path / 'w'}", *wrong)
        assert done.returncode == 2 and not (tmp_path / "w").exists()
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and named in line


def test_two_workers_of_one_share_or_of_shares_that_meet_are_refused(tmp_path):
    with locks.hold(tmp_path, (0, 2)):
        with locks.hold(tmp_path, (1, 2)):
            pass
        for shard in ((0, 2), (0, 1), (2, 4), (1, 3)):
            refused = pytest.raises(UserError, match="another process is at work on --shard=0/2")
            with refused as error, locks.hold(tmp_path, shard):
                pass
            assert "\n" not in str(error.value)
        with locks.hold(tmp_path, (1, 4)):
            pass
    with locks.hold(tmp_path, (0, 1)):
        pass
