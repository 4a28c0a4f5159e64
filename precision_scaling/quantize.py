"""From a precision spec to dot_generals: the one module that imports AQT.

Stands between `formats`/`numerics` (what a number format is) and `model` (where operands meet). What a program must
know to be compiled (which operands are quantized, at which granularity, by which family of formats) is a static
`Program`; the formats themselves are a `Table` of traced grids, so that one compiled program serves every precision.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from aqt.jax.v2 import calibration as aqt_calibration
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2 import utils as aqt_utils
from aqt.jax.v2.aqt_dot_general import DequantMode
from aqt.jax.v2.numerics import numerics as aqt_numerics

from precision_scaling import numerics
from precision_scaling.formats import Grid, Kind

# Operands of the forward pass. "w" and "a" meet in every projection; "q", "k" in the scores; "p" (the attention
# probabilities) and "v" in the values.
OPERANDS = ("w", "a", "q", "k", "v", "p")
# What the paper's P_w, P_a and P_kv stand for, part by part.
PARTS = {"w": ("w",), "a": ("a",), "kv": ("k", "v")}
GRANULARITIES = ("tensor", "token", "channel")

Table = Mapping[str, Grid]


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand is quantized, as far as it is compiled in: its format's kind and what shares a scale."""

    kind: Kind
    granularity: str


@dataclasses.dataclass(frozen=True)
class Program:
    """The quantized operands of a compiled model, as (name, Operand) pairs; an operand that is absent is exact."""

    operands: tuple[tuple[str, Operand], ...] = ()

    def get(self, name: str) -> Operand | None:
        return dict(self.operands).get(name)


UNQUANTIZED = Program()


def fake_quant(
    x: jax.Array,
    fmt: object,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    rounding: str = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    """x on the grid of a number format, scaled by its abs-max over `axis` (None: the whole tensor); a stable call.

    Same shape and dtype as x; gradients pass straight through. A NaN or an infinity makes all under its scale NaN.

    fmt: a format's name ("int4", "e4m3", "mxfp4"), a number of bits, or a `formats.Format`.
    group_size: splits `axis` (one axis; None is the last) into groups with a scale each; block formats bring their own.
    rounding: "nearest" (ties to even) or "stochastic" (unbiased), which needs `key`, a JAX PRNG key.
    Raises FormatError, one line, for an unknown format, a group that does not divide, or stochastic without a key.
    """
    return numerics.fake_quant_array(x, fmt, axis, group_size, rounding, key)


@aqt_utils.flax_slots_kw_only_dataclass
class GridContext(aqt_utils.Context):
    """AQT's context with the traced grid of one operand, which flows through AQT's custom_vjp."""

    grid: Any = aqt_utils.dynamic_field(default=None)


@aqt_utils.flax_slots_kw_only_dataclass
class GridNumerics(aqt_numerics.AqtNumerics):
    """AQT numerics that put an operand on a traced grid, scale and all; the gradient passes straight through.

    The scale is applied here rather than by AQT (whose scale is then the constant 1, see `UnitScale`): the operand is
    read and written once, and the backward pass uses the very values the forward pass multiplied.
    """

    kind: Kind = aqt_utils.static_field()
    axes: tuple[int, ...] = aqt_utils.static_field()

    def get_dtype(self):
        return None

    def get_quant_bound(self):
        return 1.0

    def vjp_fwd(self, x, context):
        return numerics.fake_quant_grid(x, context.grid, self.kind, self.axes), ()

    def vjp_bwd(self, res, grad):
        return grad, None


@aqt_utils.flax_slots_kw_only_dataclass
class UnitScale(aqt_calibration.Calibration):
    """The constant scale 1, which XLA folds away."""

    def get_scale_and_bias_and_sparsity(self, x, shared_axes, numerics_, context=None):
        return [jnp.ones((1,) * x.ndim, x.dtype)], [], None


def _scale_axes(operand: Operand, ndim: int, contracting: Sequence[int]) -> tuple[int, ...]:
    """Axes over which one scale is shared: all, or the contracted ones (a scale per output channel, or per token)."""
    return tuple(range(ndim)) if operand.granularity == "tensor" else tuple(contracting)


def dot_general(lhs, rhs, dimension_numbers, lhs_name: str, rhs_name: str, program: Program, table: Table | None):
    """lax.dot_general of two named operands, each on the grid that the program and the table give it.

    Forward only is quantized; gradients are straight-through and use the quantized operands (paper, section 2).
    """
    lhs_operand, rhs_operand = program.get(lhs_name), program.get(rhs_name)
    if lhs_operand is None and rhs_operand is None:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers)
    (lhs_contracting, rhs_contracting), _ = dimension_numbers
    config = aqt_config.default_unquantized_config()
    raw = config.fwd
    sides = (
        (lhs, lhs_name, lhs_operand, lhs_contracting, raw.lhs, raw.dg_quantizer.lhs, config.drhs.rhs),
        (rhs, rhs_name, rhs_operand, rhs_contracting, raw.rhs, raw.dg_quantizer.rhs, config.dlhs.rhs),
    )
    for x, name, operand, contracting, tensor, quantizer, saved in sides:
        if operand is None:
            continue
        quantizer.numerics = GridNumerics(kind=operand.kind, axes=_scale_axes(operand, x.ndim, contracting))
        quantizer.calibration = UnitScale
        quantizer.context = GridContext(key=None, train_step=None, grid=table[name])
        tensor.dequant_mode = DequantMode.THIS_INPUT
        saved.use_fwd_quant = True
    with warnings.catch_warnings():
        # AQT 0.9.0 calls jnp.promote_types with arrays.
        warnings.filterwarnings(
            "ignore", message="Implicit conversion of an array to a dtype", category=DeprecationWarning
        )
        return config(lhs, rhs, dimension_numbers)


def on_grid(x, name: str, program: Program, table: Table | None):
    """An operand of a projection ("a" or "w", contracted over its last or first axis) as the product sees it."""
    operand = program.get(name)
    if operand is None:
        return x
    contracting = (0,) if name == "w" else (x.ndim - 1,)
    return numerics.fake_quant_grid(x, table[name], operand.kind, _scale_axes(operand, x.ndim, contracting))


def linear(x, kernel, program: Program, table: Table | None):
    """x (..., in) times kernel (in, *features) -> (..., *features)."""
    # A product of matrices, whatever the ranks: XLA's CPU backend is 1.5 times slower on the higher-rank form.
    y = dot_general(
        x.reshape(-1, x.shape[-1]),
        kernel.reshape(kernel.shape[0], -1),
        (((1,), (0,)), ((), ())),
        "a",
        "w",
        program,
        table,
    )
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def attention_scores(q_BxLxHxK, k_BxMxHxK, program: Program, table: Table | None):
    """(B, H, L, M)."""
    return dot_general(q_BxLxHxK, k_BxMxHxK, (((3,), (3,)), ((0, 2), (0, 2))), "q", "k", program, table)


def attention_values(p_BxHxLxM, v_BxMxHxK, program: Program, table: Table | None):
    """(B, L, H, K)."""
    o_BxHxLxK = dot_general(p_BxHxLxM, v_BxMxHxK, (((3,), (1,)), ((0, 1), (0, 2))), "p", "v", program, table)
    return o_BxHxLxK.transpose(0, 2, 1, 3)
