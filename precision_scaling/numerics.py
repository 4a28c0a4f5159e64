"""Rounding arithmetic: an array and a grid in, the same array on the grid out.

Pure functions of JAX arrays that take the grid of `formats` as traced scalars. `quantize` puts them inside the model's
products; post-training quantization and the tests call them directly.
"""

import jax
import jax.numpy as jnp
from jax import lax

from precision_scaling.formats import FormatError, Grid

_EXPONENT_FIELD = 0x7F800000  # of a float32
_SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: below it XLA flushes to zero and 1 / scale overflows
_LARGEST_SCALE = 2.0**126  # above it 1 / scale is flushed to zero


def abs_max_scale(x: jax.Array, grid: Grid, axes: int | tuple[int, ...] | None = None) -> jax.Array:
    """The float32 scale, of x's shape with `axes` (None: all) of length 1: x / scale has abs-max = grid.max_value.

    Zeros get the smallest normal number. An infinity, a NaN or a magnitude so large that 1 / scale underflows gives a
    scale that is not finite, which makes everything it scales NaN. The scale is 1 where the grid passes through.
    """
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    # Correct rounding here is what gives a quantized tensor the very same scale again. The vanishing term keeps XLA from
    # replacing the division by a product with a rounded inverse, which it does for every broadcast divisor.
    scale = jnp.maximum(largest / (grid.max_value + 0 * largest), _SMALLEST_SCALE)
    scale = jnp.where(scale > _LARGEST_SCALE, jnp.inf, scale)
    return jnp.where(grid.passthrough > 0, 1.0, scale)


def round_to_grid(
    x: jax.Array, grid: Grid, family: str, noise: jax.Array | None = None, *, saturate: bool = True
) -> jax.Array:
    """x (float32, already divided by its scale) on the grid.

    Nearest, ties to even; with `noise` uniform in [0, 1) of x's shape up or down at random so that the mean is x.
    Values beyond ±max_value saturate; `saturate=False` skips that for inputs known to lie inside. NaN stays NaN.
    """
    clipped = jnp.clip(x, -grid.max_value, grid.max_value) if saturate or noise is not None else x
    if family == "int":
        x_q = _round(clipped, noise)
    elif family == "float":
        step, inverse_step = _spacing(clipped, grid)
        x_q = _round(clipped * inverse_step, noise) * step
    elif family == "none":
        return x
    else:
        raise FormatError(f"family {family!r} has no traced rounding; allowed: int, float, none")
    return jnp.where(grid.passthrough > 0, x, x_q)


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
