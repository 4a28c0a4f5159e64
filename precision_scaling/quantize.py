"""From a precision program to dot_generals: the one module that imports AQT.

Stands between `formats`/`numerics` (what a number format is) and `model` (where operands meet). What a program must
know to be compiled (which operands are quantized, what shares a scale, how it rounds, by which family of formats) is a
static `Program`; the formats themselves are a `Table` of traced grids, so that one compiled program serves every
precision. `precision` makes both from the options.
"""

import contextlib
import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from aqt.jax.v2 import calibration as aqt_calibration
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2 import utils as aqt_utils
from aqt.jax.v2.aqt_dot_general import DequantMode
from aqt.jax.v2.numerics import numerics as aqt_numerics

from precision_scaling import hadamard, numerics
from precision_scaling.formats import FormatError, Grid, Kind

# Operands of the forward pass. "w" and "a" meet in every projection; "q", "k" in the scores; "p" (the attention
# probabilities) and "v" in the values.
OPERANDS = ("w", "a", "q", "k", "v", "p")
# Operands outside the blocks: the embedding's table, and the head's weights and inputs.
OUTER = ("e", "head_w", "head_a")
# Operands of the backward pass. The gradient of operand x is a product of "g_x", the incoming gradient, and "s_x", the
# saved other operand of the forward product: dx = dy·wᵀ multiplies g_a and s_a (which is w), dw = xᵀ·dy g_w and s_w.
BACKWARD = tuple(f"{side}_{name}" for name in OPERANDS for side in "gs")
PRODUCTS = (("a", "w"), ("q", "k"), ("p", "v"), ("head_a", "head_w"))
_INDEX = {name: i for i, name in enumerate((*OPERANDS, *OUTER, *BACKWARD))}

# Axes that share a scale, by operand, in the shapes that `linear` and the attention products multiply: one scale per
# token (and head), or one per channel. "tensor" is all axes; "vector" and "group:g" go along the contraction.
_SCALE_AXES = {
    "a": {"token": (1,), "channel": (0,)},
    "w": {"channel": (0,)},
    **{name: {"token": (3,), "channel": (1,)} for name in "qkv"},
    "p": {"token": (3,), "channel": (2,)},
    "e": {"token": (1,)},
    "head_a": {"token": (1,), "channel": (0,)},
    "head_w": {"channel": (0,)},
    **{name: {} for name in BACKWARD},
}
# The granularity whose scale is constant along the contraction, so that it can be applied to the product of codes.
_OUTPUT_SCALED = {"a": "token", "w": "channel", "q": "token", "k": "token", "p": "token", "v": "channel"}
_OUTPUT_SCALED |= {"head_a": "token", "head_w": "channel"} | dict.fromkeys(BACKWARD, "vector")

Table = Mapping[str, Grid]


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand is quantized, as far as it is compiled in.

    kind: of its formats. granularity: what shares a scale, see `granularities`; block formats group by themselves.
    container: dtype of the codes that the hardware multiplies ('int8', 'float8_e4m3fn', ...); None simulates.
    """

    kind: Kind
    granularity: str = "tensor"
    rounding: str = "nearest"
    container: str | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """The quantized operands of a compiled model, as (name, Operand) pairs; an operand that is absent is exact.

    exact: operands x whose gradient is made with the exact saved operand instead of the quantized one.
    wide: left operands of the products that are computed in float32 whatever the compute dtype.
    rotated: both operands of each projection are rotated along the contraction before they are quantized.
    """

    operands: tuple[tuple[str, Operand], ...] = ()
    exact: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    rotated: bool = False

    def get(self, name: str) -> Operand | None:
        return dict(self.operands).get(name)

    @property
    def stochastic(self) -> bool:
        """Whether anything rounds at random, so that products need a key."""
        return any(operand.rounding == "stochastic" for _, operand in self.operands)

    def evaluation(self) -> "Program":
        """The same forward pass, rounding to nearest, without what only training needs."""
        operands = tuple(
            (name, dataclasses.replace(operand, rounding="nearest"))
            for name, operand in self.operands
            if name not in BACKWARD
        )
        return Program(operands, wide=self.wide, rotated=self.rotated)

    def simulated(self) -> "Program":
        """The same program with every product simulated, whose formats may pass through."""
        operands = tuple((name, dataclasses.replace(operand, container=None)) for name, operand in self.operands)
        return dataclasses.replace(self, operands=operands)


UNQUANTIZED = Program()

_observer: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observed(observe: Callable[[str, jax.Array, jax.Array, jax.Array | None], None]) -> Iterator[None]:
    """Shows the operands of every product that is traced meanwhile: observe(name, x, x_q, saturated), left one first.

    x as it comes; x_q as it is multiplied, rounded to nearest; saturated: where x lies beyond its grid, None where it
    is not quantized. They are traced arrays: for programs traced to be looked at, never for a training step.
    """
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


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


def granularities(name: str) -> tuple[str, ...]:
    """What may share a scale in that operand; 'group:g' is g elements along the contraction."""
    return ("tensor", *_SCALE_AXES[name], *(("vector",) if name in BACKWARD else ()), "group:g")


def output_scaled(name: str, granularity: str) -> bool:
    """Whether scales of that granularity are constant along the contraction, as native products need."""
    return granularity in ("tensor", _OUTPUT_SCALED.get(name))


def group_size(granularity: str) -> int | None:
    """g of 'group:g'; None for the others."""
    return int(granularity.removeprefix("group:")) if granularity.startswith("group:") else None


def fold_in(key: jax.Array | None, index) -> jax.Array | None:
    """A key for the part of a model with that index; None stays None, where nothing rounds at random."""
    return None if key is None else jax.random.fold_in(key, index)


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

    operand: Operand = aqt_utils.static_field()
    axes: tuple[int, ...] = aqt_utils.static_field()

    def get_dtype(self):
        return None

    def get_quant_bound(self):
        return 1.0

    def vjp_fwd(self, x, context):
        return _fake_quant(x, self.operand, self.axes, context.grid, context.key), ()

    def vjp_bwd(self, res, grad):
        return grad, None


@aqt_utils.flax_slots_kw_only_dataclass
class UnitScale(aqt_calibration.Calibration):
    """The constant scale 1, which XLA folds away."""

    def get_scale_and_bias_and_sparsity(self, x, shared_axes, numerics_, context=None):
        return [jnp.ones((1,) * x.ndim, x.dtype)], [], None


@aqt_utils.flax_slots_kw_only_dataclass
class CodeNumerics(aqt_numerics.AqtNumerics):
    """AQT numerics of native products: codes in their container, of an operand that AQT has divided by its scale."""

    operand: Operand = aqt_utils.static_field()

    def get_dtype(self):
        return jnp.dtype(self.operand.container)

    def get_quant_bound(self):
        return 1.0

    def vjp_fwd(self, x, context):
        noise = None
        if self.operand.rounding == "stochastic":
            noise = numerics.rounding_noise(_required(context.key), x.shape)
        codes = numerics.round_to_grid(x, context.grid, self.operand.kind, noise, saturate=noise is not None)
        return codes.astype(self.operand.container), ()

    def vjp_bwd(self, res, grad):
        return grad, None


@aqt_utils.flax_slots_kw_only_dataclass
class GridScale(aqt_calibration.Calibration):
    """The scale of a traced grid, as `numerics` has it, for AQT to apply."""

    operand: Operand = aqt_utils.static_field()
    axes: tuple[int, ...] = aqt_utils.static_field()

    def get_scale_and_bias_and_sparsity(self, x, shared_axes, numerics_, context=None):
        x_f32 = jax.lax.stop_gradient(x).astype(jnp.float32)
        unsaturated = self.operand.rounding == "stochastic"
        scale = numerics.scale_of(x_f32, context.grid, self.operand.kind, self.axes, unsaturated)
        # AQT multiplies by the inverse, which is flushed to zero for a larger scale.
        return [jnp.where(scale > numerics.LARGEST_INVERTIBLE, jnp.nan, scale)], [], None


def _required(key: jax.Array | None) -> jax.Array:
    if key is None:
        raise FormatError("rounding 'stochastic' without a key; allowed: a JAX PRNG key, or rounding 'nearest'")
    return key


def _fake_quant(x, operand: Operand, axes: tuple[int, ...], grid: Grid, key):
    group = operand.kind.block_size or group_size(operand.granularity)
    return numerics.fake_quant_grid(x, grid, operand.kind, axes, group, operand.rounding, key)


def _scale_axes(name: str, operand: Operand, ndim: int, contracting: Sequence[int]) -> tuple[int, ...]:
    """Axes over which one scale is shared, or that are split into groups."""
    if operand.kind.block_size is not None or operand.granularity == "vector" or group_size(operand.granularity):
        return tuple(contracting)
    if operand.granularity == "tensor":
        return tuple(range(ndim))
    return _SCALE_AXES[name][operand.granularity]


def _dot(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """lax.dot_general at JAX's default precision, which AQT would override."""
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type)


def _dot_float32(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """A product of float32 operands that keeps at least 11 bits of them: TF32 on GPUs, three bf16 passes on TPUs."""
    return jax.lax.dot_general(
        lhs, rhs, dimension_numbers, jax.lax.Precision.HIGH, preferred_element_type=preferred_element_type
    )


def _set_product(raw, sides, table: Table, key, wide: bool) -> None:
    """Sets how AQT computes one product; sides: (name, Operand or None, ndim, contracted axes) of left and right."""
    raw.dot_general = _dot_float32 if wide else _dot
    native = all(operand is not None and operand.container for _, operand, _, _ in sides)
    if native:
        integers = all(operand.container == "int8" for _, operand, _, _ in sides)
        raw.dg_accumulator_dtype = jnp.int32 if integers else jnp.float32
    quantizers = (raw.lhs, raw.dg_quantizer.lhs), (raw.rhs, raw.dg_quantizer.rhs)
    for (name, operand, ndim, contracting), (tensor, quantizer) in zip(sides, quantizers, strict=True):
        if operand is None:
            continue
        axes = _scale_axes(name, operand, ndim, contracting)
        if native:
            quantizer.numerics = CodeNumerics(operand=operand)
            quantizer.calibration = functools.partial(GridScale, operand=operand, axes=axes)
        else:
            quantizer.numerics = GridNumerics(operand=operand, axes=axes)
            quantizer.calibration = UnitScale
            tensor.dequant_mode = DequantMode.THIS_INPUT
        own_key = fold_in(key, _INDEX[name]) if operand.rounding == "stochastic" else None
        quantizer.context = GridContext(key=own_key, train_step=None, grid=table[name])


def dot_general(lhs, rhs, dimension_numbers, lhs_name: str, rhs_name: str, program: Program, table, key=None):
    """lax.dot_general of two named operands, it and its gradients each at the precision that program and table give.

    An operand that the program does not name is exact. Gradients are straight-through and, unless the program says
    otherwise, use the quantized operands and the incoming gradient as it is (paper, section 2).
    table: the grid of every operand of the program. key: a PRNG key that no other product of the step has, for programs
    that are `stochastic`.
    """
    if _observer.get() is not None:
        _show(lhs, lhs_name, dimension_numbers[0][0], program, table)
        _show(rhs, rhs_name, dimension_numbers[0][1], program, table)
    names = (lhs_name, rhs_name, f"g_{lhs_name}", f"s_{lhs_name}", f"g_{rhs_name}", f"s_{rhs_name}")
    lhs_operand, rhs_operand, lhs_g, lhs_s, rhs_g, rhs_s = (program.get(name) for name in names)
    if not any((lhs_operand, rhs_operand, lhs_g, lhs_s, rhs_g, rhs_s)):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers)
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = tuple(sorted({*range(lhs.ndim)} - {*lhs_contracting, *lhs_batch}))
    rhs_free = tuple(sorted({*range(rhs.ndim)} - {*rhs_contracting, *rhs_batch}))
    out_ndim = len(lhs_batch) + len(lhs_free) + len(rhs_free)
    out_lhs = tuple(range(len(lhs_batch), len(lhs_batch) + len(lhs_free)))
    out_rhs = tuple(range(out_ndim - len(rhs_free), out_ndim))

    config = aqt_config.default_unquantized_config()
    wide = lhs_name in program.wide
    left = (lhs_name, lhs_operand, lhs.ndim, lhs_contracting)
    right = (rhs_name, rhs_operand, rhs.ndim, rhs_contracting)
    _set_product(config.fwd, (left, right), table, key, wide)
    # The gradient of the left operand contracts the incoming gradient with the right one, and the other way round.
    for raw, x, g, s, other, ndim, out_axes, free in (
        (config.dlhs, lhs_name, lhs_g, lhs_s, rhs_operand, rhs.ndim, out_rhs, rhs_free),
        (config.drhs, rhs_name, rhs_g, rhs_s, lhs_operand, lhs.ndim, out_lhs, lhs_free),
    ):
        other_name = rhs_name if x == lhs_name else lhs_name
        saved = (f"s_{x}", s, ndim, free)
        if g is not None and g.container and s is None:
            # The codes of the forward pass, made again (the same key gives the same): AQT would dequantize them.
            saved = (other_name, other, ndim, free)
        elif s is None and other is not None and x not in program.exact:
            raw.rhs.use_fwd_quant = True
        _set_product(raw, ((f"g_{x}", g, out_ndim, out_axes), saved), table, key, wide)

    dtype = lhs.dtype
    if wide:
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    with warnings.catch_warnings():
        # AQT 0.9.0 calls jnp.promote_types with arrays.
        warnings.filterwarnings(
            "ignore", message="Implicit conversion of an array to a dtype", category=DeprecationWarning
        )
        return config(lhs, rhs, dimension_numbers).astype(dtype)


def _show(x, name: str, contracting: Sequence[int], program: Program, table) -> None:
    operand = program.get(name)
    if operand is None:
        _observer.get()(name, x, x, None)
        return
    if any(name in pair and pair[0] in program.wide for pair in PRODUCTS):
        x = x.astype(jnp.float32)
    operand = dataclasses.replace(operand, rounding="nearest")
    axes = _scale_axes(name, operand, x.ndim, contracting)
    group = operand.kind.block_size or group_size(operand.granularity)
    saturated = numerics.saturated(x, table[name], operand.kind, axes, group)
    _observer.get()(name, x, _fake_quant(x, operand, axes, table[name], None), saturated)


def _rotation_signs(width: int) -> jax.Array:
    """One draw for each width, the same always: training, evaluation and what comes after see one basis."""
    return hadamard.random_signs(jax.random.key(width), width)


def on_grid(x, name: str, program: Program, table: Table | None):
    """An operand of a projection ("a" or "w", contracted over its last or first axis) as the product sees it."""
    operand = program.get(name)
    if operand is None:
        return x
    weights = name.endswith("w")
    x_2d = x.reshape(x.shape[0], -1) if weights else x.reshape(-1, x.shape[-1])
    contracting = 0 if weights else 1
    signs = _rotation_signs(x_2d.shape[contracting]) if program.rotated else None
    if signs is not None:
        x_2d = hadamard.rotate(x_2d, signs, contracting)
    x_2d = _fake_quant(x_2d, operand, _scale_axes(name, operand, 2, (contracting,)), table[name], None)
    if signs is not None:
        x_2d = hadamard.unrotate(x_2d, signs, contracting)
    return x_2d.reshape(x.shape)


def linear(x, kernel, program: Program, table: Table | None, key=None, names: tuple[str, str] = ("a", "w")):
    """x (..., in) times kernel (in, *features) -> (..., *features). names: of the two operands in the program."""
    # A product of matrices, whatever the ranks: XLA's CPU backend is 1.5 times slower on the higher-rank form.
    x_2d, kernel_2d = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
    if program.rotated and names == ("a", "w"):
        signs = _rotation_signs(x.shape[-1])
        x_2d, kernel_2d = hadamard.rotate(x_2d, signs, 1), hadamard.rotate(kernel_2d, signs, 0)
    y = dot_general(x_2d, kernel_2d, (((1,), (0,)), ((), ())), *names, program, table, key)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def attention_scores(q_BxLxHxK, k_BxMxHxK, program: Program, table: Table | None, key=None):
    """(B, H, L, M)."""
    return dot_general(q_BxLxHxK, k_BxMxHxK, (((3,), (3,)), ((0, 2), (0, 2))), "q", "k", program, table, key)


def attention_values(p_BxHxLxM, v_BxMxHxK, program: Program, table: Table | None, key=None):
    """(B, L, H, K)."""
    o_BxHxLxK = dot_general(p_BxHxLxM, v_BxMxHxK, (((3,), (1,)), ((0, 1), (0, 2))), "p", "v", program, table, key)
    return o_BxHxLxK.transpose(0, 2, 1, 3)


def embedding_table(table_VxD, program: Program, table: Table | None, key=None):
    """The embedding's table as it is looked up; gradients pass straight through."""
    operand = program.get("e")
    if operand is None:
        return table_VxD
    own_key = fold_in(key, _INDEX["e"]) if operand.rounding == "stochastic" else None
    return _fake_quant(table_VxD, operand, _scale_axes("e", operand, 2, (1,)), table["e"], own_key)
