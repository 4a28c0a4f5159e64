"""The cost-optimal training precision by fitted laws, at every budget."""

import dataclasses
from collections.abc import Callable

import numpy as np

from analysis.fitting.comparison import Comparison, Row
from analysis.fitting.statistics import interval_of_enough
from analysis.laws.law import FIXED_OPTIMUM, HIGH_PRECISION_BITS, PARTS
from analysis.planning.cost import FLOPS_PER_PARAMETER_TOKEN, CostModel
from analysis.planning.surface import Surface, build
from analysis.reporting.evidence import Evidence
from analysis.table import PRECISIONS
from analysis.wording import interval_text

FINEST = np.linspace(2.0, HIGH_PRECISION_BITS, 57)  # bits, coarse grid of the search
DRAWS = 60  # bootstrap samples that give an interval


def near_best(comparison: Comparison | None, kind: str = "loss") -> tuple[str, ...]:
    """The laws of a kind whose held-out error is not above the best one's beyond their paired interval, best first."""
    rows = [] if comparison is None else [row for row in comparison.rows if row.kind == kind]
    return tuple(row.law for i, row in enumerate(rows) if i == 0 or _may_be_best(row))


def _may_be_best(row: Row) -> bool:
    """Whether its paired interval reaches 0; with too few runs for an interval it may."""
    return row.difference is not None and (row.difference.low is None or row.difference.low <= 0)


def allowed(surface: Surface) -> np.ndarray:
    """The precisions that the law describes, in bits, with 16."""
    return FINEST if surface.precisions is None else np.array(surface.precisions)


def best_bits(loss: Callable, flops: float, bits: np.ndarray) -> float:
    """P* in bits: of least loss over N and P with D = 16 C / (6 N P); between grid points where `bits` is FINEST."""
    sizes = np.linspace(np.log(1e2), np.log(flops), 61)
    rounds = 3 if bits is FINEST else 1
    for _ in range(rounds):
        best = _least_over_sizes(loss, flops, bits, sizes)
        at = int(np.argmin(best))
        if rounds > 1:
            step = bits[1] - bits[0]
            low, high = np.clip((bits[at] - step, bits[at] + step), 2.0, 16.0)
            found, bits = bits[at], np.linspace(low, high, 21)
    return float(found if rounds > 1 else bits[at])


def _least_over_sizes(loss: Callable, flops: float, bits: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Least loss over N at each precision: a grid over log N, narrowed twice around its least value."""
    low, high = (np.full(len(bits), end) for end in (sizes[0], sizes[-1]))
    for _ in range(3):
        log_n = np.linspace(low, high, len(sizes))
        n = np.exp(log_n)
        d = np.maximum(flops * HIGH_PRECISION_BITS / (FLOPS_PER_PARAMETER_TOKEN * n * bits), 1.0)
        with np.errstate(over="ignore", invalid="ignore"):
            values = loss(n, d, np.broadcast_to(bits, n.shape))
        values = np.where(np.isfinite(values), values, np.inf)
        at = np.argmin(values, axis=0)
        step = (high - low) / (len(sizes) - 1)
        middle = log_n[at, np.arange(len(bits))]
        low, high = np.maximum(middle - step, low), np.minimum(middle + step, high)
    return values.min(axis=0)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """P* of one fitted law at each budget, its draws (none without a bootstrap), and whether its form forces one P*."""

    law: str
    budgets: tuple[float, ...]
    bits: tuple[float, ...]
    drawn: np.ndarray  # (draws, budgets)
    constant: bool
    near_best: bool
    starts_at_best: float | None

    def interval(self, at: int) -> tuple[float, float] | None:
        return interval_of_enough(self.drawn[:, at])

    @property
    def rise(self) -> tuple[float, float] | None:
        """Interval of P* at the largest measured budget minus P* at the smallest."""
        return interval_of_enough(self.drawn[:, -1] - self.drawn[:, 0])

    @property
    def words(self) -> str:
        each = [
            f"{bits:.1f} {interval_text(self.interval(i), '{:.1f}'.format)}".strip() for i, bits in enumerate(self.bits)
        ]
        starts = "" if self.starts_at_best is None else f" ({self.starts_at_best:.1%} of starts at its best fit)"
        if self.constant:
            return f"{self.law}: {each[0]} bits at every budget, by its form{starts}"
        at = ", ".join(f"{budget:.0e}".replace("e+", "e") for budget in self.budgets)
        return f"{self.law}: {', '.join(each)} bits at {at} FLOPs{starts}"


def budgets_of(evidence: Evidence) -> tuple[float, ...]:
    """Three training costs that span the table's, rounded inwards to one figure."""
    losses = evidence.losses
    bits = np.mean([np.minimum(losses[name], HIGH_PRECISION_BITS) for name in PRECISIONS], axis=0)
    cost = CostModel().training(losses["N"], losses["D"], bits)
    low, high = (10.0 ** np.floor(np.log10(end)) for end in (cost.min(), cost.max()))
    low, high = np.ceil(cost.min() / low) * low, np.floor(cost.max() / high) * high
    if low > high:
        low, high = cost.min(), cost.max()
    middle = float(f"{np.sqrt(low * high):.0e}")
    return tuple(sorted({float(low), middle, float(high)}))


def optima(evidence: Evidence) -> list[Optimum]:
    """P* by every fitted law near the best and by the paper's, where the table identifies all three parts."""
    return evidence.once(_optima)


def _optima(evidence: Evidence) -> list[Optimum]:
    near = near_best(evidence.comparison)
    return [
        _optimum(surface, budgets_of(evidence), name in near)
        for name in dict.fromkeys((*near, "precision"))
        if name in evidence.fits and (surface := build([evidence.fits[name]])).parts == PARTS
    ]


def _optimum(surface: Surface, budgets: tuple[float, ...], near: bool) -> Optimum:
    """P* at each budget by the fit and by its bootstrap samples; a constant P* by the form is computed once."""
    bits, constant = allowed(surface), surface.law.by_form == FIXED_OPTIMUM
    asked = budgets[len(budgets) // 2 :][:1] if constant else budgets
    at = lambda surface: np.resize([best_bits(surface.loss, c, bits) for c in asked], len(budgets))
    drawn = [at(surface.draw(i)) for i in range(min(surface.draws, DRAWS))]
    best, starts = tuple(map(float, at(surface))), surface.of_loss.fit.starts_at_best
    return Optimum(surface.name, budgets, best, np.array(drawn).reshape(-1, len(budgets)), constant, near, starts)
