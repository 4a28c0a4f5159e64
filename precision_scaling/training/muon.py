"""Muon for the kernels of the blocks (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, made
orthogonal by Newton-Schulz iterations. `optimizer` has AdamW for the other parameters and applies rates and decay.

An update has the root mean square of an Adam update (Liu et al. 2025, arXiv 2502.16982), so that one rate serves both.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers

from precision_scaling.model.config import ModelConfig

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5  # of the Newton-Schulz iteration
RMS = 0.2  # root mean square of an update whose singular values are all 1, as that of Adam's updates
# Axes of inputs and outputs of a kernel, after that of the layers; of gate_up the axis between them tells two matrices
# apart. Queries, keys and values are three matrices, see `_split`.
_AXES = {
    **dict.fromkeys(("q", "k", "v"), MuonDimensionNumbers(1, (2, 3))),
    "out": MuonDimensionNumbers(1, 2),
    "gate_up": MuonDimensionNumbers(1, 3),
    "down": MuonDimensionNumbers(1, 2),
}


def scale_by_muon(beta: float, model: ModelConfig) -> optax.GradientTransformation:
    """From the gradients of the blocks' kernels, (L, inputs, outputs ...), to the directions of their updates.

    The state has a momentum for each kernel, in the same tree; for qkv there are three, see `_split`.
    """
    muon = optax.contrib.scale_by_muon(COEFFICIENTS, STEPS, beta, eps=1e-20, weight_dimension_numbers=_axes_of_tree)

    def init(kernels):
        return muon.init(_split(kernels, model))._replace(ns_coeffs=())  # constants, which no checkpoint needs

    def update(grads, state, params=None):
        state = state._replace(ns_coeffs=jnp.asarray(COEFFICIENTS))
        directions, state = muon.update(_split(grads, model), state)
        scaled = {name: RMS * math.sqrt(max(_matrix(name, x.shape))) * x for name, x in _flat(directions).items()}
        return _joined(scaled), state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)


def flops(kernels: Any, model: ModelConfig) -> int:
    """FLOPs of the iterations of one update; of one iteration on an m × n matrix, m <= n: 4 m² n + 2 m³."""
    total = 0
    for name, x in _flat(jax.eval_shape(lambda tree: _split(tree, model), kernels)).items():
        m, n = sorted(_matrix(name, x.shape))
        total += STEPS * (4 * m * m * n + 2 * m**3) * (math.prod(x.shape) // (m * n))
    return total


_flat = functools.partial(traverse_util.flatten_dict, sep="/")
_nested = functools.partial(traverse_util.unflatten_dict, sep="/")


def _axes(name: str) -> MuonDimensionNumbers:
    return _AXES[name.split("/")[-2]]


def _axes_of_tree(kernels: Any) -> Any:
    return _nested({name: _axes(name) for name in _flat(kernels)})


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(inputs, outputs) of each matrix in a kernel of that name."""
    size = lambda axes: math.prod(shape[i] for i in ((axes,) if isinstance(axes, int) else axes))
    return size(_axes(name).reduction_axis), size(_axes(name).output_axis)


def _split(kernels: Any, model: ModelConfig) -> Any:
    """The tree with qkv cut into the kernels of queries, keys and values."""
    parts: dict[str, Any] = {}
    for name, x in _flat(kernels).items():
        if "/qkv/" in name:
            cut = jnp.split(x, (model.heads, model.heads + model.key_heads), axis=2)
            parts |= {name.replace("/qkv/", f"/qkv/{part}/"): one for part, one in zip("qkv", cut, strict=True)}
        else:
            parts[name] = x
    return _nested(parts)


def _joined(parts: dict[str, Any]) -> Any:
    """The tree that `_split` has cut, from its flat form."""
    kernels = {name: x for name, x in parts.items() if "/qkv/" not in name}
    for name in (name for name in parts if "/qkv/q/" in name):
        cut = [parts[name.replace("/qkv/q/", f"/qkv/{part}/")] for part in "qkv"]
        kernels[name.replace("/qkv/q/", "/qkv/")] = jnp.concatenate(cut, axis=2)
    return _nested(kernels)
