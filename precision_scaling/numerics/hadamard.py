"""Random Hadamard rotations: spread outliers along a contraction before it is quantized, as QuEST and Quartet do.

Both operands of a product are rotated along the contracted axis with the same signs; the product stays as it was.
"""

import jax
import jax.numpy as jnp
import numpy as np

_FACTOR = 64  # largest Hadamard matrix multiplied at once; wider ones are its Kronecker products


def random_signs(key: jax.Array, width: int) -> jax.Array:
    """`width` independent float32 signs, +1 or -1: what makes a Hadamard rotation random."""
    return jax.random.rademacher(key, (width,), jnp.float32)


def block_width(width: int) -> int:
    """Width of the diagonal blocks of the rotation of `width`: the largest power of two that divides it.

    Raises ValueError for odd widths, which no Hadamard matrix mixes.
    """
    if width < 2 or width % 2:
        raise ValueError(f"Hadamard rotation of width {width}: allowed are even widths, best a power of two")
    return width & -width


def rotate(x: jax.Array, signs: jax.Array, axis: int = -1, block: int | None = None) -> jax.Array:
    """H S x along `axis`: signs S, then the orthonormal Hadamard matrix H in diagonal blocks; x's dtype, from float32.

    signs: from `random_signs`, one for each position of the axis.
    block: width of the diagonal blocks, a power of two that divides the axis; None is the largest (`block_width`).
    Raises ValueError for a block or signs that do not fit.
    """
    x_f32 = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
    return _restore(_hadamard(x_f32 * _fitting(signs, x_f32), block), x, axis)


def unrotate(x: jax.Array, signs: jax.Array, axis: int = -1, block: int | None = None) -> jax.Array:
    """S H x along `axis`: the inverse of `rotate`, with the same arguments."""
    x_f32 = jnp.moveaxis(x, axis, -1).astype(jnp.float32)
    return _restore(_hadamard(x_f32, block) * _fitting(signs, x_f32), x, axis)


def _fitting(signs: jax.Array, x: jax.Array) -> jax.Array:
    if signs.shape != x.shape[-1:]:
        raise ValueError(f"Hadamard rotation: signs of shape {signs.shape}; allowed is one for each of {x.shape[-1]}")
    return jnp.broadcast_to(signs, x.shape)


def _restore(x_f32: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    return jnp.moveaxis(x_f32, -1, axis).astype(like.dtype)


def _hadamard(x: jax.Array, block: int | None) -> jax.Array:
    width = x.shape[-1]
    largest = block_width(width)
    block = largest if block is None else block
    if block < 2 or block & (block - 1) or largest % block:
        raise ValueError(f"Hadamard block {block} for width {width}: allowed are powers of two from 2 to {largest}")
    shape = x.shape
    done = 1
    while done < block:
        factor = min(_FACTOR, block // done)
        x = x.reshape(*shape[:-1], width // (factor * done), factor, done)
        x = jnp.einsum("...id,ij->...jd", x, matrix(factor).astype(np.float32), precision=jax.lax.Precision.HIGHEST)
        done *= factor
    return x.reshape(shape)


def matrix(width: int) -> np.ndarray:
    """Sylvester's Hadamard matrix over sqrt(width), in float64: symmetric, orthonormal, its own inverse."""
    found = np.ones((1, 1))
    while len(found) < width:
        found = np.block([[found, found], [found, -found]])
    return found / np.sqrt(width)
