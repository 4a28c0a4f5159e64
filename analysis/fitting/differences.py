"""Paired bootstrap of the difference in held-out error between laws of one kind."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.fitting.multistart import LEAST_RUNS
from analysis.fitting.statistics import interval

Errors = dict[tuple[int, str], float]  # absolute held-out log error by (row of the table, scheme)


class Difference(NamedTuple):
    """Mean and the ends of its 95 % interval; None where too few runs give one."""

    mean: float
    low: float | None
    high: float | None

    def text(self, form: str = "{:.2f}") -> str:
        """The interval in percent."""
        if self.low is None or self.high is None:
            return "(few runs)"
        return f"[{form.format(100 * self.low)}, {form.format(100 * self.high)}]"


def order_and_differences(
    errors: Sequence[Errors], model_n: np.ndarray, resamples: int, seed: int
) -> list[tuple[int, Difference | None]]:
    """Indices of the laws, least mean error first, with the difference from the best (None for the best itself).

    errors: of every law. model_n: the trained model of every row of the table. Errors pair by row and scheme, over the
    held-out rows that every law can predict, so that no law gains by predicting fewer; trained models are resampled,
    where there are at least LEAST_RUNS.
    """
    shared = sorted(set.intersection(*map(set, errors))) if errors else []

    def score(at: int) -> float:
        return float(np.mean([errors[at][key] for key in shared])) if shared else math.inf

    order = sorted(range(len(errors)), key=score)
    out: list[tuple[int, Difference | None]] = []
    for at in order:
        difference = None
        if at != order[0] and shared:
            gap = np.array([errors[at][key] - errors[order[0]][key] for key in shared])
            run = np.unique(model_n[[row for row, _ in shared]], return_inverse=True)[1]
            difference = Difference(float(gap.mean()), *_mean_interval(gap, run, resamples, seed))
        out.append((at, difference))
    return out


def _mean_interval(
    values: np.ndarray, run_n: np.ndarray, resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """95 % interval of the mean under resampling of the runs; none of fewer than LEAST_RUNS."""
    total, count = np.bincount(run_n, values), np.bincount(run_n)
    if len(count) < LEAST_RUNS:
        return None, None
    counts = np.random.default_rng(seed).multinomial(len(count), np.full(len(count), 1 / len(count)), size=resamples)
    draws = (counts @ total) / np.maximum(counts @ count, 1)
    return interval(draws)
