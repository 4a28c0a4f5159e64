"""Rounding to nearest: values worked out by hand, the clip search against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.numerics import rounding
from precision_scaling.ptq import kernel_grid, rtn
from precision_scaling.ptq.scheme import Scheme

pytestmark = pytest.mark.usefixtures("simple_loops")

BITS = (2, 3, 4, 5, 6, 7, 8)


def kernel_of(rows=64, outputs=12, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, outputs)).astype(np.float32)


def test_symmetric_grid_by_hand():
    kernel = np.array([[0.3, 0.0], [-0.7, 0.0], [0.34, 0.0], [0.05, 0.0]])
    # abs-max 0.7 in 3 steps either way: 0.2333; 0.3 / 0.2333 = 1.29, 0.34 / 0.2333 = 1.46, 0.05 / 0.2333 = 0.21.
    expected = [[0.7 / 3, 0.0], [-0.7, 0.0], [0.7 / 3, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(rtn.quantize_kernel(kernel, 3), expected, rtol=1e-6)


def test_asymmetric_grid_by_hand():
    kernel = np.array([[0.3], [-0.2], [0.5], [0.02]])
    # 3 steps over [-0.2, 0.5]: 0.2333, zero point round(0.857) = 1, so the levels are -0.2333, 0, 0.2333, 0.4667.
    expected = np.array([[1], [-1], [2], [0]]) * 0.7 / 3
    np.testing.assert_allclose(rtn.quantize_kernel(kernel, 2, symmetric=False), expected, rtol=1e-6)


def test_asymmetric_grid_of_one_sign_starts_at_zero():
    kernel = np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_allclose(rtn.quantize_kernel(kernel, 2, symmetric=False), kernel, rtol=1e-6)
    np.testing.assert_allclose(rtn.quantize_kernel(-kernel, 2, symmetric=False), -kernel, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [None, 8])
def test_is_the_rounding_of_training_bit_for_bit(group_size):
    kernel = kernel_of()
    for bits in (*BITS, 12, 16):
        expected = rounding.fake_quant_array(jnp.asarray(kernel), bits, axis=0, group_size=group_size)
        np.testing.assert_array_equal(rtn.quantize_kernel(kernel, bits, group_size=group_size), expected)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"full_range": True}], ids=str)
def test_a_last_group_of_fewer_inputs_is_rounded_as_if_it_were_alone(options, clip):
    kernel = kernel_of()
    rows = len(kernel)
    size = rows // 2 + 5
    found = rtn.quantize_kernel(kernel, 3, group_size=size, clip=clip, **options)
    parts = [rtn.quantize_kernel(part, 3, clip=clip, **options) for part in (kernel[:size], kernel[size:])]
    np.testing.assert_array_equal(found, np.concatenate(parts))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_twice_changes_nothing_and_errors_are_half_a_step_at_most(symmetric):
    kernel = kernel_of()
    for bits in BITS:
        once = rtn.quantize_kernel(kernel, bits, group_size=16, symmetric=symmetric)
        found = kernel_grid.find(
            jnp.asarray(kernel), kernel_grid.integer_levels(bits), group_size=16, symmetric=symmetric
        )
        twice, _ = kernel_grid.quantize(once, found, symmetric=symmetric)
        np.testing.assert_allclose(twice, once, rtol=1e-6)
        step = np.repeat(found.scale_GxO, 16, 0)
        # An asymmetric range is shifted by up to half a step to put a level on zero.
        assert np.all(np.abs(kernel - once) <= (0.5 if symmetric else 1.0) * step * 1.0001)
        assert max(len(np.unique(column)) for column in np.asarray(once[:16]).T) <= 2**bits - symmetric


@pytest.mark.slow
def test_clip_finds_the_best_of_its_ratios():
    kernel = kernel_of()
    for bits in (2, 3, 4):
        high = 2 ** (bits - 1) - 1
        clipped = np.asarray(rtn.quantize_kernel(kernel, bits, clip=True))
        for w, q in zip(kernel.T.astype(np.float64), clipped.T, strict=True):
            scales = np.array(kernel_grid.CLIP_RATIOS) * np.abs(w).max() / high
            tried = scales[:, None] * np.clip(np.rint(w / scales[:, None]), -high, high)
            np.testing.assert_allclose(np.sum((w - q) ** 2), np.sum((w - tried) ** 2, axis=1).min(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_never_raises_the_rounding_error_and_lowers_it_much_at_two_bits(symmetric):
    kernel = kernel_of(rows=1024)

    def error(bits, clip):
        return np.sum((kernel - rtn.quantize_kernel(kernel, bits, symmetric=symmetric, clip=clip)) ** 2, axis=0)

    for bits in BITS:
        assert np.all(error(bits, True) <= error(bits, False) * 1.0001)
    # The best ternary grid of a Gaussian has 0.19 of its variance as error (Max 1960); abs-max keeps almost nothing.
    if symmetric:
        np.testing.assert_allclose(np.mean(error(2, True)) / 1024, 0.19, atol=0.01)
        assert np.mean(error(2, False)) / 1024 > 0.7


def test_bit_widths_and_layers_can_be_mapped_over():
    kernels = jnp.stack([jnp.asarray(kernel_of(seed=seed)) for seed in range(2)])
    over_bits = jax.vmap(rtn.quantize_kernel, in_axes=(None, 0))
    together = jax.jit(jax.vmap(over_bits, in_axes=(0, None)))(kernels, jnp.array(BITS))
    for i, kernel in enumerate(kernels):
        for j, bits in enumerate(BITS):
            np.testing.assert_array_equal(together[i, j], rtn.quantize_kernel(kernel, bits))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"bits": 1}, "1"),
        ({"bits": 2.5}, "2.5"),
        ({"bits": "int99"}, "int99"),
        ({"group_size": 700}, "group_size = 700"),
        ({"bits": "ternary", "group_size": 7}, "group_size = 7"),
        ({"bits": "e2m1", "symmetric": False}, "symmetric"),
        ({"bits": "nvfp4", "clip": True}, "clip"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_value(change, names):
    with pytest.raises(ValueError) as raised:
        rtn.quantize_kernel(**({"kernel": kernel_of(), "bits": 4} | change))
    assert names in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("fmt", ["nvfp4", "nvint4"])
def test_a_block_of_zeros_or_whose_scale_underflows_has_codes_of_zero(fmt):
    kernel = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    kernel[:16], kernel[16:32] = 0, kernel[16:32] * 1e-9
    levels, kind = kernel_grid.levels_of(fmt)
    found = rtn.solve(jnp.asarray(kernel), levels, kind, Scheme(rtn.METHOD), None)
    code, scale = np.asarray(found.code_IxO), np.asarray(found.scale_GxO)
    assert not code[:32].any() and not scale[:2].any() and np.isfinite(code).all()
    value = (code.reshape(4, 16, 4) * scale[:, None]).reshape(64, 4)
    np.testing.assert_allclose(value, kernel, atol=0.6)
