"""AWQ against the same search written out in NumPy, and what it promises: never worse than rounding to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.ptq import awq, kernel_grid, rtn

pytestmark = pytest.mark.usefixtures("quick_compile")

BITS = (2, 3, 4, 8)


def problem(seed=0, rows=64, outputs=(24, 16), spread=1.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(512, rows)) @ rng.normal(size=(rows, rows)) / np.sqrt(rows)
    x = (x * np.exp(spread * rng.normal(size=rows))).astype(np.float32)
    return x, [rng.normal(size=(rows, columns)).astype(np.float32) for columns in outputs]


def solve(x, kernels, **settings):
    return awq.solve(kernels, x.T @ x, np.abs(x).mean(0), np.array(BITS), **settings)


def round_by_hand(kernel, bits, size):
    groups = kernel.reshape(-1, size, kernel.shape[1])
    high = 2 ** (bits - 1) - 1
    scale = np.abs(groups).max(1, keepdims=True) / high
    return (scale * np.rint(groups / scale)).reshape(kernel.shape)


def search_by_hand(x, kernels, bits, size):
    """Least error over the exponents, its exponent, and the kernels."""
    tried = []
    for exponent in np.arange(20) / 20:
        s = np.abs(x).mean(0) ** exponent
        s = (s / np.sqrt(s.max() * s.min()))[:, None]
        quantized = [round_by_hand(s * kernel.astype(np.float64), bits, size) / s for kernel in kernels]
        error = sum(np.sum((x @ (kernel - q)) ** 2) for kernel, q in zip(kernels, quantized, strict=True))
        tried.append((error, exponent, quantized))
    return min(tried, key=lambda entry: entry[0]), tried[0][0]


def test_scales_are_a_power_of_the_mean_magnitude_normalized_by_hand():
    # 1, 4, 16 to the power ½ are 1, 2, 4; √(4 · 1) = 2.
    np.testing.assert_allclose(awq.channel_scales(jnp.array([1.0, 4.0, 16.0]), 0.5), [0.5, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(awq.channel_scales(jnp.array([1e-9, 1e9]), 0.0), [1, 1])
    assert np.all(awq.channel_scales(jnp.array([0.0, 1.0]), 0.95) > 0)


@pytest.mark.parametrize("group_size", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_finds_the_scales_of_the_search_by_hand(group_size):
    x, kernels = problem()
    solution = solve(x, kernels, group_size=group_size, clip=False)
    for b, bits in enumerate(BITS):
        (error, exponent, quantized), rtn_error = search_by_hand(x, kernels, bits, group_size or len(kernels[0]))
        np.testing.assert_allclose(solution.error[b], error, rtol=2e-3)
        np.testing.assert_allclose(solution.rtn_error[b], rtn_error, rtol=2e-3)
        np.testing.assert_allclose(solution.exponent[b], exponent, atol=1e-6)
        for ours, theirs in zip(solution.dequantized, quantized, strict=True):
            assert np.mean(np.abs(ours[b] - theirs) > 1e-4) < 2e-3  # ties


@pytest.mark.slow
def test_lowers_the_error_where_inputs_differ_in_size_and_clip_lowers_it_further():
    x, kernels = problem()
    clipped, unclipped = solve(x, kernels), solve(x, kernels, clip=False)
    assert np.all(unclipped.error < 0.8 * unclipped.rtn_error)
    assert np.all(clipped.error <= unclipped.error)
    assert np.all(clipped.error[:2] < 0.8 * unclipped.error[:2])
    for solution in (clipped, unclipped):
        for b in range(len(BITS)):
            error = sum(np.sum((x @ (w - q[b])) ** 2) for w, q in zip(kernels, solution.dequantized, strict=True))
            np.testing.assert_allclose(solution.error[b], error, rtol=2e-3)
        assert not solution.fell_back


@pytest.mark.slow
def test_codes_scales_and_channel_scales_give_back_the_kernel():
    x, kernels = problem()
    solution = solve(x, kernels, group_size=16, symmetric=False)
    for dequantized, codes, scales, zeros in zip(*solution[:4], strict=True):
        assert codes.dtype == jnp.int32
        high = 2 ** np.array(BITS)[:, None, None] - 1
        assert np.all((codes >= 0) & (codes <= high))
        scaled = np.repeat(scales, 16, 1) * (codes - np.repeat(zeros, 16, 1))
        np.testing.assert_allclose(scaled / solution.channel_scales[:, :, None], dequantized, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_objective_decides():
    x, kernels = problem()
    # The second input, however small, is all that counts: no exponent above 0 helps it, and a clip might not either.
    weight = np.zeros((64, 1), np.float32)
    weight[np.argmin(np.abs(x).mean(0))] = 1

    def objective(quantized):
        return jnp.sum((weight * (kernels[0] - quantized[0])) ** 2)

    solution = solve(x, kernels, objective=objective)
    assert np.all(solution.error <= solution.rtn_error)
    assert np.all(solution.exponent != solve(x, kernels).exponent)
    achieved = [objective([solution.dequantized[0][b]]) for b in range(len(BITS))]
    np.testing.assert_allclose(solution.error, achieved, rtol=1e-4)


@pytest.mark.slow
def test_layers_can_be_mapped_over():
    problems = [problem(seed) for seed in range(2)]
    hessians = jnp.stack([x.T @ x for x, _ in problems])
    means = jnp.stack([jnp.abs(x).mean(0) for x, _ in problems])
    kernels = tuple(jnp.stack(layers) for layers in zip(*(k for _, k in problems), strict=True))
    mapped = jax.vmap(lambda *layer: awq.solve(*layer, jnp.array(BITS)))(kernels, hessians, means)
    for i, (x, ks) in enumerate(problems):
        alone = solve(x, ks)
        np.testing.assert_allclose(mapped.exponent[i], alone.exponent)
        np.testing.assert_allclose(mapped.error[i], alone.error, rtol=1e-3)


@pytest.mark.parametrize("spoil", ["nan mean", "zero mean", "nan hessian"])
def test_unusable_statistics_fall_back_to_rounding_to_nearest_and_say_so(spoil):
    x, kernels = problem()
    hessian, mean = x.T @ x, np.abs(x).mean(0)
    if spoil == "nan mean":
        mean[3] = np.nan
    elif spoil == "zero mean":
        mean[:] = 0
    else:
        hessian[2, 2] = np.nan
    solution = awq.solve(kernels, hessian, mean, np.array(BITS))
    assert solution.fell_back
    for kernel, dequantized in zip(kernels, solution.dequantized, strict=True):
        for b, bits in enumerate(BITS):
            np.testing.assert_allclose(dequantized[b], rtn.quantize_kernel(kernel, bits), atol=1e-6)


def test_one_calibration_token_is_enough():
    x, kernels = problem()
    solution = solve(x[:1], kernels)
    assert not solution.fell_back
    assert np.all(solution.error < 0.5 * solution.rtn_error)
    for dequantized in solution.dequantized:
        assert np.all(np.isfinite(dequantized))


def test_a_kernel_of_one_row_is_rounded_to_nearest():
    x, kernels = problem(rows=1)
    solution = solve(x, kernels, clip=False)
    for kernel, dequantized in zip(kernels, solution.dequantized, strict=True):
        for b, bits in enumerate(BITS):
            np.testing.assert_allclose(dequantized[b], rtn.quantize_kernel(kernel, bits), atol=1e-6)


@pytest.mark.slow
def test_floating_formats_and_formats_that_pass_through():
    x, kernels = problem()
    solution = awq.solve(kernels, x.T @ x, np.abs(x).mean(0), *kernel_grid.stack(["e2m1", "int4", 16]))
    assert np.all(solution.error[:2] < 0.9 * solution.rtn_error[:2])
    np.testing.assert_array_equal(solution.dequantized[0][2], kernels[0])
