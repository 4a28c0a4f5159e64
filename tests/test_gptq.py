"""GPTQ against optimal brain quantization written out in float64, the identities it must obey, and bad Hessians."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.numerics import rounding
from precision_scaling.ptq import gptq, kernel_grid, rtn
from precision_scaling.ptq.error import relative_output_error

pytestmark = pytest.mark.usefixtures("quick_compile")

# Shapes and bit-widths are shared between the tests on purpose: what takes time here is to compile.
BITS = (2, 3, 4, 5, 6, 7, 8)


def solve(kernel, hessian, bits, **options):
    """`gptq.solve` at each of the bit-widths, a leading axis in what it returns."""
    return jax.tree.map(lambda *fields: jnp.stack(fields), *(gptq.solve(kernel, hessian, b, **options) for b in bits))


def correlated_inputs(tokens, features, seed=0, decay=0.5, spread=0.5):
    """Inputs whose covariance has eigenvalues i^-decay in a random basis, features of different size."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(features, features)).astype(np.float32))[0]
    x = rng.normal(size=(tokens, features)) * np.arange(1, features + 1) ** (-decay / 2)
    return (x.astype(np.float32) @ basis) * np.exp(spread * rng.normal(size=features)).astype(np.float32)


def problem(rows=160, outputs=24, seed=0, **inputs):
    x = correlated_inputs(8 * rows, rows, seed, **inputs)
    kernel = np.random.default_rng(seed + 1).normal(size=(rows, outputs)).astype(np.float32)
    return kernel, x.T @ x


def damped(hessian, damping=0.01):
    hessian = hessian.astype(np.float64)
    return hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def grid_by_hand(kernel, bits, group_size, symmetric, full_range=False):
    """Per row of the kernel: scale, zero, lowest and highest code."""
    size = group_size or len(kernel)
    rows = len(kernel)
    groups = np.pad(kernel, ((0, -rows % size), (0, 0))).reshape(-1, size, kernel.shape[1])
    if full_range:
        low, high = 0, 2**bits - 1
        scale = np.abs(groups).max(1) / np.float32(high / 2)
        zero = np.full_like(scale, 2 ** (bits - 1))
    elif symmetric:
        high = 2 ** (bits - 1) - 1
        scale, low = np.abs(groups).max(1) / np.float32(high), -high
        zero = np.zeros_like(scale)
    else:
        low, high = 0, 2**bits - 1
        bottom, top = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        scale = (top - bottom) / np.float32(high)
        zero = np.rint(-bottom / scale)
    scale = np.repeat(scale.astype(np.float64), size, 0)[:rows]
    return scale, np.repeat(zero, size, 0)[:rows], low, high


def brain_surgeon(
    kernel, hessian, bits, group_size=None, symmetric=True, act_order=False, damping=0.01, full_range=False
):
    """Rows one by one, each error spread by the explicit inverse of what is left. Returns codes and x / scale."""
    scale, zero, low, high = grid_by_hand(kernel, bits, group_size, symmetric, full_range)
    w, inverse = kernel.astype(np.float64), np.linalg.inv(damped(hessian, damping))
    codes, steps = np.zeros_like(w), np.zeros_like(w)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(w))
    left = list(order)
    for i in order:
        steps[i] = w[i] / scale[i]
        codes[i] = np.clip(np.rint(steps[i]) + zero[i], low, high)
        error = (w[i] - scale[i] * (codes[i] - zero[i])) / inverse[i, i]
        w[left] -= np.outer(inverse[left, i], error)
        inverse[np.ix_(left, left)] -= np.outer(inverse[left, i], inverse[i, left]) / inverse[i, i]
        left.remove(i)
    return codes, steps, order


def output_error(kernel, quantized, hessian):
    e = kernel - np.asarray(quantized, np.float64)
    return np.sum(e * (hessian.astype(np.float64) @ e), axis=(-2, -1))


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("symmetric", "group_size", "act_order"),
    [
        (True, None, False),
        (True, None, True),
        (True, 16, False),
        (True, 16, True),
        (True, 64, True),  # the last group has 32
        (False, None, False),
        pytest.param(False, None, True, marks=SLOW),
        pytest.param(False, 16, False, marks=SLOW),
        pytest.param(False, 48, False, marks=SLOW),
        pytest.param(False, 16, True, marks=SLOW),
    ],
)
def test_codes_are_those_of_the_one_by_one_method_but_for_ties(symmetric, group_size, act_order):
    kernel, hessian = problem()
    settings = {"group_size": group_size, "symmetric": symmetric, "act_order": act_order}
    solution = solve(kernel, hessian, BITS, **settings)
    differing = 0
    for codes, bits in zip(np.asarray(solution.codes), BITS, strict=True):
        expected, steps, order = brain_surgeon(kernel, hessian, bits, **settings)
        for column in range(kernel.shape[1]):
            (where,) = np.nonzero(codes[order, column] != expected[order, column])
            if len(where):  # later rows follow from the first that differs, and that must be a tie
                x = steps[order[where[0]], column]
                assert abs(abs(x - np.trunc(x)) - 0.5) < 1e-3, (bits, column, x)
                differing += 1
    assert differing < 0.05 * len(BITS) * kernel.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 48])
def test_layer_errors_with_all_levels_are_those_of_the_one_by_one_method(group_size, act_order):
    kernel, hessian = problem()
    settings = {"group_size": group_size, "act_order": act_order, "full_range": True}
    solution = solve(kernel, hessian, BITS, **settings)
    for k, bits in enumerate(BITS):
        codes, *_ = brain_surgeon(kernel, hessian, bits, **settings)
        scale, zero, low, high = grid_by_hand(kernel, bits, group_size, True, True)
        assert solution.codes[k].min() >= low and solution.codes[k].max() <= high
        expected = output_error(kernel, scale * (codes - zero), hessian)
        # The two differ where a weight lies half-way between two levels, in float32.
        np.testing.assert_allclose(output_error(kernel, solution.dequantized[k], hessian), expected, rtol=0.02)


@pytest.mark.parametrize("act_order", [False, True])
def test_loss_is_the_sum_of_squared_rounding_errors_over_the_factors_diagonal(act_order):
    kernel, hessian = problem()
    solution = solve(kernel, hessian, BITS, act_order=act_order)
    factor = gptq.factorize(jnp.asarray(hessian), act_order=act_order)
    order = np.asarray(factor.order_I)
    e = (kernel - np.asarray(solution.dequantized[1]))[order].astype(np.float64)
    # U of H⁻¹ = Uᵀ U in float64; its diagonal is d. x - q is what is left of e when the earlier errors are fed back.
    h = damped(hessian)[np.ix_(order, order)]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    x_minus_q = np.diag(u)[:, None] * np.linalg.solve(u.T, e)
    loss = 0.5 * np.trace(e.T @ h @ e)
    np.testing.assert_allclose(np.sum(x_minus_q**2 / (2 * np.diag(u)[:, None] ** 2)), loss, rtol=1e-9)
    ours = np.asarray(factor.diagonal_I)[:, None] * (e + np.asarray(factor.feedback_IxI).T @ e)
    np.testing.assert_allclose(0.5 * np.sum(ours**2) * np.max(np.diag(hessian)), loss, rtol=1e-4)
    inside = np.abs(np.asarray(solution.codes[1]))[order] < 3
    assert np.all(np.abs(x_minus_q)[inside] <= 0.5001 * np.broadcast_to(solution.scales[1], e.shape)[inside])


@SLOW
def test_codes_do_not_depend_on_the_block_size():
    kernel, hessian = problem()
    solutions = [solve(kernel, hessian, BITS, block=block).codes for block in (128, 160, 7)]
    for other in solutions[1:]:
        assert np.mean(solutions[0] != other) < 1e-3


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**60, 1e-7, 3e9])
def test_codes_do_not_depend_on_the_hessians_scale(factor):
    kernel, hessian = problem()
    codes = [np.asarray(solve(kernel, h, BITS).codes) for h in (hessian, np.float32(factor) * hessian)]
    assert np.mean(codes[0] != codes[1]) <= (0 if np.log2(factor) % 1 == 0 else 1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_diagonal_hessian_and_endless_damping_give_rounding_to_nearest(act_order):
    kernel, hessian = problem()
    nearest = [rtn.quantize_kernel(kernel, bits) for bits in BITS]
    diagonal = solve(kernel, np.diag(np.diag(hessian)), BITS, act_order=act_order)
    endless = solve(kernel, hessian, BITS, act_order=act_order, damping=1e9)
    np.testing.assert_array_equal(diagonal.dequantized, nearest)
    np.testing.assert_array_equal(endless.dequantized, nearest)


def test_act_order_does_not_see_how_inputs_are_numbered():
    kernel, hessian = problem()
    shuffled = np.random.default_rng(5).permutation(len(kernel))
    codes = solve(kernel, hessian, BITS, act_order=True).codes
    other = solve(kernel[shuffled], hessian[np.ix_(shuffled, shuffled)], BITS, act_order=True).codes
    assert np.mean(codes[:, shuffled] != other) < 1e-3


def test_loss_without_clipping_is_within_the_bound_of_half_a_step_per_input():
    kernel, hessian = problem()
    # A last input that is independent and has the largest weight by far leaves room above all the others.
    kernel[-1] = 5 * np.abs(kernel).max()
    hessian[-1, :-1] = hessian[:-1, -1] = 0
    solution = solve(kernel, hessian, BITS)
    d = np.diag(np.linalg.cholesky(np.linalg.inv(damped(hessian))).T)
    for b, bits in list(enumerate(BITS))[1:]:
        assert np.all(np.abs(solution.codes[b][:-1]) < 2 ** (bits - 1) - 1)
        e = kernel - np.asarray(solution.dequantized[b])
        loss = 0.5 * np.einsum("io,ij,jo->o", e, damped(hessian), e)
        assert np.all(loss <= 0.5 * (solution.scales[b][0] / 2) ** 2 * np.sum(1 / d**2))


@pytest.mark.slow
def test_halves_the_layer_error_of_1024_correlated_inputs_at_4_bits():
    x = correlated_inputs(8 * 1024, 1024, decay=1.0)
    kernel = np.random.default_rng(1).normal(size=(1024, 256)).astype(np.float32)
    hessian = x.T @ x
    quantized = gptq.quantize_kernel(kernel, hessian, 4)
    error = np.sum((x @ (kernel - quantized)) ** 2)
    assert error < 0.5 * np.sum((x @ (kernel - rtn.quantize_kernel(kernel, 4))) ** 2)
    np.testing.assert_allclose(
        relative_output_error(kernel, quantized, hessian), error / np.sum((x @ kernel) ** 2), rtol=1e-3
    )


def errors(kernel, hessian, bits, **settings):
    solution = solve(kernel, hessian, bits, **settings)
    return np.asarray(output_error(kernel, solution.dequantized, hessian))


def test_act_order_lowers_the_error_where_inputs_differ_in_size():
    kernel, hessian = problem(spread=1.5)
    for group_size in (None, 16):
        ordered = errors(kernel, hessian, BITS, group_size=group_size, act_order=True)
        assert np.all(ordered < 0.9 * errors(kernel, hessian, BITS, group_size=group_size))


def test_asymmetric_grid_lowers_the_error_of_a_lopsided_kernel():
    kernel, hessian = problem()
    kernel = np.abs(kernel)
    assert np.all(errors(kernel, hessian, BITS, symmetric=False) < 0.4 * errors(kernel, hessian, BITS))


def test_groups_lower_the_error_where_rows_differ_in_size():
    kernel, hessian = problem()
    kernel *= np.exp(np.random.default_rng(3).normal(size=(10, 1, 1))).repeat(16, 1).reshape(160, 1).astype(np.float32)
    ratio = errors(kernel, hessian, BITS, group_size=16) / errors(kernel, hessian, BITS)
    assert ratio[0] < 1 and np.all(ratio[1:] < 0.7), ratio


def test_clip_lowers_the_error_at_few_bits_and_leaves_it_at_many():
    kernel, hessian = problem()
    ratio = errors(kernel, hessian, BITS, clip=True) / errors(kernel, hessian, BITS)
    assert np.all(ratio[:3] < (0.6, 0.8, 0.95)), ratio
    assert np.all(np.abs(ratio[-2:] - 1) < 0.1), ratio


def test_all_levels_lower_the_error_unless_the_kernel_lies_on_the_others():
    kernel, hessian = problem()
    ratio = errors(kernel, hessian, (2, 3, 4), full_range=True) / errors(kernel, hessian, (2, 3, 4))
    assert np.all(ratio < (0.7, 0.87, 0.95)), ratio
    kernel = np.random.default_rng(4).integers(-7, 8, kernel.shape).astype(np.float32)
    kernel[0] = 7
    assert errors(kernel, hessian, (4,))[0] == 0 < errors(kernel, hessian, (4,), full_range=True)[0]
    with pytest.raises(UserError, match="full_range"):
        gptq.quantize_kernel(kernel, hessian, "e2m1", full_range=True)


def test_clip_is_the_least_rounding_error_weighed_by_the_squared_diagonal_of_the_factor():
    kernel, hessian = problem(spread=1.5)
    scales = np.asarray(
        solve(kernel, hessian, (3,), act_order=True, clip=True, full_range=True).scales[0, 0], np.float64
    )
    order = np.argsort(-np.diag(hessian), kind="stable")
    # R of H = R Rᵀ in the order of solving, as the reversed lower factor of the reversed matrix.
    r = np.linalg.cholesky(damped(hessian)[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    weight = np.square(np.diag(r))[np.argsort(order)][:, None]

    def error(scale):
        return np.sum(weight * np.square(np.clip(np.rint(kernel / scale), -4, 3) * scale - kernel), axis=0)

    full = np.abs(kernel).max(0).astype(np.float64) / 3  # both ends have a level for it
    tried = [[error(sign * ratio * full) for ratio in kernel_grid.CLIP_RATIOS] for sign in (1, -1)]
    one_sign, best = np.min(tried[0], axis=0), np.min(tried, axis=(0, 1))
    np.testing.assert_allclose(error(scales), best, rtol=1e-5)
    assert np.any(scales < 0) and np.any(scales > 0)
    # An end more to choose: less error in many channels, and never more.
    assert np.mean(best < 0.99 * one_sign) > 0.3 and np.mean(best) < 0.9 * np.mean(error(full))


def test_groups_are_of_adjacent_inputs_whatever_the_order():
    kernel, hessian = problem(spread=1.5)
    solution = solve(kernel, hessian, BITS, group_size=16, act_order=True)
    scale = np.abs(kernel.reshape(10, 16, -1)).max(1) / 7
    np.testing.assert_allclose(solution.scales[2], scale, rtol=1e-6)
    levels = np.asarray(solution.dequantized[2]).reshape(10, 16, -1) / scale[:, None]
    np.testing.assert_allclose(levels, np.asarray(solution.codes[2]).reshape(10, 16, -1), atol=1e-5)


SLOW_FORMATS = ("e2m1", "e4m3", "ternary", "mxfp4", "nvfp4", "mxint8", "e8m7")


@pytest.mark.parametrize("fmt", ["int12", *(pytest.param(fmt, marks=SLOW) for fmt in SLOW_FORMATS)])
def test_every_number_format_is_a_grid(fmt):
    kernel, hessian = problem(decay=1.0)
    nearest = rounding.fake_quant_array(jnp.asarray(kernel), fmt, axis=0)
    np.testing.assert_array_equal(rtn.quantize_kernel(kernel, fmt), nearest)
    np.testing.assert_array_equal(gptq.quantize_kernel(kernel, np.diag(np.diag(hessian)), fmt), nearest)
    quantized = gptq.quantize_kernel(kernel, hessian, fmt)
    assert output_error(kernel, quantized, hessian) < 0.9 * output_error(kernel, nearest, hessian)


@SLOW
def test_widest_asymmetric_codes_do_not_overflow():
    kernel, hessian = problem()
    kernel = np.abs(kernel)
    quantized = gptq.quantize_kernel(kernel, hessian, "int16", symmetric=False)
    np.testing.assert_allclose(quantized, kernel, atol=1e-3)


def test_layers_bit_widths_and_damping_are_data():
    problems = [problem(seed=seed) for seed in range(3)]
    kernels, hessians = (jnp.stack(arrays) for arrays in zip(*problems, strict=True))
    mapped = jax.jit(jax.vmap(functools.partial(gptq.solve, act_order=True), in_axes=(0, 0, 0)))
    bits = jnp.array([3, 8, 4])
    together = mapped(kernels, hessians, bits)
    for i, (kernel, hessian) in enumerate(problems):
        alone = gptq.solve(kernel, hessian, bits[i], act_order=True)
        np.testing.assert_array_equal(together.codes[i], alone.codes)
    assert mapped._cache_size() == 1
    mapped(kernels, hessians, bits[::-1])
    assert mapped._cache_size() == 1


def test_program_does_not_grow_with_the_width():
    def operations(rows):
        shapes = jax.ShapeDtypeStruct((rows, 64), jnp.float32), jax.ShapeDtypeStruct((rows, rows), jnp.float32)
        lowered = jax.jit(lambda w, h: gptq.solve(w, h, 4, act_order=True)).lower(*shapes)
        return lowered.as_text().count("stablehlo.")

    assert operations(2048) == operations(256)


def test_inputs_never_seen_get_no_weight_and_do_not_disturb_the_others():
    kernel, hessian = problem()
    dead = np.array([0, 17, 159])
    live = np.delete(np.arange(160), dead)
    kernel[dead] *= 0.1  # so that they don't set the scale
    hessian[dead] = hessian[:, dead] = 0
    quantized = np.asarray(gptq.quantize_kernel(kernel, hessian, 4))
    assert np.all(quantized[dead] == 0)
    # The mean diagonal, of which damping is a fraction, is over all inputs.
    codes, _, _ = brain_surgeon(kernel[live], hessian[np.ix_(live, live)], 4, damping=0.01 * 157 / 160)
    assert np.mean(np.abs(quantized[live] - codes * np.abs(kernel).max(0) / 7) > 1e-5) < 1e-3


@pytest.mark.parametrize("act_order", [False, True])
def test_one_calibration_token_is_enough(act_order):
    kernel, _ = problem()
    x = np.random.default_rng(9).normal(size=(1, 160)).astype(np.float32)
    quantized = solve(kernel, x.T @ x, BITS, act_order=act_order).dequantized[1]
    nearest = rtn.quantize_kernel(kernel, 3)
    assert np.sum((x @ (kernel - quantized)) ** 2) < 0.05 * np.sum((x @ (kernel - nearest)) ** 2)


def test_singular_hessian_without_damping_is_damped_aloud():
    kernel, _ = problem()
    x = correlated_inputs(40, 160)
    with pytest.warns(UserWarning, match="damping raised from 0 to"):
        quantized = gptq.quantize_kernel(kernel, x.T @ x, 4, damping=0.0)
    error = np.sum((x @ (kernel - quantized)) ** 2)
    assert error < 0.5 * np.sum((x @ (kernel - rtn.quantize_kernel(kernel, 4))) ** 2)


def test_ill_conditioned_hessian_is_solved_without_a_warning():
    kernel, hessian = problem(decay=6.0, spread=3.0)
    assert np.linalg.cond(hessian.astype(np.float64)) > 1e12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = gptq.quantize_kernel(kernel, hessian, 4, act_order=True)
    nearest = rtn.quantize_kernel(kernel, 4)
    assert output_error(kernel, quantized, hessian) < 0.1 * output_error(kernel, nearest, hessian)


@pytest.mark.parametrize("shape", [(1, 24), *(pytest.param(shape, marks=SLOW) for shape in ((160, 1), (1, 1)))])
def test_kernels_of_one_row_or_column(shape):
    kernel, hessian = problem(*shape)
    quantized = gptq.quantize_kernel(kernel, hessian, 4)
    assert quantized.shape == shape
    if shape[0] == 1:
        np.testing.assert_array_equal(quantized, rtn.quantize_kernel(kernel, 4))
    np.testing.assert_array_equal(gptq.quantize_kernel(np.zeros_like(kernel), hessian, 4), 0)


@pytest.mark.parametrize(
    ("damping", "used"),
    [(-1.0, 1e-6), (0.0, 0.0), (0.25, 0.25), (1e9, 1e9), (-np.inf, 1e-6), (np.nan, np.nan)],
)
def test_the_search_for_a_damping_ends_wherever_it_starts(damping, used):
    """The commands refuse what is below zero; a program that is given it all the same goes on from the smallest one."""
    _, hessian = problem()
    factor = gptq.factorize(jnp.asarray(hessian), damping=damping)
    np.testing.assert_allclose(factor.damping, used, rtol=1e-5)
    assert factor.ok == np.isfinite(used)
    unusable_one = gptq.factorize(-jnp.asarray(hessian), damping=damping)
    assert damping == 1e9 or not unusable_one.ok


def unusable():
    kernel, hessian = problem()
    nan, infinite, indefinite = hessian.copy(), hessian.copy(), hessian.copy()
    nan[3, 4] = nan[4, 3] = np.nan
    infinite[5, 5] = np.inf
    indefinite[0, 1] = indefinite[1, 0] = 100 * hessian.max()
    return kernel, {
        "NaN": nan,
        "infinite": infinite,
        "not positive": indefinite,
        "zero": np.zeros_like(hessian),
        "negative": -hessian,
    }


@pytest.mark.parametrize("what", ["NaN", "infinite", "not positive", "zero", "negative"])
def test_unusable_hessian_is_an_error_or_a_fall_back_that_says_so(what):
    kernel, hessians = unusable()
    with pytest.raises(ValueError) as raised:
        gptq.quantize_kernel(kernel, hessians[what], 4)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("hessian")
    solution = gptq.solve(kernel, hessians[what], 4)
    assert solution.fell_back and np.isnan(solution.damping_used)
    np.testing.assert_array_equal(solution.dequantized, rtn.quantize_kernel(kernel, 4))


def test_a_bad_layer_does_not_spoil_the_others_of_its_batch():
    kernel, hessians = unusable()
    _, hessian = problem()
    batch = jnp.stack([hessian, hessians["NaN"], hessians["not positive"]])
    solution = jax.vmap(lambda h: gptq.solve(kernel, h, 3))(batch)
    np.testing.assert_array_equal(solution.fell_back, [False, True, True])
    np.testing.assert_allclose(solution.damping_used[0], 0.01)
    np.testing.assert_array_equal(solution.codes[0], gptq.solve(kernel, hessian, 3).codes)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 1},
        {"bits": 4.5},
        {"bits": "e9m9"},
        {"group_size": 33},
        {"bits": "ternary", "group_size": 7},
        {"group_size": 0},
        {"damping": -1},
        {"damping": float("nan")},
        {"damping": float("inf")},
        {"damping": "0.01"},
        {"damping": True},
        {"hessian": np.eye(31)},
        {"hessian": np.triu(np.ones((32, 32)))},
        {"kernel": np.ones(32)},
        {"kernel": np.ones((32, 0))},
        {"kernel": np.full((32, 4), np.nan)},
        {"bits": "e2m1", "symmetric": False},
        {"bits": "mxfp4", "clip": True},
        {"bits": "mxfp4", "group_size": 8},
    ],
)
def test_bad_arguments_are_one_clear_line(change):
    kernel, hessian = problem(rows=32)
    with pytest.raises(ValueError) as raised:
        gptq.quantize_kernel(**({"kernel": kernel, "hessian": hessian, "bits": 4} | change))
    assert "\n" not in str(raised.value)


def test_a_corrected_kernel_is_the_least_squares_of_what_the_original_inputs_give():
    rng = np.random.default_rng(5)
    x = correlated_inputs(400, 24)
    before = x + 0.2 * rng.normal(size=x.shape).astype(np.float32)
    kernel = rng.normal(size=(24, 7)).astype(np.float32)
    expected = np.linalg.lstsq(x.astype(np.float64), before.astype(np.float64) @ kernel, rcond=None)[0]
    statistics = x.T @ x, x.T @ (before - x)
    for share in (0.0, 0.25, 1.0):
        found = gptq.corrected(jnp.asarray(kernel), *map(jnp.asarray, statistics), 0.0, share)
        np.testing.assert_allclose(found, kernel + share * (expected - kernel), atol=2e-4)
    # Inputs that were always zero stay as they are, and so does a kernel whose statistics are unusable.
    x[:, 3] = 0
    found = gptq.corrected(jnp.asarray(kernel), jnp.asarray(x.T @ x), jnp.asarray(x.T @ (before - x)), 0.01, 1.0)
    np.testing.assert_array_equal(found[3], kernel[3])
    broken = gptq.corrected(jnp.asarray(kernel), jnp.full((24, 24), jnp.nan), jnp.asarray(statistics[1]), 0.01, 1.0)
    np.testing.assert_array_equal(broken, kernel)
