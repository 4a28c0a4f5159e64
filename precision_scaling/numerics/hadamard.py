"""Random Hadamard rotations: spread outliers along a contraction before it is quantized, as QuEST and Quartet do.

Both operands of a product are rotated along the contracted axis with the same signs; the product stays as it was.
"""

import functools

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
    axis %= x.ndim
    return _hadamard(x * _fitting(signs, x, axis), axis, _block(x.shape[axis], block))


def unrotate(x: jax.Array, signs: jax.Array, axis: int = -1, block: int | None = None) -> jax.Array:
    """S H x along `axis`: the inverse of `rotate`, with the same arguments."""
    axis %= x.ndim
    return _hadamard(x, axis, _block(x.shape[axis], block)) * _fitting(signs, x, axis)


def _fitting(signs: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    if signs.shape != (x.shape[axis],):
        raise ValueError(f"Hadamard rotation: signs of shape {signs.shape}; allowed is one for each of {x.shape[axis]}")
    return jax.lax.broadcast_in_dim(signs.astype(x.dtype), x.shape, (axis,))


def _block(width: int, block: int | None) -> int:
    largest = block_width(width)
    block = largest if block is None else block
    if block < 2 or block & (block - 1) or largest % block:
        raise ValueError(f"Hadamard block {block} for width {width}: allowed are powers of two from 2 to {largest}")
    return block


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _hadamard(x: jax.Array, axis: int, block: int) -> jax.Array:
    """H x along an axis. H is symmetric: a gradient goes through the same, in its own dtype."""
    shape, dtype, factor = x.shape, x.dtype, min(_FACTOR, block)
    # Of bfloat16 values products with ones are exact and their sums float32's, in one pass over a TPU's matrix unit
    # where float32 takes six, and on the one of a GPU, which has none for float32.
    ones = np.sign(matrix(factor))
    x = _along(axis, x if dtype == jnp.bfloat16 else x.astype(jnp.float32), ones, 1) * factor**-0.5
    done = factor
    while done < block:
        factor = min(_FACTOR, block // done)
        x = _along(axis, x.reshape(shape), matrix(factor), done)
        done *= factor
    return x.reshape(shape).astype(dtype)


def _along(axis: int, x: jax.Array, matrix: np.ndarray, stride: int) -> jax.Array:
    """float32: groups of positions along the axis, `stride` apart, times a matrix. In place: moving the axis to the end
    and back takes a CPU twice as long as the product."""
    inner = (stride,) if stride > 1 else ()
    x = x.reshape(*x.shape[:axis], -1, len(matrix), *inner, *x.shape[axis + 1 :])
    after = [*range(2, x.ndim - axis)]
    return jnp.einsum(
        *(x, [..., 0, *after], jnp.asarray(matrix, x.dtype), [0, 1], [..., 1, *after]),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


_hadamard.defvjp(
    lambda x, axis, block: (_hadamard(x, axis, block), None), lambda axis, block, _, g: (_hadamard(g, axis, block),)
)


def matrix(width: int) -> np.ndarray:
    """Sylvester's Hadamard matrix over sqrt(width), in float64: symmetric, orthonormal, its own inverse."""
    found = np.ones((1, 1))
    while len(found) < width:
        found = np.block([[found, found], [found, -found]])
    return found / np.sqrt(width)
