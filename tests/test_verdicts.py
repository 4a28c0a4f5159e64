"""The verdicts on tables made by hand, where what they must say is known: supported, contradicted, undecided, or forced
by the form of the law.
"""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from analysis import laws
from analysis.fitting.comparison import Comparison, Row
from analysis.fitting.differences import Difference
from analysis.fitting.fit import Fit
from analysis.fitting.multiplicativity import Multiplicativity
from analysis.planning.surface import build
from analysis.reporting import findings
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts import (
    best_precision,
    equal_cost,
    few_bits,
    growth,
    multiply,
    optimum_by_law,
    schedule,
    served_low,
    turning,
)
from analysis.reporting.verdicts.finding import CONTRADICTED, FORCED, SUPPORTED, UNDECIDED
from analysis.reporting.verdicts.series import FALLS, FLAT, RISES, TURNS, all_series
from analysis.table import from_columns

pytestmark = pytest.mark.usefixtures("simple_loops")

SIZES, TOKENS = (1e5, 4e5), (1e6, 2e6, 4e6, 8e6)


def model(n, d, loss, deltas=(), seed=0, method="gptq", **columns):
    """The rows of one model: its loss, and the loss after PTQ at the bits of `deltas`, {P_post: δ}."""
    same = {"N": n, "D": d, "P_w": 16, "P_a": 16, "P_kv": 16, "seed": seed, "schedule": "cosine", **columns}
    same["run"] = "-".join(str(value) for value in same.values())
    served = [{**same, "P_post": p, "loss": loss + x, "method": method} for p, x in dict(deltas).items()]
    return [{**same, "P_post": "", "loss": loss, "method": ""}, *served]


def evidence(rows, fits=None, comparison=None):
    rows = [row for group in rows for row in group]
    table = from_columns({name: [row[name] for row in rows] for name in rows[0]})
    return Evidence(table, fits or {}, table, comparison)


def grid(delta, noise=0.0, loss=lambda n, d: 2.0, **columns):
    """Every N, D and two seeds; `delta(n, d, p)` at 3 and 4 bits, ± noise by seed."""
    return [
        model(n, d, loss(n, d), {p: delta(n, d, p) + sign * noise for p in (3, 4)}, seed, **columns)
        for n, d in itertools.product(SIZES, TOKENS)
        for seed, sign in ((0, 1), (1, -1))
    ]


def power(exponent):
    return lambda n, d, p: 0.1 * (d / 1e6) ** exponent * np.exp(3 - p)


# --- F1 -------------------------------------------------------------------------------------------------------------


def test_growth_beyond_noise_is_supported_with_its_exponent():
    finding = growth.degradation_grows(evidence(grid(power(0.5), 1e-4)))
    told = finding.numbers["gptq"]
    assert finding.verdict == SUPPORTED
    assert (told["series"], told["rise_beyond_noise"], told["fall_beyond_noise"]) == (4, 4, 0)
    assert told["exponent"] == pytest.approx(0.5, abs=0.01)
    assert told["exponent_ci"][0] < 0.5 < told["exponent_ci"][1] + 0.01


def test_falling_degradation_is_contradicted():
    assert growth.degradation_grows(evidence(grid(power(-0.5), 1e-4))).verdict == CONTRADICTED


def test_growth_below_the_noise_is_undecided():
    # δ rises in every series, by less than what lies between two seeds
    finding = growth.degradation_grows(evidence(grid(power(0.02), 0.05)))
    assert finding.verdict == UNDECIDED
    assert finding.numbers["gptq"]["rise_beyond_noise"] == 0 and finding.numbers["gptq"]["within_noise"] == 4


def test_methods_that_disagree_are_undecided():
    rows = grid(power(0.5), 1e-4) + [
        [row for row in rows if row["method"]] for rows in grid(power(-0.5), 1e-4, method="rtn")
    ]
    finding = growth.degradation_grows(evidence(rows))
    assert finding.verdict == UNDECIDED and set(finding.numbers) == {"gptq", "rtn"}


def test_delta_not_above_zero_is_counted():
    finding = growth.degradation_grows(evidence(grid(lambda n, d, p: 0.1 if p == 3 else -0.001)))
    assert finding.numbers["gptq"]["rows_not_above_zero"] == 16
    assert "16 of 32 δ are 0 or less" in finding.by_table


def served(losses, noise=1e-3):
    """A series of losses as served at 3 bits over TOKENS at two N; the loss before PTQ is 1."""
    return evidence(
        [
            model(n, d, 1.0, {3: loss - 1.0 + sign * noise}, seed)
            for n in SIZES
            for d, loss in zip(TOKENS, losses, strict=True)
            for seed, sign in ((0, 1), (1, -1))
        ]
    )


@pytest.mark.parametrize(
    ("losses", "course", "verdict"),
    [
        ((2.0, 1.8, 1.9, 2.1), TURNS, SUPPORTED),
        ((1.8, 1.9, 2.0, 2.1), RISES, SUPPORTED),  # worse with more data, but no D_crit inside
        ((2.1, 2.0, 1.9, 1.8), FALLS, UNDECIDED),
        ((2.0, 1.8, 1.7, 1.7005), FALLS, UNDECIDED),  # a rise below the noise is none
        ((2.0, 2.0005, 2.0, 2.0001), FLAT, UNDECIDED),
    ],
)
def test_d_crit_is_claimed_where_measured_losses_turn(losses, course, verdict):
    found = served(losses)
    assert {s.served for s in all_series(found)} == {course}
    finding = turning.more_data_hurts(found)
    assert finding.verdict == verdict
    assert finding.numbers["turned"] == (2 if course == TURNS else 0)
    if course == TURNS:
        assert "D/N 10 to 40" in finding.by_table and "D/N 2.5 to 10" in finding.by_table
    if course == RISES:
        assert "no D_crit is measured" in finding.by_table


def test_a_turn_that_only_the_fit_sees_is_contradicted():
    # the fit says that 3-bit losses rise from 2e6 tokens on; they fall throughout
    constants = {"A": 1.0, "alpha": 0.5, "B": 1e3, "beta": 0.5, "E": 0.5}
    ptq = {"C_T": 2.3e-3, "gamma_D": 0.5, "gamma_N": 0.0, "gamma_post": 0.6, "b": 0.0}
    fits = {"chinchilla": fit_with("chinchilla", constants), "ptq": fit_with("ptq", {**ptq, "C_T": 2.3e-3 * np.exp(5)})}
    rows = [
        model(n, d, loss - 0.01, dict.fromkeys((3, 4), 0.01), s)
        for n in SIZES
        for d, loss in zip(TOKENS, (2.0, 1.9, 1.8, 1.7), strict=True)
        for s in (0, 1)
    ]
    finding = turning.more_data_hurts(evidence(rows, fits))
    assert finding.verdict == CONTRADICTED and "By the fits alone D_crit at 3 bits" in finding.by_table


def fit_with(law, params, samples=None, **fields):
    law = laws.get(law)
    values = law.values(params)
    made = Fit(law.name, values, {}, None, None, 0, 1, 0.0, law.columns, values, starts_at_best=1.0)
    return dataclasses.replace(made, samples=samples or {}, **fields)


# --- F2 -------------------------------------------------------------------------------------------------------------


def kappa(value, low, high):
    test = Multiplicativity(value, (low, high), 0.0, 0.004, 0.003, 0.95, 60, 12, "")
    return Comparison((), {}, test, None, {}, ())


def forecast(errors, low, high):
    return multiply.Forecast("precision", np.array(errors), (low, high), 0.01, 1.0)


NO_SUMS = multiply.Sums((), {}, None)


@pytest.mark.parametrize(
    ("errors", "interval", "test", "verdict"),
    [
        ([0.01, -0.01] * 6, (-0.004, 0.004), (1.0, 0.9, 1.1), SUPPORTED),
        ([0.01, -0.01] * 6, (-0.004, 0.004), (1.0, 0.6, 1.4), UNDECIDED),
        ([0.02] * 11 + [-0.01], (0.01, 0.03), (0.87, 0.64, 1.01), CONTRADICTED),  # κ's interval holds 1
        ([-0.02] * 12, (-0.03, -0.01), (1.1, 0.9, 1.2), CONTRADICTED),
        ([0.02] * 12, (-0.03, 0.05), (0.9, 0.6, 1.2), UNDECIDED),  # the marginal fit itself is not known so well
    ],
)
def test_a_bias_contradicts_the_product(errors, interval, test, verdict):
    said = multiply._verdict(forecast(errors, *interval), kappa(*test).multiplicativity, NO_SUMS)
    assert said[0] == verdict
    if verdict == CONTRADICTED:
        assert ("overlap" if errors[0] > 0 else "compound") in said[1]


def joint_table(joint, seeds=2, noise=1e-4):
    """16 bits at 2.0, weights at 4 bits 2.1, activations at 4 bits 2.2; both at `joint`."""
    settings = (({}, 2.0), ({"P_w": 4}, 2.1), ({"P_a": 4}, 2.2), ({"P_w": 4, "P_a": 4}, joint))
    return evidence(
        [
            model(n, 1e6, loss + (noise if s else -noise), {}, s, **bits)
            for n in SIZES
            for bits, loss in settings
            for s in range(seeds)
        ]
    )


def test_sums_of_parts_by_hand():
    sums = multiply.sums_of_parts(joint_table(2.25))
    assert len(sums.found) == 2
    assert sums.found[0].together == pytest.approx(0.25) and sums.found[0].alone == pytest.approx(0.3)
    assert sums.mean[0] == pytest.approx(0.05)
    # joint - w - a + 16 bits at each N, two seeds each, averaged over two N
    assert sums.mean[1] == pytest.approx(sums.noise.t * sums.noise.sd * np.sqrt(4 / 2 / 2))
    assert multiply._verdict(None, None, sums)[0] == CONTRADICTED
    assert multiply._verdict(None, None, multiply.sums_of_parts(joint_table(2.4)))[0] == UNDECIDED
    assert multiply._verdict(None, None, multiply.sums_of_parts(joint_table(2.29, noise=0.05)))[0] == UNDECIDED


def test_f2_says_what_is_missing():
    finding = multiply.effects_multiply(evidence(grid(power(0.5))))
    assert finding.verdict == UNDECIDED
    assert finding.by_table == "No run was trained with two or more parts below 16 bits."


BITS = tuple(
    {**dict.fromkeys(("P_w", "P_a", "P_kv"), 16), **bits}
    for bits in (
        {},
        *({part: p} for part in ("P_w", "P_a", "P_kv") for p in (3, 4, 6, 8)),
        *({"P_w": p, "P_a": p, "P_kv": p} for p in (4, 5, 6)),
        {"P_w": 4, "P_a": 6},
    )
)
CHINCHILLA = {"A": 7.2, "alpha": 0.2, "B": 48.0, "beta": 0.3, "E": 0.9}
PRODUCT = {**laws.get("precision").published, **CHINCHILLA}
POWER = {**CHINCHILLA, **{f"C_{x}": 2.0 for x in ("w", "a", "kv")}, **{f"rho_{x}": 2.5 for x in ("w", "a", "kv")}}
ADDED = {**CHINCHILLA, "g": 1.0, "d": 0.1, "q": 0.6, "c_w": 0.02, "c_a": 0.3, "c_kv": 0.05}


@pytest.mark.slow
def test_runs_of_added_noise_contradict_the_product(monkeypatch):
    monkeypatch.setattr(multiply, "STARTS", 24)
    monkeypatch.setattr(multiply, "RESAMPLES", 40)
    rng = np.random.default_rng(0)
    rows = [
        model(n, d, float(laws.predict("noise", ADDED, N=n, D=d, **bits)) * np.exp(rng.normal(0, 0.001)), **bits)
        for n, d in itertools.product((1e5, 9e5), (1e6, 4e6, 16e6))
        for bits in BITS
    ]
    finding = multiply.effects_multiply(evidence(rows, comparison=kappa(1.0, 0.9, 1.1)))
    product, noise = finding.numbers["precision"], finding.numbers["noise"]
    assert finding.verdict == CONTRADICTED and "although κ's interval contains 1" in finding.by_table
    assert product["too_high"] > 0.8 * product["joint_runs"] and product["mean_log_error_ci"][0] > 0
    assert abs(noise["mean_log_error"]) < 0.002 < product["mean_log_error"]


# --- F3 -------------------------------------------------------------------------------------------------------------


def compared(*laws_with_low, kind="loss"):
    """A comparison of laws, best first: (name, low end of the difference from the best)."""
    made = []
    for i, (law, low) in enumerate(laws_with_low):
        gap = None if i == 0 else Difference(low + 0.01, low, low + 0.02)
        held = dict.fromkeys(("N", "D", "P", "compute", "largest_N"), 0.01 + 0.01 * i)
        quality = {"r2": 0.9, "mse": 0.1, "objective": 0.1, "aic": 0.0, "bic": 0.0, "r2_held_out": 0.9}
        shares = {"starts_at_best": 1.0, "condition": 1.0, "seconds": 0.0, "unidentified": ()}
        made.append(Row(law=law, kind=kind, n=9, k=5, held_out=held, served=held, difference=gap, **quality, **shares))
    return Comparison(tuple(made), {}, None, "", {}, ())


def spread(made, scale=0.01):
    """The fit with 40 bootstrap samples of its values."""
    rng = np.random.default_rng(0)
    samples = {k: tuple(v * np.exp(rng.normal(0, scale, 40))) for k, v in made.values.items()}
    return dataclasses.replace(made, samples=samples)


def test_best_bits_are_those_of_the_closed_form_at_every_budget():
    loss = build([fit_with("precision", laws.get("precision").published)]).loss
    for flops in (1e18, 1e21):
        assert optimum_by_law.best_bits(loss, flops, optimum_by_law.FINEST) == pytest.approx(7.0, abs=0.02)
    rising = build([fit_with("power_laws", POWER)]).loss
    low, high = (optimum_by_law.best_bits(rising, flops, optimum_by_law.FINEST) for flops in (1e12, 1e16))
    assert high > low + 1


def test_laws_near_the_best_by_their_paired_interval():
    found = compared(("noise", 0.0), ("precision", -0.001), ("d_eff", 0.002))
    assert optimum_by_law.near_best(found) == ("noise", "precision")
    assert optimum_by_law.near_best(None) == ()


def low_rows(bits=(3, 4, 5, 6, 7, 8, 10)):
    parts = [{part: p} for part in ("P_w", "P_a", "P_kv") for p in bits]
    tied = [dict.fromkeys(("P_w", "P_a", "P_kv"), p) for p in bits]
    return [model(n, 1e6, 2.0 + 0.1 * i, **b) for n in SIZES for i, b in enumerate(({}, *parts, *tied))]


@pytest.mark.parametrize(
    ("near", "bits", "verdict"),
    [
        ((("precision", 0.0),), (3, 4, 5, 6, 7, 8, 10), FORCED),
        ((("power_laws", 0.0), ("precision", 0.01)), (3, 4, 5, 6, 7, 8, 10), CONTRADICTED),
        ((("power_laws", 0.0), ("precision", -0.01)), (3, 4, 5, 6, 7, 8, 10), UNDECIDED),
        ((("power_laws", 0.0), ("precision", 0.01)), (3, 4, 6), UNDECIDED),  # nothing measured between 6 and 16
        ((("noise", 0.0),), (3, 4, 5, 6, 7, 8, 10), UNDECIDED),  # not fitted
    ],
)
def test_the_best_precision_by_laws_near_the_best(near, bits, verdict):
    fits = {
        "precision": spread(fit_with("precision", PRODUCT)),
        "power_laws": spread(fit_with("power_laws", POWER)),
    }
    found = evidence([*low_rows(bits), model(SIZES[0], 1e4, 3.0), model(SIZES[1], 1e9, 1.5)], fits, compared(*near))
    finding = best_precision.optimal_precision(found)
    assert finding.verdict == verdict
    assert "precision" in finding.numbers["constant_by_form"]
    assert "No three precisions of all parts were measured at equal cost" in finding.by_table
    p_star = finding.numbers["P_star"]["precision"].values()
    assert max(p_star) == min(p_star) == pytest.approx(7.0, abs=0.02)


def at_equal_cost(best, noise=0.001):
    """Runs of all parts at 4 to 16 bits with N·D·P fixed at two budgets; loss least at `best[budget]` bits."""
    rows = []
    for budget, bits in zip((1.6e12, 1.6e13), best, strict=True):
        for p in (4, 5, 6, 7, 8, 10, 16):
            for seed, sign in ((0, 1), (1, -1)):
                loss = 2.0 + 0.01 * abs(p - bits) + sign * noise
                rows.append(model(1e5, round(budget / 1e5 / p), loss, {}, seed, P_w=p, P_a=p, P_kv=p))
    return evidence(rows)


@pytest.mark.parametrize(
    ("best", "verdict"), [((7, 7), SUPPORTED), ((5, 5), CONTRADICTED), ((6, 8), CONTRADICTED), ((7, 8), CONTRADICTED)]
)
def test_the_best_precision_by_runs_of_equal_cost(best, verdict):
    found = at_equal_cost(best)
    by_size, by_budget = equal_cost.matches(found)
    assert [m.best for m in by_budget] == [float(b) for b in best] and len(by_size) == 2
    assert by_budget[0].good == (float(best[0]),)
    assert best_precision.optimal_precision(found).verdict == verdict


def test_runs_of_equal_cost_within_noise_decide_nothing():
    finding = best_precision.optimal_precision(at_equal_cost((7, 8), noise=0.05))
    assert finding.verdict == UNDECIDED and "within noise" in finding.by_table


def test_the_size_that_makes_up_for_few_bits_is_read_off_the_losses():
    law = lambda n: 1.0 + n**-0.2
    sizes = (1e5, 2e5, 4e5, 8e5, 16e5)
    wide = [model(n, 1e6, law(n)) for n in sizes]
    tied = lambda p, factor: [
        model(n, 1e6, law(n / factor), P_w=p, P_a=p, P_kv=p) for n in sizes if n / factor >= sizes[0]
    ]
    assert few_bits.few_bits_cost_parameters(evidence([*wide, *tied(3, 5.0)])).verdict == SUPPORTED
    less = few_bits.few_bits_cost_parameters(evidence([*wide, *tied(3, 2.0)]))
    assert less.verdict == CONTRADICTED
    assert all(float(row["factor on N"]) == pytest.approx(2.0, abs=0.02) for row in less.rows)
    bound = few_bits.few_bits_cost_parameters(evidence([*wide, model(2e5, 1e6, 2.0, P_w=3, P_a=3, P_kv=3)]))
    assert bound.verdict == UNDECIDED and bound.rows[0]["factor on N"] == "above 2"
    assert few_bits.few_bits_cost_parameters(evidence(wide)).verdict == UNDECIDED


# --- F4 -------------------------------------------------------------------------------------------------------------


def low_models(below, at, above, method="gptq"):
    """Models of weights at 4 bits served at 3, 4 and 6 bits beside 16-bit ones that lose .3, .1 and .01 there."""
    rows = []
    for n, d in itertools.product(SIZES, TOKENS):
        for seed, sign in ((0, 1e-4), (1, -1e-4)):
            rows.append(model(n, d, 2.0 + sign, {3: 0.3 + sign, 4: 0.1 + sign, 6: 0.01 + sign}, seed, method=method))
        rows.append(model(n, d, 2.1, {3: below, 4: at, 6: above}, method=method, P_w=4))
    return rows


def test_f4_is_told_apart_below_at_and_above_the_bits_of_training():
    found = evidence(low_models(0.2, 0.0, 0.05))
    assert served_low.low_precision_loses_less(found).verdict == SUPPORTED
    home = served_low.nothing_lost_when_served_as_trained(found)
    assert home.verdict == CONTRADICTED  # above P_w they lose .05, which the 16-bit models do not
    assert home.numbers == {"gptq, P_post = P_w": 0.0, "gptq, P_post > P_w": 1.0}
    assert served_low.nothing_lost_when_served_as_trained(evidence(low_models(0.2, 0.0, 0.0))).verdict == SUPPORTED
    assert served_low.low_precision_loses_less(evidence(low_models(0.4, 0.0, 0.0))).verdict == CONTRADICTED
    assert served_low.low_precision_loses_less(evidence(low_models(0.3001, 0.0, 0.0))).verdict == UNDECIDED  # noise


def test_f4_does_not_count_what_noise_alone_puts_beyond_its_limit():
    # 200 rows: 2.5 % on either side are to be expected
    assert served_low._less(Counter({"less": 9, "more": 5, "within noise": 186})) == UNDECIDED
    assert served_low._less(Counter({"less": 19, "more": 7, "within noise": 174})) == SUPPORTED
    assert served_low._less(Counter({"less": 19, "more": 19, "within noise": 162})) == UNDECIDED
    assert served_low._less(Counter({"less": 4, "more": 30, "within noise": 166})) == CONTRADICTED


def test_f4_is_told_method_by_method():
    rtn = [[row for row in rows if row["method"]] for rows in low_models(0.2, 0.0, 0.0, "rtn")]
    home = served_low.nothing_lost_when_served_as_trained(evidence([*low_models(0.2, 0.37, 0.0), *rtn]))
    assert home.verdict == CONTRADICTED
    assert home.numbers["rtn, P_post = P_w"] == 0.0 and home.numbers["gptq, P_post = P_w"] == 1.0
    assert "GPTQ at P_post = P_w" in home.by_table and "RTN at" not in home.by_table


def test_one_law_is_judged_by_its_held_out_error():
    rows = grid(power(0.5), 1e-4)
    beaten = compared(("unified_noise", 0.0), ("unified", 0.01), kind="both")
    assert served_low.one_law(evidence(rows, comparison=beaten)).verdict == CONTRADICTED
    near = compared(("unified_noise", 0.0), ("unified", -0.01), kind="both")
    assert served_low.one_law(evidence(rows, comparison=near)).verdict == UNDECIDED
    assert served_low.one_law(evidence(rows)).verdict == UNDECIDED


# --- the challenge --------------------------------------------------------------------------------------------------


def schedules(constant, seeds=(0, 1), noise=1e-5, tokens=TOKENS):
    rows = []
    for name, exponent in (("cosine", 0.6), ("constant", constant)):
        for n, d, s in itertools.product(SIZES, tokens, seeds):
            deltas = {p: power(exponent)(n, d, p) + (noise if s else -noise) for p in (3, 4)}
            rows.append(model(n, d, 2.0, deltas, s, schedule=name))
    return rows


@pytest.mark.parametrize(("constant", "verdict"), [(0.02, SUPPORTED), (0.5, CONTRADICTED), (0.25, UNDECIDED)])
def test_the_challenge_is_decided_by_the_exponent_left_without_decay(constant, verdict):
    finding = schedule.schedule_or_data(evidence(schedules(constant)))
    assert finding.verdict == verdict
    assert finding.numbers["cosine"]["decayed"] == pytest.approx(0.6, abs=0.01)
    assert finding.numbers["cosine"]["constant"] == pytest.approx(constant, abs=0.01)
    assert finding.numbers["cosine"]["units"] == 4


def test_one_seed_of_two_sizes_decides_nothing():
    finding = schedule.schedule_or_data(evidence(schedules(0.5, seeds=(0,))))
    assert finding.verdict == UNDECIDED and "Fewer than 3 matched N and seeds" in finding.by_table


def test_only_matched_settings_are_compared():
    # the cosine runs that a constant schedule has no match for grow faster: they must not count
    extra = [model(n, d, 2.0, {3: 1e-3 * (d / 1e6) ** 3}, s) for n in (9e5,) for d in TOKENS for s in (0, 1)]
    finding = schedule.schedule_or_data(evidence([*schedules(0.5), *extra]))
    assert finding.numbers["cosine"]["decayed"] == pytest.approx(0.6, abs=0.01)
    alone = [rows for rows in schedules(0.5) if rows[0]["schedule"] == "cosine"]
    assert schedule.schedule_or_data(evidence(alone)).verdict == UNDECIDED


# --- all of them ----------------------------------------------------------------------------------------------------


def test_a_table_of_sizes_and_tokens_alone_decides_nothing():
    n, d = (np.array(x) for x in zip(*itertools.product(SIZES, TOKENS), strict=True))
    found = findings.all_findings(Evidence(from_columns({"N": n, "D": d, "loss": 1 + n**-0.2 + d**-0.2})))
    assert {f.verdict for f in found} == {UNDECIDED}
    assert [f.key for f in found][:2] == ["F1", "F1 D_crit"] and found[-1].key == "Challenge"
    assert all(f.by_form and f.by_table.endswith((".", ")")) for f in found)
