"""AWQ (Lin et al., arXiv 2306.00978): scale the inputs that matter most up before rounding, and back down after.

Inputs with large activations get finer steps: the kernels that share an input are rounded as Q(s·W) / s, where s is the
mean magnitude of each input to a power that is searched for. A model folds 1/s into whatever makes the input.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.numerics import formats
from precision_scaling.ptq import kernel_grid
from precision_scaling.ptq.error import output_error

EXPONENTS = tuple(i / 20 for i in range(20))  # 0 is rounding to nearest
SMALLEST_MAGNITUDE = 1e-4  # of the largest input's: one that is hardly ever on must not get a scale of zero


class Solution(NamedTuple):
    """What AWQ did to kernels (in I, out O) of one input in B formats; G groups. Tuples have an entry per kernel."""

    dequantized: tuple[jax.Array, ...]  # (B, I, O), 1/s included: takes the kernel's place in the unchanged model
    codes: tuple[jax.Array, ...]  # (B, I, O), of s·W, as GPTQ's
    scales: tuple[jax.Array, ...]  # (B, G, O)
    zeros: tuple[jax.Array, ...]  # (B, G, O)
    channel_scales: jax.Array  # (B, I), s
    exponent: jax.Array  # (B,)
    error: jax.Array  # (B,), the objective
    rtn_error: jax.Array  # (B,), the objective of rounding to nearest: never below `error`
    fell_back: jax.Array  # scalar bool: statistics were NaN or zero, so this is rounding to nearest


def channel_scales(mean_magnitude_I, exponent):
    """s (I,): mean magnitudes to a power, with √(max · min) = 1, so that the kernel's range stays about where it is."""
    s_I = jnp.maximum(mean_magnitude_I / jnp.max(mean_magnitude_I), SMALLEST_MAGNITUDE) ** exponent
    return s_I / jnp.sqrt(jnp.max(s_I) * jnp.min(s_I))


def solve(
    kernels: Sequence[jax.Array],
    hessian,
    mean_magnitude,
    bits,
    kind: formats.Kind = kernel_grid.INTEGER,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    clip: bool = True,
    objective: Callable[[tuple[jax.Array, ...]], jax.Array] | None = None,
) -> Solution:
    """AWQ of the kernels (in, out) that share an input, in several formats.

    hessian: (in, in), Σ x xᵀ over calibration inputs x. mean_magnitude: (in,), mean |x|.
    bits, kind: as for `gptq.solve`.
    clip: then shrinks each range where that lowers the output error that its own group of inputs makes, and keeps the
        result if it lowers the objective, too.
    objective: kernels in, error out (traced): the paper's is the squared error of the output of the module that holds
        the kernels (the whole attention, the whole MLP). None is that of the kernels' own outputs, Σ ‖X (W - Q)‖².

    Pure and compiled (again for each objective): `vmap` it over a leading axis of layers. Statistics that can't be used
    give rounding to nearest with `fell_back` set: report it. Raises FormatError and UserError for formats, groups and
    clips that don't exist.
    """
    levels = bits if isinstance(bits, formats.Grid) else kernel_grid.integer_levels(bits)
    return _solve(tuple(kernels), hessian, mean_magnitude, levels, kind, group_size, symmetric, clip, objective)


@functools.partial(jax.jit, static_argnames=("kind", "group_size", "symmetric", "clip", "objective"))
def _solve(kernels, hessian, mean_magnitude, levels, kind, group_size, symmetric, clip, objective) -> Solution:
    kernels = tuple(jnp.asarray(kernel).astype(jnp.float32) for kernel in kernels)
    hessian_IxI, mean_I = jnp.asarray(hessian).astype(jnp.float32), jnp.asarray(mean_magnitude).astype(jnp.float32)
    size = kernel_grid.group_rows(kernels[0].shape[0], group_size, kind)
    find = functools.partial(kernel_grid.find, kind=kind, group_size=group_size, symmetric=symmetric)
    usable = jnp.all(jnp.isfinite(mean_I)) & (jnp.max(mean_I) > 0) & jnp.all(jnp.isfinite(hessian_IxI))
    mean_I = jnp.where(usable, mean_I, 1)
    hessian_IxI = jnp.where(usable, hessian_IxI, 0)
    if objective is None:

        def objective(quantized):
            return sum(output_error(w, q, hessian_IxI) for w, q in zip(kernels, quantized, strict=True))

    own_GxSxS = _diagonal_blocks(hessian_IxI, size)

    def round_scaled(one, s_I, clip):
        """Per kernel: the dequantized kernel with 1/s included, levels and grid of s·W."""
        s_Ix1, inverse_Ix1 = s_I[:, None], (1 / s_I)[:, None]
        scaled = [s_Ix1 * kernel for kernel in kernels]
        grids = [find(w_IxO, one, clip=clip) for w_IxO in scaled]
        rounded = [
            kernel_grid.quantize(w_IxO, found, kind, symmetric) for w_IxO, found in zip(scaled, grids, strict=True)
        ]
        return tuple(value * inverse_Ix1 for value, _ in rounded), tuple(level for _, level in rounded), tuple(grids)

    def search(one):
        def attempt(best, exponent):
            best_error, best_exponent = best
            error = objective(round_scaled(one, channel_scales(mean_I, exponent), False)[0])
            better = error < best_error
            return (jnp.where(better, error, best_error), jnp.where(better, exponent, best_exponent)), error

        (error, exponent), errors = jax.lax.scan(attempt, (jnp.inf, 0.0), jnp.asarray(EXPONENTS))
        s_I = channel_scales(mean_I, exponent)
        chosen = round_scaled(one, s_I, False)
        if clip:
            inverse_Sx1 = (1 / s_I).reshape(-1, size)[:, :, None]
            clipped = round_scaled(one, s_I, lambda e_GxSxO: _group_error(e_GxSxO * inverse_Sx1, own_GxSxS))
            clipped_error = objective(clipped[0])
            better = clipped_error < error
            chosen = jax.tree.map(lambda a, b: jnp.where(better, a, b), clipped, chosen)
            error = jnp.where(better, clipped_error, error)
        return chosen, s_I, exponent, error, errors[0]

    (dequantized, level, grids), s_BxI, exponent_B, error_B, rtn_B = jax.lax.map(search, levels)
    dtype = kernel_grid.code_dtype(kind, symmetric)
    return Solution(
        dequantized=dequantized,
        codes=tuple(
            (_grouped(x, size) + g.zero_GxO[:, :, None]).astype(dtype).reshape(x.shape)
            for x, g in zip(level, grids, strict=True)
        ),
        scales=tuple(found.scale_GxO for found in grids),
        zeros=tuple(found.zero_GxO for found in grids),
        channel_scales=s_BxI,
        exponent=exponent_B,
        error=error_B,
        rtn_error=rtn_B,
        fell_back=~usable | ~jnp.all(jnp.isfinite(error_B)),
    )


def _grouped(level_BxIxO, size):
    count, rows, outputs = level_BxIxO.shape
    return level_BxIxO.reshape(count, rows // size, size, outputs)


def _diagonal_blocks(hessian_IxI, size):
    groups = hessian_IxI.shape[0] // size
    block = jnp.arange(groups)
    return hessian_IxI.reshape(groups, size, groups, size)[block, :, block]


def _group_error(e_GxSxO, hessian_GxSxS):
    he_GxSxO = jnp.matmul(hessian_GxSxS, e_GxSxO, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(e_GxSxO * he_GxSxO, axis=1)
