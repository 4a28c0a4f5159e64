"""What quantizing a projection is expected to cost in loss, from the gradients of its outputs.

To second order, and with errors of different tokens and outputs taken as independent, outputs y that change by Δy add

    ΔL = 1/2 · 1/T · Σ_o G_o · Σ_t Δy_to²,   G_o = 1/T · Σ_t (∂ Σ L / ∂ y_to)²

nats per token over T tokens: G is the diagonal of the empirical Fisher matrix of the outputs, Σ_t Δy_to² = e_oᵀ H e_o
with the Hessian H = Σ x xᵀ of the inputs and the error e = W - Q of the kernel. Everything is measured on the model as
it is, before any of it is quantized, without the run's own precision of activations. Shapes are those of `apply`.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn

from precision_scaling.model.decoder import Block
from precision_scaling.model.decoder import Linear as Projection
from precision_scaling.numerics import formats
from precision_scaling.ptq import projection, statistics
from precision_scaling.ptq.activations import Stream
from precision_scaling.ptq.codes import dequantize
from precision_scaling.ptq.forward import forward
from precision_scaling.ptq.scheme import LINEARS, Linear, Scheme
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import compilation, files
from precision_scaling.runtime.sharding import Layout, split_batch, splitting
from precision_scaling.training.blocks import Blocks
from precision_scaling.training.step import StepConfig

PASSES = 2  # through all blocks: forward, and back
Gradients = dict[Linear, Any]  # G (O,) of each projection of a block


def write(path: Path, key: str, widths: Sequence[int], cost_LxPxK: np.ndarray) -> None:
    """Keeps what `measure` found. key: whatever it depends on, in words."""
    names = ["/".join(linear) for linear in LINEARS]
    record = {"key": key, "projections": names, "widths": list(widths), "loss": cost_LxPxK.tolist()}
    files.write_sealed(path, record, indent=None)


def read(path: Path, key: str, widths: Sequence[int]) -> np.ndarray | None:
    """What was kept under the same key at these widths, or None. A damaged file counts as none."""
    if not files.exists(path):
        return None
    try:
        found = files.read_sealed(path)
        if found["key"] != key or not set(widths) <= set(found["widths"]):
            return None
        return np.asarray(found["loss"], np.float64)[..., [found["widths"].index(width) for width in widths]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        logging.warning("%s is damaged (%s): it is measured again", path, error)
        return None


def measure(
    step_config: StepConfig,
    scheme: Scheme,
    layout: Layout,
    blocks: Blocks,
    tokens_CxBxS1: np.ndarray,
    damping: float,
    limit: float,
    done: Callable[[], Any],
) -> np.ndarray:
    """Expected loss, nats per token, that each projection adds at each of `scheme.widths`: (L, projections, K).

    limit: bytes of activations in memory; others are in files. done: is called PASSES times for each block.
    """
    step_config = StepConfig(step_config.model, UNQUANTIZED, step_config.optimizer)
    pieces, top, each = forward(step_config, layout), blocks.top(), limit / (blocks.depth + 1)
    starts = [pieces.starts(batch[:, :-1]) for batch in tokens_CxBxS1]
    streams = [Stream((pieces.embed(top, {}, batch[:, :-1]) for batch in tokens_CxBxS1), each)]
    for layer in range(blocks.depth):
        block, pairs = _block(step_config, blocks, layer), zip(streams[-1], starts, strict=True)
        streams.append(Stream((pieces.through(block, {}, *pair) for pair in pairs), each))
        done()
    back, tokens = _backward(step_config, layout), tokens_CxBxS1[..., 1:].size
    pairs = zip(streams.pop(), tokens_CxBxS1, strict=True)
    g = Stream((pieces.loss_gradient(top, {}, x, batch[:, 1:]) for x, batch in pairs), limit)
    found = []
    for layer in reversed(range(blocks.depth)):
        block, x, sums = _block(step_config, blocks, layer), streams.pop(), dict.fromkeys(LINEARS, jnp.zeros(()))

        def below(triples, block=block, sums=sums):
            for x_BxSxD, above_BxSxD, starts_BxS in triples:
                below_BxSxD, squares = back(block, x_BxSxD, above_BxSxD, starts_BxS)
                sums.update({linear: sums[linear] + squares[linear] for linear in LINEARS})
                yield below_BxSxD

        g = Stream(below(zip(x, g, starts, strict=True)), limit)
        gradients = {linear: sums[linear] / tokens for linear in LINEARS}
        found.append(_costs(step_config, scheme, layout, block, x, starts, gradients, damping, tokens))
        done()
    return np.asarray(found[::-1])


def _block(step_config: StepConfig, blocks: Blocks, layer: int) -> Any:
    return projection.as_multiplied(blocks.block(layer), step_config.model.dtype)


def _costs(
    step_config, scheme: Scheme, layout: Layout, block: Any, x: Stream, starts, gradients: Gradients, damping, tokens
):
    """(projections, K) of a block."""
    costs = []
    for linear in LINEARS:
        pairs = zip(x, starts, strict=True)
        inputs = (forward(step_config, layout).inputs(linear, block, {}, *pair) for pair in pairs)
        kernel = projection.kernel_of(block, linear)
        found = statistics.gather(step_config, layout, {}, kernel.shape[0], inputs)
        given = found if scheme.method.calibrated else None
        row = []
        for width in scheme.widths:
            fmt = formats.parse(width)
            solve = projection.solver(step_config, scheme, fmt.kind, linear, layout)
            codes, _ = solve(block, given, None, {}, jax.tree.map(jnp.asarray, fmt.grid()), damping)
            error_IxO = projection.flat(kernel - dequantize(codes))
            row.append(float(_expected(error_IxO, found.hessian_IxI, gradients[linear])) / tokens)
        costs.append(row)
    return costs


@jax.jit
def _expected(error_IxO, hessian_IxI, gradient_O):
    """1/2 Σ_o G_o e_oᵀ H e_o."""
    added_IxO = jnp.matmul(hessian_IxI, error_IxO, precision="highest")
    return 0.5 * jnp.sum(gradient_O * jnp.sum(error_IxO * added_IxO, axis=0))


@functools.lru_cache(maxsize=4)
def _backward(step_config: StepConfig, layout: Layout):
    """(block, x (B, S, D), gradient of what comes out, starts) -> (gradient of x, Σ over tokens of squares by
    projection)."""
    model, products = step_config.model, Products(UNQUANTIZED, {})

    def run(block, x_BxSxD, above_BxSxD, starts_BxS):
        def through(x_BxSxD, noise):
            def add(call, args, keywords, context):
                output, module = call(*args, **keywords), context.module
                linear = module.path[-2:]
                if isinstance(module, Projection) and context.method_name == "__call__" and linear in noise:
                    return output + noise[linear]
                return output

            with nn.intercept_methods(add):
                return Block(model).apply({"params": block}, x_BxSxD, products, starts_BxS)

        with splitting(layout):
            x_BxSxD, above_BxSxD = split_batch(x_BxSxD), split_batch(above_BxSxD)
            features = {linear: projection.kernel_of(block, linear).shape[1:] for linear in LINEARS}
            noise = {
                linear: jnp.zeros((*x_BxSxD.shape[:2], *shape), x_BxSxD.dtype) for linear, shape in features.items()
            }
            _, pull = jax.vjp(through, x_BxSxD, noise)
            below_BxSxD, by_linear = pull(above_BxSxD)
        squares = {
            linear: jnp.sum(jnp.square(g.astype(jnp.float32)), axis=(0, 1)).reshape(-1)
            for linear, g in by_linear.items()
        }
        return below_BxSxD, squares

    return compilation.jit(run)
