"""Post-training quantization of a whole decoder: layer by layer, each on inputs made by the quantized layers before it.

Stands between the methods for one kernel, which `registry` lists, and `study.ptq`, which loads the parameters and
evaluates. Shape letters: C calibration batches of B sequences, S positions, I inputs, O outputs, L layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.model.decoder import Block, Decoder
from precision_scaling.numerics import formats
from precision_scaling.ptq import rtn
from precision_scaling.ptq.codes import Codes, QuantizedModel, dequantize, encode
from precision_scaling.ptq.error import relative_output_error
from precision_scaling.ptq.scheme import Calibration, Rounded, Scheme
from precision_scaling.quantize.products import Products
from precision_scaling.runtime import compilation
from precision_scaling.runtime.sharding import Layout, split_batch, split_hessian, splitting
from precision_scaling.training.step import StepConfig

# The projections of a block in the order in which data reaches them.
LINEARS = (("attention", "qkv"), ("attention", "out"), ("mlp", "gate_up"), ("mlp", "down"))
# The norms whose gains can take a factor of the input of a projection.
NORMS = {("attention", "qkv"): "attention_norm", ("mlp", "gate_up"): "mlp_norm"}


class Report(NamedTuple):
    """What happened to each projection of each layer, at each of K bit-widths: arrays (K, L, projections).

    Errors are ‖X (W - Q)‖² / ‖X W‖² on the inputs X that the layers quantized before it make; NaN where nothing was
    calibrated.
    """

    fell_back: jax.Array  # the calibration statistics were unusable, so rounded to nearest
    damping: jax.Array  # NaN where nothing was damped
    error: jax.Array
    rtn_error: jax.Array  # of rounding to nearest on the same inputs


def quantize_model(
    step_config: StepConfig,
    params: Any,
    grids: Any,
    tokens_NxS,
    bits: Sequence[object],
    damping,
    *,
    scheme: Scheme,
    batch_size: int,
    layout: Layout,
) -> tuple[tuple[QuantizedModel, ...], Report]:
    """The decoder with the kernels of all blocks on the grids of each of the formats.

    step_config: with the static precision of `scheme.static`. grids: of the run's activations and attention, weights
    passing through; operands that the scheme quantizes need none. tokens_NxS: calibration text, N a multiple of
    batch_size. bits: bit-widths (2 to 8), or formats of one kind. layout: calibration batches and Hessians are sharded
    over its devices; a factorization gathers one Hessian.
    Every format has its own stream of activations, made by what is quantized already.
    """
    found = [formats.parse(b) for b in bits]
    (kind,) = {fmt.kind for fmt in found}
    levels_K = jax.tree.map(lambda *fields: jnp.stack(fields), *(fmt.grid() for fmt in found))
    quantize = _compiled(step_config, dataclasses.replace(scheme, format=""), kind, batch_size, layout)
    blocks, report = quantize(params, grids, tokens_NxS, levels_K, damping)
    models = []
    for k in range(len(bits)):
        kernels, block = jax.tree.map(lambda x, k=k: x[k], blocks)
        models.append(QuantizedModel(kernels, {**params, "layers": {"block": block}}))
    return tuple(models), jax.tree.map(np.asarray, report)


@functools.lru_cache(maxsize=16)
def _compiled(step_config: StepConfig, scheme: Scheme, kind: formats.Kind, batch_size: int, layout: Layout):
    method = scheme.method

    def quantize_at_all(params, grids, tokens_NxS, levels_K, damping):
        layers = _as_multiplied(params["layers"]["block"], step_config.model.dtype)
        params = {**params, "layers": {"block": layers}}

        def at(levels):
            if not (method.calibrated or method.input_scales):
                return _round_layers(scheme, layers, levels, kind)
            stream = params, {**grids, **dict.fromkeys(method.operands, levels)}, tokens_NxS
            return _calibrated_layers(step_config, scheme, *stream, levels, kind, damping, batch_size)

        # One after the other: they share nothing, and a stream of activations is the largest thing in memory.
        with splitting(layout):
            return jax.lax.map(at, levels_K)

    return compilation.jit(quantize_at_all)


def _as_multiplied(layers: Any, dtype: str) -> Any:
    """The kernels as the products see them, still in float32. In bfloat16 the grid of the float32 kernel is another one
    than training rounded to, and a model trained at the very precision would lose something."""
    info = jnp.finfo(dtype)

    def rounded(path, leaf):
        return jax.lax.reduce_precision(leaf, info.nexp, info.nmant) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(rounded, layers)


def _flat(kernel):
    """(in, *features) -> (in, out)."""
    return kernel.reshape(kernel.shape[0], -1)


def _kernel(block: Any, linear: tuple[str, str]):
    return block[linear[0]][linear[1]]["kernel"]


def _with_kernel(block: Any, linear: tuple[str, str], kernel) -> Any:
    module, name = linear
    return {**block, module: {**block[module], name: {"kernel": kernel}}}


def _split(block: Any, codes: dict[tuple[str, str], Codes]) -> tuple[dict[str, dict[str, Codes]], Any]:
    """(codes by module and name, the block's parameters without its kernels)."""
    kernels: dict[str, dict[str, Codes]] = {}
    for (module, name), found in codes.items():
        kernels.setdefault(module, {})[name] = found
    left = {
        module: {name: value for name, value in parameters.items() if (module, name) not in codes}
        for module, parameters in block.items()
    }
    return kernels, {module: parameters for module, parameters in left.items() if parameters}


def _encoded(scheme: Scheme, kind: formats.Kind, rounded: Rounded, shape: tuple[int, ...]) -> Codes:
    # The zero of all 2^b levels is the same everywhere, so the codes are kept without it.
    code_IxO = rounded.code_IxO - rounded.zero_GxO[:1] if scheme.has_full_range(kind) else rounded.code_IxO
    arrays = code_IxO, rounded.scale_GxO, rounded.zero_GxO
    return encode(*arrays, scheme.symmetric, shape, rounded.row_scale_I, integers=kind.family == "int")


def _round_layers(scheme: Scheme, layers: Any, levels: formats.Grid, kind: formats.Kind):
    """All layers at once, by a method that needs no calibration."""
    solve = scheme.method.solve
    assert solve is not None, "what leaves kernels alone is not applied"

    def block(params):
        kernels = {linear: _kernel(params, linear) for linear in LINEARS}
        return _split(params, {linear: rounded(kernel) for linear, kernel in kernels.items()})

    def rounded(kernel):
        return _encoded(scheme, kind, solve(_flat(kernel), levels, kind, scheme, None), kernel.shape)

    shape = (jax.tree.leaves(layers)[0].shape[0], len(LINEARS))
    unknown = jnp.full(shape, jnp.nan)
    return jax.vmap(block)(layers), Report(jnp.zeros(shape, bool), unknown, unknown, unknown)


def statistics(products: Products, x_CxBxSxI):
    """(Σ x xᵀ, mean |x|) in float32 over all tokens, x as the projection multiplies it: at the run's precision."""

    def add(total, x_BxSxI):
        x = products.on_grid(x_BxSxI, "a").astype(jnp.float32).reshape(-1, x_BxSxI.shape[-1])
        hessian_IxI = split_hessian(total[0] + jnp.matmul(x.T, x, precision="highest"))
        return (hessian_IxI, total[1] + jnp.sum(jnp.abs(x), axis=0)), None

    size = x_CxBxSxI.shape[-1]
    nothing = split_hessian(jnp.zeros((size, size))), jnp.zeros(size)
    (hessian_IxI, magnitude_I), _ = jax.lax.scan(add, nothing, x_CxBxSxI)
    return hessian_IxI, magnitude_I / (x_CxBxSxI.size // size)


def _move_scales(scheme: Scheme, block: Any, linear, inputs_CxBxSxI):
    """The method's factors moved from the norm before a projection into its kernel; and its inputs after that."""
    assert scheme.method.input_scales is not None
    kernel = _kernel(block, linear)
    largest_I = jnp.max(jnp.abs(inputs_CxBxSxI.astype(jnp.float32)), axis=(0, 1, 2))
    s_I, unusable = scheme.method.input_scales(largest_I, _flat(kernel), scheme)
    block = _with_kernel(block, linear, (_flat(kernel) * s_I[:, None]).reshape(kernel.shape))
    gain = block[NORMS[linear]]["scale"] / s_I
    inputs = (inputs_CxBxSxI / jnp.broadcast_to(s_I, inputs_CxBxSxI.shape)).astype(inputs_CxBxSxI.dtype)
    return {**block, NORMS[linear]: {"scale": gain}}, inputs, unusable


def _calibrated_layers(
    step_config: StepConfig,
    scheme: Scheme,
    params,
    grids,
    tokens_NxS,
    levels,
    kind: formats.Kind,
    damping,
    batch_size: int,
):
    method, module = scheme.method, Block(step_config.model)
    assert method.solve is not None, "what leaves kernels alone is not applied"
    solve = method.solve
    products = Products(step_config.static, grids)
    embedded: Any = Decoder(step_config.model).apply({"params": params}, tokens_NxS, products, method=Decoder.embed)

    def each(block, function, *streams_CxB):
        """A method of the block with these parameters, calibration batch by calibration batch."""
        apply = lambda batch: module.apply({"params": block}, *map(split_batch, batch), method=function)
        return jax.lax.map(apply, streams_CxB)

    multiplied = lambda function: lambda block, *args: function(block, *args, products)

    def branch_error(block, linear, inputs_CxBxSxI):
        """Of kernels that begin a branch (the whole attention or MLP), the squared error of what it adds."""
        nothing_CxBxSxD = jnp.zeros((*inputs_CxBxSxI.shape[:3], step_config.model.width), step_config.model.dtype)

        def added(block):
            if linear == LINEARS[0]:
                inputs = each(block, multiplied(Block.before_out), inputs_CxBxSxI)
                return each(block, multiplied(Block.before_gate_up), nothing_CxBxSxD, inputs)[0].astype(jnp.float32)
            inputs = each(block, multiplied(Block.before_down), inputs_CxBxSxI)
            return each(block, multiplied(Block.after_down), nothing_CxBxSxD, inputs).astype(jnp.float32)

        kernel, before = _kernel(block, linear), added(block)

        def objective(other_IxO):
            new = _with_kernel(block, linear, other_IxO.reshape(kernel.shape))
            return jnp.sum(jnp.square(added(new) - before))

        return objective

    def layer(x_CxBxSxD, block):
        codes, notes = {}, []

        def quantized(block, linear, inputs_CxBxSxI):
            """The block with this projection quantized, and its inputs."""
            unusable = jnp.asarray(False)
            if method.input_scales and linear in NORMS:
                block, inputs_CxBxSxI, unusable = _move_scales(scheme, block, linear, inputs_CxBxSxI)
            kernel = _kernel(block, linear)
            hessian_IxI, magnitude_I = statistics(products, inputs_CxBxSxI)
            begins = method.branch_error and linear in NORMS
            objective = branch_error(block, linear, inputs_CxBxSxI) if begins else None
            calibration = Calibration(hessian_IxI, magnitude_I, damping, objective)
            rounded = solve(_flat(kernel), levels, kind, scheme, calibration)
            codes[linear] = _encoded(scheme, kind, rounded, kernel.shape)
            new = dequantize(codes[linear])
            grid = scheme.group_size or None, scheme.symmetric, False, scheme.has_full_range(kind)
            plain = rtn.nearest(_flat(kernel), levels, kind, *grid)
            errors = (relative_output_error(_flat(kernel), q, hessian_IxI) for q in (_flat(new), plain))
            notes.append(Report(rounded.fell_back | unusable, rounded.damping, *errors))
            return _with_kernel(block, linear, new.astype(kernel.dtype)), inputs_CxBxSxI

        block, inputs = quantized(block, LINEARS[0], each(block, Block.before_qkv, x_CxBxSxD))
        inputs = each(block, multiplied(Block.before_out), inputs)
        block, inputs = quantized(block, LINEARS[1], inputs)
        x_CxBxSxD, inputs = each(block, multiplied(Block.before_gate_up), x_CxBxSxD, inputs)
        block, inputs = quantized(block, LINEARS[2], inputs)
        inputs = each(block, multiplied(Block.before_down), inputs)
        block, inputs = quantized(block, LINEARS[3], inputs)
        x_CxBxSxD = each(block, multiplied(Block.after_down), x_CxBxSxD, inputs)
        report = jax.tree.map(lambda *values: jnp.stack(values), *notes)
        return x_CxBxSxD, (_split(block, codes), report)

    start_CxBxSxD = embedded.reshape(-1, batch_size, *embedded.shape[1:])
    return jax.lax.scan(layer, start_CxBxSxD, params["layers"]["block"])[1]
