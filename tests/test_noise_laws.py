"""Laws of rounding noise against hand-worked values, and the relative steps that they read."""

import dataclasses

import numpy as np
import pytest

from analysis import laws
from analysis.fitting.fit import Fit, fit
from analysis.fitting.options import FitError, Options
from analysis.fitting.setup import set_up
from analysis.laws import derived
from analysis.laws.law import Law, LawError, Need, Parameter
from analysis.laws.steps import integer_step, relative_step
from analysis.laws.synthetic import constants, table
from analysis.planning import fitted, surface
from analysis.planning.minimize import Budget
from analysis.planning.plan import plan
from precision_scaling.numerics.gaussian import gaussian_mse
from precision_scaling.numerics.rounding import fake_quant_array
from precision_scaling.quantize import fake_quant

pytestmark = pytest.mark.usefixtures("simple_loops")

OUTER = {"A": 400.0, "alpha": 0.5, "B": 300.0, "beta": 0.25, "E": 1.5, "g": 2.0}  # (4 + 3)^2 + 1.5 at N 1e4, D 1e8
HERE = {"N": 1e4, "D": 1e8}


def test_integers_step_by_one_over_their_largest_level():
    np.testing.assert_allclose(integer_step([2, 3, 4, 8, 16, 32]), [1, 1 / 3, 1 / 7, 1 / 127, 0, 0])
    assert integer_step(1) == np.inf and np.isnan(integer_step(np.nan))
    steps = integer_step(np.linspace(1.5, 15.9, 200))
    assert np.all(np.diff(steps) < 0)


def test_added_variances_are_their_formula():
    noisy = {**OUTER, "d": 0.25, "q": 0.5, "c_w": 9.0, "c_a": 441.0, "c_kv": 2.0}
    assert laws.predict("chinchilla_outer", OUTER, **HERE) == pytest.approx(50.5)
    got = laws.predict("noise", noisy, **HERE, P_w=[16, 3, 3], P_a=[16, 16, 4], P_kv=16)
    # D^.25 = 100; 9/9 = 1 at 3 bits of weights; 441/49 = 9 more at 4 bits of activations
    np.testing.assert_allclose(got, [50.5, 150.5, 50.5 + 100 * np.sqrt(10)])
    freed = laws.predict("noise", {**noisy, "nu": 0.5}, **HERE, P_w=3)
    assert freed == pytest.approx(50.5 + 100 / 100)


def test_noise_that_limits_capacity_is_its_formula():
    params = {**OUTER, "m": 0.5, "p": 2.0, "c_w": 0.27, "c_a": 9.8, "c_kv": 1.0}
    got = laws.predict("capacity_noise", params, **HERE, P_w=[16, 3, 3], P_a=[16, 16, 4])
    # N^.5 = 100; .27/9 = .03 gives N/4, 9.8/49 = .2 on top N/24
    np.testing.assert_allclose(got, [50.5, (8 + 3) ** 2 + 1.5, (4 * np.sqrt(24) + 3) ** 2 + 1.5])


def test_untrained_rounding_is_its_formula():
    params = {"C": 0.5, "gamma_D": 0.25, "gamma_N": 0.5}
    got = laws.predict("ptq_noise", params, **HERE, P_post=[2, 3, 4])
    np.testing.assert_allclose(got, 0.5 * 100 / 100 * np.array([1, 1 / 9, 1 / 49]))
    assert laws.predict("ptq_noise", {**params, "p": 1.0}, **HERE, P_post=3) == pytest.approx(0.5 / 3)
    # 2^b levels between the extremes: steps of 2/(2^b - 1)
    full = laws.predict("ptq_noise", params, **HERE, P_post=[3, 3], method=["gptq", "gptq-asymmetric"])
    np.testing.assert_allclose(full, [0.5 / 9, 0.5 * (2 / 7) ** 2])


def test_unified_noise_adds_its_delta_after_ptq_alone():
    params = {**OUTER, "m": 0.5, "p": 2.0, "c_w": 0.27, "c_a": 9.8, "c_kv": 1.0}
    params |= {"C": 0.5, "gamma_D": 0.25, "gamma_N": 0.5, "k": 9.0, "M": 2.7}
    got = laws.predict("unified_noise", params, **HERE, P_w=[16, 16, 3, 3], P_post=[np.nan, 3, np.nan, 4])
    low = 11**2 + 1.5
    np.testing.assert_allclose(got, [50.5, 50.5 + 0.5 / 9, low, low + 0.5 * (1 / 49 / (1 + 1) + 2.7 / 27)])
    assert laws.predict("unified_noise", params, **HERE, P_post=16) == pytest.approx(50.5)


def test_the_capacity_of_a_channel_is_its_formula():
    params = {"a": 0.01, "alpha": 0.25, "beta": 0.5, "c": 2.0, "gamma": 0.25, "d": 5.0, "delta": 0.125, "e": 950.0}
    # 1e8^.5 = 1e4; 2 (1e12)^.25 = 2000, 5 (1e8)^.125 = 50, 950: together 3000
    assert laws.predict("shannon", params, **HERE) == pytest.approx(1 / (0.01 * 10 * np.log2(1 + 10 / 3)))


@pytest.mark.slow
def test_a_format_has_the_step_of_the_integers_that_err_as_much():
    # between 4 and 5 bits under one scale for 1024 values, as sampled
    x = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    error = {
        name: float(np.mean((np.asarray(fake_quant_array(x, name, 1)) - x) ** 2)) for name in ("int4", "e2m1", "int5")
    }
    assert error["int5"] < error["e2m1"] < error["int4"]
    between = np.interp(np.log(error["e2m1"]), np.log([error["int5"], error["int4"]]), np.log([1 / 15, 1 / 7]))
    assert relative_step("e2m1", "channel", 1024) == pytest.approx(np.exp(between), rel=0.01)
    # fine grids go in proportion: 9 bits' worth of error is 9 bits
    assert gaussian_mse("int9", "absmax", 64) ** 0.5 / gaussian_mse("int8", "absmax", 64) ** 0.5 == pytest.approx(
        127 / 255, rel=1e-3
    )
    assert relative_step("bf16") == 0 and relative_step("int4", usual="tensor") == pytest.approx(1 / 7)
    # Scales of their own count: a group of 32 integers errs less than a channel of them, as sampled.
    x = np.random.default_rng(1).standard_normal((1024, 1024)).astype(np.float32)
    rms = lambda name, group: float(np.std(np.asarray(fake_quant(x, name, 1, group_size=group)) - x))
    bits = np.log([1 / 31, 1 / 15, 1 / 7])
    channels = np.log([rms("int6", None), rms("int5", None), rms("int4", None)])
    for name, granularity, error in (
        ("int4", "group:32", rms("int4", 32)),
        ("mxfp4", "tensor", rms("mxfp4", None)),
        ("nvfp4", "", rms("nvfp4", None)),
    ):
        expected = np.exp(np.interp(np.log(error), channels, bits))
        assert relative_step(name, granularity, 1024) == pytest.approx(expected, rel=0.03), name
    assert relative_step("nvfp4") < relative_step("mxfp4") < relative_step("int4")
    with pytest.raises(LawError, match="granularity 'row'"):
        relative_step("e4m3", "row")


def test_steps_come_from_formats_where_the_table_names_them_and_from_bits_elsewhere():
    columns = {"P_w": [4.0, 4.0, 16.0, 3.0], "w_format": ["int4", "e2m1", "bf16", ""], "width": [256.0] * 4}
    got = derived.column("s_w", columns)
    np.testing.assert_allclose(got[[0, 2, 3]], [1 / 7, 0, 1 / 3])
    assert got[1] == relative_step("e2m1", "channel", 256)
    grouped = {**columns, "w_granularity": ["group:32"] * 4}
    assert derived.column("s_w", grouped)[1] == relative_step("e2m1", "group:32", 256)
    # keys and values by their root mean square, over heads of 256/4
    cache = {"P_kv": [4.0], "k_format": ["int4"], "v_format": ["int3"], "width": [256.0], "heads": [4.0]}
    assert derived.column("s_kv", cache)[0] == pytest.approx(np.sqrt((1 / 49 + 1 / 9) / 2))
    per_head = {**cache, "k_format": ["e2m1"], "v_format": ["e2m1"], "attention_granularity": ["token"]}
    assert derived.column("s_kv", per_head)[0] == relative_step("e2m1", "token", 64, "tensor")
    np.testing.assert_allclose(derived.column("s_post", {"P_post": [np.nan, 3.0]}), [np.nan, 1 / 3])
    with pytest.raises(LawError, match="P_w = 1: symmetric integers have more than 1 bit; name the format"):
        derived.column("s_w", {"P_w": [1.0, 4.0]})


@pytest.mark.slow
def test_a_parameter_that_stays_at_its_default_is_fitted_when_freed():
    with pytest.raises(FitError, match="freed nu: it is fixed"):
        set_up("noise", table("noise"), Options(freed=("nu",), fixed={"nu": 0.1}))
    truth = {**constants("ptq_noise"), "p": 1.6}
    rows = table("ptq_noise", params=truth)
    assert fit("ptq_noise", rows, starts=8, profile=False).params["p"] == 2.0
    assert fit("ptq_noise", rows, Options(freed=("p",)), starts=8, profile=False).params["p"] == pytest.approx(1.6)


def test_constants_of_noise_that_the_rows_do_not_identify_are_named():
    rows = table("noise")
    weights_only = rows.select((rows["P_a"] == 16) & (rows["P_kv"] == 16) & np.isin(rows["P_w"], (16, 4)))
    unidentified = set_up("noise", weights_only).unidentified
    assert set(unidentified) == {"c_a", "c_kv", "q"}
    assert "only s_kv = 0" in unidentified["c_kv"] and "3 different values" in unidentified["q"]
    one_budget = rows.select((rows["D"] == rows["D"].min()) | rows.high_precision)
    assert "only D =" in set_up("chinchilla_outer", rows.select(rows["D"] == rows["D"].min())).unidentified["g"]
    channel = table("shannon")
    one_size = set_up("shannon", channel.select(channel["N"] == channel["N"].min()))
    assert set(one_size.unidentified) == {"alpha", "c", "gamma"}
    served = table("unified_noise")
    served = served.select(~served.quantized | (served["P_post"] == 4))
    assert "only s_post" in set_up("unified_noise", served).unidentified["M"]
    assert "training below 16 bits" in set_up("noise", one_budget).unidentified["d"]


# --- planning with laws that say by themselves what a plan must know

CPU = {"A": 240.0, "alpha": 0.602, "B": 50100.0, "beta": 0.84, "E": 0.793, "g": 0.427, "d": 0.194, "q": 0.622}
CPU |= {"c_w": 0.00182, "c_a": 0.0716, "c_kv": 0.00762}


def of(law, params):
    return dataclasses.replace(Fit.from_json(f'{{"law": "{law}", "params": {{}}}}'), params=params, values=params)


def best_bits(law, params, flops):
    """The precision of least loss at a budget by plain search over N and P."""
    n, p = np.meshgrid(np.geomspace(1e3, 1e7, 400), np.linspace(3, 15, 600), indexing="ij")
    loss = laws.predict(law, params, N=n, D=flops * 16 / (6 * n * p), P_w=p, P_a=p, P_kv=p)
    return p.ravel()[np.argmin(loss)]


def test_a_noise_law_is_planned_and_its_best_precision_rises_with_the_budget():
    found = [plan([of("noise", CPU)], Budget(flops=flops)) for flops in (1e11, 1e12, 1e13)]
    bits = [result.best.p for result in found]
    assert bits == pytest.approx([best_bits("noise", CPU, flops) for flops in (1e11, 1e12, 1e13)], abs=0.03)
    assert bits[0] < bits[1] - 0.3 < bits[2] - 0.6
    assert not any("by the form" in warning for warning in found[0].warnings)
    paper = plan(fitted.load("paper"), Budget(flops=1e21))
    assert any("by the form of law precision alone" in warning for warning in paper.warnings)


def test_the_share_of_n_that_noise_leaves_needs_n_and_goes_into_the_plan():
    params = {**OUTER, "m": 0.5, "p": 2.0, "c_w": 0.27, "c_a": 9.8, "c_kv": 1e-30}
    share = surface.build([of("capacity_noise", params)]).with_parts(["w"]).share
    assert share(np.float64(3), 1e4, 1e8) == pytest.approx(1 / 4)
    with pytest.raises(surface.SurfaceError, match="varies with N or D"):
        share(3.0)
    params |= {"C": 1e-4, "gamma_D": 0.4, "gamma_N": 0.3, "k": 9.0, "M": 0.01}
    at = plan([of("unified_noise", params)], Budget(n=1e4, d=1e8, p=16.0, serve_bits=3))
    assert at.best.delta == pytest.approx(1e-4 * 1e8**0.4 / 1e4**0.3 / 9)


def test_only_informed_parts_are_planned_and_unknown_bits_are_errors():
    half = dataclasses.replace(of("noise", CPU), unidentified={"c_kv": "only s_kv = 0", "c_a": "only s_a = 0"})
    assert surface.build([half]).parts == ("w",)
    result = plan([half], Budget(flops=1e12))
    assert result.parts == ("w",) and "low precision in activations, KV cache" in result.warnings[0]
    gmse = of(
        "capacity_gmse", {**dict.fromkeys("AB", 100.0), "alpha": 0.3, "beta": 0.3, "E": 1, "L": 1, "F": 0.4, "C": 1}
    )
    assert plan([gmse], Budget(flops=1e12)).best.p in range(2, 17)
    qat = of("qat", {**laws.published("qat"), **dict.fromkeys("AB", 100.0), "alpha": 0.3, "beta": 0.3, "E": 1.0})
    with pytest.raises(surface.SurfaceError, match="does not say how loss depends on bits"):
        plan([qat], Budget(flops=1e12), columns={"group_size": 32})


def test_a_law_of_ones_own_is_planned_by_what_it_reads(monkeypatch):
    """Every row of low weights costs c/P: the best P is neither a bound nor that of any law of the project."""

    def log_loss(p, c, xp):
        return xp.log(p["A"] / xp.sqrt(c["N"]) + p["B"] / xp.sqrt(c["D"]) + p["c"] / c["P_w"])

    own = Law(
        "own",
        "L = A N^-.5 + B D^-.5 + c / P_w",
        "this test",
        tuple(Parameter(name, 1e-6, 1e6, (1.0, 100.0), True) for name in ("A", "B", "c")),
        ("N", "D", "P_w"),
        log_loss,
        needs=(Need("P_w", 2, ("c",)),),
    )
    monkeypatch.setitem(laws.LAWS, "own", own)
    params = {"A": 300.0, "B": 300.0, "c": 1.0}
    result = plan([of("own", params)], Budget(flops=1e12))
    assert result.parts == ("w",)
    # N = D, so that both terms are 300 (6 P / 16 / 1e12)^(1/4): minimal where 150 (6/16/1e12)^.25 P^.25 = 1/P
    assert result.best.p == pytest.approx((150 * (6 / 16 / 1e12) ** 0.25) ** (-4 / 5), abs=1e-3)
    untold = dataclasses.replace(of("own", params), unidentified={"c": "only P_w = 16"})
    assert plan([untold], Budget(flops=1e12)).best.p == 16.0
