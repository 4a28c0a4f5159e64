"""What a fit compares between prediction and measurement: the log of a loss, the loss itself, log δ, or log δ above a
noise floor.

A residual is a difference of compared values. Each kind has its transform, its slope (how noise in nats shows in it)
and its inverse (which measurement a residual corresponds to).
"""

import numpy as np

RESIDUALS = ("log_loss", "loss")
DELTA_RESIDUALS = ("log_delta", "log_loss", "floored")
OF_DELTA = ("log_delta", "floored")  # those that compare δ itself, not the loss as served


def transform(kind: str, log_value, floor, xp=np):
    """The compared value of a prediction given by its log: of L for "log_loss" and "loss", of δ for the others."""
    if kind in ("log_loss", "log_delta"):
        return log_value
    value = xp.exp(log_value)
    return value if kind == "loss" else xp.arcsinh(value / _unit(floor))


def compared(kind: str, value: np.ndarray, floor: float | None) -> np.ndarray:
    """The compared value of a measurement in nats; of "floored", δ may be zero or negative."""
    if kind in ("log_loss", "log_delta"):
        return np.log(value)
    return value if kind == "loss" else np.arcsinh(value / _unit(floor))


def slope(kind: str, value: np.ndarray, floor: float | None) -> np.ndarray:
    """Derivative of the compared value by the measurement: a standard deviation in nats times this is one of it."""
    if kind == "loss":
        return np.ones(np.shape(value))
    if kind == "floored":
        return 1 / np.sqrt(value**2 + _unit(floor) ** 2)
    return 1 / value


def measurement(kind: str, predicted: np.ndarray, residual: np.ndarray, floor: float | None) -> np.ndarray:
    """The measurement, in nats, that lies `residual` above a prediction in nats."""
    if kind in ("log_loss", "log_delta"):
        return predicted * np.exp(residual)
    if kind == "loss":
        return predicted + residual
    return _unit(floor) * np.sinh(np.arcsinh(predicted / _unit(floor)) + residual)


def _unit(floor):
    """What δ is divided by under "floored", the one kind that has a floor."""
    assert floor is not None
    return 2 * floor
