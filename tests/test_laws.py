"""Laws against the published numbers, hand-worked values and their own limits."""

import numpy as np
import pytest

from analysis import laws
from analysis.laws import derived, paper, synthetic
from analysis.laws.law import MIN_FRACTION, LawError, fraction

PAPER = laws.published("unified")
PARTS = ("w", "a", "kv")


def tied(bits):
    return {f"P_{x}": bits for x in PARTS}


@pytest.mark.parametrize(("bits", "share"), [(4, 0.191), (6, 0.611), (8, 0.828), (16, 0.994)])
def test_published_constants_give_the_effective_share_of_parameters(bits, share):
    n_eff = paper.effective_parameters(PAPER, {"N": 1e9, **tied(bits)})
    assert n_eff / 1e9 == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(("part", "zero"), [("a", 3.11), ("kv", 2.32), ("w", 0.81)])
def test_a_part_has_no_capacity_left_at_its_zero_and_is_clipped_below_it(part, zero):
    gamma, n = PAPER[f"gamma_{part}"], PAPER[f"n_{part}"]
    assert fraction(zero + 0.05, gamma, n) > MIN_FRACTION
    assert fraction(zero - 0.05, gamma, n) == MIN_FRACTION
    assert np.isfinite(
        laws.predict("precision", laws.published("precision"), N=1e8, D=1e10, **{f"P_{part}": zero - 0.5})
    )


@pytest.mark.parametrize(
    ("bits", "n", "loss"),
    [(4, 1.76e9, 3.171), (6, 1.17e9, 3.0925), (8, 880e6, 3.0909), (16, 440e6, 3.140), (32, 220e6, 3.230)],
)
def test_published_constants_give_the_cost_matched_losses(bits, n, loss):
    assert laws.predict("precision", laws.published("precision"), N=n, D=16e9, **tied(bits)) == pytest.approx(
        loss, abs=5e-4
    )


@pytest.mark.parametrize(
    ("d", "deltas"), [(1.5e9, (0.138, 0.025, 0.0047, 0.0009)), (26e9, (0.586, 0.108, 0.020, 0.0036))]
)
def test_published_constants_give_the_ptq_losses(d, deltas):
    got = laws.predict("ptq", laws.published("ptq"), N=30e6, D=d, P_post=np.array([3, 4, 5, 6]))
    np.testing.assert_allclose(got, deltas, rtol=0.05, atol=5e-5)


def test_chinchilla_is_its_formula():
    params = {"A": 400.0, "alpha": 0.5, "B": 300.0, "beta": 0.25, "E": 1.5}
    # 400 / sqrt(1e4) + 300 / 1e8^(1/4) + 1.5 = 4 + 3 + 1.5
    assert laws.predict("chinchilla", params, N=1e4, D=1e8) == pytest.approx(8.5)


def test_qid_floating_point_and_qat_are_their_formulas():
    qid = {"k": 2.0, "beta": 0.5, "alpha": 0.25, "gamma": 2.0}
    assert laws.predict("qid", qid, N=1e8, D=1e4, P_post=4) == pytest.approx(2 * 100 / (100 * 16))
    fp = {"n": 100.0, "alpha": 0.25, "d": 300.0, "beta": 0.5, "epsilon": 1.5, "gamma": 10.0, "delta": 1.0, "nu": 2.0}
    got = laws.predict("floating_point", fp, N=1e8, D=1e4, exponent_bits=3.5, mantissa_bits=1.5, group_size=32)
    assert got == pytest.approx(1 + 3 + 1.5 + (100 / 100) * 5 / (10 * 4 * 4))
    qat = {"A": 100.0, "alpha": 0.25, "B": 300.0, "beta": 0.5, "E": 1.5}
    qat |= {"k": 0.1, "gamma_N": 0.25, "gamma_D": 0.5, "gamma_G": 2.0}
    got = laws.predict("qat", qat, N=1e8, D=1e4, P_w=[4, 16], P_a=[4, 16], group_size=32)
    np.testing.assert_allclose(got, [5.5 + 0.1 * 100 * 25 / 100, 5.5])


def test_capacity_law_multiplies_n_by_the_value_of_the_rows_precision():
    params = {"A": 400.0, "alpha": 0.5, "B": 300.0, "beta": 0.25, "E": 1.5, "eff_w4_a4": 0.25, "eff_kv3": 0.01}
    got = laws.predict("capacity", params, N=1e4, D=1e8, P_w=[16, 4, 16], P_a=[16, 4, 16], P_kv=[16, 16, 3])
    np.testing.assert_allclose(got, [8.5, 12.5, 44.5])
    assert np.isnan(laws.predict("capacity", params, N=1e4, D=1e8, P_w=8))


def test_quartet_puts_forward_precision_on_n_and_backward_precision_on_d():
    params = {
        "A": 400.0,
        "alpha": 0.5,
        "B": 300.0,
        "beta": 0.25,
        "E": 1.5,
        "gamma": 2.0,
        "eff_w4_a4": 0.25,
        "eff_D_g4": 1e-4,
    }
    columns = {"N": 1e4, "D": 1e8, "P_w": [16, 4, 16], "P_a": [16, 4, 16], "P_grad": [16, 16, 4]}
    np.testing.assert_allclose(laws.predict("quartet", params, **columns), [50.5, 122.5, (4 + 30) ** 2 + 1.5])


def test_capacity_from_gaussian_error_is_its_formula_and_needs_no_error_column():
    params = {"A": 400.0, "alpha": 0.5, "B": 300.0, "beta": 0.25, "E": 1.5, "L": 0.9, "F": 0.5, "C": 2.0}
    share = 0.9 * np.tanh(0.5 * 2) ** 2  # log_{1/4} of 1/16 is 2
    got = laws.predict(
        "capacity_gmse", params, N=1e4, D=1e8, gmse_w=[0, 1 / 16, 1 / 16], gmse_a=[0, 0, 1 / 16], gmse_kv=0
    )
    np.testing.assert_allclose(got, [8.5, 4 / np.sqrt(share) + 4.5, 4 / share + 4.5])
    by_bits = laws.predict("capacity_gmse", params, N=1e4, D=1e8, P_w=[16, 8, 4, 3], P_a=16, P_kv=16)
    assert by_bits[0] == pytest.approx(8.5) and np.all(np.diff(by_bits) > 0)
    with pytest.raises(LawError, match=r"no integer format has 4\.5 bits"):
        laws.predict("capacity_gmse", params, N=1e4, D=1e8, P_w=4.5)


def test_formats_give_the_columns_that_a_table_leaves_out():
    columns = {"N": [1.0] * 4, "P_w": [8, 8, 16, 4], "w_format": ["e4m3", "e5m2", "bf16", "int4"]}
    np.testing.assert_array_equal(derived.column("exponent_bits", columns), [4, 5, 8, np.nan])
    np.testing.assert_array_equal(derived.column("mantissa_bits", columns), [3, 2, 7, np.nan])
    np.testing.assert_array_equal(derived.column("P_grad", columns), [16] * 4)
    gmse = derived.column("gmse_w", columns)
    assert gmse[2] == 0 and 0 < gmse[0] < gmse[1] < gmse[3]
    # the error of the best 16-level symmetric uniform quantizer of a Gaussian lies near Max's 0.01154 (15 levels here)
    assert gmse[3] == pytest.approx(0.0125, abs=0.001)


def test_unified_adds_nothing_before_ptq_or_where_training_was_no_finer():
    params = {**PAPER, "C_w": 0.5, "C_a": 0.5, "C_kv": 0.5}
    before = laws.predict("precision", laws.published("precision"), N=1e8, D=1e10, **tied(4))
    assert laws.predict("unified", params, N=1e8, D=1e10, **tied(4)) == pytest.approx(before)
    assert laws.predict("unified", params, N=1e8, D=1e10, P_post=4, **tied(4)) == pytest.approx(before)
    assert laws.predict("unified", params, N=1e8, D=1e10, P_post=6, **tied(4)) == pytest.approx(before)


def test_unified_at_sixteen_bits_with_saturated_factors_is_precision_plus_ptq_of_n_eff():
    params = {**PAPER, "C_w": 100.0, "C_a": 100.0, "C_kv": 100.0}
    n_eff = paper.effective_parameters(PAPER, {"N": 1e8, **tied(16)})
    expected = laws.predict("precision", laws.published("precision"), N=1e8, D=1e10)
    expected += laws.predict("ptq", laws.published("ptq"), N=n_eff, D=1e10, P_post=4)
    assert laws.predict("unified", params, N=1e8, D=1e10, P_post=4) == pytest.approx(expected)


def test_low_precision_training_lowers_ptq_loss_in_the_unified_law():
    params = {**PAPER, "C_w": 0.3, "C_a": 0.3, "C_kv": 0.3}
    columns = {"N": 1e8, "D": 1e10, "P_w": np.array([16.0, 8, 6, 5, 4]), "P_post": 3}
    delta = laws.predict("unified", params, **columns) - laws.predict(
        "unified", params, **{**columns, "P_post": np.nan}
    )
    assert np.all(np.diff(delta) < 0)


@pytest.mark.parametrize("name", ["d_eff", "n_and_d_eff", "n_and_d_eff_untied", "power_laws"])
def test_alternatives_agree_with_chinchilla_where_precision_costs_nothing(name):
    law = laws.get(name)
    params = {p.name: p.held for p in law.params} | laws.published("chinchilla")
    expected = laws.predict("chinchilla", laws.published("chinchilla"), N=1e8, D=1e10)
    assert laws.predict(name, params, N=1e8, D=1e10) == pytest.approx(expected, rel=1e-6)


def test_alternatives_put_the_lost_capacity_where_they_say():
    params = laws.published("precision")
    share = paper.effective_parameters(PAPER, {"N": 1.0, **tied(6)})
    chinchilla = laws.published("chinchilla")
    on_d = laws.predict("chinchilla", chinchilla, N=1e8, D=1e10 * share)
    on_both = laws.predict("chinchilla", chinchilla, N=1e8 * share, D=1e10 * share)
    assert laws.predict("d_eff", params, N=1e8, D=1e10, **tied(6)) == pytest.approx(on_d)
    assert laws.predict("n_and_d_eff", params, N=1e8, D=1e10, **tied(6)) == pytest.approx(on_both)


@pytest.mark.parametrize("name", list(laws.LAWS))
def test_every_law_is_the_same_function_in_numpy_and_jax(name):
    import jax
    import jax.numpy as jnp

    columns = {"N": [3e7, 1e9], "D": [1e9, 2e10], "P_w": [4.0, 4.0], "P_a": [4.0, 4.0], "P_kv": [16.0, 16.0]}
    columns |= {"P_post": [3.0, 3.0], "exponent_bits": [4, 5], "mantissa_bits": [3, 2], "group_size": [32, 128]}
    columns |= {"P_grad": [8.0, 16.0]}
    law = laws.resolve(name, columns=laws.complete_columns(laws.get(name), columns))
    params = {p.name: p.published if p.published is not None else p.grid[len(p.grid) // 2] for p in law.params}
    expected = laws.predict(law, params, **columns)
    with jax.enable_x64(True):
        columns = {k: jnp.asarray(v) for k, v in laws.complete_columns(law, columns).items()}
        got = np.asarray(law.evaluate(law.values(params), columns, jnp))
    assert np.all(np.isfinite(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("name", list(laws.LAWS))
def test_every_law_says_what_a_user_needs(name):
    law = laws.get(name)
    assert law.formula and law.source and law.columns
    for p in law.params:
        assert p.lower < p.upper
        assert all(p.lower <= value <= p.upper for value in p.grid)
        assert not p.log or p.lower > 0
        for value in (p.published, p.default, p.held):
            assert value is None or p.lower <= value <= p.upper
    assert set(synthetic.constants(name)) >= {p.name for p in law.params if p.default is None}
    known = {*law.columns}
    assert all(set(need.columns) <= known and set(need.params) <= set(law.names) for need in law.needs)


def test_biases_left_out_are_zero():
    without = {k: v for k, v in laws.published("precision").items() if not k.startswith("n_")}
    with_zero = {**without, "n_w": 0.0, "n_a": 0.0, "n_kv": 0.0}
    columns = {"N": 1e8, "D": 1e10, **tied(4)}
    assert laws.predict("precision", without, **columns) == laws.predict("precision", with_zero, **columns)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: laws.predict("chinchila", {}, N=1, D=1), "chinchila.*choose one of"),
        (lambda: laws.predict("chinchilla", laws.published("chinchilla"), N=1e6), "needs column D"),
        (lambda: laws.predict("chinchilla", {"A": 1.0}, N=1e6, D=1e6), "parameter alpha .* is missing"),
        (lambda: laws.predict("ptq", {**laws.published("ptq"), "C_T": None}, N=1, D=1, P_post=3), "C_T .* is null"),
        (
            lambda: laws.predict("ptq", {**laws.published("ptq"), "C_t": 1.0}, N=1, D=1, P_post=3),
            "no parameter 'C_t'",
        ),
        (
            lambda: laws.predict("chinchilla", laws.published("chinchilla"), N=[1, 2], D=[1, 2, 3]),
            "different lengths",
        ),
        (lambda: laws.predict("chinchilla", laws.published("chinchilla"), N="many", D=1), "not a number"),
    ],
)
def test_mistakes_are_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
