"""AWQ against the same search written out in NumPy, and what it promises: never worse than rounding to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.ptq import awq, kernel_grid, rtn

pytestmark = pytest.mark.usefixtures("quick_compile")

BITS = (2, 3, 4, 8)


def problem(seed=0, rows=64, outputs=40, spread=1.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(512, rows)) @ rng.normal(size=(rows, rows)) / np.sqrt(rows)
    x = (x * np.exp(spread * rng.normal(size=rows))).astype(np.float32)
    return x, rng.normal(size=(rows, outputs)).astype(np.float32)


def solve(x, kernel, **options):
    """`awq.solve` at each of BITS, a leading axis in what it returns."""
    return solve_with(kernel, x.T @ x, np.abs(x).mean(0), **options)


def solve_with(kernel, hessian, mean, **options):
    each = (awq.solve(kernel, hessian, mean, bits, **options) for bits in BITS)
    return jax.tree.map(lambda *fields: jnp.stack(fields), *each)


def round_by_hand(kernel, bits, size):
    groups = np.pad(kernel, ((0, -len(kernel) % size), (0, 0))).reshape(-1, size, kernel.shape[1])
    high = 2 ** (bits - 1) - 1
    scale = np.abs(groups).max(1, keepdims=True) / high
    return (scale * np.rint(groups / scale)).reshape(-1, kernel.shape[1])[: len(kernel)]


def search_by_hand(x, kernel, bits, size):
    """Least error over the exponents, its exponent, and the kernel."""
    tried = []
    for exponent in np.arange(20) / 20:
        s = np.abs(x).mean(0) ** exponent
        s = (s / np.sqrt(s.max() * s.min()))[:, None]
        quantized = round_by_hand(s * kernel.astype(np.float64), bits, size) / s
        tried.append((np.sum((x @ (kernel - quantized)) ** 2), exponent, quantized))
    return min(tried, key=lambda entry: entry[0]), tried[0][0]


def test_scales_are_a_power_of_the_mean_magnitude_normalized_by_hand():
    # 1, 4, 16 to the power ½ are 1, 2, 4; √(4 · 1) = 2.
    np.testing.assert_allclose(awq.channel_scales(jnp.array([1.0, 4.0, 16.0]), 0.5), [0.5, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(awq.channel_scales(jnp.array([1e-9, 1e9]), 0.0), [1, 1])
    assert np.all(awq.channel_scales(jnp.array([0.0, 1.0]), 0.95) > 0)


@pytest.mark.parametrize("group_size", [None, pytest.param(28, marks=pytest.mark.slow)])
def test_finds_the_scales_of_the_search_by_hand(group_size):
    x, kernel = problem()
    solution = solve(x, kernel, group_size=group_size, clip=False)
    for b, bits in enumerate(BITS):
        (error, exponent, quantized), rtn_error = search_by_hand(x, kernel, bits, group_size or len(kernel))
        np.testing.assert_allclose(solution.error[b], error, rtol=2e-3)
        np.testing.assert_allclose(solution.rtn_error[b], rtn_error, rtol=2e-3)
        np.testing.assert_allclose(solution.exponent[b], exponent, atol=1e-6)
        assert np.mean(np.abs(solution.dequantized[b] - quantized) > 1e-4) < 2e-3  # ties


@pytest.mark.slow
def test_lowers_the_error_where_inputs_differ_in_size_and_clip_lowers_it_further():
    x, kernel = problem()
    clipped, unclipped = solve(x, kernel), solve(x, kernel, clip=False)
    assert np.all(unclipped.error < 0.8 * unclipped.rtn_error)
    assert np.all(clipped.error <= unclipped.error)
    assert np.all(clipped.error[:2] < 0.8 * unclipped.error[:2])
    for solution in (clipped, unclipped):
        for b in range(len(BITS)):
            error = np.sum((x @ (kernel - solution.dequantized[b])) ** 2)
            np.testing.assert_allclose(solution.error[b], error, rtol=2e-3)
        assert not solution.fell_back.any()


@pytest.mark.slow
def test_codes_scales_and_channel_scales_give_back_the_kernel():
    x, kernel = problem()
    solution = solve(x, kernel, group_size=16, symmetric=False)
    dequantized, codes, scales, zeros = solution[:4]
    assert codes.dtype == jnp.int32
    high = 2 ** np.array(BITS)[:, None, None] - 1
    assert np.all((codes >= 0) & (codes <= high))
    scaled = np.repeat(scales, 16, 1) * (codes - np.repeat(zeros, 16, 1))
    np.testing.assert_allclose(scaled / solution.channel_scales[:, :, None], dequantized, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_objective_decides():
    x, kernel = problem()
    # The second input, however small, is all that counts: no exponent above 0 helps it, and a clip might not either.
    weight = np.zeros((64, 1), np.float32)
    weight[np.argmin(np.abs(x).mean(0))] = 1

    def objective(quantized):
        return jnp.sum((weight * (kernel - quantized)) ** 2)

    solution = solve(x, kernel, objective=objective)
    assert np.all(solution.error <= solution.rtn_error)
    assert np.all(solution.exponent != solve(x, kernel).exponent)
    achieved = [objective(solution.dequantized[b]) for b in range(len(BITS))]
    np.testing.assert_allclose(solution.error, achieved, rtol=1e-4)


@pytest.mark.slow
def test_layers_can_be_mapped_over():
    problems = [problem(seed) for seed in range(2)]
    hessians = jnp.stack([x.T @ x for x, _ in problems])
    means = jnp.stack([jnp.abs(x).mean(0) for x, _ in problems])
    kernels = jnp.stack([kernel for _, kernel in problems])
    mapped = jax.vmap(lambda *layer: awq.solve(*layer, 3))(kernels, hessians, means)
    for i, (x, kernel) in enumerate(problems):
        alone = solve(x, kernel)
        np.testing.assert_allclose(mapped.exponent[i], alone.exponent[1])
        np.testing.assert_allclose(mapped.error[i], alone.error[1], rtol=1e-3)


@pytest.mark.parametrize("spoil", ["nan mean", "zero mean", "nan hessian"])
def test_unusable_statistics_fall_back_to_rounding_to_nearest_and_say_so(spoil):
    x, kernel = problem()
    hessian, mean = x.T @ x, np.abs(x).mean(0)
    if spoil == "nan mean":
        mean[3] = np.nan
    elif spoil == "zero mean":
        mean[:] = 0
    else:
        hessian[2, 2] = np.nan
    solution = solve_with(kernel, hessian, mean)
    assert solution.fell_back.all()
    for b, bits in enumerate(BITS):
        np.testing.assert_allclose(solution.dequantized[b], rtn.quantize_kernel(kernel, bits), atol=1e-6)


def test_one_calibration_token_is_enough():
    x, kernel = problem()
    solution = solve(x[:1], kernel)
    assert not solution.fell_back.any()
    assert np.all(solution.error < 0.5 * solution.rtn_error)
    assert np.all(np.isfinite(solution.dequantized))


def test_a_kernel_of_one_row_is_rounded_to_nearest():
    x, kernel = problem(rows=1)
    solution = solve(x, kernel, clip=False)
    for b, bits in enumerate(BITS):
        np.testing.assert_allclose(solution.dequantized[b], rtn.quantize_kernel(kernel, bits), atol=1e-6)


@pytest.mark.slow
def test_floating_formats_and_formats_that_pass_through():
    x, kernel = problem()
    for fmt in ("e2m1", "e3m2"):
        solution = awq.solve(kernel, x.T @ x, np.abs(x).mean(0), *kernel_grid.levels_of(fmt))
        assert solution.error < 0.9 * solution.rtn_error
    passing = awq.solve(kernel, x.T @ x, np.abs(x).mean(0), 16)
    np.testing.assert_array_equal(passing.dequantized, kernel)
