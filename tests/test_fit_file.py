"""fit.json and the command that writes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import fit as analysis_fit
from analysis import laws
from analysis.fitting.fit import Fit, FitError, load
from analysis.laws import synthetic

pytestmark = pytest.mark.usefixtures("simple_loops")

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "analysis.fit", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_the_command_writes_the_contract_and_prints_what_was_left_out(tmp_path):
    table = synthetic.table("chinchilla", noise=0.005)
    rows = [f"{n:.0f},{d:.0f},{loss}" for n, d, loss in zip(table["N"], table["D"], table["loss"], strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["N,D,loss", *rows, "1e6,1e7,nan"]) + "\n")
    out = tmp_path / "deep" / "fit.json"
    done = run(f"--runs={tmp_path}/runs.csv", "--law=chinchilla", "--bootstrap=50", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "1 row left out: 1 loss is empty or NaN" in done.stdout
    raw = json.loads(out.read_text())
    contract = ["law", "params", "ci", "r2", "objective", "n", "starts", "seconds", "columns"]
    assert list(raw)[: len(contract)] == contract
    assert raw["n"] == 20 and raw["columns"] == ["N", "D"] and list(raw["params"]) == ["A", "alpha", "B", "beta", "E"]
    loaded = load(out)
    assert loaded.predict(N=1e6, D=1e7) == pytest.approx(laws.predict("chinchilla", raw["params"], N=1e6, D=1e7))
    assert Fit.from_json(loaded.to_json()) == loaded
    assert [p.name for p in out.parent.iterdir()] == ["fit.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--law=chinchilla", "--out=x.json"], "--runs is required"),
        (["--runs=nothing.csv", "--law=chinchilla", "--out=x.json"], "no table at nothing.csv"),
        (["--runs=nothing.csv", "--law=chinchila", "--out=x.json"], "unknown law 'chinchila'"),
        (["--runs=a", "--law=ptq", "--out=b", "--fixed=A"], "--fixed=A: allowed is name=value"),
        (["--runs=a", "--law=ptq", "--out=b", "--bootstrap=many"], "bootstrap"),
    ],
)
def test_the_command_refuses_mistakes_in_one_line(capsys, arguments, words):
    saved = analysis_fit.FLAGS.flag_values_dict()
    assert analysis_fit.command(["fit", *arguments]) == 2
    for name, value in saved.items():
        analysis_fit.FLAGS[name].value = value
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"law": "ptq"}', '{"law": "ptq", "params": {"C_T": "x"}}', '{"law": "x", "params": {}}']
)
def test_a_file_that_is_no_fit_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(FitError, match="is not a fit") as caught:
        load(tmp_path / "fit.json")
    assert "\n" not in str(caught.value)
