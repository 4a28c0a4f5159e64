"""Codes of numbers on a grid: the bits that hardware and ml_dtypes have, and scales found again from their products."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_scaling.numerics import bit_patterns, formats
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import kernel_grid

FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3": ml_dtypes.float8_e4m3,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
BLOCKS = [name for name in formats.names() if parse(name).family == "block"]
PACKED = [name for name in (*formats.names(), *FLOATS, "e3m0", "e2m0") if bit_patterns.layout(parse(name))]


@pytest.mark.parametrize("name", FLOATS)
def test_floats_have_the_bits_of_ml_dtypes(name):
    values = np.append(parse(name).values(), -0.0).astype(np.float32)
    np.testing.assert_array_equal(bit_patterns.encode(values, parse(name)), values.astype(FLOATS[name]).view(np.uint8))


def test_codes_worked_out_by_hand():
    # 4 bits, sign first: 6 is the last of eight magnitudes, -0.5 the second with a sign.
    np.testing.assert_array_equal(bit_patterns.encode(np.float32([6, -0.5, -0.0]), parse("e2m1")), [7, 9, 8])
    np.testing.assert_array_equal(bit_patterns.encode(np.float32([-1, 0, 1]), parse("ternary")), [0, 1, 2])
    # Multiples of 1/64 in two's complement.
    np.testing.assert_array_equal(bit_patterns.encode(np.float32([1 / 64, -1 / 64]), parse("mxint8")), [1, 255])
    np.testing.assert_array_equal(bit_patterns.encode(np.float32([-7, 7]), parse("nvint4")), [9, 7])


@pytest.mark.parametrize("name", PACKED)
def test_values_come_back_from_different_codes_of_the_formats_bits(name):
    fmt = parse(name)
    values, layout = fmt.values().astype(np.float32), bit_patterns.layout(fmt)
    codes = bit_patterns.encode(values, fmt)
    assert len(set(codes.tolist())) == len(values) and codes.max() < 2**layout.bits
    np.testing.assert_array_equal(bit_patterns.decode(codes, fmt), values)
    scales = 0 if fmt.family != "block" else layout.scale_bits / fmt.block_size
    assert layout.bits + scales == pytest.approx(np.ceil(fmt.bits) if fmt.levels else fmt.bits)


def test_what_takes_more_than_a_byte_has_no_code():
    assert [bit_patterns.layout(parse(name)) for name in ("e5m6", "e8m7", "bf16", "int9", "e5m10")] == [None] * 5
    wide = formats.block("wide_scales", formats.floating(2, 1), 16, "e5m10")
    assert bit_patterns.layout(wide) is None


@pytest.mark.parametrize("value", [0.3, np.nan, 6.5, -7])
def test_what_is_no_value_of_the_format_is_refused(value):
    with pytest.raises(ValueError, match="none of e2m1"):
        bit_patterns.encode(np.float32([1, value]), parse("e2m1"))


# Blocks of very different sizes, some of which underflow, and of zeros; kernels far from 1.
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("factor", [1.0, 1e-20, 3e7])
def test_scales_are_stored_in_a_byte_and_come_back_bit_for_bit(name, factor):
    rng, fmt = np.random.default_rng(0), parse(name)
    for spread in (0, 1, 8):
        kernel = rng.normal(size=(128, 24)) * np.exp(spread * rng.normal(size=(4, 1, 24))).repeat(32, 0).reshape(
            128, 24
        )
        kernel[:32, :2] = 0
        levels, kind = kernel_grid.levels_of(name)
        grid = kernel_grid.find(jnp.asarray(kernel * factor, jnp.float32), levels, kind)
        scales = np.asarray(grid.scale_GxO)
        codes, tensor_scale = bit_patterns.encode_scales(scales, fmt)
        assert codes.dtype == np.uint8 and (tensor_scale is not None) == bit_patterns.layout(fmt).tensor_scale
        found = bit_patterns.decode_scales(codes, fmt, tensor_scale)
        np.testing.assert_array_equal(found.view(np.uint32), scales.view(np.uint32))
    assert bit_patterns.encode_scales(np.zeros((2, 3), np.float32), parse("nvfp4"))[1] == 1


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_scales_that_the_format_has_not_are_refused(name):
    scales = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    with pytest.raises(ValueError, match=f"none of {name}"):
        bit_patterns.encode_scales(scales, parse(name))


def test_powers_of_two_are_those_of_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(bit_patterns.powers_of_two(codes), expected)
