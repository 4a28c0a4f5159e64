"""Fits recover known constants, match an independent optimizer, and name what a table does not identify."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize as scipy_optimize

from analysis import laws
from analysis import table as tables
from analysis.fitting.fit import fit
from analysis.fitting.levenberg_marquardt import Solution
from analysis.fitting.multistart import SAME_OPTIMUM, plainest
from analysis.fitting.options import FitError, Options
from analysis.fitting.setup import set_up
from analysis.laws import synthetic
from analysis.laws.law import MIN_FRACTION

pytestmark = pytest.mark.usefixtures("simple_loops")

ROOT = Path(__file__).resolve().parents[1]
QUEST = ROOT.parent / "shared" / "data" / "quest_runs.csv"
QUEST_METHOD = ["HalfHadamardTrustQuantizer", "HadamardTrustQuantizer", "NoQuantizer"]
TIED = {"gamma_a": "gamma_w", "n_a": "n_w"}


def chinchilla_table(sizes=4, budgets=5, noise=0.0, seed=0, **more):
    n = np.repeat(np.geomspace(1e5, 3e6, sizes), budgets)
    d = np.tile(np.geomspace(1e6, 6e7, budgets), sizes)
    loss = laws.predict("chinchilla", {"A": 30.0, "alpha": 0.3, "B": 200.0, "beta": 0.4, "E": 0.9}, N=n, D=d)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(loss.shape))
    return tables.from_columns({"N": n, "D": d, "loss": loss, **more})


def assert_recovered(result, truth, tolerance=1e-3):
    assert not result.unidentified
    for name, value in truth.items():
        assert result.params[name] == pytest.approx(value, rel=tolerance, abs=1e-9), name


FEW_RUNS = ("chinchilla", "ptq", "qid", "chinchilla_outer", "ptq_noise", "shannon")  # laws of 16-bit training alone


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_RUNS)
def test_noiseless_tables_give_the_constants_back(name):
    assert_recovered(fit(name, synthetic.table(name), profile=False), synthetic.constants(name))


LARGER = [name for name in laws.LAWS if name not in FEW_RUNS]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_noiseless_tables_give_the_constants_back_for_larger_laws(name):
    full = synthetic.table(name)
    sizes, tokens = np.unique(full["N"])[[0, 2, 3]], np.unique(full["D"])[[0, 2, -1]]
    some = full.select(np.isin(full["N"], sizes) & np.isin(full["D"], tokens))
    starts = 24 if name in ("unified", "unified_noise") else 12
    assert_recovered(fit(name, some, starts=starts, profile=False), synthetic.constants(name))


@pytest.mark.slow
def test_the_objective_is_the_huber_sum_and_no_worse_than_scipys_best():
    table = chinchilla_table(noise=0.01)
    result = fit("chinchilla", table, profile=False)

    def objective(theta):
        a, alpha, b, beta, e = theta
        terms = np.stack([a - alpha * np.log(table["N"]), b - beta * np.log(table["D"]), np.full(len(table), e)])
        r = np.abs(np.log(np.exp(terms).sum(axis=0)) - np.log(table["loss"]))
        return np.sum(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)))

    at = result.params
    theta = [np.log(at["A"]), at["alpha"], np.log(at["B"]), at["beta"], np.log(at["E"])]
    assert result.objective == pytest.approx(objective(theta), rel=1e-9)
    rng = np.random.default_rng(0)
    starts = [theta, *(rng.uniform([0, 0, 0, 0, -1], [25, 1, 25, 1, 1]) for _ in range(20))]
    options = {"maxiter": 20000, "maxfev": 20000, "xatol": 1e-10, "fatol": 1e-16}
    best = min(scipy_optimize.minimize(objective, s, method="Nelder-Mead", options=options).fun for s in starts)
    assert result.objective <= best * (1 + 1e-6)


def test_least_squares_matches_scipys():
    table = chinchilla_table(noise=0.01)
    result = fit("chinchilla", table, Options(loss="least_squares"), profile=False)

    def residuals(theta):
        a, alpha, b, beta, e = theta
        predicted = np.exp(a) * table["N"] ** -alpha + np.exp(b) * table["D"] ** -beta + np.exp(e)
        return np.log(predicted) - np.log(table["loss"])

    expected = scipy_optimize.least_squares(residuals, [3.4, 0.3, 5.3, 0.4, -0.1], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert result.objective == pytest.approx(expected.cost, rel=1e-8)
    assert result.params["alpha"] == pytest.approx(expected.x[1], rel=1e-3)


def test_huber_shrugs_off_an_outlier_that_moves_least_squares():
    table = chinchilla_table(noise=1e-4)
    table["loss"][7] *= 1.3
    robust = fit("chinchilla", table, profile=False)
    squares = fit("chinchilla", table, Options(loss="least_squares"), profile=False)
    assert abs(robust.params["alpha"] - 0.3) < 0.01 < abs(squares.params["alpha"] - 0.3)


@pytest.mark.slow
def test_fixed_and_tied_parameters_stay_so():
    result = fit(
        "chinchilla", chinchilla_table(noise=0.01), Options(fixed={"E": 0.9}, tied={"beta": "alpha"}), profile=False
    )
    assert result.params["E"] == 0.9
    assert result.params["beta"] == result.params["alpha"]
    assert result.reporting["free"] == ("A", "alpha", "B")


@pytest.mark.slow
def test_the_unbiased_form_holds_the_biases_at_zero():
    table = synthetic.table("precision", noise=0.005)
    table = table.select(table["P_w"] == table["P_a"])
    biased, unbiased = (fit("precision", table, Options(biased=b), starts=16, profile=False) for b in (True, False))
    assert all(unbiased.params[f"n_{x}"] == 0 for x in ("w", "a", "kv"))
    assert unbiased.objective > biased.objective


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_truth_under_one_percent_noise():
    inside, total = 0, 0
    truth = {"A": 30.0, "alpha": 0.3, "B": 200.0, "beta": 0.4, "E": 0.9}
    for seed in range(6):
        result = fit(
            "chinchilla", chinchilla_table(8, 10, 0.01, seed), starts=64, bootstrap_resamples=150, profile=False
        )
        for name, value in truth.items():
            low, high = result.ci[name]
            inside += (low is None or low <= value) and (high is None or value <= high)
            total += 1
    assert inside / total >= 0.8


@pytest.mark.slow
def test_the_bootstrap_moves_the_rows_of_a_run_together():
    # every run quantized twice, with two calibration sets, halves no interval: the rows say nothing new
    once = synthetic.table("ptq", noise=0.02, seed=3)
    wide = fit("ptq", once, bootstrap_resamples=200, profile=False).ci["gamma_D"]
    after = once.quantized
    repeated = {k: np.concatenate([v, v[after]]) for k, v in once.columns.items()}
    repeated["calibration"] = np.r_[np.full(len(once), "c4"), np.full(after.sum(), "pile")]
    twice = fit("ptq", tables.from_columns(repeated), bootstrap_resamples=200, profile=False).ci["gamma_D"]
    assert (twice[1] - twice[0]) == pytest.approx(wide[1] - wide[0], rel=0.15)


def test_the_same_arguments_give_the_same_fit():
    table = chinchilla_table(noise=0.01)
    one, two = (fit("chinchilla", table, starts=32, bootstrap_resamples=40, seed=5) for _ in range(2))
    assert one.params == two.params and one.ci == two.ci and one.samples == two.samples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "unidentified"),
    [((16,), {"gamma_w", "n_w"}), ((16, 4), {"n_w"}), ((16, 8, 4, 3), set())],
)
def test_constants_of_precisions_that_the_table_lacks_are_unidentified(bits, unidentified):
    full = synthetic.table("precision", noise=0.002)
    mask = np.isin(full["P_w"], bits) & (full["P_a"] == 16) & (full["P_kv"] == 16)
    result = fit("precision", full.select(mask), starts=24, profile=False)
    assert set(result.unidentified) == unidentified | {"gamma_a", "n_a", "gamma_kv", "n_kv"}
    assert all(result.params[name] is None for name in result.unidentified)
    assert "only P_a = 16; 2 different values" in result.unidentified["gamma_a"]
    assert np.isfinite(result.predict(N=1e8, D=1e10, P_w=bits[-1]))


def test_of_equal_optima_the_one_without_a_part_at_its_floor_is_reported():
    plain = {**synthetic.constants("precision"), "gamma_kv": 0.05, "n_kv": 0.0}
    floor = {**plain, "gamma_kv": 50.0, "n_kv": 10.0, "A": plain["A"] * MIN_FRACTION ** plain["alpha"]}
    setup = set_up("precision", synthetic.table("precision", 0.005, params=plain))
    theta_SxF = np.stack([setup.theta(floor), setup.theta(plain), setup.theta({**plain, "E": 9.0})])
    objective_S = np.array([setup.objective(theta_F) for theta_F in theta_SxF])
    assert objective_S[0] == pytest.approx(objective_S[1], rel=1e-9) and objective_S[2] > 2 * objective_S[0]
    found = Solution(theta_SxF, objective_S - [1e-12, 0, 0], np.ones(3, bool))
    at_best = objective_S < objective_S[0] * (1 + SAME_OPTIMUM)
    np.testing.assert_array_equal(plainest(setup, found, at_best), theta_SxF[1])
    assert laws.get("n_and_d_eff_untied").fractions[3:] == tuple((f"gamma_{x}_D", f"n_{x}_D") for x in ("w", "a", "kv"))
    assert laws.get("unified").fractions == laws.get("precision").fractions and not laws.get("qat").fractions


def test_one_size_informs_neither_a_nor_alpha():
    table = chinchilla_table(sizes=1, budgets=8)
    result = fit("chinchilla", table, starts=64)
    assert {"A", "alpha"} <= set(result.unidentified)
    np.testing.assert_allclose(result.predict(N=table["N"], D=table["D"]), table["loss"], rtol=1e-3)


def test_a_table_without_an_asymptote_says_that_e_is_weakly_identified():
    n, d = np.repeat(np.geomspace(1e5, 4e5, 3), 4), np.tile(np.geomspace(1e6, 8e6, 4), 3)
    loss = laws.predict("chinchilla", {"A": 8.0, "alpha": 0.1, "B": 12.0, "beta": 0.12, "E": 0.5}, N=n, D=d)
    loss = loss * np.exp(0.003 * np.random.default_rng(1).standard_normal(12))
    result = fit("chinchilla", tables.from_columns({"N": n, "D": d, "loss": loss}))
    assert "E" in result.unidentified or any(note.startswith("E is weakly identified") for note in result.notes)


@pytest.mark.slow
def test_a_well_measured_table_has_no_weak_parameter_and_profiles_agree_with_the_bootstrap():
    table = chinchilla_table(12, 20, noise=0.002)
    result = fit("chinchilla", table, bootstrap_resamples=300)
    assert not result.unidentified and not result.identifiability["weak"]
    for name in ("alpha", "beta", "E"):
        low, high = result.identifiability["profile"][name]
        assert (high - low) == pytest.approx(result.ci[name][1] - result.ci[name][0], rel=0.4)


@pytest.mark.slow
def test_zero_and_negative_deltas_are_counted_or_kept_by_the_other_residual():
    table = synthetic.table("ptq", noise=0.01)
    after = np.flatnonzero(table.quantized & (table["P_post"] == 6))
    before = dict(zip(table["run"][~table.quantized], table["loss"][~table.quantized], strict=True))
    table["loss"][after[0]] = before[table["run"][after[0]]]
    table["loss"][after[1]] = before[table["run"][after[1]]] - 0.001
    log_delta = fit("ptq", table, profile=False)
    assert log_delta.left_out["delta is zero or negative and has no log"] == 2
    assert any("2 rows with delta <= 0" in note for note in log_delta.notes)
    log_loss = fit("ptq", table, Options(delta_residual="log_loss"), profile=False)
    assert log_loss.n == log_delta.n + 2
    assert log_loss.params["gamma_D"] == pytest.approx(log_delta.params["gamma_D"], abs=0.02)


@pytest.mark.slow
def test_a_staged_fit_takes_the_sixteen_bit_rows_first():
    table = synthetic.table("precision", noise=0.005)
    table = table.select((table["P_a"] == 16) & (table["P_kv"] == 16))
    staged = fit("precision", table, Options(stages="staged"), starts=64, profile=False)
    chinchilla = fit("chinchilla", table, starts=64, profile=False)
    for name in ("A", "alpha", "B", "beta", "E"):
        assert staged.params[name] == pytest.approx(chinchilla.params[name], rel=1e-3)
    assert staged.params["gamma_w"] == pytest.approx(2.67, rel=0.3)


def test_a_law_of_ones_own_is_fitted_like_any_other(monkeypatch):
    """The worked example of docs/analysis.md."""
    text = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(example, scope)
    monkeypatch.delitem(laws.LAWS, "one_exponent")  # where the example has put it
    n, d = np.repeat(np.geomspace(1e5, 3e6, 4), 5), np.tile(np.geomspace(1e6, 6e7, 5), 4)
    truth = {"A": 30.0, "alpha": 0.3, "B": 200.0}
    loss = laws.predict(scope["LAW"], truth, N=n, D=d)
    np.testing.assert_allclose(loss, 30 * n**-0.3 + 200 * d**-0.3)
    assert_recovered(fit(scope["LAW"], tables.from_columns({"N": n, "D": d, "loss": loss}), profile=False), truth)


def test_fitting_leaves_single_precision_to_others():
    fit("chinchilla", chinchilla_table(), starts=8, profile=False)
    assert jnp.ones(3).dtype == jnp.float32


@pytest.mark.slow
def test_many_rows_are_searched_on_a_sample_and_fitted_on_all(monkeypatch):
    table = chinchilla_table(30, 60, noise=0.01)
    sampled = fit("chinchilla", table, starts=32, bootstrap_resamples=100, profile=False)
    monkeypatch.setattr("analysis.fitting.multistart.SEARCH_ROWS", 10**6)
    whole = fit("chinchilla", table, starts=32, profile=False)
    assert sampled.objective == pytest.approx(whole.objective, rel=1e-8)
    monkeypatch.setattr("analysis.fitting.multistart.LARGE_TABLE", 100)
    stepped = fit("chinchilla", table, starts=32, bootstrap_resamples=400, profile=False)
    for name in ("alpha", "beta", "E"):
        assert np.ptp(stepped.ci[name]) == pytest.approx(np.ptp(sampled.ci[name]), rel=0.35)


@pytest.mark.slow
def test_a_million_rows_fit():
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(1e5), np.log(1e8), 10**6)), np.exp(rng.uniform(np.log(1e7), np.log(1e10), 10**6))
    truth = {"A": 30.0, "alpha": 0.3, "B": 200.0, "beta": 0.4, "E": 0.9}
    loss = laws.predict("chinchilla", truth, N=n, D=d) * np.exp(0.01 * rng.standard_normal(10**6))
    table = tables.from_columns({"run": np.arange(10**6), "N": n, "D": d, "loss": loss})
    result = fit("chinchilla", table, starts=16, bootstrap_resamples=40)
    for name, value in truth.items():
        assert result.params[name] == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fixed": {"F": 1.0}}, "no parameter 'F'; it has A, alpha, B, beta, E"),
        ({"fixed": {"alpha": 7.0}}, "fixed alpha = 7.0: law chinchilla allows 0 to 3"),
        ({"tied": {"A": "alpha"}}, "one is positive, the other is not"),
        ({"tied": {"alpha": "alpha"}}, "the left one follows"),
        ({"fixed": {"A": 1.0, "alpha": 1.0, "B": 1.0, "beta": 1.0, "E": 1.0}}, "nothing is left to fit"),
        ({"loss": "cauchy"}, "choose one of huber, least_squares"),
        ({"huber_delta": 0.0}, "must be positive"),
        ({"stages": "staged"}, "has no stages"),
    ],
)
def test_mistakes_in_options_are_one_clear_line(options, words):
    with pytest.raises(ValueError, match=words):
        fit("chinchilla", chinchilla_table(), Options(**options))


@pytest.mark.parametrize(
    ("law", "words"),
    [
        ("ptq", "needs losses after PTQ"),
        ("qat", "needs column group_size"),
        ("capacity", "no row was trained below 16 bits"),
        ("nonsense", "unknown law 'nonsense'"),
    ],
)
def test_a_table_that_a_law_cannot_use_is_refused_in_one_line(law, words):
    with pytest.raises(ValueError, match=words) as caught:
        fit(law, chinchilla_table())
    assert "\n" not in str(caught.value)


def test_a_table_whose_deltas_are_all_negative_is_refused_with_their_count():
    rows = {"run": ["a", "a", "b", "b"], "N": [1e6] * 4, "D": [1e7] * 4, "P_post": ["", 4, "", 4]}
    table = tables.from_columns({**rows, "loss": [3.0, 2.9, 3.1, 3.1]})
    with pytest.raises(FitError, match="2 rows left out: 2 delta is zero or negative"):
        fit("ptq", table)


def test_one_row_is_refused():
    with pytest.raises(FitError, match=r"nothing is left to fit|too few"):
        fit("chinchilla", tables.from_columns({"N": [1e6], "D": [1e7], "loss": [3.0]}))


def quest():
    table = tables.load(QUEST)
    return table.select(np.isin(table["w_quantizer"], QUEST_METHOD) & (table["P_w"] == table["P_a"]))


@pytest.mark.slow
@pytest.mark.skipif(not QUEST.exists(), reason="public measurements not at hand")
def test_public_measurements_fit_as_well_as_published_and_leave_e_open():
    biased = fit("precision", quest(), Options(tied=TIED), starts=128)
    unbiased = fit("precision", quest(), Options(tied=TIED, biased=False), starts=128, profile=False)
    capacity = fit("capacity", quest(), starts=128, profile=False)
    assert biased.r2 >= 0.998
    assert capacity.r2 > biased.r2
    assert unbiased.r2 < 0.99
    assert any(note.startswith("E is weakly identified") for note in biased.notes)
    assert set(biased.unidentified) == {"gamma_kv", "n_kv"}
    # the authors' own constants (arXiv 2502.05003), which their notebook takes from the last start and not the best
    for bits, published in ((2, 0.152), (3, 0.433), (4, 0.692), (8, 1.016)):
        assert capacity.params[f"eff_w{bits}_a{bits}"] == pytest.approx(published, abs=0.05)
