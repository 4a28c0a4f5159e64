"""AdamW, the learning-rate schedule and depth-µP, with everything that may differ between runs traced.

Used by `step`; the schedule is a function of traced (step, total steps, warm-up steps, peak rate), so that runs of
different length share one compiled program.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from precision_scaling.model import ModelConfig

# Depth-µP for Adam (Yang et al. 2023, arXiv 2310.02244, table 1): (regex on the parameter's path, power of width / base
# width, power of depth / base depth) of the learning rate. The first match counts; no match means no scaling.
RATE_POWERS = ((r"layers/.*kernel", -1.0, -0.5),)
# Parameters that weight decay acts on: the matrices, not the norms' gains.
DECAYED = r"kernel|embedding"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of AdamW that are the same for every run of a study."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    final_fraction: float


def _path(key_path) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in key_path)


def rate_multipliers(params: Any, model: ModelConfig) -> Any:
    """Learning-rate multiplier of every parameter, a tree of floats."""

    def multiplier(key_path, _):
        for pattern, width_power, depth_power in RATE_POWERS:
            if re.search(pattern, _path(key_path)):
                return (model.width / model.base_width) ** width_power * (model.depth / model.base_depth) ** depth_power
        return 1.0

    return jax.tree_util.tree_map_with_path(multiplier, params)


def learning_rate(step, total_steps, warmup_steps, peak_rate, final_fraction: float):
    """Linear warm-up to the peak over `warmup_steps`, then a cosine to final_fraction of it at `total_steps`.

    step counts updates done, from 0; every argument but the last may be traced.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = peak_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1)
    cosine = peak_rate * (
        final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(progress, 0, 1)))
    )
    return jnp.where(step < warmup_steps, warmup, cosine)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    )


global_norm = optax.tree.norm


def init(config: OptimizerConfig, params: Any) -> Any:
    """Optimizer state for `params`."""
    return _adam(config).init(params)


def update(config: OptimizerConfig, model: ModelConfig, grads: Any, state: Any, params: Any, rate) -> tuple[Any, Any]:
    """(parameters, state) after one AdamW update at `rate`; weight decay is decoupled and scaled by the rate."""
    direction, state = _adam(config).update(grads, state, params)

    def apply(key_path, param, delta, multiplier):
        if re.search(DECAYED, _path(key_path)):
            delta = delta + config.weight_decay * param
        return param - rate * multiplier * delta

    params = jax.tree_util.tree_map_with_path(apply, params, direction, rate_multipliers(params, model))
    return params, state
