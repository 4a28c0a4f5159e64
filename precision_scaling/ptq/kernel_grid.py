"""The grids that post-training quantization rounds a kernel to: a scale (and zero point) per output channel and group.

A grid is found from the kernel alone, before anything is quantized, so every method works on the same grid and their
errors can be compared. Formats are data: one compiled program serves all that share a kind.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.numerics import elements, formats, rounding

INTEGER = formats.Kind("int")

# Fractions of the full range tried by the clip search, widest first. A ternary grid on a Gaussian column wants about
# a third of the range, and heavy tails less, so the search goes down to a tenth.
CLIP_RATIOS = tuple((50 - i) / 50 for i in range(46))


class KernelGrid(NamedTuple):
    """Values scale * level. G groups of inputs have a scale each, for each of O outputs.

    A symmetric grid has the levels of its format; an asymmetric one has the integers -zero to 2^b - 1 - zero.
    """

    scale_GxO: jax.Array
    zero_GxO: jax.Array
    levels: formats.Grid


def integer_levels(bits) -> formats.Grid:
    """The levels ±(2^(b-1) - 1) of whole bit-widths in an array of any shape, traced or not; 16 and above pass through.

    Raises FormatError for bit-widths that don't exist, where they can be seen.
    """
    if not isinstance(bits, jax.core.Tracer):
        for b in np.ravel(np.asarray(bits)):
            formats.parse(float(b))
    bits = jnp.asarray(bits).astype(jnp.int32)
    kept = jnp.minimum(bits, 16)
    fields = jnp.left_shift(1, kept - 1) - 1, kept - 2, kept - 2, bits >= 16
    return formats.Grid._make(field.astype(jnp.float32) for field in fields)


def levels_of(spec: object) -> tuple[formats.Grid, formats.Kind]:
    """The levels of a format, or of a number of bits, and the kind that a program serves it with.

    Raises FormatError for an unknown format.
    """
    fmt = formats.parse(spec)
    return jax.tree.map(jnp.asarray, fmt.grid()), INTEGER if fmt.family == "none" else fmt.kind


def group_rows(rows: int, group_size: int | None, kind: formats.Kind = INTEGER) -> int:
    """Inputs per group: all of them for None, a block format's own size. Raises UserError if they don't fit.

    The last group may have fewer, but for formats of blocks and those whose scale is a mean.
    """
    size = kind.block_size or group_size or rows
    whole = kind.block_size or kind.scale != "absmax"
    if group_size not in (None, size) or not 1 <= size <= rows or (whole and rows % size):
        allowed = f"None or the format's {kind.block_size}" if kind.block_size else f"None or 1 to {rows}"
        allowed = "None or a divisor" if whole and not kind.block_size else allowed
        raise UserError(f"group_size = {group_size!r} for a kernel with {rows} inputs: allowed is {allowed}")
    return size


def find(
    kernel_IxO,
    levels: formats.Grid,
    kind: formats.Kind = INTEGER,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    full_range: bool = False,
    clip: bool | Callable[[jax.Array], jax.Array] = False,
) -> KernelGrid:
    """The grid of a float32 kernel for (possibly traced) scalar `levels`.

    Symmetric: the scale that training gives the format, for integers abs-max / (2^(b-1) - 1), so the largest weight is
    a level. With `full_range` symmetric integers have all 2^b levels, -2^(b-1) to 2^(b-1) - 1, at the finer scale
    2 abs-max / (2^b - 1); a largest weight that is positive loses half a step. Zero is 2^(b-1) then, and `quantize`
    takes the grid as an asymmetric one. Asymmetric: 2^b levels from min(0, smallest) to max(0, largest), one of them
    zero.
    `clip` shrinks each range to the fraction in CLIP_RATIOS that has the least squared rounding error, or the least of
    what a function makes (G, O) of the rounding errors (G, S, O) of groups of S inputs. With `full_range` it begins at
    the range where every weight has a level, and tries scales of both signs: one end has a level more than the other.
    """
    if not symmetric and kind.family != "int":
        raise UserError(f"symmetric = False with formats of family {kind.family}: allowed are integers")
    if clip and kind.family in ("block", "wide"):
        raise UserError(f"clip = True with formats of family {kind.family}: allowed are those whose scale can be any")
    if full_range and (not symmetric or kind.family != "int"):
        raise UserError("full_range = True: allowed with symmetric grids of integers, others have all their levels")
    w_GxSxO = grouped(kernel_IxO, group_rows(kernel_IxO.shape[0], group_size, kind))
    if full_range:
        largest_GxO = elements.abs_max(w_GxSxO, 1)
        full_GxO = jnp.where(largest_GxO == 0, 1, largest_GxO / (levels.max_value + (0 if clip else 0.5)))
        bottom_GxO = -full_GxO * (levels.max_value + 1)
    elif symmetric:
        scale_kind = kind._replace(scale="absmax") if clip else kind
        full_GxO = rounding.scale_of(w_GxSxO, levels, scale_kind, 1)[:, 0]
        bottom_GxO = jnp.zeros_like(full_GxO)
    else:
        bottom_GxO = jnp.minimum(jnp.min(w_GxSxO, axis=1), 0)
        span_GxO = jnp.maximum(jnp.max(w_GxSxO, axis=1), 0) - bottom_GxO
        full_GxO = jnp.where(span_GxO == 0, 1, span_GxO / (2 * levels.max_value + 1))
    full_GxO = jnp.where(levels.passthrough > 0, 1, full_GxO)

    def at(ratio):
        # The zero point does not depend on the ratio: both ends of the range move. A block whose stored scale
        # underflowed to 0 has none.
        zero_GxO = jnp.round(-bottom_GxO / jnp.where(full_GxO == 0, 1, full_GxO))
        return KernelGrid(ratio * full_GxO, zero_GxO, levels)

    if not clip:
        return at(1)

    measure = clip if callable(clip) else lambda e_GxSxO: jnp.sum(jnp.square(e_GxSxO), axis=1)

    ratios = jnp.asarray(CLIP_RATIOS, jnp.float32)
    ratios = jnp.concatenate([ratios, -ratios]) if full_range else ratios

    def search(best, ratio):
        best_error_GxO, best_ratio_GxO = best
        error_GxO = measure(_round_groups(w_GxSxO, at(ratio), kind, symmetric and not full_range)[0] - w_GxSxO)
        better = error_GxO < best_error_GxO
        return (jnp.where(better, error_GxO, best_error_GxO), jnp.where(better, ratio, best_ratio_GxO)), None

    start = jnp.full_like(full_GxO, jnp.inf), jnp.ones_like(full_GxO)
    (_, ratio_GxO), _ = jax.lax.scan(search, start, ratios)
    return at(ratio_GxO)


def nearest_level(x, inverse_scale, zero, levels: formats.Grid, kind: formats.Kind, symmetric: bool):
    """The level that x / scale is nearest to, ties to even; multiplied by the inverse, as training does it."""
    x = x * inverse_scale
    if symmetric:
        return elements.round_to_grid(x, levels, kind)
    level = jnp.clip(jnp.round(x), -zero, 2 * levels.max_value + 1 - zero)
    return jnp.where(levels.passthrough > 0, x, level)


def inverse(scale):
    """1 / scale; 0 for the scale 0 of a block whose stored scale underflowed, NaN where the inverse would underflow."""
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale > rounding.LARGEST_INVERTIBLE, jnp.nan, scale))


def code_dtype(kind: formats.Kind, symmetric: bool):
    """What codes are kept as: integers, of 32 bits where a zero point can add one to 16; other levels as they are."""
    return jnp.float32 if kind.family != "int" else jnp.int16 if symmetric else jnp.int32


def quantize(
    kernel_IxO,
    grid: KernelGrid,
    kind: formats.Kind = INTEGER,
    symmetric: bool = True,
    group_size: int | None = None,
):
    """Round to nearest: (dequantized kernel, levels), both (in, out).

    group_size: as for `find`; None where all groups have as many rows.
    """
    rows, groups = kernel_IxO.shape[0], grid.scale_GxO.shape[0]
    w_GxSxO = grouped(kernel_IxO, group_size or -(-rows // groups))
    return tuple(ungrouped(x, rows) for x in _round_groups(w_GxSxO, grid, kind, symmetric))


def grouped(x_IxO, size: int):
    """(G, size, O), a last group of fewer rows filled up with zeros: they change no range and are a level of each grid,
    so they round to themselves."""
    rows, *features = x_IxO.shape
    return jnp.pad(x_IxO, ((0, -rows % size), *((0, 0) for _ in features))).reshape(-1, size, *features)


def ungrouped(x_GxSxO, rows: int):
    """The first rows (rows, O) of what `grouped` made."""
    return x_GxSxO.reshape(-1, *x_GxSxO.shape[2:])[:rows]


def _round_groups(w_GxSxO, grid, kind, symmetric):
    scale, zero = grid.scale_GxO[:, None], grid.zero_GxO[:, None]
    level = nearest_level(w_GxSxO, inverse(scale), zero, grid.levels, kind, symmetric)
    return level * scale, level
