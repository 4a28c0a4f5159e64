"""AdamW, or Muon with AdamW, as `parametrization` scales it. Used by `step`, at the rate of the run's `schedule`."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import traverse_util

from precision_scaling.model import decoder
from precision_scaling.model.accounting import bytes_of
from precision_scaling.model.config import ModelConfig
from precision_scaling.training import muon, parametrization
from precision_scaling.training.parametrization import Multipliers, is_block_kernel

NAMES = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of the optimizer that are the same for every run of a study.

    decay_pattern: regex on the paths of the parameters that weight decay acts on. z_loss: weight of mean(log² Z) in the
    training loss (PaLM, arXiv 2204.02311), Z the softmax's normalizer. name: of NAMES; "muon" has Muon for the kernels
    of the blocks, with the momentum muon_beta, and AdamW for all else. embedding_rate, head_rate, vector_rate: rates of
    the embedding, of the head, and of norm gains and biases as multiples of the schedule's. gradient_sum: dtype
    in which devices add up the gradients of kernels. ema: decays of the averages of
    the parameters that are kept, see `average`.
    """

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    final_fraction: float
    decay_pattern: str = "kernel|embedding"
    z_loss: float = 0.0
    name: str = "adamw"
    muon_beta: float = 0.95
    embedding_rate: float = 1.0
    head_rate: float = 1.0
    vector_rate: float = 1.0
    gradient_sum: str = "float32"
    ema: tuple[float, ...] = ()


_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def parameter_names(params: Any) -> list[str]:
    """What `decay_pattern` is searched in."""
    return [_path(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)]


def rate_multipliers(config: OptimizerConfig, model: ModelConfig, params: Any) -> Any:
    """Learning-rate multiplier of every parameter, a tree of floats."""
    own = {"embedding/embedding": config.embedding_rate, "head/kernel": config.head_rate}

    def multiplier(key_path, _):
        name = _path(key_path)
        return _scaled(config, model, name).rate * (1.0 if is_block_kernel(name) else own.get(name, config.vector_rate))

    return jax.tree_util.tree_map_with_path(multiplier, params)


def _scaled(config: OptimizerConfig, model: ModelConfig, name: str) -> Multipliers:
    return parametrization.multipliers(model, config.name, name)


def _direction(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    """From gradients to the directions of the updates, before rates and weight decay."""
    scale = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "muon":
        scale = _for_kernels(muon.scale_by_muon(config.muon_beta, model), scale)
    if model.parametrization == "completep":
        scale = _with_epsilons(scale, lambda name: _scaled(config, model, name).epsilon)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(), scale)


def _with_epsilons(inner: optax.GradientTransformation, times: Callable[[str], float]) -> optax.GradientTransformation:
    """Adam whose epsilon is `times` of the parameter's name as large there: the same as one of larger gradients."""
    scaled = lambda key_path, grad: grad / times(_path(key_path))

    def update(grads, state, params=None):
        return inner.update(jax.tree_util.tree_map_with_path(scaled, grads), state, params)

    return optax.GradientTransformation(inner.init, update)


def _for_kernels(
    of_kernels: optax.GradientTransformation, of_others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The one for the kernels of the blocks, the other for all else; the state has a part for each."""

    def init(params):
        kernels, others = _parted(params)
        return {"kernels": of_kernels.init(kernels), "others": of_others.init(others)}

    def update(grads, state, params=None):
        kernels, others = _parted(grads)
        kernels, kernels_state = of_kernels.update(kernels, state["kernels"])
        others, others_state = of_others.update(others, state["others"])
        return _merged(kernels, others), {"kernels": kernels_state, "others": others_state}

    return optax.GradientTransformation(init, update)


def _parted(params: Any) -> tuple[Any, Any]:
    """(kernels of the blocks, all else), two trees with the names of the one."""
    flat = traverse_util.flatten_dict(params)
    of_blocks = {name for name in flat if is_block_kernel("/".join(name))}
    part = lambda wanted: traverse_util.unflatten_dict({k: x for k, x in flat.items() if (k in of_blocks) == wanted})
    return part(True), part(False)


def _merged(*trees: Any) -> Any:
    return traverse_util.unflatten_dict({k: x for tree in trees for k, x in traverse_util.flatten_dict(tree).items()})


global_norm = optax.tree.norm


def init(config: OptimizerConfig, model: ModelConfig, params: Any) -> Any:
    """Optimizer state for `params`."""
    return _direction(config, model).init(params)


def update(config: OptimizerConfig, model: ModelConfig, grads: Any, state: Any, params: Any, rate) -> tuple[Any, Any]:
    """(parameters, state) after one update at `rate`; weight decay is decoupled and scaled by the rate."""
    direction, state = _direction(config, model).update(grads, state, params)

    def apply(key_path, param, delta, multiplier):
        if re.search(config.decay_pattern, _path(key_path)):
            delta = delta + config.weight_decay * _scaled(config, model, _path(key_path)).decay * param
        return param - rate * multiplier * delta

    params = jax.tree_util.tree_map_with_path(apply, params, direction, rate_multipliers(config, model, params))
    return params, state


@functools.cache
def cost(config: OptimizerConfig, model: ModelConfig) -> tuple[int, int]:
    """(bytes of a run's state, averages included; FLOPs of an update's products, which Muon alone has)."""
    params = decoder.abstract(model)
    state = jax.eval_shape(functools.partial(init, config, model), params)
    state = (params, state, *(params for _ in config.ema))
    held = bytes_of(state)
    return held, muon.flops(_parted(params)[0], model) if config.name == "muon" else 0
