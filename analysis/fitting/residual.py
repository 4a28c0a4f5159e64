"""What a fit compares between prediction and measurement: the log of a loss, the loss itself, log δ, or log δ above a
noise floor.

A residual is a difference of compared values. Each kind has its transform, its slope (how noise in nats shows in it)
and its inverse (which measurement a residual stands for).
"""

import numpy as np

from analysis.table import FORMAT_COLUMNS, PRECISIONS, Table
from precision_scaling.errors import UserError

RESIDUALS = ("log_loss", "loss")
DELTA_RESIDUALS = ("log_delta", "log_loss", "floored")


class FloorError(UserError):
    """No noise floor of δ can be told from the table."""


def transform(kind: str, log_value, floor, xp=np):
    """The compared value of a prediction given by its log: of L for "log_loss" and "loss", of δ for the others."""
    if kind in ("log_loss", "log_delta"):
        return log_value
    value = xp.exp(log_value)
    return value if kind == "loss" else xp.arcsinh(value / (2 * floor))


def compared(kind: str, value: np.ndarray, floor: float) -> np.ndarray:
    """The compared value of a measurement in nats; of "floored", δ may be zero or negative."""
    if kind in ("log_loss", "log_delta"):
        return np.log(value)
    return value if kind == "loss" else np.arcsinh(value / (2 * floor))


def slope(kind: str, value: np.ndarray, floor: float) -> np.ndarray:
    """Derivative of the compared value by the measurement: a standard deviation in nats times this is one of it."""
    if kind == "loss":
        return np.ones(np.shape(value))
    if kind == "floored":
        return 1 / np.sqrt(value**2 + 4 * floor**2)
    return 1 / value


def measurement(kind: str, predicted: np.ndarray, residual: np.ndarray, floor: float) -> np.ndarray:
    """The measurement, in nats, that lies `residual` above a prediction in nats."""
    if kind in ("log_loss", "log_delta"):
        return predicted * np.exp(residual)
    if kind == "loss":
        return predicted + residual
    return 2 * floor * np.sinh(np.arcsinh(predicted / (2 * floor)) + residual)


def noise_floor(deltas: Table) -> float:
    """Standard deviation of δ over seeds at the most bits that were repeated: what is left of it where δ vanishes.

    deltas: rows after PTQ with `delta`. Rows that agree in everything but the seed are repeats. Raises FloorError where
    the table has none.
    """
    names = ["N", "D", *PRECISIONS, "P_post", *(name for names in FORMAT_COLUMNS.values() for name in names)]
    names += ["schedule", "ptq_options", "group_size"]
    codes = [np.unique(deltas[name].astype(str), return_inverse=True)[1].ravel() for name in names if name in deltas]
    group_n = np.unique(np.stack(codes), axis=1, return_inverse=True)[1].ravel()
    count = np.bincount(group_n)
    mean_n = (np.bincount(group_n, deltas["delta"]) / count)[group_n]
    for bits in sorted(set(deltas["P_post"][count[group_n] > 1]), reverse=True):
        here = (deltas["P_post"] == bits) & (count[group_n] > 1)
        freedom = np.sum(here) - len(set(group_n[here]))
        floor = float(np.sqrt(np.sum((deltas["delta"] - mean_n)[here] ** 2) / freedom))
        if floor > 0:
            return floor
    raise FloorError(
        "delta_residual = floored: no run is repeated with another seed, which would tell the noise of delta; give "
        "delta_floor, a number of nats"
    )
