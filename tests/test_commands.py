"""What the commands say to a wrong word: exit status 2, one line on stderr, nothing written. And to a right one."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from precision_scaling.errors import UserError
from precision_scaling.ptq import __main__
from precision_scaling.runtime import cli
from precision_scaling.runtime.cli import help_text
from precision_scaling.runtime.stopping import Stopped
from precision_scaling.study.workspace import reopen_workspace

ROOT = Path(__file__).parent.parent


def said(done, workdir) -> str:
    """The one line on stderr of a command that was refused."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not workdir.exists()
    return line


@pytest.mark.slow
def test_a_misspelt_option(run_command, tmp_path):
    workdir = tmp_path / "w"
    arguments = ("precision_scaling.train", "--config=configs/base.py", f"--workdir={workdir}")
    assert "widht" in said(run_command(*arguments, "--config.model.widht=3"), workdir)


def test_bits_that_cannot_be_and_files_that_are_no_configs(tmp_path):
    assert __main__._bits(["4", "3", "4"]) == [3, 4]
    for texts in (["3", "1"], ["9"], ["4.5"], ["four"], [""]):
        with pytest.raises(UserError, match="whole numbers from 2 to 8"):
            __main__._bits(texts)
    for content in ('{"config":', "{}", '{"config": 3, "corpus": ""}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json: not a config") as error:
            reopen_workspace(tmp_path)
        assert "\n" not in str(error.value)


HOSTS = {"coordinator_address", "num_processes", "process_id", "[no]distributed"}
# Some in every module that defines any; a command may get more.
OPTIONS = {
    "precision_scaling.train": {"config", "config.key", "workdir", "time_limit", "profile", *HOSTS},
    "precision_scaling.study": {"config", "config.key", "workdir", "time_limit", "profile", *HOSTS}
    | {"shard", "only", "[no]dry_run", "rows", "settings"},
    "precision_scaling.ptq": {
        "workdir",
        "method",
        "bits",
        "[no]save",
        "group_size",
        "[no]asymmetric",
        "[no]full_range",
        "[no]act_order",
    }
    | {"[no]clip", "smoothing", "granularity"},
    "precision_scaling.layer_stats": {"workdir", "run", "precision", "sequences"},
    "precision_scaling.huggingface": {
        "config",
        "config.key",
        "workdir",
        "model",
        "tokens",
        "sequence_length",
        "run",
        "out",
    },
    "analysis.compare": {"runs", "out", "laws", "where", "tied", "starts", "seed"},
    "analysis.report": {"runs", "out", "laws", "where", "bootstrap", "seed"},
}


def listed(help_text: str) -> set[str]:
    return set(re.findall(r"^  --([\w.\[\]-]+)", help_text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("module", OPTIONS)
def test_help_anywhere_lists_all_options_of_a_command_and_does_nothing_else(module, tmp_path):
    workdir = tmp_path / "w"
    command = [sys.executable, "-m", module, f"--workdir={workdir}", "--help", "--config=configs/none.py"]
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}  # asking for a device would fail
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and not workdir.exists()
    assert f"python -m {module} " in done.stdout.split("Options:")[0]
    assert listed(done.stdout) >= OPTIONS[module]
    assert not listed(done.stdout) & {"verbosity", "[no]logtostderr", "[no]run_with_pdb", "flagfile", "undefok"}


def test_help_lists_what_is_given_in_one_list_without_files_of_this_machine():
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where.", flag_values=values)
    flags.DEFINE_bool("again", False, "Whether.", short_name="a", flag_values=values)
    expected = "What for.\n\nOptions:\n  -a,--[no]again: Whether.\n    (default: 'false')\n  --workdir: Where."
    assert help_text("\nWhat for.\n", values) == expected


def test_every_command_has_the_same_frame():
    """So --help of each is the one that is tried above."""
    sources = [path for name in ("precision_scaling", "analysis", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    texts = {path: path.read_text().split('\nif __name__ == "__main__":\n') for path in sources}
    ends = {path: parts[1] for path, parts in texts.items() if len(parts) > 1}
    del ends[ROOT / "precision_scaling" / "data" / "workers.py"]  # a process of its own, and no command
    assert len(ends) >= 20
    for path, end in ends.items():
        called = texts[path][0] if end == "    sys.exit(command())\n" else end
        assert "cli.run" in called, path


def frame(*argv: str, required=(), defaults=()) -> tuple[int, dict]:
    """Exit status and values of a command with a number, a switch and a text."""
    values = flags.FlagValues()
    flags.DEFINE_float("serve_bits", 0.0, "Bits.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Whether.", flag_values=values)
    flags.DEFINE_string("fit", None, "Which.", flag_values=values)

    def main() -> None:
        if values.fit == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "runs.csv")
        if values.fit == "stopped":
            raise Stopped("by SIGTERM")
        if values.fit == "interrupted":
            raise KeyboardInterrupt

    return cli.run(main, values, ["command", *argv], required, defaults), values.flag_values_dict()


def test_hyphens_and_underscores_in_the_name_of_an_option_are_the_same(tmp_path):
    (tmp_path / "flags").write_text("--serve-bits=4\n--dry-run\n")
    wanted = {"serve_bits": 4.0, "dry_run": True, "fit": "a-b"}
    for words in (["--serve-bits=4", "--dry-run"], ["-serve_bits", "4", "--dry_run"], [f"--flagfile={tmp_path}/flags"]):
        assert frame("--fit=a-b", *words) == (0, wanted)
    assert frame("--nodry-run") == (0, {"serve_bits": 0.0, "dry_run": False, "fit": None})


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--serve-bit=4",), 2, "error: Unknown command line flag 'serve-bit'"),
        (("--serve_bits=nan",), 2, "error: --serve_bits=nan: allowed is a finite number"),
        (("--serve_bits=a\nb",), 2, "error: the argument '--serve_bits=a b': allowed is one line"),
        (("4",), 2, "error: unexpected argument '4'; options begin with --"),
        (("--flagfile=/nowhere",), 2, "/nowhere"),
        (("--fit=",), 2, "error: --fit is required"),
        (("--fit=full",), 2, "error: runs.csv: No space left on device; what was measured is kept"),
        (("--fit=stopped",), 75, "stopped: by SIGTERM; run the same command again"),
        (("--fit=interrupted",), 130, "interrupted: run the same command again"),
    ],
)
def test_a_command_that_cannot_go_on_says_why_in_one_line(arguments, status, words, capsys):
    assert frame(*arguments, required=("fit",))[0] == status
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and printed.err.count("\n") == 1


def test_an_argument_by_default_counts_where_the_option_is_not_given():
    assert frame(defaults=("--fit=paper",))[1]["fit"] == "paper"
    assert frame("--fit", "own", defaults=("--fit=paper",))[1]["fit"] == "own"


def test_a_dry_run_prints_the_plan_and_writes_nothing(run_command, tmp_path):
    workdir = tmp_path / "w"
    done = run_command("precision_scaling.study", "--config=configs/paper.py", f"--workdir={workdir}", "--dry_run")
    assert done.returncode == 0, done.stderr
    *cohorts, total = done.stdout.splitlines()[1:]
    assert total.startswith("548 runs in") and "228 runs are quantized" in total
    assert sum(int(line.split()[1]) for line in cohorts) == 548
    per_step = 256 * 1024
    budgets = [1_500_000_000, 3_000_000_000, 6_000_000_000, 13_000_000_000, 26_000_000_000]
    whole = [budget // per_step * per_step for budget in budgets]
    # A size has a bf16 run at each budget, ten bits of three parts at four of them, six tied precisions at two.
    tokens = 4 * (sum(whole) + 30 * sum(whole[:4]) + 6 * sum(whole[:2]))
    assert f"{tokens:,} tokens" in total
    flops = re.search(r"([\d.]+e\+\d+) FLOPs", total)
    # 6·N·D with N from 30 to 220 million lies within a factor of 2 of the whole, heads and attention included.
    assert 0.5 < float(flops[1]) / (6 * tokens / 4 * (30e6 + 60e6 + 110e6 + 220e6)) < 2
    assert not workdir.exists()
