"""GPTQ (Frantar et al., arXiv 2210.17323) in JAX, by one factorization of the Hessian.

GPTQ takes the inputs one by one, rounds a row of the kernel, and moves the error into the rows still to come. With
H = R Rᵀ, R upper triangular (R⁻¹ is GPTQ's "Cholesky factor of the inverse"), row i is rounded from

    x_i = w_i + Σ_{j<i} R_ji / R_ii · (w_j - q_j)

which needs neither the inverse nor a running copy of the kernel: earlier errors are only read. There is one matrix
product per pair of blocks of rows, and within a block the loop goes row by row. Outputs do not interact. The loss is
½ tr(Eᵀ H E) = ½ Σ (R_ii (x_i - q_i))², E = w - q.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.numerics import formats
from precision_scaling.ptq import kernel_grid
from precision_scaling.ptq.kernel_grid import KernelGrid
from precision_scaling.ptq.scheme import Calibration, Method, Rounded, Scheme

HIGHEST = jax.lax.Precision.HIGHEST

MAX_DAMPING = 1.0  # where raising stops: what fails here is no sum of x xᵀ with rounding errors
MIN_DAMPING = 1e-6  # the first increase from zero


class Solution(NamedTuple):
    """What GPTQ did to one kernel (in I, out O), G groups of inputs."""

    dequantized: jax.Array  # (I, O)
    codes: jax.Array  # (I, O) level + zero, of type `kernel_grid.code_dtype`
    scales: jax.Array  # (G, O)
    zeros: jax.Array  # (G, O); 0 for symmetric grids
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
    """Factor of the damped Hessian, inputs by decreasing diagonal if `act_order`.

    `damping` is a fraction of the mean diagonal. While the factorization fails it is raised tenfold, at most to 1.
    The Hessian is first divided by its largest diagonal entry, so its scale is of no consequence. Computed in the
    Hessian's type, float32 at least.
    """
    n = hessian_IxI.shape[0]
    diagonal_I = jnp.diagonal(hessian_IxI)
    dead_I = diagonal_I == 0
    order_I = jnp.argsort(-diagonal_I, stable=True) if act_order else jnp.arange(n)
    h_IxI = hessian_IxI / jnp.max(jnp.abs(diagonal_I))
    usable = jnp.all(jnp.isfinite(h_IxI))
    mean = jnp.mean(jnp.diagonal(h_IxI))
    h_IxI = jnp.where(dead_I[:, None] | dead_I[None, :], 0, h_IxI)
    if act_order:
        h_IxI = h_IxI[order_I[:, None], order_I[None, :]]
    h_IxI = jnp.flip(h_IxI)  # the lower factor of the flipped matrix is the flipped upper one
    diagonal_I = jnp.diagonal(h_IxI)
    # A pivot that is nothing but the rounding error of its own diagonal entry is a failure too.
    noise = 10 * jnp.finfo(h_IxI.dtype).eps

    def attempt(state):
        _, fraction, *_ = state
        damped_I = jnp.where(diagonal_I == 0, 1, diagonal_I + fraction * mean)
        l_IxI = jax.lax.linalg.cholesky(_with_diagonal(h_IxI, damped_I), symmetrize_input=False)
        # A failed factorization is NaN all over, or from the bad pivot on.
        ok = jnp.all(jnp.square(jnp.diagonal(l_IxI)) > noise * damped_I)
        return fraction, jnp.maximum(10 * fraction, MIN_DAMPING), jnp.asarray(True), ok, l_IxI

    def failing(state):
        _, following, begun, ok, _ = state
        return usable & ~ok & (~begun | (following <= 1.01 * MAX_DAMPING))

    first = jnp.asarray(damping, h_IxI.dtype)
    start = first, first, jnp.asarray(False), jnp.asarray(False), jnp.zeros_like(h_IxI)
    fraction, _, _, ok, l_IxI = jax.lax.while_loop(failing, attempt, start)
    r_IxI = jnp.flip(l_IxI)
    r_I = jnp.where(ok, jnp.diagonal(r_IxI), 1)
    feedback_IxI = jnp.where(ok, jnp.triu(r_IxI / r_I[None, :], 1), 0)  # no feedback: rounding to nearest
    return Factor(feedback_IxI, r_I, order_I, dead_I & ok, jnp.where(ok, fraction, jnp.nan), ok)


def _with_diagonal(matrix_IxI, diagonal_I):
    return jnp.where(jnp.eye(len(diagonal_I), dtype=bool), diagonal_I, matrix_IxI)


def _round_block(feedback_SxS, w_SxO, x_SxO, row_grid, kind, symmetric):
    """Rows of a block one by one: x holds w plus the feedback of the blocks before. Returns errors and levels."""

    def row(i, state):
        e_SxO, level_SxO = state
        scale_O, inverse_O, zero_O, levels = row_grid(i)
        x_O = x_SxO[i] + jnp.matmul(feedback_SxS[:, i], e_SxO, precision=HIGHEST)
        level_O = kernel_grid.nearest_level(x_O, inverse_O, zero_O, levels, kind, symmetric)
        return e_SxO.at[i].set(w_SxO[i] - level_O * scale_O), level_SxO.at[i].set(level_O)

    return jax.lax.fori_loop(0, w_SxO.shape[0], row, (jnp.zeros_like(w_SxO), jnp.zeros_like(w_SxO)))


def _round_rows(feedback_IxI, w_IxO, group_I, grid: KernelGrid, kind, symmetric: bool, block: int):
    """Levels (I, O) of all rows; group_I: the row of the grid that serves a row of the kernel."""
    rows, outputs = w_IxO.shape
    pad = -rows % block
    w_IxO = jnp.pad(w_IxO, ((0, pad), (0, 0)))
    feedback_IxI = jnp.pad(feedback_IxI, ((0, pad), (0, pad)))
    group_I = jnp.pad(group_I, (0, pad))
    inverse_GxO = kernel_grid.inverse(grid.scale_GxO)
    level_dtype = kernel_grid.code_dtype(kind, symmetric)

    def feedback(i, j):
        return jax.lax.dynamic_slice(feedback_IxI, (i * block, j * block), (block, block))

    def step(e_IxO, b):
        w_SxO = jax.lax.dynamic_slice(w_IxO, (b * block, 0), (block, outputs))

        def add(a, x_SxO):
            e_SxO = jax.lax.dynamic_slice(e_IxO, (a * block, 0), (block, outputs))
            return x_SxO + jnp.matmul(feedback(a, b).T, e_SxO, precision=HIGHEST)

        def row_grid(i):
            g = group_I[b * block + i]
            return grid.scale_GxO[g], inverse_GxO[g], grid.zero_GxO[g], grid.levels

        x_SxO = jax.lax.fori_loop(0, b, add, w_SxO)
        e_SxO, level_SxO = _round_block(feedback(b, b), w_SxO, x_SxO, row_grid, kind, symmetric)
        return jax.lax.dynamic_update_slice(e_IxO, e_SxO, (b * block, 0)), level_SxO.astype(level_dtype)

    start = jnp.zeros((rows + pad, outputs), w_IxO.dtype)
    _, level_NxSxO = jax.lax.scan(step, start, jnp.arange((rows + pad) // block))
    return level_NxSxO.reshape(rows + pad, outputs)[:rows]


def solve(
    kernel,
    hessian,
    bits,
    kind: formats.Kind = kernel_grid.INTEGER,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float | jax.Array = 0.01,
    clip: bool = False,
    full_range: bool = False,
    block: int = 128,
) -> Solution:
    """GPTQ of a kernel (in, out) in one format, with the Hessian Σ x xᵀ (in, in) of its inputs.

    bits: a bit-width, traced or not, or the grid of another format, with its `kind`.

    Pure and compiled: `vmap` it over a leading axis of layers. Kernels that share an input can be joined along `out`.
    Nothing can be raised while tracing, so a Hessian that can't be used (NaN, zero, not positive semidefinite) gives
    rounding to nearest with `fell_back` set: report it. Inputs whose diagonal is zero get weight 0. Groups are of
    inputs adjacent in the kernel, in whatever order they are taken. Grids come from the kernel alone, unless `clip`
    shrinks them to the least rounding error Σ R_ii² (w_i - q_i)²: GPTQ's own loss before any feedback. full_range: see
    `kernel_grid.find`; codes are then from 0, and zeros 2^(b-1). `block` changes speed only.
    Raises FormatError and UserError for formats and groups that don't exist.
    """
    levels = bits if isinstance(bits, formats.Grid) else kernel_grid.integer_levels(bits)
    return _solve(kernel, hessian, levels, kind, group_size, symmetric, act_order, damping, clip, full_range, block)


@functools.partial(
    jax.jit, static_argnames=("kind", "group_size", "symmetric", "act_order", "clip", "full_range", "block")
)
def _solve(
    kernel, hessian, levels, kind, group_size, symmetric, act_order, damping, clip, full_range, block
) -> Solution:
    kernel_IxO = jnp.asarray(kernel).astype(jnp.float32)
    hessian_IxI = jnp.asarray(hessian)
    hessian_IxI = hessian_IxI.astype(jnp.promote_types(hessian_IxI.dtype, jnp.float32))
    rows = kernel_IxO.shape[0]
    size = kernel_grid.group_rows(rows, group_size, kind)
    factor = factorize(hessian_IxI, act_order=act_order, damping=damping)
    measure = _weighted_error(factor, size) if clip else False
    options = {"symmetric": symmetric, "full_range": full_range, "clip": measure}
    grid = kernel_grid.find(kernel_IxO, levels, kind, group_size=group_size, **options)
    symmetric = symmetric and not full_range
    w_IxO = jnp.where(factor.dead_I[:, None], 0, kernel_IxO)[factor.order_I]
    feedback_IxI = factor.feedback_IxI.astype(jnp.float32)
    level_IxO = _round_rows(feedback_IxI, w_IxO, factor.order_I // size, grid, kind, symmetric, min(block, rows))
    if act_order:
        level_IxO = level_IxO[jnp.argsort(factor.order_I)]
    level_GxSxO = kernel_grid.grouped(level_IxO, size)
    value_IxO = kernel_grid.ungrouped(level_GxSxO * grid.scale_GxO[:, None], rows)
    code_GxSxO = level_GxSxO + grid.zero_GxO[:, None].astype(level_GxSxO.dtype)
    return Solution(
        dequantized=jnp.where(levels.passthrough > 0, kernel_IxO, value_IxO),
        codes=kernel_grid.ungrouped(code_GxSxO, rows),
        scales=grid.scale_GxO,
        zeros=grid.zero_GxO,
        damping_used=factor.damping,
        fell_back=~factor.ok,
    )


def _weighted_error(factor: Factor, size: int):
    """Of rounding errors (G, S, O): their squares weighed by what GPTQ pays for a row, R_ii², summed over S."""
    weight_I = jnp.square(factor.diagonal_I)[jnp.argsort(factor.order_I)]
    weight_GxSx1 = kernel_grid.grouped(weight_I, size)[..., None].astype(jnp.float32)
    return lambda e_GxSxO: jnp.sum(weight_GxSx1 * jnp.square(e_GxSxO), axis=1)


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
    full_range: bool = False,
):
    """GPTQ of one kernel (in, out) in one format: the dequantized kernel (in, out) in float32.

    hessian: (in, in), Σ x xᵀ over calibration inputs x, at any scale.
    bits: a bit-width (2 to 15 are integers, 16 and above pass through) or a format ('e2m1', 'nvfp4').

    Raises UserError where the answer would not be GPTQ's: shapes that don't match, NaN or infinite entries, a Hessian
    that is zero, not symmetric or not positive semidefinite. Warns where it needed more damping than it was given.
    """
    levels, kind = kernel_grid.levels_of(bits)
    kernel, hessian = np.asarray(kernel), np.asarray(hessian)
    check(kernel, hessian, damping)
    solution = solve(
        kernel,
        hessian,
        levels,
        kind,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        damping=damping,
        clip=clip,
        full_range=full_range,
    )
    if solution.fell_back:
        raise UserError(f"hessian is not positive semidefinite, even damped by {MAX_DAMPING:g} of its mean diagonal")
    if solution.damping_used > 1.01 * damping:
        message = f"gptq: damping raised from {damping:g} to {solution.damping_used:g}, the Hessian did not factorize"
        warnings.warn(message, stacklevel=2)
    return solution.dequantized


def check(kernel, hessian, damping) -> None:
    """Raises UserError, one line, for a kernel or Hessian (NumPy arrays) that GPTQ can't use."""
    if kernel.ndim != 2 or 0 in kernel.shape:
        raise UserError(f"kernel has shape {kernel.shape}: allowed is (in, out) with neither of them 0")
    if hessian.shape != (kernel.shape[0],) * 2:
        square = (kernel.shape[0],) * 2
        raise UserError(f"hessian has shape {hessian.shape}: allowed is {square} for a kernel {kernel.shape}")
    if isinstance(damping, bool) or not isinstance(damping, int | float | np.floating) or not 0 <= damping < np.inf:
        raise UserError(f"damping = {damping!r}: allowed is a fraction of the mean diagonal, 0 or more")
    kernel, hessian = kernel.astype(np.float64), hessian.astype(np.float64)
    for name, array in (("kernel", kernel), ("hessian", hessian)):
        if not np.all(np.isfinite(array)):
            raise UserError(f"{name} has {np.sum(~np.isfinite(array))} NaN or infinite entries of {array.size}")
    diagonal = np.diagonal(hessian)
    if np.any(diagonal < 0):
        raise UserError(f"hessian has the diagonal entry {np.min(diagonal):g}: allowed is a sum of x xᵀ")
    if not np.any(diagonal):
        raise UserError("hessian has a zero diagonal: no calibration input reached this kernel")
    if np.max(np.abs(hessian - hessian.T)) > 1e-3 * np.max(diagonal):
        raise UserError("hessian is not symmetric: allowed is a sum of x xᵀ")


def _solve_projection(
    kernel_IxO, levels: formats.Grid, kind: formats.Kind, scheme: Scheme, calibration: Calibration
) -> Rounded:
    if calibration.cross_IxI is not None:
        statistics = calibration.hessian_IxI, calibration.cross_IxI, calibration.damping
        kernel_IxO = corrected(kernel_IxO, *statistics, scheme.correct_inputs)
    found = solve(
        kernel_IxO,
        calibration.hessian_IxI,
        levels,
        kind,
        group_size=scheme.group_size or None,
        symmetric=scheme.symmetric,
        act_order=scheme.act_order,
        damping=calibration.damping,
        clip=scheme.clip,
        full_range=scheme.has_full_range(kind),
    )
    return Rounded(found.codes, found.scales, found.zeros, None, found.fell_back, found.damping_used)


def corrected(kernel_IxO, hessian_IxI, cross_IxI, damping, share):
    """The kernel W (I, O) moved toward the least squares of what it should give, W + share · H⁻¹ C W.

    Its inputs x are off by what was quantized before it, but its outputs are to be those of the inputs x₀ that there
    were: ‖X Q - X₀ W‖² is least at Q = H⁻¹ Σ x x₀ᵀ W, with C = Σ x (x₀ - x)ᵀ, and to round from there by GPTQ loses
    what GPTQ always does. That is the objective of GPTAQ (Li et al., arXiv 2504.02692), which corrects row by row as it
    rounds. share: 1 is all; less fits the calibration text less. damping: of the Hessian, as for `solve`.
    """
    diagonal_I = jnp.diagonal(hessian_IxI)
    damped_I = jnp.where(diagonal_I == 0, 1, diagonal_I + damping * jnp.mean(diagonal_I))
    change_IxO = jnp.matmul(cross_IxI, kernel_IxO, precision=HIGHEST)
    factor = jax.scipy.linalg.cho_factor(_with_diagonal(hessian_IxI, damped_I))
    found_IxO = kernel_IxO + share * jax.scipy.linalg.cho_solve(factor, change_IxO)
    # What does not factorize is rounded to nearest, and reported, by `solve`.
    return jnp.where(jnp.all(jnp.isfinite(found_IxO)), found_IxO, kernel_IxO)


METHOD = Method(
    "gptq",
    solve=_solve_projection,
    options=(
        "group_size",
        "symmetric",
        "full_range",
        "act_order",
        "clip",
        "rotate",
        "correct_inputs",
        "layers",
        "target_bits",
    ),
    calibrated=True,
    any_format=True,
)
