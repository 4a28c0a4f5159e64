"""Round to nearest: the post-training quantization that looks at the kernel alone, and the yardstick for the others."""

import jax.numpy as jnp

from precision_scaling.ptq import grid


def quantize_kernel(kernel, bits, group_size: int | None = None, symmetric: bool = True, clip: bool = False):
    """The kernel (in, out) rounded to the nearest level of its grid at `bits` (scalar, 2 to 8, traced or not).

    Returns the dequantized kernel (in, out) in at least float32. Raises ValueError for a bad bit-width or group size.
    """
    grid.check_bits(bits)
    kernel_IxO = jnp.asarray(kernel)
    kernel_IxO = kernel_IxO.astype(jnp.promote_types(kernel_IxO.dtype, jnp.float32))
    found = grid.find(kernel_IxO, bits, group_size=group_size, symmetric=symmetric, clip=clip)
    return grid.quantize(kernel_IxO, found)[0]
