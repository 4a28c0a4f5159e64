"""Round to nearest: the post-training quantization that looks at the kernel alone, and the yardstick for the others."""

import functools

import jax
import jax.numpy as jnp

from precision_scaling.numerics import formats
from precision_scaling.ptq import kernel_grid


def quantize_kernel(kernel, bits, group_size: int | None = None, symmetric: bool = True, clip: bool = False):
    """The kernel (in, out) rounded to the nearest level of its grid: the dequantized kernel (in, out) in float32.

    bits: a bit-width (2 to 15 are integers, 16 and above pass through), traced or not, or a format ('e2m1', 'nvfp4').
    Raises FormatError for an unknown format and UserError for a group size, asymmetry or clip that it can't have.
    """
    if isinstance(bits, str | formats.Format):
        levels, kind = kernel_grid.stack([bits])
        levels = jax.tree.map(lambda field: field[0], levels)
    else:
        levels, kind = kernel_grid.integer_levels(bits), kernel_grid.INTEGER
    return _quantize(kernel, levels, kind, group_size, symmetric, clip)


@functools.partial(jax.jit, static_argnames=("kind", "group_size", "symmetric", "clip"))
def _quantize(kernel, levels, kind, group_size, symmetric, clip):
    kernel_IxO = jnp.asarray(kernel).astype(jnp.float32)
    found = kernel_grid.find(kernel_IxO, levels, kind, group_size=group_size, symmetric=symmetric, clip=clip)
    return kernel_grid.quantize(kernel_IxO, found, kind, symmetric)[0]
