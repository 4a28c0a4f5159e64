"""SLURM scripts: what their tasks run, by the dry run always and under a real SLURM where there is one."""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from odd_values import TEXTS

ROOT = Path(__file__).parent.parent
STUDY, RUN = ("launch/slurm_study.sbatch", "launch/slurm_run.sbatch")
AWKWARD = ["--config=my study.py", "--workdir=w", *(f"--config.data.root={text}" for text in TEXTS)]


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTHON"))}
    command = ["bash", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**outside, **environment}, capture_output=True, text=True, timeout=60)


def test_the_dry_run_of_a_study_prints_what_each_task_runs():
    done = bash(STUDY, "--dry_run", "--tasks=3", *AWKWARD)
    assert done.returncode == 0
    study = [".venv/bin/python", "-m", "precision_scaling.study", *AWKWARD]
    assert list(map(shlex.split, done.stdout.splitlines())) == [[*study, f"--shard={i}/3"] for i in range(3)]


def test_the_dry_run_of_a_run_prints_its_step():
    done = bash(RUN, "--dry_run", "-m", "precision_scaling.train", *AWKWARD, "", PYTHON="/opt/my python")
    step = ["srun", "--kill-on-bad-exit=1", "/opt/my python", "-m", "precision_scaling.train", *AWKWARD, ""]
    assert shlex.split(done.stdout) == step


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (STUDY, [], "the study is missing"),
        (STUDY, ["--config=x"], "submit it with sbatch --array"),
        (STUDY, ["--config=x", "--shard=0/2"], "--shard=0/2: every process"),
        (STUDY, ["--config=x", "--dry_run"], "--tasks=N is missing"),
        (STUDY, ["--config=x", "--tasks=8"], "sbatch has --array=0-7"),
        (RUN, [], "the command is missing"),
        (RUN, ["-m", "precision_scaling.train"], "submit it with sbatch"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, said):
    done = bash(script, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line


def array(task: int, first: int, last: int, count: int, step: int = 1) -> dict[str, str]:
    names = {"TASK_ID": task, "TASK_MIN": first, "TASK_MAX": last, "TASK_COUNT": count, "TASK_STEP": step}
    return {"SLURM_ARRAY_JOB_ID": "7", **{f"SLURM_ARRAY_{key}": str(value) for key, value in names.items()}}


def test_the_tasks_of_any_regular_array_cover_the_study():
    def shard(**variables):
        return bash(STUDY, "--config=x", "--workdir=w", PYTHON="/bin/echo", **variables).stdout.split()[-1]

    assert [shard(**array(task, 0, 2, 3)) for task in (0, 1, 2)] == [f"--shard={i}/3" for i in range(3)]
    assert [shard(**array(task, 3, 9, 4, 2)) for task in (3, 5, 7, 9)] == [f"--shard={i}/4" for i in range(4)]
    assert shard(**array(5, 5, 5, 1)) == "--shard=0/1"  # one task alone does all that is missing
    done = bash(STUDY, "--config=x", PYTHON="/bin/echo", **array(4, 0, 4, 3))
    assert done.returncode == 2 and "--array=0-2" in done.stderr


def test_a_task_that_fails_fails_the_job_and_a_missing_interpreter_is_named():
    assert bash(STUDY, "--config=x", PYTHON="/bin/false", **array(0, 0, 0, 1)).returncode == 1
    done = bash(STUDY, "--config=x", PYTHON="nowhere/python", **array(0, 0, 0, 1))
    assert done.returncode == 2 and "nowhere/python: no such file" in done.stderr


def executable(path: Path, script: str) -> Path:
    path.write_text(script)
    path.chmod(0o755)
    return path


# An interpreter that, asked to stop, saves and ends as a killed process does; a second run of it finds that and ends.
SAVES = """#!/bin/sh
[ ! -e "{saved}" ] || exit 0
trap 'echo "$@" >"{saved}"; exit 143' TERM
touch "{started}"
while true; do sleep 0.1; done
"""


@pytest.mark.parametrize("script", [STUDY, RUN])
def test_the_copy_that_slurm_runs_finds_the_rest_where_it_was_submitted(tmp_path, script):
    copy = shutil.copy(ROOT / script, tmp_path / "slurm_script")
    arguments = ["--dry_run", "--tasks=1", "--config=x"] if script == STUDY else ["--dry_run", "x"]
    done = bash(str(copy), *arguments)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == bash(script, *arguments).stdout
    lost = subprocess.run(["bash", copy, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert lost.returncode == 2 and lost.stdout == ""
    (line,) = lost.stderr.splitlines()
    assert line == f"error: no launch/slurm_job.sh in {tmp_path}: submit from the project's directory"


def test_asked_to_stop_a_task_saves_and_goes_back_into_the_queue(tmp_path):
    saved, started, calls = (tmp_path / name for name in ("saved", "started", "calls"))
    python = executable(tmp_path / "python", SAVES.format(saved=saved, started=started))
    executable(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" >>"{calls}"\nkill -KILL $PPID\n')  # as SLURM would
    environment = {**os.environ, **array(1, 0, 1, 2), "PYTHON": str(python)}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.Popen(["bash", STUDY, "--config=x"], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    while not started.exists():
        time.sleep(0.05)
    job.terminate()
    job.communicate(timeout=30)
    assert saved.read_text() == "-m precision_scaling.study --config=x --shard=1/2\n"
    assert calls.read_text() == "requeue 7_1\n"


def test_a_task_that_was_done_when_it_was_asked_to_stop_stays_so(tmp_path):
    saved, started, calls = (tmp_path / name for name in ("saved", "started", "calls"))
    python = executable(tmp_path / "python", SAVES.format(saved=saved, started=started).replace("exit 143", "exit 0"))
    executable(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" >>"{calls}"\nkill -KILL $PPID\n')
    environment = {**os.environ, **array(1, 0, 1, 2), "PYTHON": str(python)}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.Popen(["bash", STUDY, "--config=x"], cwd=ROOT, env=environment)
    wait_for(started.exists)
    job.terminate()
    assert job.wait(timeout=30) == 0
    assert saved.exists() and not calls.exists()


@pytest.fixture(scope="module")
def slurm():
    """Skips where no SLURM with a free node answers."""
    if not (shutil.which("sbatch") and shutil.which("sinfo")):
        pytest.skip("no SLURM here")
    try:
        nodes = subprocess.run(["sinfo", "-h", "-t", "idle,mixed"], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        pytest.skip("SLURM does not answer")
    if nodes.returncode or not nodes.stdout.strip():
        pytest.skip("SLURM has no free node")


def sbatch(tmp_path: Path, python: Path, *arguments: str) -> str:
    command = ["sbatch", "--parsable", "--mem=100M", f"--output={tmp_path}/%a.log", *arguments]
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_under_slurm_the_tasks_of_an_array_share_the_study(tmp_path):
    python = executable(tmp_path / "python", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    sbatch(tmp_path, python, "--array=0-1", STUDY, *AWKWARD)
    expected = ["-m", "precision_scaling.study", *AWKWARD]
    for i in (0, 1):
        log = tmp_path / f"{i}.log"
        wait_for(lambda log=log: log.exists() and "--shard" in log.read_text())
        assert log.read_text().splitlines() == [*expected, f"--shard={i}/2"]


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_under_slurm_a_run_asked_to_stop_saves_and_is_queued_again(tmp_path):
    saved, started = tmp_path / "saved", tmp_path / "started"
    python = executable(tmp_path / "python", SAVES.format(saved=saved, started=started))
    job = sbatch(tmp_path, python, RUN, "-m", "precision_scaling.train", "--workdir=w")
    try:
        wait_for(started.exists)
        subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
        wait_for(saved.exists)
        assert saved.read_text() == "-m precision_scaling.train --workdir=w\n"
        describe = ["scontrol", "show", "job", job]
        wait_for(lambda: "Restarts=1" in subprocess.run(describe, capture_output=True, text=True).stdout)
    finally:
        subprocess.run(["scancel", job], check=False)
