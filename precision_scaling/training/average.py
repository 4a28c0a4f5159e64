"""Exponential moving averages of the parameters over the steps of a run, any number of them, beside the training.

They change nothing in the run. `study` evaluates and quantizes each as a run of its own, `Run.averaged`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def init(decays: tuple[float, ...], params: Any) -> tuple[Any, ...]:
    """An average for each decay, of no step yet."""
    return tuple(params for _ in decays)


def update(decays: tuple[float, ...], averages: tuple[Any, ...], params: Any, step) -> tuple[Any, ...]:
    """The averages when `params` are those after `step` updates, from 1.

    The mean of the parameters after updates 1 to t, that after i weighing d^(t-i): Σ d^(t-i) θ_i / Σ d^(t-i). It is the
    moving average that starts at 0, divided by 1 - d^t as in Adam (Kingma and Ba 2014, arXiv 1412.6980, section 3).
    """
    return tuple(_update(decay, average, params, step) for decay, average in zip(decays, averages, strict=True))


def _update(decay: float, average: Any, params: Any, step) -> Any:
    weight = (1 - decay) / -jnp.expm1(jnp.asarray(step, jnp.float32) * math.log(decay))
    return jax.tree.map(lambda mean, now: mean + weight * (now - mean), average, params)
