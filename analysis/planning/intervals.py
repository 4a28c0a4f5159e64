"""Intervals of a plan from the bootstrap samples of its fits."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from analysis.fitting.multistart import least_resamples
from analysis.fitting.statistics import LEVEL, Interval, interval
from analysis.planning.minimize import Budget, BudgetError, Point, evaluate, minimize
from analysis.planning.options import Option
from analysis.planning.surface import Surface

MOST_DRAWS = 200  # bootstrap samples whose own optimum is found


@dataclasses.dataclass(frozen=True)
class Intervals:
    """95 % intervals: of the loss at the plan, of what the best N, D and P would be, and of every option's loss and its
    loss above the plan's in the same sample. None and empty where the fits carry too few samples.
    """

    loss: Interval | None = None
    optimum: dict[str, Interval] = dataclasses.field(default_factory=dict)
    options: tuple[dict[str, Interval], ...] = ()


def intervals(plan: Option, options: Sequence[Option], budget: Budget) -> Intervals:
    """By the samples of the fits of the plan. `options` share its fits; `budget` leaves free what the plan chose."""
    surface, best = plan.surface, plan.point
    chosen = samples(surface, budget.serve_bits is not None)
    if chosen is None:
        return Intervals(options=({},) * len(options))
    at_plan, at_options, optima = [], [], []
    groups = _groups(options)
    for index in chosen:
        drawn = surface.draw(index)
        at_plan.append(evaluate(drawn, plan.budget, best.n, best.d, best.p).loss)
        at_options.append(
            np.concatenate([_losses(group, several.draw(index)) for group, several in groups] or [np.array([])])
        )
        try:
            optima.append(minimize(drawn, budget))
        except BudgetError:
            continue
    free = [key for key, given in (("n", budget.n), ("d", budget.d), ("p", budget.p)) if given is None]
    optimum = {f"{key.upper()}_ci": interval([getattr(point, key) for point in optima]) for key in free}
    losses = np.array(at_options)
    above = losses - np.array(at_plan)[:, None]
    each = zip(losses.T, above.T, strict=True)
    words = tuple({"loss_ci": interval(loss), "extra_loss_ci": interval(extra)} for loss, extra in each)
    return Intervals(interval(at_plan), optimum, words)


def samples(surface: Surface, of_delta: bool) -> np.ndarray | None:
    """Which bootstrap samples to use; None where there are too few for an interval."""
    count = (surface if of_delta else surface.of_loss).draws
    if count < least_resamples(LEVEL):
        return None
    return np.linspace(0, count - 1, min(count, MOST_DRAWS)).round().astype(int)


def loss_interval(surface: Surface, at: Point, serve_bits: float | None) -> Interval | None:
    """Of the loss at a point by the samples of a surface."""
    chosen = samples(surface, serve_bits is not None)
    if chosen is None:
        return None
    return interval([float(surface.draw(i).served(at.n, at.d, at.p, serve_bits)) for i in chosen])


def _groups(options: Sequence[Option]) -> list[tuple[list[Option], Surface]]:
    """Neighbours in the list that one surface can evaluate together: those of bits, and those of formats."""
    of_bits = [option for option in options if option.fmt is None]
    of_formats = [option for option in options if option.fmt is not None]
    groups = [(of_bits, of_bits[0].surface)] if of_bits else []
    if of_formats:
        named = [option.fmt for option in of_formats if option.fmt is not None]
        groups.append((of_formats, of_formats[0].surface.in_formats(named)))
    return groups


def _losses(options: Sequence[Option], surface: Surface) -> np.ndarray:
    n, d, p = (np.array([getattr(option.point, key) for option in options]) for key in "ndp")
    loss = surface.loss(n, d, p)
    bits = [option.budget.serve_bits for option in options]
    rounded = next((b for b in bits if b is not None), None)
    if rounded is None:
        return loss
    return loss + np.where([b is not None for b in bits], surface.delta(n, d, p, rounded), 0.0)
