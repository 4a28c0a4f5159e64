"""Rounding against ml_dtypes' casts and brute force on enumerated grids; scales, blocks, gradients and bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from precision_scaling.numerics import elements, formats
from precision_scaling.numerics import rounding as rounding_lib
from precision_scaling.numerics.formats import Kind, parse
from precision_scaling.ptq import kernel_grid

CASTS = {
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3": ml_dtypes.float8_e4m3,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e5m10": np.float16,
    "e8m7": ml_dtypes.bfloat16,
}
INTEGERS = [f"int{bits}" for bits in range(2, 17)]
PAPER_FLOATS = ["e2m0", "e3m0", "e3m2", "e4m2", "e5m2", "e5m6"]
# Every eXmY that no standard fixes, up to 10 bits, and the widest of each exponent.
OTHER_FLOATS = [
    f"e{e}m{m}"
    for e in range(1, 8)
    for m in range(16 - e)
    if (1 + e + m <= 10 or 1 + e + m == 16) and f"e{e}m{m}" not in CASTS
]
BLOCKS = ["mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "mxint8", "nvfp4"]

# One compiled program per family and shape: the grids are traced.
round_traced = jax.jit(elements.round_to_grid, static_argnames=("kind", "saturate"))
fake_quant_static = jax.jit(rounding_lib.fake_quant_array, static_argnames=("fmt", "axis", "group_size", "rounding"))
fake_quant_traced = jax.jit(rounding_lib.fake_quant_grid, static_argnames=("kind", "axis", "group_size", "rounding"))


def fake_quant(x, name, axis=None, **options):
    return fake_quant_traced(x, parse(name).grid(), parse(name).kind, axis, **options)


def probes(values: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Float32 inputs that search a grid: values, midpoints, their neighbours, random, tiny, huge, zeros, infinities."""
    rng = np.random.default_rng(seed)
    finite = np.finfo(np.float32)
    special = np.array([0.0, -0.0, finite.tiny, -finite.tiny, 1e-44, -1e-44, finite.max, finite.min, np.inf, -np.inf])
    middles = (values[1:] + values[:-1]) / 2
    exact = np.concatenate([values, middles]).astype(np.float32)
    if len(exact) > size // 5:
        exact = rng.choice(exact, size // 5, replace=False)
    up, down = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))
    neighbours = np.concatenate([exact, up, down])
    left = size - len(special) - len(neighbours)
    over_grid = rng.uniform(-1.2, 1.2, left // 2) * values[-1]
    over_exponents = rng.choice([-1.0, 1.0], left - left // 2) * np.exp2(rng.uniform(-126, 127.9, left - left // 2))
    with np.errstate(over="ignore"):
        return np.concatenate([special, neighbours, over_grid, over_exponents]).astype(np.float32)


def brute_force(x: np.ndarray, fmt: formats.Format) -> np.ndarray:
    """Nearest value in float64, beyond the ends the ends; ties as IEEE 754-2019 4.3.1 has them.

    To the even significand, which is the even code; where no mantissa bit makes one even, to the larger magnitude.
    """
    values = fmt.values()
    positive = values[len(values) // 2 :]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), values[-1])
    above = np.clip(np.searchsorted(positive, magnitude), 1, len(positive) - 1)
    to_below, to_above = magnitude - positive[above - 1], positive[above] - magnitude
    tie_goes_up = above > 1 if fmt.mantissa_bits == 0 else above % 2 == 0
    code = np.where((to_above < to_below) | ((to_above == to_below) & tie_goes_up), above, above - 1)
    return np.copysign(positive[code], x)


def assert_same_bits(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual).view(np.uint32), np.asarray(expected, np.float32).view(np.uint32))


@pytest.mark.parametrize("name", CASTS)
def test_floats_equal_the_casts_of_ml_dtypes(name):
    fmt = parse(name)
    x = probes(fmt.values(), 50_000)
    expected = np.clip(x, -fmt.max_value, fmt.max_value).astype(np.float32).astype(CASTS[name]).astype(np.float32)
    assert_same_bits(round_traced(x, fmt.grid(), fmt.family), expected)


@pytest.mark.parametrize("name", OTHER_FLOATS)
def test_floats_equal_brute_force(name):
    fmt = parse(name)
    x = probes(fmt.values(), 20_000)
    x = x[(np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0)]  # XLA flushes subnormal inputs
    x = np.resize(x, 19_990)
    assert_same_bits(round_traced(x, fmt.grid(), "float"), brute_force(x, fmt))


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_equal_brute_force_on_both_paths(name):
    fmt = parse(name)
    x = probes(fmt.values(), 20_000)
    expected = brute_force(x, fmt)
    assert_same_bits(round_traced(x, fmt.grid(), "int"), expected)
    assert_same_bits(round_traced(x, fmt.grid(), "float"), expected)


@pytest.mark.parametrize("name", [*CASTS, *OTHER_FLOATS, *INTEGERS])
def test_every_value_of_a_grid_stays_with_and_without_noise(name):
    fmt = parse(name)
    values = np.resize(fmt.values(), 65536).astype(np.float32)
    if fmt.family == "wide":
        values = np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values)
    assert_same_bits(round_traced(values, fmt.grid(), fmt.family) + 0.0, values + 0.0)
    almost_one = np.full_like(values, np.nextafter(np.float32(1), np.float32(0)))
    for noise in (np.zeros_like(values), almost_one):
        assert_same_bits(round_traced(values, fmt.grid(), fmt.family, noise) + 0.0, values + 0.0)


@pytest.mark.parametrize("name", ["int4", "e4m3", "e8m7"])
def test_rounding_keeps_nan_and_saturates_infinity(name):
    fmt = parse(name)
    y = np.asarray(round_traced(np.float32([np.nan, np.inf, -np.inf]), fmt.grid(), fmt.family))
    np.testing.assert_array_equal(y, np.float32([np.nan, fmt.max_value, -fmt.max_value]))


# Scales.


def random_tensor(seed: int, shape=(24, 64)) -> np.ndarray:
    """Heavy-tailed, of a magnitude anywhere between 1e-28 and 1e28."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, shape) * 10 ** rng.uniform(-28, 28)
    return x.astype(np.float32)


@pytest.mark.parametrize("axis", [None, 0, (0, 1), -1])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_lie_on_the_grid_reach_the_last_level_and_are_idempotent(name, axis):
    fmt = parse(name)
    for seed in range(10):
        x = random_tensor(seed)
        y = np.asarray(fake_quant(x, name, axis))
        largest = np.max(np.abs(x.astype(np.float64)), axis=axis, keepdims=True)
        codes = y / largest * fmt.max_value
        np.testing.assert_allclose(codes, np.rint(codes), atol=2**-22 * fmt.max_value)
        np.testing.assert_allclose(np.max(np.abs(y), axis=axis, keepdims=True), largest, rtol=1.2e-7)
        assert np.all(np.abs(y - x) <= largest / fmt.max_value * (0.5 + 2**-22 * fmt.max_value))
        assert_same_bits(fake_quant(y, name, axis), y)


@pytest.mark.parametrize("name", ["e2m0", "e3m0", "e2m1", "e4m3", "e4m3fn", "e5m2", "e5m6", "e7m8", *BLOCKS[:-1]])
def test_floats_and_mx_blocks_are_idempotent(name):
    for seed in range(10):
        y = fake_quant(random_tensor(seed), name, -1)
        assert_same_bits(fake_quant(y, name, -1), y)


def test_nvfp4_is_idempotent_up_to_the_rounding_of_its_tensor_scale():
    for seed in range(10):
        y = fake_quant(random_tensor(seed), "nvfp4", -1)
        np.testing.assert_allclose(fake_quant(y, "nvfp4", -1), y, rtol=3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INTEGERS, "e2m1", "e4m3", "e5m6", "ternary"])
def test_a_quantized_tensor_gets_its_scale_back_whatever_its_mantissa(name):
    grid = parse(name).grid()
    scale_of_each = jax.jit(lambda x: rounding_lib.scale_of(x, grid, Kind("int"), axes=1))
    for start in range(2**23, 2**24, 2**21):
        largest = np.arange(start, start + 2**21, dtype=np.float32)[:, None]
        scale = scale_of_each(largest)
        assert_same_bits(scale, largest / grid.max_value)
        assert_same_bits(scale_of_each(scale * grid.max_value), scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        *((name, "nearest") for name in ("int2", "e4m3", "ternary", "e8m7", "mxfp4")),
        *((name, "stochastic") for name in ("int2", "binary", "nvfp4")),
    ],
)
def test_zeros_stay_zero_and_have_a_gradient(name, rounding):
    options = {"axis": -1, "rounding": rounding, "key": jax.random.key(0)}
    y, pull_back = jax.vjp(lambda x: fake_quant(x, name, **options), jnp.zeros((4, 64)))
    assert np.all(np.abs(y) <= (2.0**-125 if name == "binary" else 0.0))  # binary has no zero
    np.testing.assert_array_equal(*pull_back(jnp.full((4, 64), 3.0)), np.full((4, 64), 3.0))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int4", "e4m3", "ternary", "binary", "e8m7", "nvfp4_4over6", *BLOCKS])
def test_a_nan_or_infinity_makes_everything_under_its_scale_nan(name, bad):
    size = parse(name).block_size or 192
    start = 140 // size * size
    # The CPU's own `max` keeps a NaN among ones, or in a small array, and loses it in others.
    ones, random = np.ones((64, 192), np.float32), np.random.default_rng(0).normal(size=(64, 192)).astype(np.float32)
    for x, dtype in itertools.product((ones, random), (jnp.float32, jnp.bfloat16)):
        x[5, 140] = bad
        for axis, rounding in itertools.product((-1, 0, None), ("nearest", "stochastic")):
            if axis is None and parse(name).block_size:
                continue
            y = np.asarray(fake_quant(jnp.asarray(x, dtype), name, axis=axis, rounding=rounding, key=jax.random.key(0)))
            under = np.zeros(x.shape, bool)
            if axis == 0:
                under[: 64 if size == 192 else size, 140] = True
            else:
                under[slice(5, 6) if axis else slice(None), start : start + size] = True
            if not name.startswith("nvfp4"):  # whose tensor scale reaches everywhere
                np.testing.assert_array_equal(np.isnan(y), under, err_msg=f"{dtype.__name__} {axis} {rounding}")
            assert np.all(np.isnan(y[under]))


HUGE, TINY = float(np.finfo(np.float32).max), 2.0**-126  # the largest float32, and the smallest that is not flushed


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        # The largest magnitude is a level of its own scale, up to float32's largest number.
        ("int2", [3e38, 1e38, -2e38], [3e38, 0, -3e38]),
        ("int3", [3e38, 1e38, -2e38], [3e38, 1e38, -2e38]),  # levels 0, ±1, ±2, ±3 thirds of 3e38
        ("int8", [3e38, 1e38, -1e36], [3e38, 3e38 * 42 / 127, 0]),
        ("e1m2", [3.5e37, 3e37, 0], [3.5e37, 3e37, 0]),  # levels 0, 0.5, ..., 3.5
        ("int8", [HUGE, -HUGE, HUGE / 2], [HUGE, -HUGE, HUGE * 64 / 127]),  # 63.5 steps: to the even one
        ("e5m10", [HUGE, HUGE / 4], [HUGE, HUGE / 4]),
        ("e2m1", [HUGE, HUGE / 6, HUGE / 12], [HUGE, HUGE / 6, HUGE / 12]),
        ("binary", [3e38, -1e38], [2e38, -2e38]),  # the sum of the magnitudes is no float32, their mean is
        ("ternary", [3e38, 0.9e38, -3e38], [2.3e38, 0, -2.3e38]),
        ("e8m7", [2.0**127, HUGE], [2.0**127, (2 - 2**-7) * 2.0**127]),
        # E8M0: 2^floor(log2 largest) over the element's, from 2^-127 to 2^127; mantissas above saturate.
        ("mxint8", [3e38, 2.0**127, 2.0**121], [113 * 2.0**121, 2.0**127, 2.0**121]),  # 3e38 / 2^127 = 112.8 / 64
        ("mxint8", [HUGE, 0], [127 * 2.0**121, 0]),
        ("mxfp4", [3e38, 2.0**126, 2.0**125], [6 * 2.0**125, 2.0**126, 2.0**125]),  # scale 2^125, levels up to 6
        ("mxfp8", [HUGE, -(2.0**120)], [448 * 2.0**119, -(2.0**120)]),
        ("mxfp8_e5m2", [HUGE, 2.0**112], [57344 * 2.0**112, 2.0**112]),
        ("mxfp6", [HUGE, 2.0**125], [7.5 * 2.0**125, 2.0**125]),
        ("mxfp6_e3m2", [HUGE, 2.0**123], [28 * 2.0**123, 2.0**123]),
        ("nvfp4", [HUGE, HUGE / 6], [HUGE, HUGE / 6]),
        # Near the smallest number every level that is not flushed is there.
        ("int4", [TINY, 3 * TINY, 7 * TINY], [TINY, 3 * TINY, 7 * TINY]),
        ("int8", [100 * TINY, 1.6 * TINY], [100 * TINY, 2 * TINY]),  # the scale is no smaller than 2^-126
        ("e4m3", [2 * TINY, TINY], [2 * TINY, TINY]),
        ("mxfp4", [TINY, 2 * TINY, 3 * TINY], [TINY, 2 * TINY, 3 * TINY]),
        ("mxfp8", [1.125 * TINY, TINY], [1.125 * TINY, TINY]),
        ("mxint8", [1.5 * TINY, TINY], [1.5 * TINY, TINY]),
        ("nvfp4", [6 * 2.0**-110, 2.0**-110], [6 * 2.0**-110, 2.0**-110]),
        ("ternary", [TINY, -TINY], [TINY, -TINY]),
        # Subnormal numbers are zero.
        ("int4", [1e-39, -1e-39], [0, 0]),
        ("mxfp4", [1e-39, -1e-45], [0, 0]),
        ("e4m3", [1.0, 1e-39], [1, 0]),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_of_every_scale_have_the_values_of_their_format(name, x, expected, sign):
    size = parse(name).block_size
    x = sign * (np.float64(x + [0.0] * (size - len(x))) if size else np.resize(x, 30))  # one compiled shape for all
    y = np.asarray(fake_quant(np.float32(x), name, -1), np.float64)
    np.testing.assert_allclose(y[: len(expected)], sign * np.float64(expected), rtol=5e-7, atol=0)


@pytest.mark.parametrize("name", [*INTEGERS, *PAPER_FLOATS, "e2m1", "e4m3fn", "e7m8", "ternary", "binary", *BLOCKS])
def test_finite_inputs_have_finite_results_with_and_without_noise(name):
    width = parse(name).block_size or 16
    rng = np.random.default_rng(0)
    top = np.nextafter(np.float32(HUGE) * (1 - rng.integers(0, 9, (40, width)) * 2.0**-24), np.float32(0))
    x = np.concatenate([np.full((1, width), HUGE), top, rng.uniform(-1, 1, (40, width)) * HUGE]).astype(np.float32)
    for options in ({}, {"rounding": "stochastic", "key": jax.random.key(0)}):
        y = np.asarray(fake_quant(x, name, -1, **options), np.float64)
        assert np.all(np.isfinite(y)) and np.all(np.abs(y) <= HUGE)
        assert np.all(np.isfinite(np.asarray(fake_quant(x * TINY, name, -1, **options))))


def test_scales_whose_inverse_is_flushed_are_nan_where_others_divide_by_them():
    x = np.float32([[3e38, 1e38]])
    codes = kernel_grid.quantize(x.T, kernel_grid.find(x.T, parse("int2").grid()))[0]
    assert np.all(np.isnan(codes))


@pytest.mark.parametrize("name", ["int4", "e4m3", "mxfp4", "ternary"])
def test_empty_and_scalar_arrays(name):
    assert fake_quant(np.zeros((0, 32), np.float32), name, axis=-1).shape == (0, 32)
    if name != "mxfp4":
        np.testing.assert_allclose(fake_quant(np.float32(-2.5), name), -2.5, rtol=1e-6)


# Axes and groups.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "e3m2"])
def test_scales_per_slice_equal_slices_done_one_by_one(name):
    x = random_tensor(3, (4, 6, 10))
    fq = functools.partial(fake_quant, name=name)
    for channel in range(10):
        assert_same_bits(fq(x, axis=(0, 1))[..., channel], fq(x[..., channel]))
    for token in range(4):
        assert_same_bits(fq(x, axis=(-1, 1))[token], fq(x[token]))
    for group in range(3):
        members = slice(2 * group, 2 * group + 2)
        for row in range(4):
            assert_same_bits(fq(x, axis=1, group_size=2)[row, members, 0], fq(x[row, members, 0]))


@pytest.mark.slow
def test_groups_and_blocks_without_an_axis_lie_along_the_last():
    x = random_tensor(4)
    fq = fake_quant
    assert_same_bits(fq(x, 4, group_size=16), fq(x, 4, axis=1, group_size=16))
    assert_same_bits(fq(x, "mxfp4"), fq(x, "mxfp4", axis=-1))
    assert_same_bits(fq(x.T, "mxfp4", axis=0), fq(x, "mxfp4").T)
    assert_same_bits(fq(x, "nvfp4", group_size=16), fq(x, "nvfp4"))


# Blocks and level sets, against NumPy.


def mx_by_hand(x: np.ndarray, element) -> np.ndarray:
    emax = {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3fn": 8, "e5m2": 15, "int8": 0}[element]
    blocks = x.reshape(-1, 32).astype(np.float64)
    scale = 2 ** (np.floor(np.log2(np.max(np.abs(blocks), 1, keepdims=True))) - emax)
    np.testing.assert_array_equal(scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float64), scale)
    scaled = blocks / scale
    if element == "int8":
        codes = np.clip(np.rint(scaled * 64), -127, 127) / 64
    else:
        largest = float(ml_dtypes.finfo(CASTS[element]).max)
        codes = np.clip(scaled, -largest, largest).astype(np.float32).astype(CASTS[element]).astype(np.float64)
    return (codes * scale).reshape(x.shape)


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("mxfp4", "e2m1"),
        ("mxfp6", "e2m3"),
        ("mxfp6_e3m2", "e3m2"),
        ("mxfp8", "e4m3fn"),
        ("mxfp8_e5m2", "e5m2"),
        ("mxint8", "int8"),
    ],
)
def test_mx_formats_follow_the_ocp_recipe(name, element):
    for seed in range(10):
        x = random_tensor(seed, (64, 64))
        np.testing.assert_array_equal(fake_quant(x, name), mx_by_hand(x, element))


def test_nvfp4_follows_its_recipe():
    for seed in range(10):
        x = random_tensor(seed, (64, 64))
        blocks = x.reshape(-1, 16)
        tensor_scale = np.max(np.abs(x)) / np.float32(6 * 448)
        wanted = np.max(np.abs(blocks), 1, keepdims=True) / np.float32(6) / tensor_scale
        scale = np.minimum(wanted, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * tensor_scale
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(scale > 0, np.clip(blocks / scale, -6, 6), 0)
        expected = scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
        np.testing.assert_allclose(fake_quant(x, "nvfp4"), expected.reshape(x.shape), rtol=3e-7)


def test_nvfp4_blocks_far_below_the_tensor_maximum_become_zero():
    x = np.full((1, 32), 1e-6, np.float32)
    x[0, 0] = 6.0
    y = np.asarray(fake_quant(x, "nvfp4"))
    assert y[0, 0] == pytest.approx(6, rel=3e-7) and np.all(y[0, 16:] == 0)


def test_ternary_and_binary_scale_by_the_mean_magnitude():
    x = np.float32([[1.0, -0.2, 0.6, -3.0], [0.0, 0.25, -0.25, 0.5]])  # mean magnitudes 1.2 and 0.25
    ternary = [[1.2, 0, 0, -1.2], [0, 0.25, -0.25, 0.25]]  # 0.6 / 1.2 is a tie: toward zero
    binary = [[1.2, -1.2, 1.2, -1.2], [0.25, 0.25, -0.25, 0.25]]
    np.testing.assert_allclose(fake_quant(x, "ternary", axis=-1), ternary, rtol=1e-6)
    np.testing.assert_allclose(fake_quant(x, "binary", axis=-1), binary, rtol=1e-6)


# Traced grids.

COHORTS = {
    "int": ["int2", "int8", "bf16"],
    "float": ["e2m0", "e4m3", "int4", "bf16"],
    "block": ["mxfp4", "mxint8", "bf16"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cohort", "rounding"), [*((cohort, "nearest") for cohort in COHORTS), ("float", "stochastic")]
)
def test_traced_vmapped_and_static_formats_give_the_same_bits(cohort, rounding):
    names = COHORTS[cohort]
    kind = formats.shared_kind(names)
    assert kind.family == cohort
    x, options = random_tensor(7), {"axis": -1, "rounding": rounding, "key": jax.random.key(1)}
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[parse(name).grid() for name in names])
    one = lambda x, grid: rounding_lib.fake_quant_grid(x, grid, kind, **options)
    together = jax.jit(jax.vmap(one, in_axes=(None, 0)))(x, stacked)
    for name, y in zip(names, together, strict=True):
        static = fake_quant_static(x, name, **options)
        assert_same_bits(y, static)
        assert_same_bits(fake_quant_traced(x, parse(name).grid(), kind, **options), static)


def test_formats_that_pass_through_change_nothing():
    x = random_tensor(8)
    for name in ("bf16", "fp16", "fp32", 16):
        assert_same_bits(fake_quant(x, name), x)
        assert_same_bits(fake_quant_traced(x, parse(name).grid(), Kind("int")), x)
        assert_same_bits(round_traced(x, parse(name).grid(), "float"), x)


# Stochastic rounding.


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INTEGERS, *PAPER_FLOATS, *CASTS, "ternary", "binary", *BLOCKS])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(name):
    fmt, draws = parse(name), 100_000
    width = fmt.block_size or 8
    x = random_tensor(11, (width,)) * np.float32(1e5)
    tiled = np.broadcast_to(x, (draws, width))
    y = np.asarray(fake_quant(tiled, name, -1, rounding="stochastic", key=jax.random.key(5)), np.float64)
    low, high = y.min(0), y.max(0)
    tolerance = 2e-7 * np.max(np.abs(x))  # float32's rounding of scale and product
    assert np.all((low <= x + tolerance) & (x - tolerance <= high))
    assert np.all((y == low) | (y == high))
    share = np.divide(x - low, high - low, out=np.zeros(width), where=high > low)
    error = (high - low) * np.sqrt(np.clip(share * (1 - share), 0, 1) / draws)
    assert np.all(np.abs(y.mean(0) - x) <= 4 * error + tolerance)


def test_stochastic_rounding_repeats_with_its_key_and_differs_with_another():
    x = random_tensor(2)
    fq = functools.partial(fake_quant, x, "int4", rounding="stochastic")
    assert_same_bits(fq(key=jax.random.key(1)), fq(key=jax.random.key(1)))
    assert np.mean(np.asarray(fq(key=jax.random.key(1))) != fq(key=jax.random.key(2))) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, rounding", [("nvfp4", "nearest"), ("nvfp4_4over6", "stochastic"), ("mxfp8", "stochastic")]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_without_their_shape_as_on_tpus_have_the_same_bits(monkeypatch, name, rounding, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(96, 64)) * 2.0 ** np.arange(-40, 24), dtype)
    quantized = lambda x: [fake_quant_whole(x, name, axis, rounding) for axis in (0, 1)]
    plain = jax.jit(quantized)(x)
    taken = []
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, tpu, default: taken.append(1) or tpu(*x))
    for one, other in zip(jax.jit(lambda x: quantized(x))(x), plain, strict=True):
        np.testing.assert_array_equal(one.view(jnp.uint8), other.view(jnp.uint8))
    assert len(taken) == 2


def fake_quant_whole(x, name, axis, rounding):
    key = jax.random.key(1) if rounding == "stochastic" else None
    return rounding_lib.fake_quant_array(x, name, axis, rounding=rounding, key=key)


def test_rounding_noise_is_uniform_and_uncorrelated():
    noise = lambda i: elements.rounding_noise(jax.random.fold_in(jax.random.key(3), i), (1000,))
    draws = np.asarray(jax.jit(jax.vmap(noise))(jnp.arange(200)))
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    correlation = lambda a, b: abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * np.sqrt(a.size)
    assert all(correlation(draws[:, lag:], draws[:, :-lag]) < 4 for lag in (1, 2, 32, 512))
    assert correlation(draws[1:], draws[:-1]) < 4
    assert np.std(draws.mean(0)) == pytest.approx(np.sqrt(1 / 12 / 200), rel=0.1)


# Gradients, transforms and dtypes.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int3", "e4m3", "nvfp4", "bf16"])
def test_the_gradient_passes_straight_through_under_jit_and_vmap(name):
    x, cotangent = random_tensor(5), random_tensor(6)
    loss = lambda x: jnp.vdot(fake_quant(x, name, axis=-1), cotangent)
    assert_same_bits(jax.jit(jax.grad(loss))(x), cotangent)
    rows = jax.vmap(jax.grad(lambda row, c: jnp.vdot(fake_quant(row, name), c)))(x, cotangent)
    assert_same_bits(rows, cotangent)
    _, tangent = jax.jvp(lambda x: fake_quant(x, name, axis=-1), (x,), (cotangent,))
    assert_same_bits(tangent, cotangent)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["int4", "mxfp8", "bf16"])
def test_the_dtype_stays_and_the_arithmetic_is_float32(name, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), dtype)
    y = fake_quant(x, name, axis=-1)
    assert y.dtype == dtype
    in_float32 = fake_quant(x.astype(jnp.float32), name, axis=-1).astype(dtype)
    np.testing.assert_array_equal(y.astype(jnp.float32), in_float32.astype(jnp.float32))


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"fmt": "e9m9"}, "'e9m9'"),
        ({"fmt": 4, "rounding": "stochastic"}, "key"),
        ({"fmt": "mxfp4", "rounding": "stochastic"}, "key"),
        ({"fmt": 4, "rounding": "up"}, "'up'"),
        ({"fmt": 4, "axis": 1, "group_size": 7}, "7"),
        ({"fmt": 16, "axis": 1, "group_size": 7}, "7"),
        ({"fmt": 4, "axis": 1, "group_size": 0}, "0"),
        ({"fmt": 4, "axis": 1, "group_size": 2.5}, "2.5"),
        ({"fmt": 4, "axis": (0, 1), "group_size": 8}, "axis 0"),
        ({"fmt": 4, "axis": 2}, "2"),
        ({"fmt": 4, "axis": -3}, "-3"),
        ({"fmt": "mxfp4", "axis": 0}, "32"),
        ({"fmt": "mxfp4", "axis": 1, "group_size": 16}, "16"),
        ({"fmt": 4, "x": np.arange(6)}, "int"),
        ({"fmt": "mxfp4", "x": np.float32(1)}, "()"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value_and_what_is_allowed(arguments, named):
    with pytest.raises(formats.FormatError) as error:
        rounding_lib.fake_quant_array(**{"x": np.ones((12, 64), np.float32)} | arguments)
    assert named in str(error.value) and "allowed" in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_family_is_refused():
    with pytest.raises(formats.FormatError, match="'decimal'"):
        elements.round_to_grid(jnp.ones(3), parse(4).grid(), "decimal")
