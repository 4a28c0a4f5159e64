"""Rounding of single numbers: float32 values that were divided by their scale, on the grid of a format.

`rounding` finds the scales and puts whole arrays on their scaled grid.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from precision_scaling.numerics.formats import FormatError, Grid, Kind

_EXPONENT_FIELD = 0x7F800000  # of a float32


def round_to_grid(
    x: jax.Array, grid: Grid, kind: Kind | str, noise: jax.Array | None = None, *, saturate: bool = True
) -> jax.Array:
    """x (float32, already divided by its scale) on the grid of a format of that kind, or scalar family.

    Nearest, ties to even (without mantissa bits, which leave no even one, to the larger: IEEE 754-2019, 4.3.1); with
    `noise` uniform in [0, 1) of x's shape up or down at random so that the mean is x.
    Values beyond ±max_value saturate; `saturate=False` skips that for inputs known to lie inside. NaN stays NaN.
    """
    x_q = rounded(x, grid, Kind(kind) if isinstance(kind, str) else kind, noise, saturate)
    return jnp.where(grid.passthrough > 0, x, x_q)


def abs_max(x: jax.Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> jax.Array:
    """The largest magnitude of x along `axis`, as of `jnp.max`; an infinity where x has one or has a NaN.

    The CPU's `max` loses a NaN in most shapes, so a NaN is an infinity before it. Both have no scale.
    """
    magnitude = jnp.abs(x)
    return jnp.max(jnp.where(magnitude < jnp.inf, magnitude, jnp.inf), axis=axis, keepdims=keepdims)


def rounding_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 noise in [0, 1), a multiple of 2^-24, for stochastic rounding.

    A hash of the element's index (MurmurHash3's finalizer, twice), seeded by `key`: on a CPU it costs about three times
    a multiplication of the array, where `jax.random.uniform` costs thirty.
    """
    seeds = jax.random.bits(key, (2,), jnp.uint32)
    index = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = _mix(_mix(index ^ seeds[0]) + seeds[1])
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def rounded(x: jax.Array, grid: Grid, kind: Kind, noise: jax.Array | None, saturate: bool) -> jax.Array:
    """As `round_to_grid`, whatever the grid's passthrough."""
    if kind.family == "wide":
        return _round_mantissa(x, grid, noise)
    if kind.levels is not None:
        return _nearest_level(x, kind.levels, noise)
    if saturate:
        x = jnp.clip(x, -grid.max_value, grid.max_value)
    if kind.family == "int":
        return _round(x, noise)
    if kind.family in ("float", "block"):
        step, inverse_step = _spacing(x, grid)
        return _round(x * inverse_step, noise) * step
    raise FormatError(f"family {kind.family!r} does not round; allowed: int, float, wide, levels, block")


def _round(levels: jax.Array, noise: jax.Array | None) -> jax.Array:
    if noise is None:
        return lax.round(levels, lax.RoundingMethod.TO_NEAREST_EVEN)
    below = jnp.floor(levels)
    return below + (noise < levels - below)  # compared, not added: the sum would round and bias the mean


def _spacing(x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """The grid's spacing at x, a power of two, and its inverse, made from the bits of x because log2 is not exact."""
    exponent = lax.bitcast_convert_type(x, jnp.int32) & _EXPONENT_FIELD
    smallest = (jnp.asarray(grid.min_exponent, jnp.int32) + 127) << 23
    step = jnp.maximum(exponent, smallest) - (jnp.asarray(grid.mantissa_bits, jnp.int32) << 23)
    inverse_step = (254 << 23) - step
    return lax.bitcast_convert_type(step, jnp.float32), lax.bitcast_convert_type(inverse_step, jnp.float32)


def _round_mantissa(x: jax.Array, grid: Grid, noise: jax.Array | None) -> jax.Array:
    """Rounds the bits themselves: with float32's exponent range the spacing or its inverse may not be a float32, and
    arithmetic would flush the subnormals, which are float32's own."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    dropped_bits = jnp.asarray(23 - grid.mantissa_bits, jnp.uint32)
    unit = jnp.left_shift(jnp.uint32(1), dropped_bits)
    dropped = magnitude & (unit - 1)
    if noise is None:
        odd = jnp.right_shift(magnitude, dropped_bits) & 1
        up = dropped + odd > unit >> 1
    else:
        up = noise * unit.astype(jnp.float32) < dropped.astype(jnp.float32)
    found = magnitude - dropped + jnp.where(up, unit, 0)
    largest = lax.bitcast_convert_type(jnp.asarray(grid.max_value, jnp.float32), jnp.uint32)
    found = jnp.minimum(found, largest) | (bits ^ magnitude)
    return jnp.where(magnitude > _EXPONENT_FIELD, x, lax.bitcast_convert_type(found, jnp.float32))


def _nearest_level(x: jax.Array, levels: tuple[float, ...], noise: jax.Array | None) -> jax.Array:
    result = jnp.full_like(x, levels[0])
    for low, high in itertools.pairwise(levels):
        if noise is None:
            middle = (low + high) / 2
            above = x > middle if middle > 0 else x >= middle
        else:
            above = x - low > noise * (high - low)
        result = jnp.where(above, high, result)
    return jnp.where(jnp.isnan(x), x, result)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
