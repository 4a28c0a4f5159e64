"""GPTQ (Frantar et al., arXiv 2210.17323) in JAX: one factorization of the Hessian serves every bit-width of a kernel.

GPTQ takes the inputs one by one, rounds a row of the kernel, and moves the error into the rows still to come. With
H = R Rᵀ, R upper triangular (R⁻¹ is GPTQ's "Cholesky factor of the inverse"), row i is rounded from

    x_i = w_i + Σ_{j<i} R_ji / R_ii · (w_j - q_j)

which needs neither the inverse nor a running copy of the kernel: earlier errors are only read. There is one matrix
product per pair of blocks of rows, and within a block the loop goes row by row. Outputs do not interact, so several
bit-widths are just more output columns. The loss is ½ tr(Eᵀ H E) = ½ Σ (R_ii (x_i - q_i))², E = w - q.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.ptq import grid

MAX_DAMPING = 1.0  # where raising stops: what fails here is no sum of x xᵀ with rounding errors
MIN_DAMPING = 1e-6  # the first increase from zero


class Solution(NamedTuple):
    """What GPTQ did to one kernel (in I, out O) at B bit-widths, G groups of inputs."""

    dequantized: jax.Array  # (B, I, O)
    codes: jax.Array  # (B, I, O) int16
    scales: jax.Array  # (B, G, O)
    zeros: jax.Array  # (B, G, O)
    damping_used: jax.Array  # scalar, fraction of the mean diagonal; above the one asked for if that did not factorize
    fell_back: jax.Array  # scalar bool: no damping factorized the Hessian, so this is rounding to nearest


class Factor(NamedTuple):
    """R of H = R Rᵀ in the order `order`: columns divided by the diagonal, strictly upper, and the diagonal."""

    feedback_IxI: jax.Array
    diagonal_I: jax.Array
    order_I: jax.Array
    dead_I: jax.Array  # inputs that were zero in all of the calibration data
    damping: jax.Array
    ok: jax.Array


def factorize(hessian_IxI, *, act_order: bool = False, damping: float = 0.01) -> Factor:
    """Factor of the damped Hessian, inputs by falling diagonal if `act_order`.

    `damping` is a fraction of the mean diagonal. While the factorization fails it is raised tenfold, at most to 1.
    The Hessian is first divided by its largest diagonal entry, so its scale is of no consequence.
    """
    n = hessian_IxI.shape[0]
    diagonal_I = jnp.diagonal(hessian_IxI)
    dead_I = diagonal_I == 0
    order_I = jnp.argsort(-diagonal_I, stable=True) if act_order else jnp.arange(n)
    h_IxI = hessian_IxI / jnp.max(diagonal_I)
    mean = jnp.mean(jnp.diagonal(h_IxI))
    h_IxI = jnp.where(dead_I[:, None] | dead_I[None, :], 0, h_IxI) + jnp.diag(dead_I.astype(h_IxI.dtype))
    h_IxI = h_IxI[order_I][:, order_I]
    usable = jnp.all(jnp.isfinite(h_IxI))
    # A pivot that is nothing but the rounding error of its own diagonal entry is a failure too.
    noise = 10 * jnp.finfo(h_IxI.dtype).eps

    def attempt(state):
        tried, _, _ = state
        fraction = jnp.where(tried < 0, damping, jnp.maximum(10 * tried, MIN_DAMPING))
        damped_IxI = h_IxI + fraction * mean * jnp.eye(n, dtype=h_IxI.dtype)
        r_IxI = jnp.flip(jnp.linalg.cholesky(jnp.flip(damped_IxI)))
        ok = jnp.all(jnp.isfinite(r_IxI)) & jnp.all(jnp.square(jnp.diagonal(r_IxI)) > noise * jnp.diagonal(damped_IxI))
        return fraction, ok, r_IxI

    def failing(state):
        tried, ok, _ = state
        return usable & ~ok & (10 * tried <= MAX_DAMPING)

    start = jnp.asarray(-1.0, h_IxI.dtype), jnp.asarray(False), jnp.eye(n, dtype=h_IxI.dtype)
    fraction, ok, r_IxI = jax.lax.while_loop(failing, attempt, start)
    r_IxI = jnp.where(ok, r_IxI, jnp.eye(n, dtype=h_IxI.dtype))  # no feedback: rounding to nearest
    r_I = jnp.diagonal(r_IxI)
    return Factor(jnp.triu(r_IxI / r_I, 1), r_I, order_I, dead_I & ok, jnp.where(ok, fraction, jnp.nan), ok)


def _round_block(feedback_SxS, w_SxC, x_SxC, row_grid):
    """Rows of a block one by one: x holds w plus the feedback of the blocks before. Returns errors and codes."""

    def row(i, state):
        e_SxC, code_SxC = state
        scale_C, zero_C, low_C, high_C = row_grid(i)
        code_C = grid.encode(x_SxC[i] + feedback_SxS[:, i] @ e_SxC, scale_C, zero_C, low_C, high_C)
        e_C = w_SxC[i] - grid.decode(code_C, scale_C, zero_C)
        return e_SxC.at[i].set(e_C), code_SxC.at[i].set(code_C)

    return jax.lax.fori_loop(0, w_SxC.shape[0], row, (jnp.zeros_like(w_SxC), jnp.zeros_like(w_SxC)))


def _round_rows(feedback_IxI, w_IxC, group_I, columns: grid.Grid, block: int):
    """Codes (I, C) of all rows; the rows of one group share a row of the grid (G, C)."""
    rows, cols = w_IxC.shape
    pad = -rows % block
    w_IxC = jnp.pad(w_IxC, ((0, pad), (0, 0)))
    feedback_IxI = jnp.pad(feedback_IxI, ((0, pad), (0, pad)))
    group_I = jnp.pad(group_I, (0, pad))

    def feedback(i, j):
        return jax.lax.dynamic_slice(feedback_IxI, (i * block, j * block), (block, block))

    def step(e_IxC, b):
        w_SxC = jax.lax.dynamic_slice(w_IxC, (b * block, 0), (block, cols))

        def add(a, x_SxC):
            return x_SxC + feedback(a, b).T @ jax.lax.dynamic_slice(e_IxC, (a * block, 0), (block, cols))

        def row_grid(i):
            g = group_I[b * block + i]
            return columns.scale_GxO[g], columns.zero_GxO[g], columns.low, columns.high

        x_SxC = jax.lax.fori_loop(0, b, add, w_SxC)
        e_SxC, code_SxC = _round_block(feedback(b, b), w_SxC, x_SxC, row_grid)
        return jax.lax.dynamic_update_slice(e_IxC, e_SxC, (b * block, 0)), code_SxC

    _, code_NxSxC = jax.lax.scan(step, jnp.zeros_like(w_IxC), jnp.arange((rows + pad) // block))
    return code_NxSxC.reshape(rows + pad, cols)[:rows]


@functools.partial(jax.jit, static_argnames=("group_size", "symmetric", "act_order", "clip", "block"))
def solve(
    kernel,
    hessian,
    bits,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
    clip: bool = False,
    block: int = 128,
) -> Solution:
    """GPTQ of a kernel (in, out) at all of `bits` (B,) with the Hessian Σ x xᵀ (in, in) of its inputs.

    Pure and jitted: `vmap` it over a leading axis of layers. Nothing can be raised while tracing, so a Hessian that
    can't be used (NaN, zero, indefinite beyond MAX_DAMPING) gives rounding to nearest with `fell_back` set: report it.
    Inputs with a zero diagonal get weight 0. Grids come from the kernel alone, groups are of inputs adjacent in it
    whatever the order they are taken in. `block` is a matter of speed and changes no code.
    """
    kernel_IxO = jnp.asarray(kernel)
    dtype = jnp.promote_types(kernel_IxO.dtype, jnp.float32)
    kernel_IxO = kernel_IxO.astype(dtype)
    rows, cols = kernel_IxO.shape
    count = bits.shape[0]
    find = functools.partial(grid.find, group_size=group_size, symmetric=symmetric, clip=clip)
    grids = jax.vmap(lambda b: find(kernel_IxO, b))(bits)  # fields (B, G, O), (B,)
    factor = factorize(jnp.asarray(hessian).astype(dtype), act_order=act_order, damping=damping)

    def flat(field_BxGxO):
        return jnp.moveaxis(field_BxGxO, 0, 1).reshape(field_BxGxO.shape[1], count * cols)

    columns = grid.Grid(
        flat(grids.scale_GxO), flat(grids.zero_GxO), jnp.repeat(grids.low, cols), jnp.repeat(grids.high, cols)
    )
    w_IxO = jnp.where(factor.dead_I[:, None], 0, kernel_IxO)[factor.order_I]
    group_I = factor.order_I // (group_size or rows)
    code_IxC = _round_rows(factor.feedback_IxI, jnp.tile(w_IxO, (1, count)), group_I, columns, min(block, rows))
    code_IxC = jnp.zeros_like(code_IxC).at[factor.order_I].set(code_IxC, unique_indices=True)
    code_BxIxO = jnp.moveaxis(code_IxC.reshape(rows, count, cols), 1, 0)
    code_BxGxSxO = code_BxIxO.reshape(count, grids.scale_GxO.shape[1], -1, cols)
    value_BxGxSxO = grid.decode(code_BxGxSxO, grids.scale_GxO[:, :, None], grids.zero_GxO[:, :, None])
    return Solution(
        dequantized=value_BxGxSxO.reshape(count, rows, cols),
        codes=code_BxIxO.astype(jnp.int16),
        scales=grids.scale_GxO,
        zeros=grids.zero_GxO,
        damping_used=factor.damping,
        fell_back=~factor.ok,
    )


def quantize_kernel(
    kernel,
    hessian,
    bits,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
    *,
    clip: bool = False,
):
    """GPTQ of one kernel (in, out) at one bit-width (2 to 8): the dequantized kernel (in, out), at least float32.

    `hessian` (in, in) is Σ x xᵀ over calibration inputs x, at any scale. Raises ValueError where the answer would not
    be GPTQ's: shapes that don't match, NaN or infinite entries, a Hessian that is zero, not symmetric or not positive
    semidefinite. Warns where the Hessian needed more damping than it was given.
    """
    grid.check_bits(bits)
    kernel, hessian = np.asarray(kernel), np.asarray(hessian)
    check(kernel, hessian, damping)
    solution = solve(
        kernel,
        hessian,
        jnp.atleast_1d(jnp.asarray(bits)),
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=damping,
        clip=clip,
    )
    if solution.fell_back:
        raise ValueError(f"hessian: not positive semidefinite, even damped by {MAX_DAMPING:g} of its mean diagonal")
    if solution.damping_used > 1.01 * damping:
        message = f"gptq: damping raised from {damping:g} to {solution.damping_used:g}, the Hessian did not factorize"
        warnings.warn(message, stacklevel=2)
    return solution.dequantized[0]


def check(kernel, hessian, damping) -> None:
    """Raises ValueError, one line, for a kernel or Hessian (NumPy arrays) that GPTQ can't use."""
    if kernel.ndim != 2 or 0 in kernel.shape:
        raise ValueError(f"kernel: shape {kernel.shape}, must be (in, out) with neither of them 0")
    if hessian.shape != (kernel.shape[0],) * 2:
        square = (kernel.shape[0],) * 2
        raise ValueError(f"hessian: shape {hessian.shape}, must be {square} for a kernel {kernel.shape}")
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping={damping}: must be a fraction of the mean diagonal, 0 or more")
    kernel, hessian = kernel.astype(np.float64), hessian.astype(np.float64)
    for name, array in (("kernel", kernel), ("hessian", hessian)):
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{name}: {np.sum(~np.isfinite(array))} of {array.size} entries are NaN or infinite")
    diagonal = np.diagonal(hessian)
    if np.any(diagonal < 0):
        raise ValueError(f"hessian: negative diagonal entry {np.min(diagonal):g}, must be a sum of x xᵀ")
    if not np.any(diagonal):
        raise ValueError("hessian: zero diagonal, no calibration input reached this kernel")
    if np.max(np.abs(hessian - hessian.T)) > 1e-3 * np.max(diagonal):
        raise ValueError("hessian: not symmetric, must be a sum of x xᵀ")
