"""A decoder's forward pass cut at the inputs of its projections, each piece compiled once for all blocks.

Calibration and evaluation after training go through it batch by batch and block by block: in memory are one block and
the residual streams of the batches. A block goes through the same pieces whether it was quantized just now or read from
disk, so a command that was killed goes on to the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_scaling.model import documents
from precision_scaling.model.decoder import Block, Decoder
from precision_scaling.ptq.scheme import DOWN, GATE_UP, QKV, Linear
from precision_scaling.quantize.products import Products
from precision_scaling.runtime import compilation
from precision_scaling.runtime.sharding import Layout, split_batch, splitting
from precision_scaling.training.step import StepConfig


class Forward(NamedTuple):
    """The pieces. block: parameters of one block; top: those outside of the blocks; grids: of the operands.

    Activations of a batch: x (B, S, D) is the residual stream, h (B, S, I) the input of a projection. starts (B, S): of
    the documents that attention stays in; None where it reads whole windows.
    """

    starts: Callable[..., Any]  # (tokens (B, S)) -> starts
    embed: Callable[..., Any]  # (top, grids, tokens (B, S)) -> x
    before_qkv: Callable[..., Any]  # (block, grids, x) -> h
    before_out: Callable[..., Any]  # (block, grids, h of qkv, starts) -> h
    after_out: Callable[..., Any]  # (block, grids, x, h of out) -> x after attention
    before_gate_up: Callable[..., Any]  # (block, grids, x after attention) -> h
    before_down: Callable[..., Any]  # (block, grids, h of gate_up) -> h
    after_down: Callable[..., Any]  # (block, grids, x after attention, h of down) -> x
    loss: Callable[..., Any]  # (top, grids, x, next tokens (B, S)) -> mean loss in nats per token
    loss_gradient: Callable[..., Any]  # (the same) -> gradient of the sum of the tokens' losses with respect to x

    def inputs(self, linear: Linear, block: Any, grids: Any, x_BxSxD, starts_BxS):
        """The input of a projection of a block."""
        h_BxSxI = self.before_qkv(block, grids, x_BxSxD)
        if linear != QKV:
            h_BxSxI = self.before_out(block, grids, h_BxSxI, starts_BxS)
        if linear in (GATE_UP, DOWN):
            h_BxSxI = self.before_gate_up(block, grids, self.after_out(block, grids, x_BxSxD, h_BxSxI))
        return self.before_down(block, grids, h_BxSxI) if linear == DOWN else h_BxSxI

    def through(self, block: Any, grids: Any, x_BxSxD, starts_BxS):
        """The residual stream of a batch after a block."""
        h_BxSxI = self.before_out(block, grids, self.before_qkv(block, grids, x_BxSxD), starts_BxS)
        x_BxSxD = self.after_out(block, grids, x_BxSxD, h_BxSxI)
        h_BxSxI = self.before_down(block, grids, self.before_gate_up(block, grids, x_BxSxD))
        return self.after_down(block, grids, x_BxSxD, h_BxSxI)


@functools.lru_cache(maxsize=16)
def forward(step_config: StepConfig, layout: Layout) -> Forward:
    """The pieces of a decoder, batches sharded over the devices of the layout."""
    model, static = step_config.model, step_config.static

    def compiled(piece):
        def run(params, grids, *batch):
            with splitting(layout):
                return piece(params, Products(static, grids), *jax.tree.map(split_batch, batch))

        return compilation.jit(run)

    def of_block(method, takes_products=True):
        def piece(block, products, *batch):
            return Block(model).apply({"params": block}, *batch, *[products] * takes_products, method=method)

        return compiled(piece)

    def before_out(block, products, h_BxSxD, starts_BxS):
        return Block(model).apply({"params": block}, h_BxSxD, products, starts_BxS, method=Block.before_out)

    def embed(top, products, tokens_BxS):
        return Decoder(model, static).apply({"params": top}, tokens_BxS, products, method=Decoder.embed)

    def loss(top, products, x_BxSxD, next_BxS):
        def mean(x_BxSxD, next_BxS):
            logits = Decoder(model, static).apply({"params": top}, x_BxSxD, products, method=Decoder.unembed)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, next_BxS))

        if static.get("head_a") is not None or layout.mesh.size > 1:  # a scale may be shared by the batch
            return mean(x_BxSxD, next_BxS)
        # One sequence after the other: logits are the largest array of all.
        return jnp.mean(jax.lax.map(lambda one: mean(one[0][None], one[1][None]), (x_BxSxD, next_BxS)))

    def loss_gradient(top, products, x_BxSxD, next_BxS):
        return jax.grad(lambda x_BxSxD: next_BxS.size * loss(top, products, x_BxSxD, next_BxS))(x_BxSxD)

    return Forward(
        starts=lambda tokens_BxS: documents.starts(model, tokens_BxS),
        embed=compiled(embed),
        before_qkv=of_block(Block.before_qkv, takes_products=False),
        before_out=compiled(before_out),
        after_out=of_block(Block.after_out),
        before_gate_up=of_block(Block.before_gate_up, takes_products=False),
        before_down=of_block(Block.before_down),
        after_down=of_block(Block.after_down),
        loss=compiled(loss),
        loss_gradient=compiled(loss_gradient),
    )
