"""Comparison prefers the law that made the table, holds rows out honestly, and tests multiplicativity."""

import csv
import json

import numpy as np
import pytest

from analysis import compare, laws
from analysis import table as tables
from analysis.fitting import comparison, crossval, forms
from analysis.fitting.multiplicativity import multiplicativity
from analysis.fitting.multistart import search
from analysis.fitting.options import FitError
from analysis.fitting.setup import set_up
from analysis.laws import paper, synthetic
from analysis.laws.law import LawError

pytestmark = pytest.mark.usefixtures("simple_loops")

WEIGHTS_ONLY = {"gamma_a", "n_a", "gamma_kv", "n_kv"}


def weights_only(noise=0.003, sizes=(30e6, 110e6, 220e6)):
    table = synthetic.table("precision", noise=noise)
    return table.select((table["P_a"] == 16) & (table["P_kv"] == 16) & np.isin(table["N"], sizes))


@pytest.fixture(scope="module")
def compared():
    names = ("chinchilla", "precision", "precision_unbiased", "d_eff", "capacity", "ptq")
    return comparison.compare(weights_only(), names, starts=24)


@pytest.mark.slow
def test_the_law_that_made_the_table_predicts_held_out_rows_best(compared):
    rows = {row.law: row for row in compared.rows}
    assert compared.rows[0].law == "precision" and rows["precision"].difference is None
    assert rows["precision"].aic < rows["d_eff"].aic < rows["chinchilla"].aic
    mean, low, high = rows["chinchilla"].difference
    assert 0 < low < mean < high


@pytest.mark.slow
def test_laws_are_judged_on_the_same_rows_and_count_their_free_parameters(compared):
    rows = {row.law: row for row in compared.rows}
    assert len({row.n for row in compared.rows}) == 1
    assert rows["chinchilla"].k == 5 and rows["precision"].k == 7 and rows["precision_unbiased"].k == 6
    assert set(rows["precision"].unidentified) == WEIGHTS_ONLY
    assert rows["capacity"].k == 5 + 6
    assert "needs losses after PTQ" in compared.skipped["ptq"]


@pytest.mark.slow
def test_a_free_capacity_cannot_predict_a_precision_that_it_never_saw(compared):
    rows = {row.law: row for row in compared.rows}
    assert rows["capacity"].held_out["P"] is None
    assert rows["precision"].held_out["P"] is not None
    assert rows["capacity"].held_out["N"] is not None


@pytest.mark.slow
def test_held_out_error_is_that_of_a_fit_without_the_fold():
    table = weights_only()
    setup = set_up("precision", table)
    theta_F = search(setup, 32).theta_F
    held = crossval.held_out(setup, theta_F, ("N",))["N"]
    without = set_up("precision", table.select(table["N"] != 220e6))
    theta_without = search(without, 32).theta_F
    out = setup.rows.select(setup.rows["N"] == 220e6)
    expected = np.log(laws.predict("precision", without.values(theta_without), **out.columns) / out["loss"])
    np.testing.assert_allclose(held.error_n[setup.rows["N"] == 220e6], expected, atol=2e-5)
    assert held.folds == 3 and held.impossible == 0
    (row,) = comparison.compare(table, ("precision",), starts=32).rows
    assert row.held_out["largest_N"] == pytest.approx(np.sqrt(np.mean(expected**2)), rel=2e-3)


def test_a_law_without_biases_is_named_so_and_must_have_some():
    assert "precision_unbiased" in forms.all_names() and "chinchilla_unbiased" not in forms.all_names()
    with pytest.raises(LawError, match="chinchilla has no biases"):
        forms.named("chinchilla_unbiased")


def test_the_compute_scheme_holds_out_the_largest_fifth_of_the_runs():
    table = weights_only()
    setup = set_up("precision", table)
    out = crossval.folds(setup, "compute") == 0
    cost = table["N"] * table["D"] * (table["P_w"] + 32)
    assert out.sum() == round(0.2 * len(table))
    assert cost[out].min() >= cost[~out].max()


@pytest.mark.slow
def test_a_table_where_precision_never_varies_compares_chinchilla_alone():
    n, d = np.repeat(np.geomspace(1e5, 3e6, 4), 5), np.tile(np.geomspace(1e6, 6e7, 5), 4)
    loss = laws.predict("chinchilla", {"A": 30.0, "alpha": 0.3, "B": 200.0, "beta": 0.4, "E": 0.9}, N=n, D=d)
    loss *= np.exp(0.003 * np.random.default_rng(0).standard_normal(20))
    table = tables.from_columns({"N": n, "D": d, "loss": loss, "corpus": np.tile(["pile", "dolma"], 10)})
    result = comparison.compare(table, ("chinchilla", "precision", "capacity"), starts=32)
    assert [row.law for row in result.rows] == ["chinchilla"]
    assert "it is chinchilla" in result.skipped["precision"]
    assert "no run was trained" in result.multiplicativity_skipped
    assert "the rows mix corpus: dolma, pile; --where=corpus=VALUE fits one of them" in result.notes
    with pytest.raises(FitError, match="no law can be fitted"):
        comparison.compare(table.select(np.arange(20) < 2), ("chinchilla",))


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [1.0, 1.5])
def test_multiplicativity_holds_where_it_was_built_in_and_fails_where_it_was_not(kappa):
    table = synthetic.table("precision", noise=0.003)
    low = np.sum([table[c] < 16 for c in ("P_w", "P_a", "P_kv")], axis=0)
    share = paper.effective_parameters(paper.PUBLISHED, table.columns) / table["N"]
    noise = table["loss"] / laws.predict("precision", laws.published("precision"), **table.columns)
    size = np.where(low >= 2, table["N"] * share**kappa, table["N"] * share)
    loss = laws.predict("chinchilla", laws.published("chinchilla"), N=size, D=table["D"]) * noise
    table.columns["loss"][:] = loss
    result = multiplicativity(table, resamples=200, starts=24)
    low, high = result.ci
    assert low <= kappa <= high
    assert (low <= 1 <= high) == (kappa == 1.0)
    assert high - low < 0.3


def test_multiplicativity_needs_each_part_varied_alone():
    full = synthetic.table("precision")
    alone = (full["P_w"] < 16) | ((full["P_a"] == 16) & (full["P_kv"] == 16))
    with pytest.raises(FitError, match="joint runs lower P_a, but no run lowers P_a alone"):
        multiplicativity(full.select(alone))


@pytest.mark.slow
def test_the_command_writes_both_files_and_prints_what_was_skipped(tmp_path, capsys):
    table = weights_only()
    names = ("run", "N", "D", "P_w", "P_a", "P_kv", "loss")
    rows = [",".join(str(v) for v in row) for row in zip(*(table[name] for name in names), strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join([",".join(names), *rows]) + "\n")
    arguments = [
        f"--runs={tmp_path}/runs.csv",
        f"--out={tmp_path}/out",
        "--laws=chinchilla,precision,qat",
        "--starts=24",
    ]
    saved = compare.FLAGS.flag_values_dict()
    assert compare.command(["compare", *arguments]) == 0
    for name, value in saved.items():
        compare.FLAGS[name].value = value
    printed = capsys.readouterr().out
    assert "skipped qat: law qat needs column group_size" in printed and "  no row left out" in printed
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        assert [row["law"] for row in csv.DictReader(file)] == ["precision", "chinchilla"]
    raw = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert raw["rows"][0]["law"] == "precision" and raw["skipped"].keys() == {"qat"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--out=x"], "--runs is required"), (["--runs=x", "--out=y", "--laws=precisoin"], "unknown law 'precisoin'")],
)
def test_the_command_refuses_mistakes_in_one_line(capsys, arguments, words):
    saved = compare.FLAGS.flag_values_dict()
    assert compare.command(["compare", *arguments]) == 2
    for name, value in saved.items():
        compare.FLAGS[name].value = value
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
