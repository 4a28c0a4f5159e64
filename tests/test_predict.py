"""Predictions of rows that no fit has seen: measured or planned, with intervals; and rows that no fit describes."""

import csv
import dataclasses

import numpy as np
import pytest

from analysis import laws, predict
from analysis import table as tables
from analysis.fitting import prediction
from analysis.fitting.fit import Fit, fit
from analysis.fitting.options import FitError, Options
from analysis.laws import synthetic
from analysis.predict import FLAGS

pytestmark = pytest.mark.usefixtures("simple_loops")

LOSS = {"A": 400.0, "alpha": 0.5, "B": 300.0, "beta": 0.25, "E": 1.5}  # 8.5 at N 1e4, D 1e8
DELTA = {"C": 0.5, "gamma_D": 0.25, "gamma_N": 0.5}  # .5 s_post^2 there


def known(law, params, **more):
    return dataclasses.replace(
        Fit.from_json(f'{{"law": "{law}", "params": {{}}}}'), params=params, values=params, **more
    )


def planned(**columns):
    count = len(columns["P_post"])
    rows = {"run": ["a"] * count, "N": [1e4] * count, "D": [1e8] * count, "loss": [1.0] * count, **columns}
    table = tables.from_columns(rows)
    return dataclasses.replace(
        table, columns={**table.columns, "loss": np.array(columns.get("loss", [np.nan] * count))}
    )


def test_planned_rows_are_predicted_by_the_fit_that_describes_them():
    rows = planned(P_post=[np.nan, 3.0, 2.0], P_w=[16.0, 16.0, 4.0])
    found = prediction.predict((known("chinchilla", LOSS), known("ptq_noise", DELTA)), rows)
    np.testing.assert_allclose(found.predicted, [8.5, 8.5 + 0.5 / 9, np.nan])
    assert list(found.before_from) == ["", "chinchilla", ""] and found.note[2].startswith("trained below 16 bits")
    assert np.isnan(found.measured).all() and np.isnan(found.low).all()
    alone = prediction.predict((known("ptq_noise", DELTA),), rows)
    assert np.isnan(alone.predicted).all()
    assert (
        alone.note[0] == "no fit given of the loss before PTQ" and "no fit is given that predicts it" in alone.note[1]
    )


def test_delta_is_added_to_the_measured_loss_where_the_run_has_one():
    rows = planned(P_post=[np.nan, 3.0], loss=[9.0, 9.1])
    both = (known("chinchilla", LOSS), known("ptq_noise", DELTA))
    found = prediction.predict(both, rows)
    np.testing.assert_allclose(found.predicted, [8.5, 9 + 0.5 / 9])
    np.testing.assert_allclose(found.error, [-0.5, 0.5 / 9 - 0.1])
    assert found.before_from[1] == "measured"
    assert prediction.predict(both, rows, before="predicted").predicted[1] == pytest.approx(8.5 + 0.5 / 9)


def test_fits_of_served_losses_predict_only_their_bits():
    served = dataclasses.replace(known("chinchilla", LOSS), serve_bits=4.0)
    found = prediction.predict((served,), planned(P_post=[np.nan, 4.0, 3.0]))
    np.testing.assert_allclose(found.predicted, [np.nan, 8.5, np.nan])
    with pytest.raises(FitError, match="two fits of the loss after PTQ to 4 bits"):
        prediction.predict((served, served), planned(P_post=[4.0]))
    with pytest.raises(FitError, match="2 fits of the loss before PTQ"):
        prediction.predict((known("chinchilla", LOSS), known("chinchilla", LOSS)), planned(P_post=[4.0]))


@pytest.mark.slow
def test_a_served_loss_is_fitted_as_a_loss():
    rows = synthetic.table("ptq_noise")
    truth = {**LOSS, "E": 1.0}
    three = rows["P_post"] == 3
    loss = np.where(three, laws.predict("chinchilla", truth, N=rows["N"], D=rows["D"]), rows["loss"])
    rows = dataclasses.replace(rows, columns={**rows.columns, "loss": loss})
    found = fit("chinchilla", rows, Options(serve_bits=3.0), starts=64, profile=False)
    assert found.n == three.sum() and found.serve_bits == 3
    assert found.params["E"] == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(FitError, match="law unified has P_post in it"):
        fit("unified", rows, Options(serve_bits=3.0))


@pytest.mark.slow
def test_intervals_cover_new_measurements_at_their_level():
    """On average over tables: the first makes the fit, rows of the second (the same settings, fresh noise) are new."""
    held = []
    for seed in range(12):
        seen, new = (synthetic.table("chinchilla", noise=0.01, seed=s) for s in (seed, 100 + seed))
        found = prediction.predict((fit("chinchilla", seen, starts=8, bootstrap_resamples=200, profile=False),), new)
        held.append(np.mean((found.low <= found.measured) & (found.measured <= found.high)))
        assert found.note.tolist() == [""] * len(new) and found.outside.tolist() == [""] * len(new)
    assert 0.90 <= np.mean(held) <= 0.99


def test_intervals_widen_beyond_the_rows_of_the_fit_and_rows_there_are_named():
    seen = synthetic.table("chinchilla", noise=0.01)
    made = fit("chinchilla", seen, starts=8, bootstrap_resamples=100, profile=False)
    rows = planned(P_post=[np.nan] * 2, N=[1e8, 1e8], D=[1e10, 1e14])
    found = prediction.predict((made,), rows)
    assert list(found.outside) == ["", "D"]
    width = np.log(found.high / found.low)
    assert width[1] > width[0] > 0


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"delta_residual": "log_delta"}, 9 + 0.5 / 9 * np.exp(0.2)),
        ({"delta_residual": "log_loss", "residual": "log_loss"}, (9 + 0.5 / 9) * np.exp(0.2)),
        ({"delta_residual": "log_loss", "residual": "loss"}, 9 + 0.5 / 9 + 0.2),
        ({"delta_residual": "floored", "delta_floor": 0.1}, 9 + 0.2 * np.sinh(np.arcsinh(0.5 / 9 / 0.2) + 0.2)),
    ],
)
def test_the_noise_in_an_interval_is_that_of_what_the_fit_compared(how, expected):
    """One draw of the constants and one residual: both ends are the prediction with it."""
    one = known("ptq_noise", DELTA, samples={name: (value,) for name, value in DELTA.items()})
    made = dataclasses.replace(one, residuals={"after": (0.2,)}, reporting=how)
    found = prediction.predict((made,), planned(P_post=[np.nan, 3.0], loss=[9.0, 9.1]))
    assert (found.low[1], found.high[1]) == pytest.approx((expected, expected))
    before = known("chinchilla", LOSS, samples={name: (value,) for name, value in LOSS.items()})
    before = dataclasses.replace(before, residuals={"before": (-0.1,)}, reporting={"residual": "loss"})
    alone = prediction.predict((before,), planned(P_post=[np.nan]))
    assert (alone.low[0], alone.high[0]) == pytest.approx((8.4, 8.4))


def run(*arguments):
    for name in FLAGS:
        FLAGS[name].unparse()
    return predict.command(["predict", *arguments])


def test_the_command_writes_the_contracts_columns(tmp_path, capsys):
    known("chinchilla", LOSS).save(tmp_path / "loss.json")
    known("ptq_noise", DELTA).save(tmp_path / "delta.json")
    plan = "N,D,P_post,comment\n10000,100000000,,first\n10000,100000000,3,second\n"
    (tmp_path / "plan.csv").write_text(plan)
    fits = f"--fit={tmp_path / 'loss.json'},{tmp_path / 'delta.json'}"
    assert run(fits, f"--runs={tmp_path / 'plan.csv'}", f"--out={tmp_path / 'out.csv'}") == 0
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["comment"] for row in rows] == ["first", "second"]
    assert float(rows[0]["predicted"]) == pytest.approx(8.5)
    assert float(rows[1]["predicted"]) == pytest.approx(8.5 + 0.5 / 9)
    assert [rows[1][name] for name in ("low", "high", "measured", "error")] == [""] * 4
    assert rows[1]["loss_before_from"] == "chinchilla" and "loss" not in rows[0]
    said = capsys.readouterr().out
    assert "1 rows predicted (loss before PTQ: 1 chinchilla), none measured" in said
    assert "the fit of chinchilla has no bootstrap" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--runs=x.csv", "--out=y.csv"), "--fit is required"),
        (("--fit=nowhere.json", "--runs=x.csv", "--out=y.csv"), "cannot read fit nowhere.json"),
        (("--fit=a.json", "--runs=x.csv", "--out=y.csv", "--before=guessed"), "before"),
    ],
)
def test_the_command_refuses_mistakes_in_one_line(capsys, arguments, words):
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
