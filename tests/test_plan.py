"""Planning against the numbers that follow from the paper's constants, worked out by hand or by other means."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import optimize

from analysis import laws
from analysis.fitting.fit import Fit
from analysis.laws import law as law_lib
from analysis.plan import FLAGS, command
from analysis.planning import closed_forms, fitted, surface
from analysis.planning.cost import CostError, CostModel, bits_of_format
from analysis.planning.minimize import Budget, BudgetError, minimize, turning_point
from analysis.planning.plan import plan
from analysis.planning.text import advice, describe

PAPER = {**laws.published("precision"), **laws.published("ptq")}
P_16 = 16.0


@pytest.fixture(scope="module")
def fits():
    return fitted.load("paper")


@pytest.fixture(scope="module")
def ground(fits):
    return surface.build(fits)


@pytest.fixture(scope="module")
def capacity(fits):
    return surface.build(fits).share


def hand_loss(n, d, p):
    """The paper's law 3 with biases, written out from its Table 2."""
    f = 1.0
    for gamma, bias in ((2.6745, 0.3037), (2.2102, 1.4072), (0.9578, 2.4185)):
        f *= 1 - math.exp(-p / gamma + bias)
    return 4299 * (n * f) ** -0.4965 + 18060 * d**-0.4965 + 2.7648


# --- the numbers of the paper's constants ---------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "product"), [(4, 0.191), (6, 0.611), (8, 0.828), (16, 0.994)])
def test_capacity_of_all_parts_at_paper_precisions(capacity, p, product):
    assert capacity(p) == pytest.approx(product, abs=5e-4)


@pytest.mark.parametrize(("part", "zero"), [("a", 3.11), ("kv", 2.32), ("w", 0.81)])
def test_capacity_of_a_part_vanishes_at_its_zero(fits, part, zero):
    f = surface.build(fits).with_parts([part]).share
    others = f(24.0) / (1 - math.exp(-24 / PAPER[f"gamma_{part}"] + PAPER[f"n_{part}"]))
    assert f(zero - 0.05) == pytest.approx(1e-3 * others, rel=1e-6)  # clipped below the zero
    assert 1e-3 < f(zero + 0.05) < 0.06
    assert PAPER[f"gamma_{part}"] * PAPER[f"n_{part}"] == pytest.approx(zero, abs=5e-3)


@pytest.mark.parametrize("flops", [1e18, 1e21, 1e25])
def test_cost_optimal_precision_is_seven_bits_at_every_budget(ground, flops):
    assert minimize(ground, Budget(flops=flops)).p == pytest.approx(7.002, abs=2e-3)


def test_cost_optimal_precision_with_the_mean_of_the_three_parts(fits):
    gamma, bias = (np.mean([PAPER[f"{k}_{x}"] for x in ("w", "a", "kv")]) for k in ("gamma", "n"))
    loss = fits[0]
    mean = {**loss.values, **{f"gamma_{x}": gamma for x in law_lib.PARTS}, **{f"n_{x}": bias for x in law_lib.PARTS}}
    point = minimize(surface.build([dataclasses.replace(loss, values=mean)]), Budget(flops=1e21))
    assert point.p == pytest.approx(7.64, abs=5e-3)


def test_tied_unbiased_optimum_is_1_904_gamma_whatever_the_exponents_and_the_budget(fits):
    assert closed_forms.tied_unbiased_optimum() == pytest.approx(1.904, abs=5e-4)
    loss = fits[0]
    for gamma, alpha, beta, flops in ((2.0, 0.4965, 0.4965, 1e21), (3.1, 0.3, 0.6, 1e19), (1.7, 0.7, 0.25, 1e23)):
        tied = {**loss.values, **{f"n_{x}": 0.0 for x in law_lib.PARTS}, **{f"gamma_{x}": gamma for x in law_lib.PARTS}}
        ground = surface.build([dataclasses.replace(loss, values={**tied, "alpha": alpha, "beta": beta})])
        assert minimize(ground, Budget(flops=flops)).p / gamma == pytest.approx(1.9038, abs=1e-3)


@pytest.mark.parametrize(("p", "factor"), [(4, 5.20), (5, 2.33), (6, 1.63), (7, 1.34), (8, 1.20)])
def test_factor_on_parameters_that_makes_up_for_low_precision(fits, capacity, p, factor):
    assert closed_forms.make_up_factor(capacity, p) == pytest.approx(factor, abs=6e-3)
    rows = {row["P"]: row for row in plan(fits, Budget(flops=1e21)).alternatives}
    assert rows[p]["N_factor"] == pytest.approx(factor, abs=6e-3)


@pytest.mark.parametrize(
    ("p", "n", "loss"),
    [(4, 1.76e9, 3.171), (6, 1.17e9, 3.0925), (8, 880e6, 3.0909), (16, 440e6, 3.140), (32, 220e6, 3.230)],
)
def test_losses_at_equal_cost(fits, p, n, loss):
    at = plan(fits, Budget(n=n, d=16e9, p=float(p)))
    assert at.best.loss == pytest.approx(loss, abs=5e-4)
    assert at.best.flops == pytest.approx(6 * n * 16e9 * p / 16)


@pytest.mark.parametrize(
    ("d", "deltas"), [(1.5e9, (0.138, 0.025, 0.0047, 0.0009)), (26e9, (0.586, 0.108, 0.020, 0.0036))]
)
def test_degradation_under_ptq(fits, d, deltas):
    for bits, delta in zip((3, 4, 5, 6), deltas, strict=True):
        at = plan(fits, Budget(n=30e6, d=d, p=P_16, serve_bits=bits))
        assert at.best.delta == pytest.approx(delta, rel=0.05 if delta < 0.001 else 0.02)
        assert at.best.loss == pytest.approx(hand_loss(30e6, d, 16) + at.best.delta, abs=1e-9)


@pytest.mark.parametrize(("bits", "per_parameter"), [(3, 177), (4, 959), (5, 5.2e3), (6, 2.8e4)])
def test_tokens_past_which_the_quantized_model_gets_worse(ground, bits, per_parameter):
    closed = closed_forms.critical_tokens(PAPER, 30e6, bits)
    assert closed / 30e6 == pytest.approx(per_parameter, rel=4e-3)
    assert turning_point(ground, 30e6, P_16, bits) == pytest.approx(float(closed), rel=1e-5)


def test_precision_of_the_weights_grows_like_beta_gamma_log_flops_at_fixed_size(fits):
    gamma, beta = PAPER["gamma_w"], PAPER["beta"]
    weights = surface.build(fits).with_parts(["w"]).share
    # the condition α A (f N)^-α f'/f = β B D^-β / P leaves P/γ - (1 - β) ln P = β ln C once f is near 1
    pure = lambda p: p / gamma - (1 - beta) * math.log(p)
    grid = np.linspace(2, 80, 8000)
    low, high = (closed_forms.fixed_size_precision(PAPER, weights, 1e8, c, grid) for c in (1e24, 1e30))
    assert (pure(high) - pure(low)) / math.log(1e6) == pytest.approx(beta, rel=5e-3)
    assert (high - low) / math.log(1e6) == pytest.approx(beta * gamma, rel=0.1)  # β γ ln C, up to the ln P term
    at = minimize(surface.build(fits).with_parts(["w"]), Budget(flops=1e24, n=1e8, p_range=(2.0, 80.0)))
    assert at.p == pytest.approx(low, abs=2e-3)
    assert at.d == pytest.approx(16e24 / (6 * 1e8 * at.p), rel=1e-9)  # D* = 16 C / (6 N P*): C / (N β γ ln C)


# --- closed forms against the law's own numerical optimum -----------------------------------------------------------


@pytest.mark.parametrize("p", [4.0, 7.0, 16.0])
@pytest.mark.parametrize("exponents", [(0.4965, 0.4965), (0.34, 0.28)])
def test_compute_optimal_sizes_match_a_scalar_minimizer(capacity, p, exponents):
    params = {**PAPER, "alpha": exponents[0], "beta": exponents[1]}
    flops, cost = 1e21, p / 16
    law = lambda log_n: float(
        laws.predict(
            "precision",
            {k: v for k, v in params.items() if k in laws.published("precision")},
            N=np.exp(log_n),
            D=flops / (6 * cost * np.exp(log_n)),
            P_w=p,
            P_a=p,
            P_kv=p,
        )
    )
    found = math.exp(optimize.minimize_scalar(law, bounds=(10, 40), method="bounded", options={"xatol": 1e-10}).x)
    n, d = closed_forms.compute_optimal(params, flops, cost, float(capacity(p)))
    assert n == pytest.approx(found, rel=1e-5)
    assert 6 * n * d * cost == pytest.approx(flops)


def test_optimal_tokens_at_fixed_precision_scale_as_one_share_of_the_cost(capacity):
    """The printed D* of the paper lacks P^(-α/(α+β)); at equal capacity D* must carry half of 1/P where α = β."""
    _, d8 = closed_forms.compute_optimal(PAPER, 1e21, 8 / 16)
    _, d16 = closed_forms.compute_optimal(PAPER, 1e21, 1.0)
    assert d8 / d16 == pytest.approx(2**0.5)


def test_search_agrees_with_closed_forms(ground, capacity):
    point = minimize(ground, Budget(flops=1e21))
    best = closed_forms.best_precision(capacity, CostModel().relative)
    assert point.p == pytest.approx(best, abs=1e-4)
    n, d = closed_forms.compute_optimal(PAPER, 1e21, point.p / 16, float(capacity(point.p)))
    assert (point.n, point.d) == (pytest.approx(n, rel=1e-4), pytest.approx(d, rel=1e-4))


@pytest.mark.parametrize("n", [3e7, 1e9])
def test_fixed_size_precision_matches_the_search(ground, capacity, n):
    closed = closed_forms.fixed_size_precision(PAPER, capacity, n, 1e21, np.linspace(2, 60, 4000))
    assert minimize(ground, Budget(flops=1e21, n=n, p_range=(2.0, 60.0))).p == pytest.approx(closed, abs=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"p": 16.0},
        {"n": 1e9},
        {"d": 1e11},
        {"serve_bits": 4.0},
        {"serve_bits": 3.0, "n": 3e8},
        {"inference_tokens": 1e12},
        {"memory_bytes": 5e8},
        {"memory_bytes": 5e8, "serve_bits": 4.0},
        {"serve_bits": 6.0, "inference_tokens": 1e12},
    ],
)
def test_no_random_plan_within_the_budget_beats_the_search(ground, case):
    budget = Budget(flops=1e21, **case)
    best = minimize(ground, budget)
    assert best.flops <= 1e21 * (1 + 1e-9)
    rng = np.random.default_rng(0)
    draw = lambda low, high: np.exp(rng.uniform(np.log(low), np.log(high), 200_000))
    n = np.full(200_000, budget.n) if budget.n else draw(1e7, 1e11)
    d = np.full(200_000, budget.d) if budget.d else draw(1e8, 1e13)
    p = np.full(200_000, budget.p) if budget.p else rng.uniform(2, 16, 200_000)
    allowed = (budget.spent(n, d, p) <= 1e21) & budget.fits_memory(n, p)
    assert allowed.sum() > 1000
    loss = ground.served(n[allowed], d[allowed], p[allowed], budget.serve_bits)
    assert best.loss <= loss.min() + 1e-9
    assert best.loss > loss.min() - 0.05


# --- costs ----------------------------------------------------------------------------------------------------------


def test_cost_is_linear_in_bits_or_the_inverse_of_speed():
    assert CostModel().training(1e9, 2e10, 8) == pytest.approx(6 / 16 * 1e9 * 2e10 * 8)
    assert CostModel().inference(1e9, 1e12, 4) == pytest.approx(2e21 / 4)
    speeds = CostModel.parse("bf16:1, fp8:1.6")
    assert speeds.training(1e9, 1e10, 8) == pytest.approx(6e19 / 1.6)
    assert speeds.precisions == (8.0, 16.0)
    with pytest.raises(CostError, match="no speed for 7 bits"):
        speeds.relative(7.0)


@pytest.mark.parametrize(
    ("name", "bits"), [("bf16", 16), ("FP8", 8), ("int4", 4), ("e4m3", 8), ("e2m1", 4), ("6.5", 6.5)]
)
def test_bits_of_a_format(name, bits):
    assert bits_of_format(name) == bits


@pytest.mark.parametrize("text", ["bf16", "bf16:0", "bf16:x", "bf16:1,fp16:1", "nope:2", "bf16:-1", "bf16:inf"])
def test_bad_speeds_are_refused(text):
    with pytest.raises(CostError):
        CostModel.parse(text)


def test_measured_speeds_can_turn_the_choice(fits):
    slow, fast = (plan(fits, Budget(flops=1e21, cost=CostModel.parse(f"bf16:1,fp8:{s}"))) for s in (1.1, 1.6))
    assert (slow.best.p, fast.best.p) == (16.0, 8.0)  # 8 bits need 1.2 times the parameters
    assert [row["format"] for row in fast.alternatives] == ["fp8", "bf16"]


# --- the plan -------------------------------------------------------------------------------------------------------


def test_contract_of_the_plan(fits):
    raw = json.loads(plan(fits, Budget(flops=1e21, serve_bits=4.0)).to_json())
    assert list(raw)[:7] == ["N", "D", "P", "loss", "loss_ci", "flops", "alternatives"]
    assert raw["loss_ci"] is None  # published constants carry no samples
    assert [row["P"] for row in raw["alternatives"]] == list(range(4, 17))
    assert raw["alternatives"][0]["delta"] == 0.0  # trained in the 4 bits it is served in
    assert all(row["loss"] >= raw["loss"] for row in raw["alternatives"])


def test_a_small_model_served_in_three_bits_stops_before_the_budget_is_spent(fits):
    found = plan(fits, Budget(flops=1e21, n=3e8, p=P_16, serve_bits=3.0))
    assert found.best.d == pytest.approx(float(closed_forms.critical_tokens(PAPER, 3e8, 3)), rel=1e-4)
    assert found.best.flops < 0.1 * 1e21
    assert advice(found).startswith("DON'T TRAIN LONGER")


def test_training_past_the_turn_is_called_out(fits):
    text = advice(plan(fits, Budget(n=30e6, d=26e9, p=P_16, serve_bits=3.0)))
    assert text.startswith("DON'T TRAIN LONGER") and "177 per parameter" in text and "4.88 times" in text
    assert "rise past" in advice(plan(fits, Budget(n=30e6, d=1e9, p=P_16, serve_bits=3.0)))


def test_extrapolation_is_said_in_words(fits):
    inside = plan(fits, Budget(n=1e8, d=1e10, p=8.0))
    assert not [w for w in inside.warnings if "extrapolation" in w]
    outside = plan(fits, Budget(n=1e8, d=1e12, p=8.0, serve_bits=2.0))
    told = " ".join(outside.warnings)
    assert "D = 1T is 38.5 times above the fit's data (1.5B to 26B)" in told and "P_post = 2 is below" in told


def test_a_part_without_data_stays_at_sixteen_bits_and_is_named(fits):
    fit = dataclasses.replace(
        fits[0],
        params={**fits[0].params, "gamma_kv": None, "n_kv": None},
        values={**fits[0].values, "gamma_kv": 0.05, "n_kv": 0.0},
        unidentified={"gamma_kv": "no row", "n_kv": "no row"},
    )
    found = plan([fit], Budget(flops=1e21))
    assert found.parts == ("w", "a")
    assert any("KV cache" in warning and "16 bits" in warning for warning in found.warnings)
    assert "precision of weights, activations" in describe(found)
    with pytest.raises(surface.SurfaceError, match="KV cache"):
        plan([fit], Budget(flops=1e21), parts=("w", "kv"))


def test_a_law_without_precision_plans_in_sixteen_bits():
    params = laws.published("chinchilla")
    fit = Fit.from_json(json.dumps({"law": "chinchilla", "params": params}))
    found = plan([fit], Budget(flops=1e21))
    n, d = closed_forms.compute_optimal(params, 1e21)
    assert (found.best.n, found.best.d, found.best.p) == (pytest.approx(n, rel=1e-4), pytest.approx(d, rel=1e-4), 16.0)
    with pytest.raises(surface.SurfaceError, match="16 bits only"):
        plan([fit], Budget(flops=1e21, p=8.0))


def test_a_free_capacity_law_chooses_among_the_precisions_it_has_seen():
    params = {**laws.published("chinchilla"), "eff_w4_a4": 0.6, "eff_w8_a8": 0.75, "eff_w3": 0.5}
    found = plan([Fit.from_json(json.dumps({"law": "capacity", "params": params}))], Budget(flops=1e21))
    assert found.parts == ("w", "a")
    assert found.best.p == 4.0  # 0.6/4 beats 0.75/8 and 1/16
    assert {row["P"] for row in found.alternatives} == {4.0, 8.0, 16.0}


def test_intervals_come_from_the_samples_of_the_fit(fits):
    rng = np.random.default_rng(1)
    values = fits[0].values
    fit = dataclasses.replace(
        fits[0],
        n=100,
        samples={"E": tuple(values["E"] + rng.normal(0, 0.01, 400)), "A": (values["A"],) * 400},
    )
    found = plan([fit], Budget(flops=1e21))
    assert found.loss_ci[0] == pytest.approx(found.best.loss - 0.0196, abs=0.004)
    assert found.loss_ci[1] == pytest.approx(found.best.loss + 0.0196, abs=0.004)
    assert found.intervals["P_ci"] == pytest.approx((7.002, 7.002), abs=2e-3)  # E moves no optimum


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        (Budget(), "--params and --tokens"),
        (Budget(n=1e9), "--params and --tokens"),
        (Budget(flops=1e8, n=1e9), "no model meets --flops=1e[+]08"),
        (Budget(flops=1e21, n=1e9, memory_bytes=1e6), "--memory=1MB"),
    ],
)
def test_impossible_budgets_are_refused(ground, budget, why):
    with pytest.raises(BudgetError, match=why):
        minimize(ground, budget)


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "analysis.plan", *options], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_command_prints_the_plan_and_writes_it(tmp_path):
    out = tmp_path / "new" / "plan.json"
    done = run("--fit=paper", "--flops=1e21", "--serve-bits=4", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "7.00 bits" in done.stdout and "D_crit" in done.stdout
    assert json.loads(out.read_text())["P"] == pytest.approx(7.0, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        ("--flops=1e21",),
        ("--fit=missing.json", "--flops=1e21"),
        ("--fit=paper", "--flops=-1"),
        ("--fit=paper", "--flops=1e21", "--parts=q"),
        ("--fit=paper", "--flops=1e21", "--columns=group_size"),
        ("--fit=paper", "--flops=1e21", "--memory=0"),
        ("--fit=paper", "--flops=1e21", "--serve-bits=0"),
        ("--fit=paper", "--flop=1e21"),
        ("--fit=paper", "--flops=many"),
        ("--fit=paper", "--flops=1e21", "--precision=q8"),
        ("--fit=paper", "--flops=1e21", "stray"),
    ],
)
def test_command_refuses_bad_input_in_one_line(options, capsys):
    saved = FLAGS.flag_values_dict()
    assert command(["plan", *options]) == 2
    for name, value in saved.items():
        FLAGS[name].value = value
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1 and told.startswith("error: ")
