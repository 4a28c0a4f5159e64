"""From chosen rows and free parameters to the numerical problem that the solver minimizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from analysis import laws
from analysis.fitting.levenberg_marquardt import Problem
from analysis.fitting.options import Options
from analysis.fitting.parameters import to_theta
from analysis.fitting.residual import OF_DELTA, compared, slope, transform
from analysis.fitting.rows import Chosen
from analysis.laws.law import Law


@dataclasses.dataclass(frozen=True)
class Prediction:
    """theta_F -> what the residuals compare of rows before PTQ, then of those after it (analysis/fitting/residual.py).

    Hashable, so shapes compile once.
    """

    law: Law
    free: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]
    residual: str = "log_loss"
    delta_residual: str = "log_delta"

    def __call__(self, theta_F, data):
        params = dict(data["constants"])
        for i, name in enumerate(self.free):
            params[name] = jnp.exp(theta_F[i]) if self.law.parameter(name).log else theta_F[i]
        for follower, leader in self.tied:
            params[follower] = params[leader]
        blocks = []
        if "loss" in data:
            blocks.append(transform(self.residual, self.law.log_loss(params, data["loss"], jnp), None, jnp))
        if "delta" in data:
            log_delta = self.law.log_delta(params, data["delta"], jnp)
            if self.delta_residual == "log_loss":
                log_served = jnp.log(data["before"] + jnp.exp(log_delta))
                blocks.append(transform(self.residual, log_served, None, jnp))
            else:
                blocks.append(transform(self.delta_residual, log_delta, data.get("floor"), jnp))
        return jnp.concatenate(blocks) * data["scale"]


def problem_of(
    law: Law,
    free: tuple[str, ...],
    constants: Mapping[str, float],
    tied: Mapping[str, str],
    chosen: Chosen,
    options: Options,
    floor: float | None,
) -> Problem:
    """The regression of the chosen rows on the free parameters."""
    delta_residual = options.delta_residual_of(law)
    kinds = (options.residual, options.residual if delta_residual == "log_loss" else delta_residual)
    data: dict[str, Any] = {"constants": {k: np.float64(v) for k, v in constants.items()}}
    target, noise = [], []
    for name, rows, kind in zip(("loss", "delta"), (chosen.loss, chosen.delta), kinds, strict=True):
        if rows is None:
            continue
        data[name] = laws.complete_columns(law, rows.columns)
        of_delta = kind in OF_DELTA
        value = rows["delta"] if of_delta else rows["loss"]
        target.append(compared(kind, value, floor))
        if options.sigma_column:
            noise.append(rows[options.sigma_column] * slope(kind, value, floor))
        if name == "delta" and not of_delta:
            data["before"] = rows["loss_before"]
    if floor is not None:
        data["floor"] = np.float64(floor)
    target_n = np.concatenate(target)
    noise_n = np.concatenate(noise) if noise else np.ones(len(target_n))
    data["scale"] = np.median(noise_n) / noise_n
    params = [law.parameter(name) for name in free]
    lower, upper = (np.array([to_theta(p, getattr(p, side)) for p in params]) for side in ("lower", "upper"))
    return Problem(
        Prediction(law, free, tuple(tied.items()), options.residual, delta_residual),
        data,
        target_n * data["scale"],
        lower,
        upper,
        np.array([1.0 if p.log else (p.upper - p.lower) / 30 for p in params]),
        np.inf if options.loss == "least_squares" else options.huber_delta,
    )
