"""Round to nearest: the post-training quantization that looks at the kernel alone, and the baseline of the others."""

import functools

import jax
import jax.numpy as jnp

from precision_scaling.numerics import formats
from precision_scaling.ptq import kernel_grid
from precision_scaling.ptq.scheme import Calibration, Method, Rounded, Scheme


def quantize_kernel(
    kernel,
    bits,
    group_size: int | None = None,
    symmetric: bool = True,
    clip: bool = False,
    full_range: bool = False,
):
    """The kernel (in, out) rounded to the nearest level of its grid: the dequantized kernel (in, out) in float32.

    bits: a bit-width (2 to 15 are integers, 16 and above pass through), traced or not, or a format ('e2m1', 'nvfp4').
    Raises FormatError for an unknown format and UserError for a group size, asymmetry or clip that it can't have.
    """
    if isinstance(bits, str | formats.Format):
        levels, kind = kernel_grid.levels_of(bits)
    else:
        levels, kind = kernel_grid.integer_levels(bits), kernel_grid.INTEGER
    return nearest(kernel, levels, kind, group_size, symmetric, clip, full_range)


@functools.partial(jax.jit, static_argnames=("kind", "group_size", "symmetric", "clip", "full_range"))
def nearest(
    kernel, levels, kind, group_size: int | None, symmetric: bool, clip: bool = False, full_range: bool = False
):
    """`quantize_kernel` for the levels of a format, traced or not, and its kind."""
    kernel_IxO = jnp.asarray(kernel).astype(jnp.float32)
    options = {"symmetric": symmetric, "full_range": full_range, "clip": clip}
    found = kernel_grid.find(kernel_IxO, levels, kind, group_size=group_size, **options)
    return kernel_grid.quantize(kernel_IxO, found, kind, symmetric and not full_range, group_size)[0]


def solve(
    kernel_IxO, levels: formats.Grid, kind: formats.Kind, scheme: Scheme, calibration: Calibration | None
) -> Rounded:
    """Codes of a kernel rounded to nearest, whatever its inputs."""
    del calibration
    group_size = scheme.group_size or None
    full_range = scheme.has_full_range(kind)
    options = {"symmetric": scheme.symmetric, "full_range": full_range, "clip": scheme.clip}
    found = kernel_grid.find(kernel_IxO, levels, kind, group_size=group_size, **options)
    _, level_IxO = kernel_grid.quantize(kernel_IxO, found, kind, scheme.symmetric and not full_range, group_size)
    rows = kernel_IxO.shape[0]
    zero_IxO = jnp.repeat(found.zero_GxO, kernel_grid.group_rows(rows, group_size, kind), axis=0)[:rows]
    return Rounded(level_IxO + zero_IxO, found.scale_GxO, found.zero_GxO)


METHOD = Method(
    "rtn",
    solve=solve,
    options=("group_size", "symmetric", "full_range", "clip", "rotate", "layers", "target_bits"),
    any_format=True,
)
