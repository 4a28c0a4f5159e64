"""One projection of a block: its kernel, and the compiled program by which a method puts it on a grid.

Between the methods, which `registry` lists and which see a matrix, and `apply`, which goes through the blocks. Shape
letters: C calibration batches of B sequences, S positions, I inputs, O outputs, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block
from precision_scaling.numerics import formats
from precision_scaling.ptq import rtn
from precision_scaling.ptq.codes import Codes, dequantize, encode
from precision_scaling.ptq.error import relative_output_error, split_errors
from precision_scaling.ptq.scheme import NORMS, OUT, QKV, Calibration, Linear, Rounded, Scheme, has_gains
from precision_scaling.quantize.products import Products
from precision_scaling.runtime import compilation
from precision_scaling.runtime.sharding import Layout, split_batch, splitting
from precision_scaling.training.step import StepConfig


class Report(NamedTuple):
    """What happened to each projection: arrays (projections,) of a block, (K, L, projections) of a model at K formats.

    Errors are ‖X (W - Q)‖² / ‖X W‖² on the inputs X that the layers quantized before it make; NaN where nothing was
    calibrated.
    """

    fell_back: jax.Array  # the calibration statistics were unusable, so rounded to nearest
    damping: jax.Array  # NaN where nothing was damped
    error: jax.Array
    rtn_error: jax.Array  # of rounding to nearest on the same inputs
    # Of the inputs, which were quantized before: ‖(X₀ - X) W‖² / ‖X W‖², X₀ those of the model as it was; and of both,
    # ‖X₀ W - X Q‖² / ‖X W‖². NaN where X₀ was not computed.
    inherited_error: jax.Array
    total_error: jax.Array


def flat(kernel):
    """(in, *features) -> (in, out)."""
    return kernel.reshape(kernel.shape[0], -1)


def kernel_of(block: Any, linear: Linear):
    """The kernel of a projection (in, *features)."""
    return block[linear[0]][linear[1]]["kernel"]


def with_kernel(block: Any, linear: Linear, kernel) -> Any:
    """The block with another kernel for a projection."""
    module, name = linear
    return {**block, module: {**block[module], name: {"kernel": kernel}}}


def as_multiplied(block: Any, dtype: str) -> Any:
    """The kernels as the products see them, still in float32. In bfloat16 the grid of the float32 kernel is another one
    than training rounded to, and a model trained at the very precision would lose something."""
    if dtype == "float32":
        return block
    info = jnp.finfo(dtype)

    def rounded(path, leaf):
        return jax.lax.reduce_precision(leaf, info.nexp, info.nmant) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(rounded, block)


def can_fold(model: ModelConfig, linear: Linear) -> bool:
    """Whether what makes a projection's inputs can take a factor of each: then it belongs to a model anyone can load.

    The gain of a norm before it, the values of attention, the half of gate_up that is not activated.
    """
    return linear not in NORMS or has_gains(model)


def solver(step_config: StepConfig, scheme: Scheme, kind: formats.Kind, linear: Linear, layout: Layout):
    """(block, Statistics or None, inputs (C, B, S, I) or None, grids, levels, damping, starts (C, B, S) or None,
    Inherited or None) -> (Codes, Report), for a projection in formats of that kind."""
    return _solver(step_config, scheme.of_kind(kind), kind, linear, layout)


@functools.lru_cache(maxsize=64)
def _solver(step_config: StepConfig, scheme: Scheme, kind: formats.Kind, linear: Linear, layout: Layout):
    method, model = scheme.method, step_config.model
    assert method.solve is not None, "what leaves kernels alone is not applied"
    method_solve = method.solve

    def solve(block, found, inputs_CxBxSxI, grids, levels, damping, starts_CxBxS=None, inherited=None):
        kernel = kernel_of(block, linear)
        if found is None:
            rounded, hessian_IxI = method_solve(flat(kernel), levels, kind, scheme, None), None
        else:
            hessian_IxI, magnitude_I = found.hessian_IxI, found.magnitude_I
            if linear == OUT:
                magnitude_I = _per_value(magnitude_I, model)
            if not can_fold(model, linear):
                magnitude_I = jnp.ones_like(magnitude_I)
            objective = None
            if inputs_CxBxSxI is not None:
                products = Products(step_config.static, grids)
                objective = _branch_error(model, products, block, linear, inputs_CxBxSxI, starts_CxBxS)
            cross_IxI = None if inherited is None else inherited.cross_IxI
            calibration = Calibration(hessian_IxI, magnitude_I, jnp.asarray(damping), cross_IxI, objective)
            rounded = method_solve(flat(kernel), levels, kind, scheme, calibration)
        codes = _encoded(scheme, kind, rounded, kernel.shape)
        fell_back, damped = jnp.asarray(rounded.fell_back), jnp.asarray(rounded.damping, jnp.float32)
        unknown = jnp.asarray(jnp.nan)
        if hessian_IxI is None:
            return codes, Report(fell_back, damped, *[unknown] * 4)
        grid = scheme.group_size or None, scheme.symmetric, False, scheme.has_full_range(kind)
        plain = rtn.nearest(flat(kernel), levels, kind, *grid)
        both = flat(dequantize(codes)), plain
        errors = (relative_output_error(flat(kernel), q, hessian_IxI) for q in both)
        split = (
            (unknown, unknown) if inherited is None else split_errors(flat(kernel), both[0], hessian_IxI, *inherited)
        )
        return codes, Report(fell_back, damped, *errors, *split)

    def solve_on_layout(*arguments):
        with splitting(layout):
            return solve(*arguments)

    return compilation.jit(solve_on_layout)


def _per_value(magnitude_I, model: ModelConfig):
    """The mean over the heads that read the same values, which can take but one factor."""
    heads_GxQxK = magnitude_I.reshape(model.key_heads, -1, model.head_dim)
    return jnp.broadcast_to(jnp.mean(heads_GxQxK, axis=1, keepdims=True), heads_GxQxK.shape).reshape(-1)


def _branch_error(model: ModelConfig, products: Products, block, linear: Linear, inputs_CxBxSxI, starts_CxBxS):
    """Of a kernel that begins a branch (the whole attention or MLP): another kernel (I, O) -> the squared error of what
    the branch adds."""
    module = Block(model)
    nothing_BxSxD = jnp.zeros((*inputs_CxBxSxI.shape[1:3], model.width), model.dtype)

    def added(block):
        def one(batch):
            call = lambda method, *args: module.apply({"params": block}, *args, method=method)
            h_BxSxI, starts_BxS = jax.tree.map(split_batch, batch)
            if linear == QKV:
                mixed_BxSxI = call(Block.before_out, h_BxSxI, products, starts_BxS)
                return call(Block.after_out, nothing_BxSxD, mixed_BxSxI, products)
            return call(Block.after_down, nothing_BxSxD, call(Block.before_down, h_BxSxI, products), products)

        return jax.lax.map(one, (inputs_CxBxSxI, starts_CxBxS)).astype(jnp.float32)

    kernel, before = kernel_of(block, linear), added(block)

    def objective(other_IxO):
        return jnp.sum(jnp.square(added(with_kernel(block, linear, other_IxO.reshape(kernel.shape))) - before))

    return objective


def _encoded(scheme: Scheme, kind: formats.Kind, rounded: Rounded, shape: tuple[int, ...]) -> Codes:
    # The zero of all 2^b levels is the same everywhere, so the codes are kept without it.
    code_IxO = rounded.code_IxO - rounded.zero_GxO[:1] if scheme.has_full_range(kind) else rounded.code_IxO
    arrays = code_IxO, rounded.scale_GxO, rounded.zero_GxO
    integers = kind.family == "int"
    return encode(*arrays, scheme.symmetric, shape, rounded.row_scale_I, integers, scheme.group_size)
