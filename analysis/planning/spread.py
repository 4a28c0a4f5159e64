"""What other laws predict for a plan. A bootstrap gives the uncertainty of one law's constants; the choice of the law
is often the larger uncertainty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.fitting.statistics import Interval
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning.cost import CostError
from analysis.planning.intervals import loss_interval
from analysis.planning.minimize import Budget, BudgetError, Point, minimize
from analysis.planning.options import Option
from analysis.planning.surface import Surface, SurfaceError


@dataclasses.dataclass(frozen=True)
class Opinion:
    """The prediction of one law for the plan, and its own best plan; None, with the reason, where it makes none."""

    law: str
    parts: tuple[str, ...]
    loss: float | None
    loss_ci: Interval | None
    own: Point | None
    why: str = ""

    def record(self) -> dict[str, Any]:
        own = self.own
        best = {} if own is None else {"N": round(own.n), "D": round(own.d), "P": own.p, "loss": own.loss}
        return {
            "law": self.law,
            "parts": list(self.parts),
            "loss": self.loss,
            "loss_ci": self.loss_ci,
            "own_plan": best or None,
            **({"why": self.why} if self.why else {}),
        }


def opinions(plan: Option, others: Sequence[Surface], budget: Budget) -> list[Opinion]:
    """Of each other surface, with those parts of the plan that its table informs. `budget`: what was requested."""
    return [_opinion(plan, _as_planned(surface, plan), budget) for surface in others]


def _as_planned(surface: Surface, plan: Option) -> Surface:
    parts = tuple(x for x in plan.surface.parts if x in surface.parts)
    surface = dataclasses.replace(surface, parts=parts)
    return surface if plan.fmt is None else surface.in_format(plan.fmt)


def _opinion(plan: Option, surface: Surface, budget: Budget) -> Opinion:
    at, bits = plan.point, plan.budget.serve_bits
    silent = lambda why: Opinion(surface.name, surface.parts, None, None, None, why)
    if bits is not None and surface.of_delta is None:
        return silent("no law of δ goes with it")
    try:
        known = surface.precisions
    except SurfaceError as error:
        return silent(str(error))
    own = _own_plan(surface, dataclasses.replace(budget, p_choices=known or ()))
    speaks = known is None or surface.of_format or min(at.p, HIGH_PRECISION_BITS) in known
    loss = float(surface.served(at.n, at.d, at.p, bits)) if speaks else np.nan
    if not np.isfinite(loss):
        levels = ", ".join(f"{p:g}" for p in known or ())
        why = f"as fitted it describes training in {levels} bits only"
        return Opinion(surface.name, surface.parts, None, None, own, why)
    return Opinion(surface.name, surface.parts, loss, loss_interval(surface, at, bits), own)


def _own_plan(surface: Surface, budget: Budget) -> Point | None:
    try:
        return minimize(surface, budget)
    except (BudgetError, CostError):
        return None


def losses(plan: Option, found: Sequence[Opinion]) -> Interval:
    """The least and the largest loss that any of the laws predicts at the plan."""
    said = [plan.point.loss, *(opinion.loss for opinion in found if opinion.loss is not None)]
    return min(said), max(said)


def record(plan: Option, found: Sequence[Opinion]) -> dict[str, Any] | None:
    """For plan.json; None where one law was given."""
    if not found:
        return None
    bits = [plan.point.p, *(opinion.own.p for opinion in found if opinion.own is not None)]
    return {"loss": losses(plan, found), "P": (min(bits), max(bits)), "laws": [opinion.record() for opinion in found]}
