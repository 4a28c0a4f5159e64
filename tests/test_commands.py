"""What the commands say to a wrong word: exit status 2, one line on stderr, nothing written. And to a right one."""

import re

import pytest

from precision_scaling import bench as bench_lib
from precision_scaling.errors import UserError
from precision_scaling.ptq import __main__ as ptq_command


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


@pytest.mark.slow
def test_other_mistakes_on_the_command_line(run_command, tmp_path):
    workdir = tmp_path / "w"
    train = ("precision_scaling.train", "--config=configs/base.py", f"--workdir={workdir}")
    assert "workdri" in said(run_command(*train, "--workdri=x"), workdir)
    assert "int1" in said(run_command(*train, "--config.precision.weights=int1"), workdir)
    missing = ("precision_scaling.train", "--config=configs/none.py", f"--workdir={workdir}")
    assert "none.py" in said(run_command(*missing), workdir)
    assert "--config" in said(run_command("precision_scaling.train", f"--workdir={workdir}"), workdir)
    single = ("precision_scaling.study", "--config=configs/base.py", f"--workdir={workdir}")
    assert "study.grid" in said(run_command(*single), workdir)
    assert "no config.json there" in said(run_command("precision_scaling.ptq", f"--workdir={workdir}"), workdir)


def test_bits_that_cannot_be_and_files_that_are_no_configs(tmp_path):
    assert ptq_command._bits(["4", "3", "4"]) == [3, 4]
    for texts in (["3", "1"], ["9"], ["4.5"], ["four"], [""]):
        with pytest.raises(UserError, match="whole numbers from 2 to 8"):
            ptq_command._bits(texts)
    for content in ('{"config":', "{}", '{"config": 3, "corpus": ""}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json: not a config") as error:
            bench_lib.reopen_bench(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_help_says_what_a_command_does(run_command):
    for module, word in (("train", "--workdir"), ("study", "dry_run"), ("ptq", "--bits")):
        done = run_command(f"precision_scaling.{module}", "--help")
        assert "Traceback" not in done.stderr and word.strip("-") in done.stdout
        assert done.returncode == 0


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
