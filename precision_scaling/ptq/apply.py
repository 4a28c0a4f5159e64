"""Post-training quantization of a whole decoder: layer by layer, each on inputs made by the quantized layers before it.

Stands between the methods for one kernel (`gptq`, `awq`, `rtn`) and `study`, which loads the parameters and evaluates.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling import compilation, quantize
from precision_scaling.model import Block, Decoder
from precision_scaling.ptq import awq, gptq, rtn
from precision_scaling.step import Static

# The projections of a block in the order in which data reaches them.
LINEARS = (("attention", "qkv"), ("attention", "out"), ("mlp", "gate_up"), ("mlp", "down"))


class Quantized(NamedTuple):
    """A decoder at each of K bit-widths."""

    params: Any  # leading axis K
    fell_back: jax.Array  # (K, layers, projections): the calibration statistics were unusable, so rounded to nearest
    damping: jax.Array  # (K, layers, projections), NaN where nothing was damped


def quantize_model(
    static: Static, params: Any, table: Any, tokens_NxS, bits_K, damping, *, method: str, batch_size: int
) -> Quantized:
    """The kernels of all blocks on the grids of `bits_K`; norms, embedding and head stay as they are.

    table: grids of the run's activations and attention, weights passing through. tokens_NxS: calibration text, N a
    multiple of batch_size. Every bit-width has its own stream of activations, made by what is quantized already.
    """
    return _compiled(static, method, batch_size)(params, table, tokens_NxS, bits_K, damping)


@functools.lru_cache(maxsize=16)
def _compiled(static: Static, method: str, batch_size: int):
    def quantize_at_all(params, table, tokens_NxS, bits_K, damping):
        layers = _as_multiplied(params["layers"]["block"], static.model.dtype)
        params = {**params, "layers": {"block": layers}}

        def at(bits):
            if method == "rtn":
                return _round_layers(layers, bits)
            return _calibrated_layers(static, method, params, table, tokens_NxS, bits, damping, batch_size)

        quantized, fell_back, used = jax.vmap(at)(bits_K)
        outer = {name: value for name, value in params.items() if name != "layers"}
        outer = jax.tree.map(lambda x: jnp.broadcast_to(x, (bits_K.shape[0], *x.shape)), outer)
        return Quantized({**outer, "layers": {"block": quantized}}, fell_back, used)

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


def _with_kernel(block: Any, linear: tuple[str, str], kernel) -> Any:
    module, name = linear
    old = block[module][name]["kernel"]
    return {**block, module: {**block[module], name: {"kernel": kernel.reshape(old.shape).astype(old.dtype)}}}


def _round_layers(layers: Any, bits):
    def block(params):
        for linear in LINEARS:
            kernel = params[linear[0]][linear[1]]["kernel"]
            params = _with_kernel(params, linear, rtn.quantize_kernel(_flat(kernel), bits))
        return params

    depth = jax.tree.leaves(layers)[0].shape[0]
    shape = (depth, len(LINEARS))
    return jax.vmap(block)(layers), jnp.zeros(shape, bool), jnp.full(shape, jnp.nan)


def _calibrated_layers(static: Static, method: str, params, table, tokens_NxS, bits, damping, batch_size: int):
    module = Block(static.model, static.program)
    embedded = Decoder(static.model, static.program).apply({"params": params}, tokens_NxS, table, method=Decoder.embed)

    def each(block, method, *streams_CxB):
        """A method of the block with these parameters, calibration batch by calibration batch."""
        return jax.lax.map(lambda batch: module.apply({"params": block}, *batch, method=method), streams_CxB)

    def statistics(x_CxBxSxI):
        """(Σ x xᵀ, mean |x|) in float32 over all tokens, x as the projection multiplies it: at the run's precision."""

        def add(total, x_BxSxI):
            x = quantize.on_grid(x_BxSxI, "a", static.program, table).astype(jnp.float32).reshape(-1, x_BxSxI.shape[-1])
            return (total[0] + jnp.matmul(x.T, x, precision="highest"), total[1] + jnp.sum(jnp.abs(x), axis=0)), None

        size = x_CxBxSxI.shape[-1]
        (hessian_IxI, magnitude_I), _ = jax.lax.scan(add, (jnp.zeros((size, size)), jnp.zeros(size)), x_CxBxSxI)
        return hessian_IxI, magnitude_I / (x_CxBxSxI.size // size)

    def solve(kernel, inputs_CxBxSxI):
        """(quantized kernel, whether it fell back, damping used)."""
        hessian_IxI, magnitude_I = statistics(inputs_CxBxSxI)
        if method == "awq":
            solution = awq.solve((kernel,), hessian_IxI, magnitude_I, bits[None])
            return solution.dequantized[0][0], solution.fell_back, jnp.nan
        solution = gptq.solve(kernel, hessian_IxI, bits[None], damping=damping)
        return solution.dequantized[0], solution.fell_back, solution.damping_used

    def layer(x_CxBxSxD, block):
        notes = []

        def quantized(block, linear, inputs_CxBxSxI):
            kernel, *note = solve(_flat(block[linear[0]][linear[1]]["kernel"]), inputs_CxBxSxI)
            notes.append(note)
            return _with_kernel(block, linear, kernel)

        with_table = lambda method: lambda block, *args: method(block, *args, table)
        inputs = each(block, Block.before_qkv, x_CxBxSxD)
        block = quantized(block, LINEARS[0], inputs)
        inputs = each(block, with_table(Block.before_out), inputs)
        block = quantized(block, LINEARS[1], inputs)
        x_CxBxSxD, inputs = each(block, with_table(Block.before_gate_up), x_CxBxSxD, inputs)
        block = quantized(block, LINEARS[2], inputs)
        inputs = each(block, with_table(Block.before_down), inputs)
        block = quantized(block, LINEARS[3], inputs)
        x_CxBxSxD = each(block, with_table(Block.after_down), x_CxBxSxD, inputs)
        fell_back, used = (jnp.stack(values) for values in zip(*notes, strict=True))
        return x_CxBxSxD, (block, fell_back, used)

    start_CxBxSxD = embedded.reshape(-1, batch_size, *embedded.shape[1:])
    return jax.lax.scan(layer, start_CxBxSxD, params["layers"]["block"])[1]
