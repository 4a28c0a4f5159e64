"""Summaries of errors and of bootstrap draws, shared by fits, comparisons and predictions, and how files hold them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.95  # of an interval where no other is asked for
LEAST_DRAWS = 20  # draws below which a report gives no interval of them

Interval = tuple[float, float]


def rms(error_n: np.ndarray) -> float | None:
    """Root mean square of the errors; NaN marks rows that cannot be predicted, and None is returned where all are NaN.

    An infinite error counts: a law that predicts a loss of zero or infinity has failed, and dropping the row would
    reward it.
    """
    known = error_n[~np.isnan(error_n)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else None


def r_squared(observed: np.ndarray, predicted: np.ndarray) -> float | None:
    """1 - residual over total sum of squares; None where nothing varies."""
    total = float(np.sum((observed - observed.mean()) ** 2))
    return 1 - float(np.sum((observed - predicted) ** 2)) / total if total > 0 else None


def percentiles(draws: Sequence[float] | np.ndarray, level: float) -> np.ndarray:
    """The ends (2, ...) of the central interval of this level, over the first axis of the draws."""
    return np.quantile(draws, ends(level), axis=0)


def ends(level: float) -> tuple[float, float]:
    """The quantiles between which the central interval of this level lies."""
    return (1 - level) / 2, (1 + level) / 2


def interval(draws: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """The central interval of this level of the draws of one number."""
    low, high = percentiles(draws, level)
    return float(low), float(high)


def interval_of_enough(draws: Sequence[float] | np.ndarray) -> Interval | None:
    """Their interval; None of fewer than LEAST_DRAWS."""
    return interval(draws) if len(draws) >= LEAST_DRAWS else None


def finite_or_null(value: Any) -> Any:
    """The value with None, which JSON has, for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite_or_null(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
