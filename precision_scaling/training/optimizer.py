"""AdamW and depth-µP. Used by `step`, at the rate that the run's `schedule` gives."""

import dataclasses
import functools
import re
from typing import Any

import jax
import optax

from precision_scaling.model.config import ModelConfig

# Depth-µP for Adam (Yang et al. 2023, arXiv 2310.02244, table 1): (regex on the parameter's path, power of width / base
# width, power of depth / base depth) of the learning rate. The first match counts; no match means no scaling.
RATE_POWERS = ((r"layers/.*kernel", -1.0, -0.5),)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of AdamW that are the same for every run of a study.

    decay_pattern: regex on the paths of the parameters that weight decay acts on. z_loss: weight of mean(log² Z) in the
    training loss (PaLM, arXiv 2204.02311), Z the softmax's normalizer.
    """

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    final_fraction: float
    decay_pattern: str = "kernel|embedding"
    z_loss: float = 0.0


_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def parameter_names(params: Any) -> list[str]:
    """What `decay_pattern` is searched in."""
    return [_path(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)]


def rate_multipliers(params: Any, model: ModelConfig) -> Any:
    """Learning-rate multiplier of every parameter, a tree of floats."""

    def multiplier(key_path, _):
        for pattern, width_power, depth_power in RATE_POWERS:
            if re.search(pattern, _path(key_path)):
                return (model.width / model.base_width) ** width_power * (model.depth / model.base_depth) ** depth_power
        return 1.0

    return jax.tree_util.tree_map_with_path(multiplier, params)


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
        if re.search(config.decay_pattern, _path(key_path)):
            delta = delta + config.weight_decay * param
        return param - rate * multiplier * delta

    params = jax.tree_util.tree_map_with_path(apply, params, direction, rate_multipliers(params, model))
    return params, state
