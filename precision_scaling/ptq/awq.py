"""AWQ (Lin et al., arXiv 2306.00978): scale the inputs that matter most up before rounding, and back down after.

Inputs with large activations get finer steps: the kernels that share an input are rounded as Q(s·W) / s, where s is the
mean magnitude of each input to a power that is searched for. A model folds 1/s into whatever makes the input.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.numerics import formats
from precision_scaling.ptq import kernel_grid
from precision_scaling.ptq.error import output_error
from precision_scaling.ptq.scheme import Calibration, Method, Rounded, Scheme

EXPONENTS = tuple(i / 20 for i in range(20))  # 0 is rounding to nearest
SMALLEST_MAGNITUDE = 1e-4  # of the largest input's: one that is hardly ever on must not get a scale of zero


class Solution(NamedTuple):
    """What AWQ did to a kernel (in I, out O); G groups of inputs."""

    dequantized: jax.Array  # (I, O), 1/s included: takes the kernel's place in the unchanged model
    codes: jax.Array  # (I, O), of s·W, as GPTQ's
    scales: jax.Array  # (G, O)
    zeros: jax.Array  # (G, O)
    channel_scales: jax.Array  # (I,), s
    exponent: jax.Array  # scalar
    error: jax.Array  # scalar, the objective
    rtn_error: jax.Array  # scalar, the objective of rounding to nearest: never below `error`
    fell_back: jax.Array  # scalar bool: statistics were NaN or zero, so this is rounding to nearest


def channel_scales(mean_magnitude_I, exponent):
    """s (I,): mean magnitudes to a power, with √(max · min) = 1, so that the kernel's range stays about where it is."""
    s_I = jnp.maximum(mean_magnitude_I / jnp.max(mean_magnitude_I), SMALLEST_MAGNITUDE) ** exponent
    return s_I / jnp.sqrt(jnp.max(s_I) * jnp.min(s_I))


def solve(
    kernel,
    hessian,
    mean_magnitude,
    bits,
    kind: formats.Kind = kernel_grid.INTEGER,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    clip: bool = True,
    full_range: bool = False,
    objective: Callable[[jax.Array], jax.Array] | None = None,
) -> Solution:
    """AWQ of a kernel (in, out) in one format. Kernels that share an input are joined along `out`.

    hessian: (in, in), Σ x xᵀ over calibration inputs x. mean_magnitude: (in,), mean |x|.
    bits, kind: as for `gptq.solve`.
    clip: then shrinks each range where that lowers the output error that its own group of inputs makes, and keeps the
        result if it lowers the objective, too.
    full_range: as for `gptq.solve`.
    objective: kernel in, error out (traced): the paper's is the squared error of the output of the module that holds
        the kernel (the whole attention, the whole MLP). None is that of the kernel's own output, ‖X (W - Q)‖².

    Pure and compiled (again for each objective): `vmap` it over a leading axis of layers. Statistics that can't be used
    give rounding to nearest with `fell_back` set: report it. Raises FormatError and UserError for formats, groups and
    clips that don't exist.
    """
    levels = bits if isinstance(bits, formats.Grid) else kernel_grid.integer_levels(bits)
    return _solve(kernel, hessian, mean_magnitude, levels, kind, group_size, symmetric, clip, full_range, objective)


@functools.partial(jax.jit, static_argnames=("kind", "group_size", "symmetric", "clip", "full_range", "objective"))
def _solve(
    kernel, hessian, mean_magnitude, levels, kind, group_size, symmetric, clip, full_range, objective
) -> Solution:
    kernel_IxO = jnp.asarray(kernel).astype(jnp.float32)
    hessian_IxI, mean_I = jnp.asarray(hessian).astype(jnp.float32), jnp.asarray(mean_magnitude).astype(jnp.float32)
    size = kernel_grid.group_rows(kernel_IxO.shape[0], group_size, kind)
    usable = jnp.all(jnp.isfinite(mean_I)) & (jnp.max(mean_I) > 0) & jnp.all(jnp.isfinite(hessian_IxI))
    mean_I = jnp.where(usable, mean_I, 1)
    hessian_IxI = jnp.where(usable, hessian_IxI, 0)
    if objective is None:

        def objective(quantized):
            return output_error(kernel_IxO, quantized, hessian_IxI)

    own_GxSxS = _diagonal_blocks(hessian_IxI, size)

    def round_scaled(s_I, clip):
        """The dequantized kernel with 1/s included, levels and grid of s·W."""
        scaled_IxO = s_I[:, None] * kernel_IxO
        options = {"symmetric": symmetric, "full_range": full_range, "clip": clip}
        grid = kernel_grid.find(scaled_IxO, levels, kind, group_size=group_size, **options)
        value_IxO, level_IxO = kernel_grid.quantize(scaled_IxO, grid, kind, symmetric and not full_range, group_size)
        return value_IxO * (1 / s_I)[:, None], level_IxO, grid

    def attempt(best, exponent):
        best_error, best_exponent = best
        error = objective(round_scaled(channel_scales(mean_I, exponent), False)[0])
        better = error < best_error
        return (jnp.where(better, error, best_error), jnp.where(better, exponent, best_exponent)), error

    start = jnp.asarray(jnp.inf), jnp.asarray(0.0)
    (error, exponent), errors = jax.lax.scan(attempt, start, jnp.asarray(EXPONENTS))
    s_I = channel_scales(mean_I, exponent)
    chosen = round_scaled(s_I, False)
    if clip:
        inverse_Sx1 = kernel_grid.grouped(1 / s_I, size)[..., None]
        clipped = round_scaled(s_I, lambda e_GxSxO: _group_error(e_GxSxO * inverse_Sx1, own_GxSxS))
        clipped_error = objective(clipped[0])
        better = clipped_error < error
        chosen = jax.tree.map(lambda a, b: jnp.where(better, a, b), clipped, chosen)
        error = jnp.where(better, clipped_error, error)
    dequantized_IxO, level_IxO, grid = chosen
    code_GxSxO = kernel_grid.grouped(level_IxO, size) + grid.zero_GxO[:, None]
    return Solution(
        dequantized=dequantized_IxO,
        codes=kernel_grid.ungrouped(
            code_GxSxO.astype(kernel_grid.code_dtype(kind, symmetric and not full_range)), len(level_IxO)
        ),
        scales=grid.scale_GxO,
        zeros=grid.zero_GxO,
        channel_scales=s_I,
        exponent=exponent,
        error=error,
        rtn_error=errors[0],
        fell_back=~usable | ~jnp.isfinite(error),
    )


def _diagonal_blocks(hessian_IxI, size):
    groups, left = -(-hessian_IxI.shape[0] // size), -hessian_IxI.shape[0] % size
    hessian_IxI, block = jnp.pad(hessian_IxI, ((0, left), (0, left))), jnp.arange(groups)
    return hessian_IxI.reshape(groups, size, groups, size)[block, :, block]


def _group_error(e_GxSxO, hessian_GxSxS):
    he_GxSxO = jnp.matmul(hessian_GxSxS, e_GxSxO, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(e_GxSxO * he_GxSxO, axis=1)


def _solve_projection(
    kernel_IxO, levels: formats.Grid, kind: formats.Kind, scheme: Scheme, calibration: Calibration
) -> Rounded:
    found = solve(
        kernel_IxO,
        calibration.hessian_IxI,
        calibration.magnitude_I,
        levels,
        kind,
        group_size=scheme.group_size or None,
        symmetric=scheme.symmetric,
        full_range=scheme.has_full_range(kind),
        objective=calibration.branch_error,
    )
    return Rounded(found.codes, found.scales, found.zeros, 1 / found.channel_scales, found.fell_back)


# It always searches for a clip of its own.
METHOD = Method(
    "awq",
    solve=_solve_projection,
    options=("group_size", "symmetric", "full_range", "rotate", "layers"),
    calibrated=True,
    branch_error=True,
)
