"""The error of the residual stream after each quantized layer, split into the layer's own and what it inherited.

`layer_stats` writes it beside a run. Shape letters: C batches, B sequences, S positions, D width, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.model import documents
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block, Decoder
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import StaticPrecision, by_layer
from precision_scaling.runtime import compilation

COLUMNS = ("layer", "incoming", "inherited", "own", "total", "inherited_share")


class Errors(NamedTuple):
    """Sums over all elements of the residual stream, (L,) each.

    With x and y the stream before and after a layer of the unquantized model, and x_q the stream before it when all
    layers before it, and the embedding, are quantized:
    """

    before: Any  # Σ x²
    after: Any  # Σ y²
    incoming: Any  # Σ (x_q - x)²
    inherited: Any  # Σ (layer(x_q) - y)²: only the layers before are quantized
    own: Any  # Σ (quantized(x) - y)²: only this layer is
    total: Any  # Σ (quantized(x_q) - y)²: both are


def measure(config: ModelConfig, static: StaticPrecision, params: Any, grids: Any, tokens_CxBxS) -> Errors:
    """Of every layer, over all batches; scales of activations are those of each batch, as in evaluation."""
    found = _compiled(config, static)(params, grids, tokens_CxBxS)
    return Errors(*(np.asarray(field, np.float64).sum(axis=0) for field in found))


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, static: StaticPrecision):
    block = Block(config)

    def layer(starts_BxS, streams, of_block):
        (x, x_q), (params, grids) = streams, of_block
        exact = lambda x: block.apply({"params": params}, x, Products(), starts_BxS)
        quantized = lambda x: block.apply({"params": params}, x, Products(static, grids), starts_BxS)
        y, y_q = exact(x), quantized(x_q)
        square = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))
        error = lambda one, other: square(one.astype(jnp.float32) - other.astype(jnp.float32))
        of_layer = square(x), square(y), error(x_q, x), error(exact(x_q), y), error(quantized(x), y), error(y_q, y)
        return (y, y_q), Errors(*of_layer)

    def errors(params, grids, tokens_CxBxS):
        def of_batch(tokens_BxS):
            embed = functools.partial(Decoder(config).apply, {"params": params}, tokens_BxS, method=Decoder.embed)
            streams = embed(Products()), embed(Products(static, grids))
            blocks = params["layers"]["block"], by_layer(grids, config.depth)
            return jax.lax.scan(functools.partial(layer, documents.starts(config, tokens_BxS)), streams, blocks)[1]

        return jax.lax.map(of_batch, tokens_CxBxS)

    return compilation.jit(errors)


def rows(found: Errors) -> list[dict[str, Any]]:
    """A row with `COLUMNS` for each layer.

    Errors over the size of the stream, before the layer for `incoming` and after it for the others; the inherited share
    of inherited + own, None where there is neither.
    """
    lines = []
    for layer, (before, after, incoming, inherited, own, total) in enumerate(zip(*found, strict=True)):
        both = inherited + own
        share = inherited / both if both else None
        values = layer, incoming / before, inherited / after, own / after, total / after, share
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return lines
