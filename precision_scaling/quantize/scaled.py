"""Projections on the codes of block formats and their scales, as block-scaled hardware multiplies them.

`jax.nn.scaled_matmul` on GPUs, which XLA runs natively where the device has such products (mxfp8 and nvfp4 from
compute capability 10.0 on) and emulates elsewhere; a product of codes times scales on other devices. What is multiplied
is what simulation multiplies, but for the scale of a whole tensor, which is applied to the product.

Shape letters: T tokens, I inputs, O outputs, R rows of an operand, K its contraction, G blocks along it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.numerics import rounding
from precision_scaling.quantize import aqt
from precision_scaling.quantize.static import Grids, StaticPrecision


def serves(static: StaticPrecision, lhs_name: str) -> bool:
    """Whether the product whose left operand that is multiplies codes of blocks."""
    quantizer = static.get(lhs_name)
    return quantizer is not None and quantizer.kind.family == "block" and quantizer.container is not None


def dot_general(lhs_TxI, rhs_IxO, lhs_name: str, rhs_name: str, static: StaticPrecision, grids: Grids, key=None):
    """lhs @ rhs in lhs's dtype; it and its gradients as `aqt.dot_general` has them, with the same arguments."""
    aqt.show(lhs_TxI, rhs_IxO, lhs_name, rhs_name, ((1,), (0,)), static, grids)
    return _product((lhs_name, rhs_name, static), lhs_TxI, rhs_IxO, grids, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(plan: tuple[str, str, StaticPrecision], lhs, rhs, grids: Grids, key):
    left, right, static = plan
    operands = _encoded(lhs, left, 1, static, grids, key), _encoded(rhs, right, 0, static, grids, key)
    return _multiplied(*operands).astype(lhs.dtype)


def _forward(plan, lhs, rhs, grids, key):
    return _product(plan, lhs, rhs, grids, key), (lhs, rhs, grids, key)


def _backward(plan, kept, g_TxO):
    (left, right, static), (lhs, rhs, grids, key) = plan, kept
    # dx = dy wᵀ contracts the outputs, dw = xᵀ dy the tokens.
    dx = _gradient(left, (right, rhs, 0, 1), (g_TxO, 1), static, grids, key)
    dw = _gradient(right, (left, lhs, 1, 0), (g_TxO, 0), static, grids, key)
    return dx.astype(lhs.dtype), dw.T.astype(rhs.dtype), None, None


_product.defvjp(_forward, _backward)


def _gradient(name: str, saved: tuple[str, Any, int, int], incoming: tuple[Any, int], static, grids, key):
    """The gradient of an operand: the incoming one times the saved operand, contracted over an axis of each.

    saved: (name, array, the axis that the forward product contracts, the one that is contracted here).
    """
    other, x, forward_axis, axis = saved
    g, g_axis = incoming
    own, of_gradient = static.get(f"s_{name}"), static.get(f"g_{name}")
    if own is None and of_gradient is None:
        if name not in static.exact:
            x = _on_grid(x, other, forward_axis, static, grids, key)
        return jax.lax.dot_general(g, x, (((g_axis,), (axis,)), ((), ())))
    width = dict(static.gradient_rotations).get(name, 0)
    if width:
        g, x = (aqt.Rotation(width, at).of(array, None) for array, at in ((g, g_axis), (x, axis)))
    read = f"s_{name}" if own is not None else other
    return _multiplied(
        _encoded(g, f"g_{name}", g_axis, static, grids, key), _encoded(x, read, axis, static, grids, key)
    )


def _on_grid(x, name: str, axis: int, static: StaticPrecision, grids: Grids, key):
    """An operand as the forward product has it."""
    quantizer = static.get(name)
    assert quantizer is not None
    axes = aqt.scale_axes(name, quantizer, 2, (axis,))
    return aqt.on_static_grid(x, quantizer, axes, grids[name], aqt.key_of(name, quantizer, key))


class _Encoded(NamedTuple):
    """An operand with its contraction last: codes · scales, each for a block along K, · unit."""

    codes_RxK: jax.Array
    scales_RxG: jax.Array
    unit: jax.Array


def _encoded(x, name: str, axis: int, static: StaticPrecision, grids: Grids, key) -> _Encoded:
    quantizer = static.get(name)
    assert quantizer is not None and quantizer.container, f"{name} has no codes"
    axes = aqt.scale_axes(name, quantizer, 2, (axis,))
    own_key = aqt.key_of(name, quantizer, key)
    codes, scales, unit = rounding.block_codes(x, grids[name], quantizer.kind, axes, quantizer.rounding, own_key)
    if len(axes) == 2:  # one scale of a tile for each of its rows
        assert quantizer.kind.block_size
        scales = jnp.repeat(scales, quantizer.kind.block_size, axis=1 - axis)
    to_rows = (lambda array: array) if axis == 1 else jnp.transpose
    scale_dtype = SCALES[quantizer.container]
    return _Encoded(to_rows(codes).astype(quantizer.container), to_rows(scales).astype(scale_dtype), unit)


SCALES = {"float8_e4m3fn": "float8_e8m0fnu", "float8_e5m2": "float8_e8m0fnu", "float4_e2m1fn": "float8_e4m3fn"}


def _multiplied(left: _Encoded, right: _Encoded):
    """(rows of left, rows of right), float32."""
    arrays = left.codes_RxK, right.codes_RxK, left.scales_RxG, right.scales_RxG
    product = jax.lax.platform_dependent(*arrays, cuda=_scaled_matmul, default=_written_out)
    return product * (left.unit * right.unit)


def _scaled_matmul(a_RxK, b_NxK, a_scales_RxG, b_scales_NxG):
    arrays = (array[None] for array in (a_RxK, b_NxK, a_scales_RxG, b_scales_NxG))
    return jax.nn.scaled_matmul(*arrays, preferred_element_type=jnp.float32)[0]


def _written_out(a_RxK, b_NxK, a_scales_RxG, b_scales_NxG):
    def values(codes, scales):
        blocks = codes.astype(jnp.float32).reshape(*scales.shape, -1) * scales.astype(jnp.float32)[..., None]
        return blocks.reshape(codes.shape)

    both = values(a_RxK, a_scales_RxG), values(b_NxK, b_scales_NxG)
    return jax.lax.dot_general(*both, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
