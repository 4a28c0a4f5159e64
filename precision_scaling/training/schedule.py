"""Learning-rate schedules as data: one formula serves cosine, linear, constant and WSD, of any length, all traced.

`experiment` makes a run's `Schedule`; `step` asks it for the rate. Runs of different schedules share a compiled step.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

NAMES = ("cosine", "linear", "constant", "wsd")


class Schedule(NamedTuple):
    """Linear warm-up to the peak, the peak up to `decay_start`, then down to a fraction of it at `total_steps`.

    cosine: whether the way down is a half cosine; else it is a straight line. Scalars of a run, or one for each lane.
    """

    peak_lr: Any
    warmup_steps: Any
    decay_start: Any
    total_steps: Any
    cosine: Any


def of(name: str, peak_lr: float, total_steps: int, warmup_steps: int, decay_steps: int) -> Schedule:
    """The schedule of that name; decay_steps is for WSD (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395)."""
    decay_start = {"constant": total_steps, "wsd": total_steps - decay_steps}.get(name, warmup_steps)
    types = (np.float32, np.int32, np.int32, np.int32, np.bool_)
    values = (peak_lr, warmup_steps, decay_start, total_steps, name == "cosine")
    return Schedule(*(kind(value) for kind, value in zip(types, values, strict=True)))


def learning_rate(step, schedule: Schedule, final_fraction: float):
    """The rate of the update after `step` updates; the schedule ends at final_fraction of its peak."""
    s, step = schedule, jnp.asarray(step, jnp.float32)
    warmup = s.peak_lr * (step + 1) / s.warmup_steps
    progress = jnp.clip((step - s.decay_start) / jnp.maximum(s.total_steps - s.decay_start, 1), 0, 1)
    left = jnp.where(s.cosine, 0.5 * (1 + jnp.cos(math.pi * progress)), 1 - progress)
    return jnp.where(step < s.warmup_steps, warmup, s.peak_lr * (final_fraction + (1 - final_fraction) * left))
