"""dot_general with each operand, forward and backward, at its own precision; the one module that imports AQT."""

import contextlib
import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from aqt.jax.v2 import calibration as aqt_calibration
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2 import utils as aqt_utils
from aqt.jax.v2.aqt_dot_general import DequantMode
from aqt.jax.v2.numerics import numerics as aqt_numerics

from precision_scaling.numerics import elements, hadamard, rounding
from precision_scaling.numerics.formats import FormatError, Grid
from precision_scaling.quantize.operands import INDEX, PRODUCTS, SCALE_AXES, group_size
from precision_scaling.quantize.static import Grids, StaticPrecision, StaticQuantizer
from precision_scaling.runtime import sharding

_observer: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observed(observe: Callable[[str, jax.Array, jax.Array, jax.Array | None, Any], None]) -> Iterator[None]:
    """Shows the operands of every product that is traced meanwhile: observe(name, x, x_q, saturated, ends), left first.

    x as it comes; x_q as it is multiplied, rounded to nearest; saturated: where x lies beyond its grid, None where it
    is not quantized; ends: as `rounding.scale_ends` has them, None where there are none. They are traced arrays: for
    inspection, never in a training step.
    """
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def observing() -> bool:
    """Whether an observer is shown the operands of the products that are traced now."""
    return _observer.get() is not None


def fold_in(key: jax.Array | None, index) -> jax.Array | None:
    """A key for the part of a model with that index; None stays None, where nothing rounds at random."""
    return None if key is None else jax.random.fold_in(key, index)


def key_of(name: str, quantizer: StaticQuantizer, key: jax.Array | None) -> jax.Array | None:
    """The key of an operand of a product with that key; None where it does not round at random."""
    return fold_in(key, INDEX[name]) if quantizer.rounding in rounding.RANDOM else None


@aqt_utils.flax_slots_kw_only_dataclass
class GridContext(aqt_utils.Context):
    """AQT's context with the traced grid of one operand, which flows through AQT's custom_vjp.

    exact: 1 where both operands of the product pass through, which are then not rotated; traced.
    signs_key: of the rotation of both, where it is drawn anew.
    """

    grid: Any = aqt_utils.dynamic_field(default=None)
    exact: Any = aqt_utils.dynamic_field(default=None)
    signs_key: Any = aqt_utils.dynamic_field(default=None)


class Rotation(NamedTuple):
    """Of both operands of a product along its contraction: a random Hadamard matrix in diagonal blocks."""

    block: int
    axis: int

    def of(self, x, key):
        """The same signs in every block, drawn with the key; without one always the same for each width."""
        signs = hadamard.random_signs(jax.random.key(self.block) if key is None else key, self.block)
        return hadamard.rotate(x, jnp.tile(signs, x.shape[self.axis] // self.block), self.axis, self.block)


@aqt_utils.flax_slots_kw_only_dataclass
class GridNumerics(aqt_numerics.AqtNumerics):
    """AQT numerics that put an operand on a traced grid, scale and all; the gradient passes straight through.

    The scale is applied here rather than by AQT (whose scale is then the constant 1, see `UnitScale`): the operand is
    read and written once, and the backward pass uses the very values the forward pass multiplied.
    """

    quantizer: StaticQuantizer = aqt_utils.static_field()
    axes: tuple[int, ...] = aqt_utils.static_field()
    rotation: Rotation | None = aqt_utils.static_field(default=None)

    def get_dtype(self):
        return None

    def get_quant_bound(self):
        return 1.0

    def vjp_fwd(self, x, context):
        if self.rotation is not None:
            x = jnp.where(context.exact > 0, x, self.rotation.of(x, context.signs_key))
        return on_static_grid(x, self.quantizer, self.axes, context.grid, context.key), ()

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

    quantizer: StaticQuantizer = aqt_utils.static_field()

    def get_dtype(self):
        return jnp.dtype(self.quantizer.container)

    def get_quant_bound(self):
        return 1.0

    def vjp_fwd(self, x, context):
        noise = None
        if self.quantizer.rounding == "stochastic":
            noise = elements.rounding_noise(_required(context.key), x.shape)
        codes = elements.round_to_grid(x, context.grid, self.quantizer.kind, noise, saturate=noise is not None)
        return codes.astype(self.quantizer.container), ()

    def vjp_bwd(self, res, grad):
        return grad, None


@aqt_utils.flax_slots_kw_only_dataclass
class GridScale(aqt_calibration.Calibration):
    """The scale of a traced grid, as `numerics` has it, for AQT to apply."""

    quantizer: StaticQuantizer = aqt_utils.static_field()
    axes: tuple[int, ...] = aqt_utils.static_field()

    def get_scale_and_bias_and_sparsity(self, x, shared_axes, numerics_, context=None):
        x_f32 = jax.lax.stop_gradient(x).astype(jnp.float32)
        unsaturated = self.quantizer.rounding == "stochastic"
        scale = rounding.scale_of(x_f32, context.grid, self.quantizer.kind, self.axes, unsaturated)
        # AQT multiplies by the inverse, which is flushed to zero for a larger scale.
        return [jnp.where(scale > rounding.LARGEST_INVERTIBLE, jnp.nan, scale)], [], None


def _required(key: jax.Array | None) -> jax.Array:
    if key is None:
        raise FormatError("rounding 'stochastic' without a key; allowed: a JAX PRNG key, or rounding 'nearest'")
    return key


def on_static_grid(x, quantizer: StaticQuantizer, axes: tuple[int, ...], grid: Grid, key):
    group = quantizer.kind.block_size or group_size(quantizer.granularity)
    return rounding.fake_quant_grid(x, grid, quantizer.kind, axes, group, quantizer.rounding, key)


def scale_axes(name: str, quantizer: StaticQuantizer, ndim: int, contracting: Sequence[int]) -> tuple[int, ...]:
    """Axes over which one scale is shared, or that are split into groups."""
    if quantizer.granularity.startswith("tile:"):
        return tuple(range(ndim))
    if quantizer.kind.block_size is not None or quantizer.granularity == "vector" or group_size(quantizer.granularity):
        return tuple(contracting)
    if quantizer.granularity == "tensor":
        return tuple(range(ndim))
    return SCALE_AXES[name][quantizer.granularity]


def _dot(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """lax.dot_general at JAX's default precision, which AQT would override."""
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type)


def _dot_float32(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
    """A product of float32 operands that keeps at least 11 bits of them: TF32 on GPUs, three bf16 passes on TPUs."""
    return jax.lax.dot_general(
        lhs, rhs, dimension_numbers, jax.lax.Precision.HIGH, preferred_element_type=preferred_element_type
    )


def _of_kernel(dot: Callable, axis: int) -> Callable:
    """`dot` of which the right side is a kernel, gathered from the devices that share it."""

    def whole(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        rhs = sharding.whole_kernel(rhs, axis)
        return dot(lhs, rhs, dimension_numbers, preferred_element_type=preferred_element_type)

    return whole


def _summed(dot: Callable, axis: int, wide: bool) -> Callable:
    """`dot` that gives a kernel's gradient, summed over devices that keep their share of that axis.

    wide: partial sums, one on each device, are float32; rounded to the product's own dtype when they are added up.
    """

    def summed(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)
        partial = dot(lhs, rhs, dimension_numbers, preferred_element_type=jnp.float32 if wide else dtype)
        return sharding.in_shares(partial, axis).astype(dtype)

    return summed


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, kernel, axis: int, wide: bool):
    """x @ kernel on several devices: see `_of_kernel`, and of its gradient `_summed`."""
    return _of_kernel(_dot, axis)(x, kernel, (((1,), (0,)), ((), ())))


def _matmul_forward(x, kernel, axis, wide):
    # The product itself, not `_matmul`: policies of recomputation look for it.
    return _of_kernel(_dot, axis)(x, kernel, (((1,), (0,)), ((), ()))), (x, kernel)


def _matmul_backward(axis, wide, kept, g):
    x, kernel = kept
    dx = _of_kernel(_dot, axis)(g, kernel, (((1,), (1,)), ((), ())))
    return dx, _summed(_dot, axis, wide)(x, g, (((0,), (0,)), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _set_product(raw, sides, grids: Grids, key, wide: bool, rotation: int = 0) -> None:
    """Sets how AQT computes one product; sides: (name, quantizer or None, ndim, contracted axes) of left and right.

    rotation: width of the Hadamard blocks that both sides are rotated with; 0: not at all.
    """
    raw.dot_general = _dot_float32 if wide else _dot
    native = all(quantizer is not None and quantizer.container for _, quantizer, _, _ in sides)
    if native:
        integers = all(quantizer.container == "int8" for _, quantizer, _, _ in sides)
        raw.dg_accumulator_dtype = jnp.int32 if integers else jnp.float32
    exact = functools.reduce(jnp.multiply, (grids[name].passthrough for name, *_ in sides)) if rotation else None
    anew = any(quantizer is not None and quantizer.rounding == "eden" for _, quantizer, _, _ in sides)
    signs_key = fold_in(fold_in(_required(key), INDEX[sides[0][0]]), 1) if anew else None
    aqt_quantizers = (raw.lhs, raw.dg_quantizer.lhs), (raw.rhs, raw.dg_quantizer.rhs)
    for (name, quantizer, ndim, contracting), (tensor, aqt_quantizer) in zip(sides, aqt_quantizers, strict=True):
        if quantizer is None:
            continue
        axes = scale_axes(name, quantizer, ndim, contracting)
        if native:
            aqt_quantizer.numerics = CodeNumerics(quantizer=quantizer)
            aqt_quantizer.calibration = functools.partial(GridScale, quantizer=quantizer, axes=axes)
        else:
            rotated = Rotation(rotation, *contracting) if rotation else None
            aqt_quantizer.numerics = GridNumerics(quantizer=quantizer, axes=axes, rotation=rotated)
            aqt_quantizer.calibration = UnitScale
            tensor.dequant_mode = DequantMode.THIS_INPUT
        own_key = key_of(name, quantizer, key)
        aqt_quantizer.context = GridContext(
            key=own_key, train_step=None, grid=grids[name], exact=exact, signs_key=signs_key
        )


def dot_general(
    lhs,
    rhs,
    dimension_numbers,
    lhs_name: str,
    rhs_name: str,
    static: StaticPrecision,
    grids,
    key=None,
    kernel_axis: int = 0,
):
    """lax.dot_general of two named operands, it and its gradients each at the precision that `static` and `grids` give.

    An operand that `static` does not name is exact. Gradients are straight-through and, unless `static` says
    otherwise, use the quantized operands and the incoming gradient as it is (paper, section 2).
    grids: of every operand of `static`. key: a PRNG key that no other product of the step has, where `static` is
    `stochastic`. kernel_axis: of a kernel, that fsdp divides.
    """
    show(lhs, rhs, lhs_name, rhs_name, dimension_numbers[0], static, grids)
    names = (lhs_name, rhs_name, f"g_{lhs_name}", f"s_{lhs_name}", f"g_{rhs_name}", f"s_{rhs_name}")
    lhs_operand, rhs_operand, lhs_g, lhs_s, rhs_g, rhs_s = (static.get(name) for name in names)
    # Tokens lie on many devices, which add up the gradients of a kernel.
    of_kernel = sharding.on_several_devices() and rhs_name in ("w", "head_w")
    sums_wide = of_kernel and sharding.sums_in_float32() and lhs.dtype == jnp.bfloat16
    if not any((lhs_operand, rhs_operand, lhs_g, lhs_s, rhs_g, rhs_s)):
        if of_kernel:
            return _matmul(lhs, rhs, kernel_axis, sums_wide)
        return jax.lax.dot_general(lhs, rhs, dimension_numbers)
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_free = tuple(sorted({*range(lhs.ndim)} - {*lhs_contracting, *lhs_batch}))
    rhs_free = tuple(sorted({*range(rhs.ndim)} - {*rhs_contracting, *rhs_batch}))
    out_ndim = len(lhs_batch) + len(lhs_free) + len(rhs_free)
    out_lhs = tuple(range(len(lhs_batch), len(lhs_batch) + len(lhs_free)))
    out_rhs = tuple(range(out_ndim - len(rhs_free), out_ndim))

    config = aqt_config.default_unquantized_config()
    wide = lhs_name in static.wide
    left = (lhs_name, lhs_operand, lhs.ndim, lhs_contracting)
    right = (rhs_name, rhs_operand, rhs.ndim, rhs_contracting)
    _set_product(config.fwd, (left, right), grids, key, wide)
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
        elif s is None and other is not None and x not in static.exact:
            raw.rhs.use_fwd_quant = True
        rotation = dict(static.gradient_rotations).get(x, 0)
        _set_product(raw, ((f"g_{x}", g, out_ndim, out_axes), saved), grids, key, wide, rotation)
    if of_kernel:
        for raw in (config.fwd, config.dlhs):
            raw.dot_general = _of_kernel(raw.dot_general, kernel_axis)
        sums_wide = sums_wide and not wide and not config.drhs.dg_accumulator_dtype
        # Which AQT computes transposed: of outputs by inputs.
        config.drhs.dot_general = _summed(config.drhs.dot_general, 1 - kernel_axis, sums_wide)

    dtype = lhs.dtype
    if wide:
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    with warnings.catch_warnings():
        # AQT 0.9.0 calls jnp.promote_types with arrays.
        warnings.filterwarnings(
            "ignore", message="Implicit conversion of an array to a dtype", category=DeprecationWarning
        )
        return config(lhs, rhs, dimension_numbers).astype(dtype)


def show(lhs, rhs, lhs_name: str, rhs_name: str, contracting: Sequence, static: StaticPrecision, grids) -> None:
    """Shows the operands of a product to the observer that there is. contracting: axes of the left and the right."""
    observe = _observer.get()
    if observe is not None:
        _show(observe, lhs, lhs_name, contracting[0], static, grids)
        _show(observe, rhs, rhs_name, contracting[1], static, grids)


def _show(observe: Callable, x, name: str, contracting: Sequence[int], static: StaticPrecision, grids) -> None:
    quantizer = static.get(name)
    if quantizer is None:
        observe(name, x, x, None, None)
        return
    if any(name in pair and pair[0] in static.wide for pair in PRODUCTS):
        x = x.astype(jnp.float32)
    quantizer = dataclasses.replace(quantizer, rounding="nearest")
    axes = scale_axes(name, quantizer, x.ndim, contracting)
    group = quantizer.kind.block_size or group_size(quantizer.granularity)
    saturated = rounding.saturated(x, grids[name], quantizer.kind, axes, group)
    ends = rounding.scale_ends(x, grids[name], quantizer.kind, axes, group)
    observe(name, x, on_static_grid(x, quantizer, axes, grids[name], None), saturated, ends)
