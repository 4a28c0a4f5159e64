"""What calibration keeps of a projection's inputs: sums over all tokens, batch by batch.

Shape letters: B sequences, S positions, I inputs of the projection.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.numerics import elements
from precision_scaling.quantize.products import Products
from precision_scaling.runtime import compilation
from precision_scaling.runtime.sharding import Layout, split_batch, split_hessian, splitting
from precision_scaling.training.step import StepConfig


class Statistics(NamedTuple):
    """Of the inputs x over all calibration tokens, in float32."""

    hessian_IxI: jax.Array  # Σ x xᵀ
    magnitude_I: jax.Array  # mean |x|; while batches are added, Σ |x|
    largest_I: jax.Array  # max |x|


class Inherited(NamedTuple):
    """Of the inputs x beside those x₀ of the model as it was, over all calibration tokens, in float32."""

    cross_IxI: jax.Array  # Σ x (x₀ - x)ᵀ
    moment_IxI: jax.Array  # Σ (x₀ - x) (x₀ - x)ᵀ


def gather(step_config: StepConfig, layout: Layout, grids: Any, size: int, inputs: Iterable[Any]) -> Statistics:
    """Of inputs (B, S, I), batch by batch; size: I."""
    add_to, found, tokens = _adder(step_config, layout), nothing(size), 0
    for h_BxSxI in inputs:
        found = add_to(found, h_BxSxI, grids)
        tokens += h_BxSxI.shape[0] * h_BxSxI.shape[1]
    return found._replace(magnitude_I=found.magnitude_I / tokens)


def inherited(
    step_config: StepConfig, layout: Layout, grids: Any, size: int, inputs: Iterable[Any], originals: Iterable[Any]
) -> Inherited:
    """Of inputs beside those of the model as it was, batch by batch as in `gather`."""
    add_to = _inherited_adder(step_config, layout)
    found = Inherited(*(split_hessian(jnp.zeros((size, size))) for _ in Inherited._fields))
    for h_BxSxI, original_BxSxI in zip(inputs, originals, strict=True):
        found = add_to(found, h_BxSxI, original_BxSxI, grids)
    return found


def nothing(size: int) -> Statistics:
    """Of no inputs yet."""
    return Statistics(split_hessian(jnp.zeros((size, size))), jnp.zeros(size), jnp.zeros(size))


def add(products: Products, found: Statistics, h_BxSxI) -> Statistics:
    """The statistics with another batch, of x as the projection multiplies it: at the run's precision."""
    x = products.on_grid(split_batch(h_BxSxI), "a").astype(jnp.float32).reshape(-1, h_BxSxI.shape[-1])
    return Statistics(
        split_hessian(found.hessian_IxI + _gram(x)),
        found.magnitude_I + jnp.sum(jnp.abs(x), axis=0),
        jnp.maximum(found.largest_I, elements.abs_max(h_BxSxI.astype(jnp.float32), (0, 1))),
    )


@functools.lru_cache(maxsize=16)
def _adder(step_config: StepConfig, layout: Layout):
    """(Statistics, inputs (B, S, I), grids) -> Statistics with these."""

    def add_batch(found, h_BxSxI, grids):
        with splitting(layout):
            return add(Products(step_config.static, grids), found, h_BxSxI)

    return compilation.jit(add_batch, donate_argnums=0)


@functools.lru_cache(maxsize=16)
def _inherited_adder(step_config: StepConfig, layout: Layout):
    """(Inherited, inputs (B, S, I), those of the model as it was, grids) -> Inherited with these."""

    def add_batch(found, h_BxSxI, original_BxSxI, grids):
        products, size = Products(step_config.static, grids), h_BxSxI.shape[-1]
        with splitting(layout):
            both = (products.on_grid(split_batch(h), "a").astype(jnp.float32) for h in (h_BxSxI, original_BxSxI))
            x, before = (h.reshape(-1, size) for h in both)
            cross = found.cross_IxI + jnp.matmul(x.T, before - x, precision="highest")
            return Inherited(split_hessian(cross), split_hessian(found.moment_IxI + _gram(before - x)))

    return compilation.jit(add_batch, donate_argnums=0)


PANELS = 4  # of the columns of a wide x; those below the diagonal are not multiplied, 3/8 of the FLOPs


def _gram(x_NxI):
    """Σ x xᵀ of the rows x, in float32: symmetric, so the blocks below the diagonal are those above it."""
    width = x_NxI.shape[1]
    panels = PANELS if width >= 512 and width % PANELS == 0 else 1
    cut = [slice(i * width // panels, (i + 1) * width // panels) for i in range(panels)]
    above = [jnp.matmul(x_NxI[:, one].T, x_NxI[:, one.start :], precision="highest") for one in cut]

    def block(i, j):
        if j < i:
            return block(j, i).T
        return above[i][:, cut[j].start - cut[i].start : cut[j].stop - cut[i].start]

    return jnp.block([[block(i, j) for j in range(panels)] for i in range(panels)])
