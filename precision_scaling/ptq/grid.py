"""The grids that post-training quantization rounds a kernel to: a scale (and zero point) per output channel and group.

A grid is found from the kernel alone, before anything is quantized, so every method works on the same grid and their
errors can be compared. The bit-width is data: one compiled program serves all of them, and `vmap` runs over them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_BITS, MAX_BITS = 2, 8

# Fractions of the full range tried by the clip search, widest first. A ternary grid on a Gaussian column wants about
# a third of the range, and heavy tails less, so the search goes down to a tenth.
CLIP_RATIOS = tuple((50 - i) / 50 for i in range(46))


class Grid(NamedTuple):
    """value = scale * (code - zero), whole codes in [low, high]; each of G groups of inputs has its own (O outputs)."""

    scale_GxO: jax.Array
    zero_GxO: jax.Array
    low: jax.Array  # scalar
    high: jax.Array  # scalar


def groups(rows: int, group_size: int | None) -> int:
    """Number of groups of `group_size` rows; None is one group of all rows. Raises ValueError if they don't fit."""
    if group_size is None:
        return 1
    if group_size < 1 or rows % group_size:
        raise ValueError(f"group_size={group_size}: must be None or a divisor of the kernel's {rows} inputs")
    return rows // group_size


def encode(x, scale, zero, low, high):
    """Nearest code of x, ties to even."""
    return jnp.clip(jnp.round(x / scale) + zero, low, high)


def decode(code, scale, zero):
    """The value that a code stands for."""
    return scale * (code - zero)


def find(kernel_IxO, bits, *, group_size: int | None = None, symmetric: bool = True, clip: bool = False) -> Grid:
    """The grid of a kernel at a (possibly traced) scalar bit-width.

    Symmetric: codes ±(2^(b-1) - 1), scale = abs-max / (2^(b-1) - 1), so that the largest weight is a level of the grid.
    Asymmetric: codes 0..2^b - 1 between min(0, smallest) and max(0, largest), zero always a level.
    `clip` shrinks each range to the fraction in CLIP_RATIOS that has the least squared rounding error.
    """
    rows, cols = kernel_IxO.shape
    w_GxSxO = kernel_IxO.reshape(groups(rows, group_size), -1, cols)
    bits = jnp.asarray(bits, w_GxSxO.dtype)
    if symmetric:
        high = jnp.exp2(bits - 1) - 1
        low = -high
        top_GxO = jnp.max(jnp.abs(w_GxSxO), axis=1)
        bottom_GxO = jnp.zeros_like(top_GxO)
    else:
        high = jnp.exp2(bits) - 1
        low = jnp.zeros_like(high)
        top_GxO = jnp.maximum(jnp.max(w_GxSxO, axis=1), 0)
        bottom_GxO = jnp.minimum(jnp.min(w_GxSxO, axis=1), 0)

    def at(ratio):
        scale = ratio * (top_GxO - bottom_GxO) / high
        scale = jnp.where(scale > 0, scale, 1)  # a group of zeros: any scale holds it
        zero = jnp.round(-ratio * bottom_GxO / scale)
        return Grid(scale, zero, low, high)

    if not clip:
        return at(1.0)

    def error(grid):
        s, z = grid.scale_GxO[:, None], grid.zero_GxO[:, None]
        return jnp.sum(jnp.square(decode(encode(w_GxSxO, s, z, low, high), s, z) - w_GxSxO), axis=1)

    def search(best, ratio):
        best_error_GxO, best_ratio_GxO = best
        error_GxO = error(at(ratio))
        better = error_GxO < best_error_GxO
        return (jnp.where(better, error_GxO, best_error_GxO), jnp.where(better, ratio, best_ratio_GxO)), None

    start = jnp.full_like(top_GxO, jnp.inf), jnp.ones_like(top_GxO)
    (_, ratio_GxO), _ = jax.lax.scan(search, start, jnp.asarray(CLIP_RATIOS, w_GxSxO.dtype))
    return at(ratio_GxO)


def quantize(kernel_IxO, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Round to nearest: (dequantized kernel, codes), both (in, out)."""
    w_GxSxO = kernel_IxO.reshape(grid.scale_GxO.shape[0], -1, kernel_IxO.shape[1])
    s, z = grid.scale_GxO[:, None], grid.zero_GxO[:, None]
    code = encode(w_GxSxO, s, z, grid.low, grid.high)
    return decode(code, s, z).reshape(kernel_IxO.shape), code.reshape(kernel_IxO.shape)


def check_bits(bits) -> None:
    """Raises ValueError unless every bit-width is a whole number from 2 to 8 (nothing to check while tracing)."""
    if isinstance(bits, jax.core.Tracer):
        return
    for b in jnp.atleast_1d(jnp.asarray(bits)).tolist():
        if b != int(b) or not MIN_BITS <= b <= MAX_BITS:
            raise ValueError(f"bits={b:g}: must be a whole number from {MIN_BITS} to {MAX_BITS}")
