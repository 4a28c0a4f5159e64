"""One training step, many steps in one dispatch, and evaluation: pure functions, written for one run.

A cohort is the `vmap` of these over runs (see `cohort`). Everything that may differ between runs of one shape is data:
the grids of its number formats, its peak rate and its length.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.model import decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Decoder
from precision_scaling.quantize import aqt
from precision_scaling.quantize.static import StaticPrecision
from precision_scaling.runtime import sharding
from precision_scaling.training import average
from precision_scaling.training import optimizer as optimizer_lib
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.schedule import Schedule, learning_rate


class TrainState(NamedTuple):
    """What a step changes. averages: of the parameters, one for each decay of the optimizer's config."""

    step: jax.Array
    params: Any
    optimizer: Any
    averages: tuple[Any, ...] = ()


class RunInputs(NamedTuple):
    """What may differ between the runs of a cohort, all traced: grids per operand, the schedule, and the run's seed.

    seed: of stochastic rounding; not needed where everything rounds to nearest.
    """

    grids: Any
    schedule: Schedule
    seed: jax.typing.ArrayLike | None = None


class StepMetrics(NamedTuple):
    """Scalars of one step: training loss (nats per token), global gradient norm before clipping, learning rate."""

    loss: jax.Array
    grad_norm: jax.Array
    rate: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a compiled step is keyed by."""

    model: ModelConfig
    static: StaticPrecision
    optimizer: OptimizerConfig
    microbatches: int = 1


def init_state(config: StepConfig, seed) -> TrainState:
    """Fresh state of one run; `seed` may be traced."""
    params = decoder.initial(config.model, jax.random.key(seed))
    optimizer = optimizer_lib.init(config.optimizer, config.model, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer, average.init(config.optimizer.ema, params))


def rounding_key(config: StepConfig, seed, step) -> jax.Array | None:
    """The key of one step's stochastic rounding, made of the run's seed and the step; None where none is needed."""
    if not config.static.stochastic:
        return None
    # 1: initialization uses the seed's own key.
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def loss_fn(params: Any, config: StepConfig, grids: Any, tokens_BxS1, key: jax.Array | None = None) -> jax.Array:
    """Mean cross-entropy in nats per token of predicting tokens[:, 1:] from tokens[:, :-1]."""
    return _objective(params, config, grids, tokens_BxS1, key, z_loss=0.0)[1]


def _objective(params: Any, config: StepConfig, grids: Any, tokens_BxS1, key, z_loss: float) -> Any:
    """(what is minimized, the mean cross-entropy in it)."""
    model = Decoder(config.model, config.static)
    return model.apply({"params": params}, tokens_BxS1, grids, key, z_loss, method=Decoder.losses)


def _loss_and_grads(config: StepConfig, params: Any, grids: Any, tokens, key):
    """Loss and gradients of a batch; with microbatches, their means over the parts, one part in memory at a time."""

    def grad_fn(*args):
        with sharding.summing_gradients(config.optimizer.gradient_sum):
            (_, loss), grads = jax.value_and_grad(_objective, has_aux=True)(*args, config.optimizer.z_loss)
        return loss, grads

    tokens_MxBxS1 = tokens.reshape(config.microbatches, -1, tokens.shape[-1])
    if config.microbatches == 1:
        return grad_fn(params, config, grids, tokens_MxBxS1[0], key)

    def add(total, part):
        i, tokens = part
        now = grad_fn(params, config, grids, tokens, aqt.fold_in(key, i))
        return jax.tree.map(jnp.add, total, now), None

    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    total, _ = jax.lax.scan(add, zero, (jnp.arange(config.microbatches), tokens_MxBxS1))
    return jax.tree.map(lambda x: x / config.microbatches, total)


def train_step(config: StepConfig, state: TrainState, inputs: RunInputs, tokens) -> tuple[TrainState, StepMetrics]:
    """One update of one run. tokens: the batch, (B, S+1), or cut into its microbatches, (M, B/M, S+1)."""
    key = rounding_key(config, inputs.seed, state.step)
    loss, grads = _loss_and_grads(config, state.params, inputs.grids, tokens, key)
    rate = learning_rate(state.step, inputs.schedule, config.optimizer.final_fraction)
    params, optimizer = optimizer_lib.update(config.optimizer, config.model, grads, state.optimizer, state.params, rate)
    grad_norm = optimizer_lib.global_norm(grads)
    averages = average.update(config.optimizer.ema, state.averages, params, state.step + 1)
    return TrainState(state.step + 1, params, optimizer, averages), StepMetrics(loss, grad_norm, rate)


def train_chunk(config: StepConfig, state: TrainState, inputs: RunInputs, fetch, steps, max_steps: int):
    """`steps` (traced, at most `max_steps`) updates of every run of a cohort in one dispatch.

    state and inputs have a leading axis R, and so have the tokens of the chunk's step t that `fetch(t)` gives.
    Returns the state and StepMetrics of shape (R, max_steps), NaN past `steps`.
    """
    runs = state.step.shape[0]
    vmapped_step = jax.vmap(functools.partial(train_step, config), spmd_axis_name="run")
    empty = StepMetrics(*(jnp.full((runs, max_steps), jnp.nan) for _ in StepMetrics._fields))

    def body(t, carry):
        state, metrics = carry
        state, now = vmapped_step(state, inputs, fetch(t))
        return state, jax.tree.map(lambda all_, one: all_.at[:, t].set(one), metrics, now)

    return jax.lax.fori_loop(0, steps, body, (state, empty))


def validation_loss(config: StepConfig, params: Any, grids: Any, tokens_NxBxS1) -> jax.Array:
    """Mean cross-entropy in nats per token over N batches, one after the other.

    Operands round to nearest here, whatever the training step does.
    """
    config = dataclasses.replace(config, static=config.static.evaluation())
    return jnp.mean(jax.lax.map(lambda tokens: loss_fn(params, config, grids, tokens), tokens_NxBxS1))
