"""Outputs of the analysis commands: known to be writable before the work, and printed where they are not after it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from precision_scaling.errors import UserError
from precision_scaling.runtime.outputs import output, writing

ROOT = Path(__file__).parent.parent


def test_an_output_that_can_be_written_is_its_path_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("old")
    for text in ("new.json", "old.json", "deep/er/new.json", str(tmp_path / "a" / "b")):
        assert output("out", text) == Path(text)
    assert output("out", "new", ("a.csv", "b.json")) == Path("new")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output("out", "~/x.json") == tmp_path / "x.json"
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_an_input_is_no_output_under_any_of_its_names(tmp_path):
    runs, link = tmp_path / "runs.csv", tmp_path / "link.csv"
    runs.write_text("N,D,loss\n")
    link.symlink_to(runs)
    for name in (runs, link, tmp_path / "x" / ".." / "runs.csv"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is what the command reads"):
            output("out", str(name), reads=[str(runs)])
    with pytest.raises(UserError, match="is what the command reads"):
        output("out", str(tmp_path), ("compare.csv", "runs.csv"), reads=[str(runs)])


def test_what_cannot_be_written_after_all_is_printed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written: Not a directory; what should have stood there is printed"),
        writing("out", tmp_path / "file" / "x", instead=lambda: '{"N": 3}'),
    ):
        (tmp_path / "file" / "x").write_text("")
    assert capsys.readouterr().out.strip() == '{"N": 3}'


@pytest.mark.slow
def test_a_disk_that_fills_while_a_plan_is_made_loses_nothing(tmp_path):
    """A limit on the size of files stands for it: empty ones can be made, this one cannot be written."""

    plan = [sys.executable, "-B", "-m", "analysis.plan", "--fit=paper", "--flops=1e18", f"--out={tmp_path}/plan.json"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *plan],  # one block: 512 or 1,024 bytes
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "plan.json cannot be written: File too large; what should have stood there is printed instead" in line
    text, _, printed = done.stdout.partition("\n{")
    assert text.startswith("Plan by precision + ptq")
    assert json.loads("{" + printed)["P"] == pytest.approx(7.0, abs=0.01)
    assert not list(tmp_path.iterdir())
