"""Command lines of the launch scripts: help and dry runs touch nothing, odd values arrive as they are or are refused.

They run in a copy of the project, with programs on the PATH that write down that they were started and fail.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from odd_values import BREAKS, NUMBERS, TEXTS

ROOT = Path(__file__).parent.parent
STUBS = ["gcloud", "sbatch", "srun", "scancel", "scontrol", "setsid", "git", "tar", "pip"]
STUBS += ["python", "python3", "python3.11", "python3.12", "python3.13"]
STUB = '#!/bin/sh\necho "$0 $*" >>"$CALLS"\nexit 1\n'
SLICE = ["--name=a", "--project=p", "--zone=z", "--poll=0"]
ARRAY = {"TASK_ID": "1", "TASK_MIN": "0", "TASK_MAX": "2", "TASK_COUNT": "3", "TASK_STEP": "1", "JOB_ID": "7"}
JOB = {"SLURM_JOB_ID": "7", **{f"SLURM_ARRAY_{key}": value for key, value in ARRAY.items()}}
# Each would start something, were there no --help or --dry_run.
LINES = {
    "local.sh": ["runs/x", "--config.study.lanes=4"],
    "setup.sh": ["cuda"],
    "slurm_run.sbatch": ["-m", "precision_scaling.train", "--workdir=w"],
    "slurm_study.sbatch": ["--config=x.py", "--workdir=w"],
    "test.sh": ["-m", "not slow", "-x"],
    "tpu_pod.sh": ["run", *SLICE, "--", "-m", "precision_scaling.train", "--workdir=w"],
    "tpu_study.sh": ["run", "--slices=2", *SLICE, "--", "--config=x.py", "--workdir=w"],
    "tpu_worker.sh": ["start", "", "w", "-m", "precision_scaling.train"],
}
SOURCED = {"arguments.sh", "slurm_job.sh"}


class Project:
    """A copy of the project beside the programs that its scripts could start."""

    def __init__(self, home: Path):
        self.home, self.root, self.called = home, home / "project", home / "calls"
        for name in ("launch", "configs"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.py", self.root)
        self.python = self.program(self.root / ".venv" / "bin" / "python")
        for name in STUBS:
            self.program(home / "bin" / name)

    def program(self, path: Path, script: str = STUB) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
        return path

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        private = ("SLURM_", "TPU_", "PYTHON", "WORKERS", "CONFIG", "PRECISION_SCALING_")
        known = {key: value for key, value in os.environ.items() if not key.startswith(private)}
        known |= {"CALLS": str(self.called), "PATH": f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", f"launch/{script}", *arguments],
            cwd=self.root,
            env={**known, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def state(self) -> dict[str, tuple]:
        """Everything on disk: names, modes, times and bytes."""
        paths = sorted(self.root.rglob("*"))
        stats = [path.lstat() for path in paths]
        return {
            str(path): (stat.st_mode, stat.st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path, stat in zip(paths, stats, strict=True)
        }

    def calls(self) -> str:
        return self.called.read_text() if self.called.exists() else ""


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def refused(done: subprocess.CompletedProcess) -> str | None:
    """The one line that a refused command says; None where it was not refused."""
    if done.returncode == 0:
        return None
    assert done.returncode == 2 and done.stdout == "", (done.args, done.stdout, done.stderr)
    (line,) = done.stderr.removesuffix("\n").split("\n")
    assert line.startswith("error: ") and line.isprintable(), line
    return line


def test_every_script_is_tried():
    assert {path.name for path in (ROOT / "launch").iterdir()} == {*LINES, *SOURCED}


@pytest.mark.parametrize("script", LINES)
def test_without_help_or_dry_run_something_is_started(project, script):
    project.run(script, *LINES[script], **JOB)
    deadline = time.monotonic() + 30
    while not project.calls():  # of a worker, in the background
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("word", ["--help", "-h", "--dry_run", "--dry-run"])
@pytest.mark.parametrize("script", LINES)
def test_help_and_dry_run_anywhere_on_the_line_touch_nothing_and_start_nothing(project, script, word):
    before = project.state()
    line = [*LINES[script], "--tasks=2"] if (script, "dry" in word) == ("slurm_study.sbatch", True) else LINES[script]
    outputs = set()
    for position in range(len(line) + 1):
        done = project.run(script, *line[:position], word, *line[position:], **JOB)
        assert (done.returncode, done.stderr) == (0, "")
        outputs.add(done.stdout)
    (output,) = outputs
    if word in ("--help", "-h"):
        assert all(part in output for part in ("Usage: ", "--dry_run", "--help", "\nExample: ", f"launch/{script}"))
        assert max(map(len, output.splitlines())) <= 120
    else:
        assert output and "--dry" not in output
    assert project.state() == before and not project.calls()


@pytest.mark.parametrize("script", sorted(SOURCED))
def test_files_that_are_sourced_say_what_they_are_and_do_nothing(project, script):
    before = project.state()
    for arguments in ([], ["--help"], ["--dry_run"]):
        done = project.run(script, *arguments)
        assert (done.returncode, done.stderr) == (0, "") and "beside" in done.stdout
    assert project.state() == before and not project.calls()


@pytest.mark.parametrize("script", sorted(LINES.keys() - {"test.sh", "slurm_run.sbatch"}))
def test_an_unknown_option_is_one_line(project, script):
    """The two others cannot know the options of pytest and of the command."""
    before, line = project.state(), LINES[script]
    arguments = ["--frobnicate"] if script == "tpu_worker.sh" else [*line[:1], "--frobnicate=1", *line[1:]]
    assert "--frobnicate" in refused(project.run(script, *arguments, **JOB))
    assert project.state() == before and not project.calls()


def test_after_two_dashes_the_options_of_the_tests_are_those_of_pytest(project):
    done = project.run("test.sh", "--dry_run", "-x", "--", "--help", "-k", "--dry_run")
    assert shlex.split(done.stdout.splitlines()[1])[3:] == [
        *["-n", "2", "--dist=worksteal", "-x", "--help", "-k", "--dry_run"]
    ]


STUDY = ["--config=x.py", "--workdir=w"]
NUMBER_PLACES = {
    "local --workers": lambda n: ("local.sh", [f"--workers={n}"], {}),
    "local WORKERS": lambda n: ("local.sh", [], {"WORKERS": n}),
    "slurm --tasks": lambda n: ("slurm_study.sbatch", [*STUDY, "--dry_run", f"--tasks={n}"], {}),
    **{
        f"slurm {key}": lambda n, key=key: ("slurm_study.sbatch", STUDY, {**JOB, f"SLURM_ARRAY_{key}": n})
        for key in ("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_STEP", "TASK_COUNT")
    },
    "pod --retries": lambda n: ("tpu_pod.sh", ["create", *SLICE, f"--retries={n}"], {}),
    "pod --poll": lambda n: ("tpu_pod.sh", ["create", *SLICE, f"--poll={n}"], {}),
    "study --slices": lambda n: ("tpu_study.sh", ["create", *SLICE, f"--slices={n}"], {}),
    "worker logs": lambda n: ("tpu_worker.sh", ["logs", n], {}),
    "worker COPY_SECONDS": lambda n: ("tpu_worker.sh", LINES["tpu_worker.sh"], {"COPY_SECONDS": n}),
}


@pytest.mark.parametrize("place", NUMBER_PLACES)
def test_what_is_no_number_is_refused_before_bash_computes_with_it(project, place):
    before = project.state()
    of_seconds = {"1.5", "1000000001", "99999999999999999999", "08"} if place.endswith("COPY_SECONDS") else set()
    for number in NUMBERS:
        script, arguments, environment = NUMBER_PLACES[place](number)
        if number not in of_seconds:
            assert refused(project.run(script, *arguments, **environment)) is not None, number
    assert project.state() == before and not project.calls()


def last_line(done: subprocess.CompletedProcess, line: int = -1) -> list[str]:
    assert (done.returncode, done.stderr) == (0, "")
    return shlex.split(done.stdout.splitlines()[line])


def remote_command(done: subprocess.CompletedProcess) -> list[str]:
    """The words that a worker's shell reads, of the dry run of a command on a slice."""
    assert done.returncode == 0, done.stderr
    (ssh,) = [line for line in done.stdout.splitlines() if "tpu_worker.sh start" in line]
    remote = next(word for word in shlex.split(ssh) if word.startswith("--command="))
    return shlex.split(remote.split("tpu_worker.sh start ")[1])


# Where any text may stand: what is called with these words, and how they arrive.
TEXT_PLACES = {
    "local": ("local.sh", ["--dry_run"], lambda done: last_line(done, -2)),
    "slurm_run": ("slurm_run.sbatch", ["--dry_run", "-m", "x"], last_line),
    "slurm_study": ("slurm_study.sbatch", ["--dry_run", "--tasks=1"], last_line),
    "test": ("test.sh", ["--dry_run"], last_line),
    "pod": ("tpu_pod.sh", ["run", *SLICE, "--dry_run", "--", "x"], remote_command),
    "study": ("tpu_study.sh", ["run", "--slices=1", *SLICE, "--dry_run", "--"], remote_command),
    "worker": ("tpu_worker.sh", ["start", "", "w", "x", "--dry_run"], last_line),
}


@pytest.mark.parametrize("place", TEXT_PLACES)
def test_any_text_arrives_as_it_is_and_a_line_break_is_refused(project, place):
    script, line, words_of = TEXT_PLACES[place]
    before = project.state()
    given = [f"--config.data.root={text}" for text in TEXTS] + [f"--only={text}" for text in TEXTS]
    arrived = words_of(project.run(script, *line, *given))
    assert [word for word in arrived if word in given] == given
    for text in BREAKS:
        assert "line breaks and control characters" in refused(project.run(script, *line, f"--config.a={text}"))
    assert project.state() == before and not project.calls()


@pytest.mark.parametrize("script", ["slurm_run.sbatch", "tpu_pod.sh", "tpu_worker.sh"])
def test_single_words_of_a_command_arrive_as_they_are(project, script):
    words = [text for text in TEXTS if text != "-h"]
    line = {"slurm_run.sbatch": [], "tpu_pod.sh": ["run", *SLICE, "--"], "tpu_worker.sh": ["start", "", "w"]}[script]
    words_of = remote_command if script == "tpu_pod.sh" else last_line
    assert words_of(project.run(script, "--dry_run", *line, *words))[-len(words) :] == words


def given_to(option: str, line: int = 0):
    """What follows `option` on a line of a dry run."""

    def value(done) -> str:
        (word,) = [word for word in last_line(done, line) if word.startswith(option)]
        return word.removeprefix(option)

    return value


POD = ["create", "--dry_run", *SLICE]
FETCH = ["fetch", "--dry_run", *SLICE]
# Where only some texts may stand: what is called with one, and how it arrives.
NARROW_PLACES = {
    "local WORKDIR": ("local.sh", lambda text: ["--dry_run", text], given_to("--workdir=", -2)),
    "local --workdir": ("local.sh", lambda text: ["--dry_run", f"--workdir={text}"], given_to("--workdir=", -2)),
    "local --config": ("local.sh", lambda text: ["--dry_run", f"--config={text}"], None),
    "setup EXTRAS": ("setup.sh", lambda text: ["--dry_run", f"cuda,{text}"], None),
    "pod --name": ("tpu_pod.sh", lambda text: [*POD, f"--name={text}"], None),
    "study --name": ("tpu_study.sh", lambda text: [*POD, "--slices=1", f"--name={text}"], None),
    "pod --project": ("tpu_pod.sh", lambda text: [*POD, f"--project={text}"], given_to("--project=")),
    "pod --type": ("tpu_pod.sh", lambda text: [*POD, "--runtime=r", f"--type={text}"], given_to("--accelerator-type=")),
    "pod --results": (
        "tpu_pod.sh",
        lambda text: [*FETCH, "--workdir=w", f"--results=gs://b/{text}"],
        lambda done: last_line(done)[4].removeprefix("gs://b/"),
    ),
    "pod --workdir, from results": (
        "tpu_pod.sh",
        lambda text: [*FETCH, "--results=gs://b", f"--workdir={text}"],
        lambda done: last_line(done)[5],
    ),
    "pod --workdir, from a worker": (
        "tpu_pod.sh",
        lambda text: [*FETCH, f"--workdir={text}"],
        lambda done: last_line(done)[6].removeprefix("a:precision_scaling/"),
    ),
}


@pytest.mark.parametrize("place", NARROW_PLACES)
def test_names_and_paths_arrive_as_they_are_or_are_refused(project, place):
    script, line, value_of = NARROW_PLACES[place]
    before, arrived = project.state(), 0
    for text in TEXTS + BREAKS:
        done = project.run(script, *line(text))
        if text == "-h" and line(text)[-1] == text:
            assert "Usage: " in done.stdout
        elif refused(done) is None:
            assert value_of(done) == text
            arrived += 1
    assert (arrived > 0) == (value_of is not None)
    assert project.state() == before and not project.calls()


@pytest.mark.parametrize(
    ("script", "line", "environment", "said"),
    [
        ("local.sh", ["runs/a", "runs/b"], {}, "runs/b: allowed is one workdir, and runs/a is given"),
        ("local.sh", ["--config.study.lanes", "4"], {}, "its value is missing: --config.study.lanes=VALUE"),
        ("local.sh", ["--shard=0/2"], {}, "every process is given its own"),
        ("local.sh", [], {"CONFIG": "mine.py"}, "--config=mine.py: no such file in "),
        ("local.sh", [], {"PRECISION_SCALING_EXTRAS": "cuda12"}, "PRECISION_SCALING_EXTRAS=cuda12: allowed are cuda, "),
        ("local.sh", [], {"PYTHON": "a\nb"}, "line breaks and control characters"),
        ("setup.sh", ["cuda", "tpu"], {}, "allowed is one list of extras, e.g. cuda,tpu"),
        ("setup.sh", ["cuda,"], {}, "EXTRAS=cuda,: allowed are"),
        ("setup.sh", ["cuda"], {"PYTHON": "nowhere/python"}, "PYTHON=nowhere/python: allowed is an interpreter"),
        ("test.sh", [], {"PRECISION_SCALING_EXTRAS": "$(touch hit)"}, "allowed are cuda, "),
        ("slurm_study.sbatch", ["--config=x", "runs/x"], {}, "runs/x: allowed are --config=FILE, "),
        ("slurm_study.sbatch", ["--config=x", "--wrokdir=w"], JOB, "--wrokdir=w: allowed are --config=FILE, "),
        ("tpu_pod.sh", ["status", *SLICE, "--", "-m", "x"], {}, "-m: status takes no command"),
        ("tpu_pod.sh", ["create", *SLICE, "--type="], {}, "--type is missing (or set TPU_TYPE)"),
        ("tpu_pod.sh", ["run", *SLICE, "--results=b/w", "--", "x"], {}, "--results=b/w: allowed is gs://BUCKET/PATH"),
        ("tpu_pod.sh", ["create", *SLICE], {"TPU_RESULTS": "gs://b/w\nx"}, "line breaks and control characters"),
        ("tpu_pod.sh", ["create", *SLICE], {"TPU_RUNTIME": "a\nb"}, "--runtime=a b: allowed"),
        ("tpu_pod.sh", ["run", *SLICE, "--workdir=w", "--", "x"], {}, "the workdir of run is the command's, after --"),
        ("tpu_pod.sh", ["run", *SLICE, "--results=gs://b", "--", "x", "--workdir=~/w"], {}, "without ~"),
        ("tpu_study.sh", ["run", "--slices=3", *SLICE, "--", "--confg=x"], {}, "--confg=x: allowed are --config=FILE"),
        ("tpu_study.sh", ["create", "--slices=3", *SLICE, "--spot"], {}, "--spot: no such option"),
        ("tpu_worker.sh", ["start", "gs://b"], {}, "start: allowed is start RESULTS WORKDIR PYTHON ARGUMENTS"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(project, script, line, environment, said):
    before = project.state()
    assert said in refused(project.run(script, *line, **environment))
    assert project.state() == before and not project.calls()


@pytest.mark.parametrize("action", ["create", "status", "logs", "delete"])
def test_what_other_actions_need_may_be_given_to_all(project, action):
    environment = {"TPU_NAME": "a", "TPU_PROJECT": "p", "TPU_ZONE": "z", "TPU_RESULTS": "gs://b/w"}
    for line in (["tpu_pod.sh", action], ["tpu_study.sh", action, "--slices=1", "--workdir=w"]):
        assert "gcloud compute tpus" in project.run(*line, "--dry_run", **environment).stdout


def test_the_extras_are_those_of_the_package(project):
    tree = ast.parse((ROOT / "setup.py").read_text())
    keywords = {node.arg: node.value for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    told = re.search(r"EXTRAS +.*: (.+)", project.run("setup.sh", "--help").stdout)[1]
    assert told.split(", ") == [key.value for key in keywords["extras_require"].keys]


def test_the_options_of_a_study_are_those_that_it_has(run_command, project):
    """All but those of its dry run, of several processes by hand, and what the scripts give it themselves."""
    told = run_command("precision_scaling.study", "--help").stdout
    there = set(re.findall(r"^  --(?:\[no\])?([\w.]+)", told, re.MULTILINE))
    own = {"shard", "dry_run", "settings", "topology", "coordinator_address", "num_processes", "process_id"}
    line = [f"--{name}" if name == "distributed" else f"--{name}=1" for name in sorted(there - own)]
    done = project.run("slurm_study.sbatch", "--dry_run", "--tasks=1", *line)
    assert last_line(done)[3:-1] == line
    for name in sorted(own - {"dry_run"}):
        assert refused(project.run("slurm_study.sbatch", "--dry_run", "--tasks=1", f"--{name}=1"))
    (line,) = re.findall(r"allowed are (.*)", refused(project.run("slurm_study.sbatch", "--x")))
    assert {word.removeprefix("--").split("=")[0] for word in line.split(", ")} == there - own


# An interpreter of the right version whose venv cannot install anything before it is mended.
PYTHON = """#!/bin/sh
case "$*" in
  --version) echo Python 3.11.0 ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install "*) echo "pip: no network" >&2; [ -e mended ] ;;
  -c*) ;;
  *) echo "ran $*" ;;
esac
"""


@pytest.fixture
def bare(project):
    """The project without .venv, on a machine whose Python is the one above."""
    shutil.rmtree(project.root / ".venv")
    project.program(project.home / "bin" / "python3", PYTHON)
    return project


def test_an_environment_that_was_not_installed_is_made_again(bare):
    for _ in range(2):
        assert bare.run("setup.sh").returncode == 1
        assert not (bare.root / ".venv" / "installed").exists()
    (bare.root / "mended").touch()
    assert "setting up" in bare.run("setup.sh").stdout
    assert bare.run("setup.sh").stdout == ""  # it is there


def test_a_worker_whose_environment_cannot_be_installed_fails_and_tries_again(bare):
    bare.run("tpu_worker.sh", "job", "", "w", "-m", "x")
    assert bare.run("tpu_worker.sh", "status").stdout.endswith(": failed with status 1\n")
    (bare.root / "mended").touch()
    assert bare.run("tpu_worker.sh", "job", "", "w", "-m", "x").stdout.endswith("ran -m x\n")
    assert bare.run("tpu_worker.sh", "status").stdout.endswith(": done\n")


def test_a_worker_that_cannot_read_its_results_does_not_begin_anew(project):
    gcloud = '#!/bin/sh\necho "$@" >>"$CALLS"\n[ "$2" = rsync ] || { echo "ERROR: no network" >&2; exit 1; }\n'
    project.program(project.home / "bin" / "gcloud", gcloud)
    python = project.program(project.home / "program", "#!/bin/sh\necho begun\n")
    done = project.run("tpu_worker.sh", "job", "gs://b/w", "w", "x", PYTHON=str(python))
    assert "ERROR: no network" in done.stderr and "begun" not in done.stdout
    assert project.run("tpu_worker.sh", "status").stdout.endswith(": failed with status 1\n")
    assert project.calls() == "storage ls gs://b/w\n"


def test_the_study_of_this_machine_goes_on_to_the_report_and_ends_with_the_status_of_its_workers(bare):
    (bare.root / "mended").touch()
    done = bare.run("local.sh", "runs/x y", "--workers=2", "--config.data.root=it's $(touch hit)")
    assert done.returncode == 0, done.stderr
    study = "ran -m precision_scaling.study --config=configs/study_cpu.py --workdir=runs/x y"
    override = "--config.data.root=it's $(touch hit)"
    said = [line for line in done.stdout.splitlines() if line.startswith("ran")]
    report = "ran -m analysis.report --runs=runs/x y/runs.csv --out=runs/x y/report"
    assert said == [f"{study} {override} --shard=0/2", f"{study} {override}", report]
    assert (bare.root / "runs/x y/worker1.log").read_text() == f"{study} {override} --shard=1/2\n"
    stops = PYTHON.replace("  -c*)", "  *--shard=1/2) echo stopped; exit 75 ;;\n  -c*)")
    bare.program(bare.root / ".venv" / "bin" / "python", stops)
    done = bare.run("local.sh", "runs/x y", "--workers=2")
    assert done.returncode == 75 and done.stderr == "stopped\n"
