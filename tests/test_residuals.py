"""What fits compare, and what else may be asked of one: other rows, smaller laws, other weights."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import optimize

from analysis import laws
from analysis import table as tables
from analysis.fitting import crossval, forms
from analysis.fitting.fit import Checks, fit
from analysis.fitting.levenberg_marquardt import solve
from analysis.fitting.multistart import search
from analysis.fitting.nested import ratio_test
from analysis.fitting.options import FitError, Options
from analysis.fitting.residual import compared, measurement, slope, transform
from analysis.fitting.setup import set_up
from analysis.laws import law, synthetic
from analysis.table.seed_noise import noise_floor

pytestmark = pytest.mark.usefixtures("simple_loops")

TRUTH = {"A": 400.0, "alpha": 0.4, "B": 2000.0, "beta": 0.4, "E": 1.5}


def chinchilla_rows(noise=0.0, seed=0, **more):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e11, 6)))
    loss = laws.predict("chinchilla", TRUTH, N=n, D=d)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(loss.shape))
    return tables.from_columns({"N": n, "D": d, "loss": loss, **more})


def delta_rows(deltas, bits, seeds=None):
    """A run for every row of `deltas`, each after PTQ to every one of `bits`."""
    rows = {name: [] for name in ("run", "N", "D", "P_post", "loss", "seed")}
    for i, of_run in enumerate(deltas):
        for p, delta in zip((np.nan, *bits), (0.0, *of_run), strict=True):
            seed = 0 if seeds is None else seeds[i]
            n = 1e6 if seeds is not None else 1e6 * 2**i
            for name, value in zip(rows, (f"run{i}", n, 1e8, p, 3.0 + delta, seed), strict=True):
                rows[name].append(value)
    return tables.from_columns(rows)


@pytest.mark.parametrize("kind", ["log_loss", "loss", "log_delta", "floored"])
def test_a_measurement_is_the_inverse_of_what_is_compared(kind):
    value, floor = np.array([0.003, 0.1, 2.0]), 0.01
    at = compared(kind, value, floor)
    np.testing.assert_allclose(transform(kind, np.log(value), floor), at)
    np.testing.assert_allclose(compared(kind, measurement(kind, value, 0.3, floor), floor), at + 0.3)
    step = 1e-6
    numeric = (compared(kind, value + step, floor) - compared(kind, value - step, floor)) / (2 * step)
    np.testing.assert_allclose(slope(kind, value, floor), numeric, rtol=1e-6)


def test_above_the_floor_delta_compares_as_its_log_and_below_as_itself():
    assert compared("floored", np.array(1.0), 1e-4) == pytest.approx(math.log(1e4), abs=1e-7)
    assert compared("floored", np.array(-2e-6), 1e-4) == pytest.approx(-0.01, rel=1e-3)


def test_the_floor_is_the_spread_over_seeds_at_the_most_bits():
    seeds = delta_rows([(0.5, 0.001), (0.7, 0.003), (0.6, 0.002)], (3, 8), seeds=(0, 1, 2)).deltas()
    assert noise_floor(seeds) == pytest.approx(0.001)  # of 1, 2 and 3 thousandths
    batches = np.where(seeds["seed"] == 2, 64, 32)  # another recipe is no replicate
    assert noise_floor(dataclasses.replace(seeds, columns={**seeds.columns, "batch_size": batches})) == pytest.approx(
        0.001 * 2**0.5
    )
    alone = delta_rows([(0.5, 0.001), (0.7, 0.003), (0.6, 0.002), (0.4, 0.002), (0.3, 0.001)], (3, 8))
    assert noise_floor(alone.deltas()) is None
    with pytest.raises(FitError, match="give delta_floor"):
        set_up("ptq_noise", alone, Options(delta_residual="floored"))


@pytest.mark.slow
def test_a_fit_of_delta_above_its_floor_keeps_every_row_and_the_truth():
    params = {"C": 0.003, "gamma_D": 0.5, "gamma_N": 0.35}
    table = synthetic.table("ptq_noise", params=params)
    noise = 1e-4 * np.random.default_rng(1).standard_normal(len(table)) * table.quantized
    table = dataclasses.replace(table, columns={**table.columns, "loss": table["loss"] + noise})
    setup = set_up("ptq_noise", table, Options(delta_residual="floored", delta_floor=1e-4))
    assert setup.problem.rows == table.quantized.sum() and setup.unheld is None
    values = setup.values(search(setup, 16).theta_F)
    assert values["gamma_D"] == pytest.approx(0.5, abs=0.01) and values["C"] == pytest.approx(0.003, rel=0.2)


def test_errors_of_the_served_loss_hold_the_rows_that_log_delta_cannot():
    table = delta_rows([(0.5, 0.05), (0.4, -0.02), (0.3, 0.01), (0.2, 0.004)], (3, 6))
    setup = set_up("ptq_noise", table, Options(fixed={"gamma_D": 0.0, "gamma_N": 0.0}))
    assert setup.problem.rows == 7 and len(setup.unheld) == 1 and len(setup.every_row) == 8
    theta_F = setup.theta({"C": 0.9, "gamma_D": 0.0, "gamma_N": 0.0, "p": 2.0})
    errors = setup.served_errors(theta_F, setup.every_row)
    assert errors[-1] == pytest.approx(math.log((3 + 0.9 / 31**2) / (3 - 0.02)))
    assert setup.log_errors(theta_F)[0] == pytest.approx(
        math.log(0.9 * (1 / 9 if setup.rows["P_post"][0] == 3 else 1 / 31**2) / setup.rows["delta"][0])
    )


@pytest.mark.slow
def test_weights_and_residuals_of_the_loss_itself_match_scipy():
    sigma = np.where(np.arange(30) % 3 == 0, 0.2, 0.01)
    table = chinchilla_rows(0.01, sigma=sigma)
    options = Options(loss="least_squares", residual="loss", sigma_column="sigma", fixed={"alpha": 0.4, "beta": 0.4})
    found = fit("chinchilla", table, options, starts=16, profile=False)

    def weighed(theta):
        predicted = theta[0] * table["N"] ** -0.4 + theta[1] * table["D"] ** -0.4 + theta[2]
        return (predicted - table["loss"]) / table["sigma"]

    expected = optimize.least_squares(weighed, (400.0, 2000.0, 1.5), x_scale=(100, 1000, 1), xtol=1e-15, ftol=1e-15)
    got = [found.params[name] for name in ("A", "B", "E")]
    np.testing.assert_allclose(got, expected.x, rtol=1e-6)
    assert found.objective == pytest.approx(np.median(sigma) ** 2 * expected.cost, rel=1e-8)


def test_rows_without_a_standard_deviation_are_counted():
    table = chinchilla_rows(sigma=[0.0, np.nan, *[0.1] * 28])
    setup = set_up("chinchilla", table, Options(sigma_column="sigma"))
    assert setup.left_out == {"sigma is empty, zero or negative": 2} and setup.problem.rows == 28


@pytest.mark.slow
def test_rows_to_fit_and_rows_to_test_are_those_of_the_expressions():
    table = chinchilla_rows(0.01)
    whole = fit(
        "chinchilla",
        table,
        Options(fit_where="N < 5e8"),
        starts=32,
        profile=False,
        checks=Checks("N > 5e8 and D > 1e9"),
    )
    part = fit("chinchilla", table.select(table["N"] < 5e8), starts=32, profile=False)
    assert whole.n == 24 and whole.left_out == {"outside of N < 5e8": 6}
    for name, value in part.params.items():
        assert whole.params[name] == pytest.approx(value, rel=1e-6)
    rest = table.select((table["N"] > 5e8) & (table["D"] > 1e9))
    error = np.log(part.predict(N=rest["N"], D=rest["D"]) / rest["loss"])
    test = whole.metrics["test"]
    assert test["rows"] == len(rest) and test["rms_log_error_served"] is None
    assert test["rms_log_error"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
    alone = fit("chinchilla", table, starts=32, profile=False, checks=Checks("not N < 5e8"))
    assert alone.n == 24 and alone.params["E"] == pytest.approx(part.params["E"], rel=1e-6)
    with pytest.raises(FitError, match="share 6 rows"):
        fit("chinchilla", table, Options(fit_where="N < 5e8"), starts=4, profile=False, checks=Checks("N < 2e6"))


def test_delta_is_paired_before_rows_are_chosen():
    table = delta_rows([(0.5, 0.05), (0.4, 0.02), (0.3, 0.01)], (3, 6))
    setup = set_up("ptq_noise", table, Options(fit_where="P_post == 3", fixed={"gamma_D": 0.0, "gamma_N": 0.0}))
    np.testing.assert_allclose(np.sort(setup.rows["delta"]), [0.3, 0.4, 0.5])


def test_the_joint_scheme_holds_out_runs_with_several_low_parts():
    table = synthetic.table("noise")
    setup = set_up("noise", table)
    (split,) = crossval.splits(setup, ("joint",))
    low = np.sum([setup.rows[c] < 16 for c in ("P_w", "P_a", "P_kv")], axis=0)
    np.testing.assert_array_equal(split.held_m, low >= 2)
    assert crossval.splits(set_up("noise", table.select(~(synthetic_joint(table)))), ("joint",)) == []


def synthetic_joint(table):
    return np.sum([table[c] < 16 for c in ("P_w", "P_a", "P_kv")], axis=0) >= 2


def test_a_form_with_a_free_outer_exponent_is_named_so():
    form = forms.named("precision_outer")
    assert form.freed == ("g",) and form.law.name == "precision" and form.biased
    assert not forms.named("precision_unbiased_outer").biased
    assert forms.named("chinchilla_outer").freed == ()  # a law of its own
    assert set_up(form.law, synthetic.table("precision"), Options(freed=form.freed)).free[-1] == "g"
    with pytest.raises(law.LawError, match="qid has no outer exponent"):
        forms.named("qid_outer")
    assert forms.held_by("precision_outer") == {"precision", "precision_unbiased_outer"}
    assert forms.held_by("capacity") == {"chinchilla"}


@pytest.mark.slow
def test_the_likelihood_ratio_rejects_a_true_smaller_law_as_often_as_it_says():
    small_options = Options(fixed={"g": 1.0})
    rejected = []
    for seed in range(40):
        table = chinchilla_rows(0.01, seed)
        large, small = set_up("chinchilla_outer", table), set_up("chinchilla_outer", table, small_options)
        start = {**TRUTH, "g": 1.0}
        found = [_from(setup, start) for setup in (small, large)]
        rejected.append(ratio_test(small, found[0], large, found[1]).p < 0.05)
    assert 0 < np.sum(rejected) <= 6  # 5 % give 2 of 40, and more than 6 once in three hundred


def _from(setup, values):
    return solve(setup.problem, setup.theta(values)[None]).theta_SxF[0]


@pytest.mark.slow
def test_a_fit_tells_its_gain_over_held_constants_and_what_its_worst_rows_do():
    table = chinchilla_rows(0.003)
    loss = table["loss"].copy()
    loss[7] *= 1.3
    table = dataclasses.replace(table, columns={**table.columns, "loss": loss})
    checks = Checks(held={"g": 1.0}, huber_deltas=(1e-2, math.inf), drop_worst=1)
    found = fit("chinchilla_outer", table, starts=32, profile=False, checks=checks)
    assert found.metrics["likelihood_ratio"]["freedom"] == 1 and found.metrics["likelihood_ratio"]["p"] > 0.01
    wide, squares, without = found.metrics["sweep"]
    assert (wide["huber_delta"], squares["huber_delta"]) == (1e-2, None)
    assert without["dropped"][0]["run"] == table["run"][7] and without["dropped"][0]["residual"] < -0.2
    assert without["rms_log_error"] < 0.005 < squares["rms_log_error"]
    assert fit("chinchilla", table, starts=8, profile=False).metrics.get("sweep") is None
