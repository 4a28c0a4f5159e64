"""F3: is the cost-optimal training precision 7 to 8 bits at every budget?

A law in which P acts through a share f(P) of N alone has argmax f(P)/P at every budget: its form says so, not the table.
So every law that predicts held-out rows as well as the best is asked, and runs of equal cost are compared without any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from analysis import laws
from analysis import surface as surfaces
from analysis.compare import Comparison
from analysis.cost import FLOPS_PER_PARAMETER_TOKEN, CostModel
from analysis.evidence import Evidence
from analysis.fit import Fit
from analysis.law import HIGH_PRECISION_BITS, LawError
from analysis.table import PRECISIONS
from analysis.verdicts.equal_cost import Match, match_rows, matches, size_factors
from analysis.verdicts.finding import CONTRADICTED, FORCED, LEVEL, SUPPORTED, UNDECIDED, Finding
from analysis.wording import count_label, interval_text

CLAIM = "Cost-optimal training precision is about 7 to 8 bits, whatever the budget."
RANGE = (6.5, 8.5)  # bits that count as about 7 to 8
FINEST = np.linspace(2.0, HIGH_PRECISION_BITS, 57)  # bits, coarse grid of the search
SAME = 0.02  # bits within which two optima are one
DRAWS = 60  # bootstrap samples that give an interval
APART = 4.0  # factor between budgets that count as different
FACTOR_CLAIM = "Training below 4 bits needs more than 4 times the parameters."


# --- by laws


def near_best(comparison: Comparison | None, kind: str = "loss") -> tuple[str, ...]:
    """The laws of a kind whose held-out error is not above the best one's beyond their paired interval, best first."""
    rows = [] if comparison is None else [row for row in comparison.rows if row.kind == kind]
    return tuple(row.law for i, row in enumerate(rows) if i == 0 or (row.difference and row.difference[1] <= 0))


def loss_of(fit: Fit, values=None) -> Callable:
    """Loss of a model of N parameters, D tokens and P bits in every part."""
    values = fit.values if values is None else values
    return lambda n, d, p: laws.predict(fit.law, values, N=n, D=d, P_w=p, P_a=p, P_kv=p)


def allowed(fit: Fit) -> np.ndarray:
    """The precisions that the law can be asked for, in bits, with 16."""
    parts = surfaces.PARTS
    if fit.law == "capacity":
        return np.array(surfaces.known_precisions(fit, parts))
    try:
        loss_of(fit)(1e6, 1e8, np.array([4.5]))
    except LawError:
        return np.arange(2.0, HIGH_PRECISION_BITS + 1)
    return FINEST


def best_bits(loss: Callable, flops: float, bits: np.ndarray) -> float:
    """P* in bits: of least loss over N and P with D = 16 C / (6 N P); between grid points where `bits` is FINEST."""
    sizes = np.linspace(np.log(1e2), np.log(flops), 61)
    rounds = 3 if bits is FINEST else 1
    for _ in range(rounds):
        best = _least_over_sizes(loss, flops, bits, sizes)
        at = int(np.argmin(best))
        if rounds > 1:
            step = bits[1] - bits[0]
            found, bits = bits[at], np.linspace(*np.clip((bits[at] - step, bits[at] + step), 2.0, 16.0), 21)
    return float(found if rounds > 1 else bits[at])


def _least_over_sizes(loss: Callable, flops: float, bits: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Least loss over N at each precision: a grid over log N, drawn in twice around its least value."""
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


def constant_by_form(fit: Fit, budgets: Sequence[float], tries: int = 8) -> bool:
    """Whether the law's form alone keeps P* the same at every budget: it does at whatever constants."""
    rng = np.random.default_rng(0)
    law = laws.resolve(fit.law, fit.values)
    bits = allowed(fit)
    ends = (min(budgets), max(budgets) * 1e3)
    for _ in range(tries):
        values = {}
        for name, value in fit.values.items():
            parameter = law.parameter(name)
            values[name] = float(np.clip(value * np.exp(rng.normal(0, 0.2)), parameter.lower, parameter.upper))
        loss = loss_of(fit, values)
        if abs(best_bits(loss, ends[0], bits) - best_bits(loss, ends[1], bits)) > SAME:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Optimum:
    """P* of one fitted law at each budget, its draws (empty without a bootstrap), and whether its form forces one P*."""

    law: str
    budgets: tuple[float, ...]
    bits: tuple[float, ...]
    drawn: np.ndarray  # (draws, budgets)
    constant: bool
    near_best: bool
    starts_at_best: float | None

    def interval(self, at: int) -> tuple[float, float] | None:
        if len(self.drawn) < 20:
            return None
        low, high = np.quantile(self.drawn[:, at], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    @property
    def rise(self) -> tuple[float, float] | None:
        """Interval of P* at the largest measured budget minus P* at the smallest."""
        if len(self.drawn) < 20:
            return None
        gap = self.drawn[:, -1] - self.drawn[:, 0]
        low, high = np.quantile(gap, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    @property
    def words(self) -> str:
        each = [
            f"{bits:.1f} {interval_text(self.interval(i), '{:.1f}'.format)}".strip() for i, bits in enumerate(self.bits)
        ]
        if self.constant:
            return f"{self.law}: {each[0]} bits at every budget, by its form"
        at = ", ".join(f"{budget:.0e}".replace("e+", "e") for budget in self.budgets)
        return f"{self.law}: {', '.join(each)} bits at {at} FLOPs"


def budgets_of(evidence: Evidence) -> tuple[float, ...]:
    """Three training costs that span the table's, rounded inwards to one figure."""
    losses = evidence.losses
    bits = np.mean([np.minimum(losses[name], HIGH_PRECISION_BITS) for name in PRECISIONS], axis=0)
    cost = CostModel().training(losses["N"], losses["D"], bits)
    low, high = float(cost.min()), float(cost.max())
    rounded = [float(f"{x:.0e}") for x in np.geomspace(low, high, 3)]
    return tuple(sorted(set(rounded)))


def optima(evidence: Evidence) -> list[Optimum]:
    """P* by every fitted law near the best and by the paper's, where the table informs all three parts."""
    near = near_best(evidence.comparison)
    names = dict.fromkeys((*near, "precision"))
    found = []
    for name in names:
        fit = evidence.fits.get(name)
        if fit is None or len(surfaces.informed_parts(fit)) < len(surfaces.PARTS):
            continue
        budgets, bits = budgets_of(evidence), allowed(fit)
        at = lambda values, fit=fit, bits=bits, budgets=budgets: [
            best_bits(loss_of(fit, values), c, bits) for c in budgets
        ]
        drawn = [at(surfaces.draw(fit, i).values) for i in range(min(surfaces.draws(fit), DRAWS))]
        constant = constant_by_form(fit, budgets)
        found.append(
            Optimum(
                name,
                budgets,
                tuple(at(fit.values)),
                np.array(drawn).reshape(-1, len(budgets)),
                constant,
                name in near,
                fit.starts_at_best,
            )
        )
    return found


# --- the finding


def gaps(evidence: Evidence) -> str:
    """The bits at which each part was lowered alone, and all together, in words."""
    names = {"P_w": "weights", "P_a": "activations", "P_kv": "KV cache"}
    said = []
    for part, name in names.items():
        bits = evidence.part_alone(part)[part]
        said.append(f"{name} {_bits_words(bits)}")
    tied = np.all([evidence.losses[p] == evidence.losses["P_w"] for p in PRECISIONS], axis=0)
    return (
        f"Measured bits below 16, alone: {'; '.join(said)}; all together: {_bits_words(evidence.losses['P_w'][tied])}."
    )


def _bits_words(bits: np.ndarray) -> str:
    low = sorted({float(b) for b in bits if b < HIGH_PRECISION_BITS})
    return ", ".join(f"{b:g}" for b in low) or "none"


def _form(found: Sequence[Optimum]) -> str:
    forced = [o.law for o in found if o.constant]
    free = [o.law for o in found if not o.constant]
    said = (
        "Where P acts through a share f(P) of N alone, the best P is argmax f(P)/P at every budget: the form forces it"
    )
    said += f" ({', '.join(forced)})." if forced else "."
    return said + (f" Free to change with the budget: {', '.join(free)}." if free else "")


def optimal_precision(evidence: Evidence) -> Finding:
    """F3 by measured runs of equal cost where there are such, else by the laws near the best."""
    found = optima(evidence)
    by_size, by_budget = matches(evidence)
    verdict, why = _by_runs(by_budget)
    if verdict is None:
        verdict, why = _by_laws([o for o in found if o.near_best])
    said = [why, *(_law_words(found) if found else ["No fitted law says what lowering all three parts costs."])]
    said += [_match_words(by_budget), gaps(evidence)]
    numbers = {
        "P_star": {o.law: dict(zip(map(str, o.budgets), o.bits, strict=True)) for o in found},
        "P_star_ci": {o.law: [o.interval(i) for i in range(len(o.budgets))] for o in found},
        "constant_by_form": [o.law for o in found if o.constant],
        "near_best": [o.law for o in found if o.near_best],
        "groups_of_equal_cost": len(by_size),
    }
    rows = match_rows([*by_size, *by_budget]) or _law_rows(found)
    return Finding("F3", CLAIM, verdict, _form(found), " ".join(said), numbers, rows)


def _law_words(found: Sequence[Optimum]) -> list[str]:
    near = "; ".join(o.words for o in found if o.near_best)
    others = "; ".join(o.words for o in found if not o.near_best)
    said = [f"P* by the laws that predict held-out rows as well as the best: {near}."] if near else []
    return said + ([f"By laws that predict them worse: {others}."] if others else [])


def _law_rows(found: Sequence[Optimum]) -> list[dict[str, object]]:
    return [
        {
            "law": o.law,
            "held-out error": "near the best" if o.near_best else "above the best",
            "form": "forces one P*" if o.constant else "lets P* change",
            **{
                f"P* at {budget:.0e} FLOPs": f"{bits:.1f} {interval_text(o.interval(i), '{:.1f}'.format)}".strip()
                for i, (budget, bits) in enumerate(zip(o.budgets, o.bits, strict=True))
            },
            "starts at the best fit": "" if o.starts_at_best is None else f"{o.starts_at_best:.0%}",
        }
        for o in found
    ]


def _match_words(groups: Sequence[Match]) -> str:
    if not groups:
        return "No three precisions of all parts were measured at equal cost, so that no run says it without a law."
    each = "; ".join(
        f"{m.best:g} bits at {m.cost:.1e} FLOPs ({', '.join(f'{p:g}' for p in m.good)} as good within noise)"
        for m in groups
    )
    return f"Measured at equal cost, without a law: {each}."


def _by_runs(groups: Sequence[Match]) -> tuple[str | None, str]:
    """The verdict by runs of equal cost at two budgets or more; None where they do not decide."""
    if not groups:
        return None, ""
    inside = lambda m: any(RANGE[0] <= p <= RANGE[1] for p in m.good)
    tested = [m for m in groups if any(RANGE[0] <= p <= RANGE[1] for p in m.losses)]
    outside = [m for m in tested if not inside(m)]
    if outside:
        at = ", ".join(f"{m.cost:.1e}" for m in outside)
        return CONTRADICTED, f"At {at} FLOPs the measured 7 and 8 bits are worse than the best beyond the noise."
    if len(tested) < 2 or tested[-1].cost < APART * tested[0].cost:
        return None, ""
    shared = set.intersection(*(set(m.good) for m in tested))
    if not shared:
        return CONTRADICTED, "No precision is within noise of the best at every budget of runs of equal cost."
    if all(RANGE[0] - 1 <= p <= RANGE[1] + 1 for m in tested for p in m.good):
        return SUPPORTED, "At every budget of runs of equal cost the best precisions lie about 7 to 8 bits."
    return UNDECIDED, "Runs of equal cost do not tell 7 to 8 bits from others within the noise."


def _by_laws(near: Sequence[Optimum]) -> tuple[str, str]:
    """The verdict by the laws near the best, which must agree."""
    if not near:
        return UNDECIDED, "No law near the best in held-out error says what all three parts cost."
    outside = [
        o
        for o in near
        if any((span := o.interval(i)) and (span[1] < RANGE[0] or span[0] > RANGE[1]) for i in range(len(o.bits)))
    ]
    if len(outside) == len(near):
        return CONTRADICTED, "Every law near the best has a P* outside 6.5 to 8.5 bits at some measured budget."
    if all(o.constant for o in near):
        return (
            FORCED,
            "All laws near the best have one P* by their form: that it is the same at every budget is not tested.",
        )
    if any(o.constant for o in near):
        return (
            UNDECIDED,
            "Of the laws near the best some force one P* and others do not: the table does not tell them apart.",
        )
    rises = [o.rise for o in near]
    if all(rise is not None and rise[0] > 0 for rise in rises):
        return CONTRADICTED, "By every law near the best P* rises with the budget."
    if all(rise is not None and rise[0] <= 0 <= rise[1] and rise[1] - rise[0] < 2 for rise in rises) and not outside:
        return SUPPORTED, "By every law near the best, none of which forces it, P* stays about 7 to 8 bits."
    return UNDECIDED, "The laws near the best do not agree on whether P* changes with the budget."


# --- below 4 bits


def few_bits_cost_parameters(evidence: Evidence) -> Finding:
    """F3 on the size that makes up for few bits: the 16-bit model of equal loss and D, by interpolation in N."""
    found = size_factors(evidence)
    below = [f for f in found if f.p < 4]
    form = "N_eff = N f(P) makes the factor f(16)/f(P) the same at every N and D; the rows need not."
    shown = below or found
    if not shown:
        why = "No model with all parts at 4 bits or fewer has two 16-bit models of its D beside it."
        return Finding("F3 few bits", FACTOR_CLAIM, UNDECIDED, form, why)
    more, less = sum(f.low > 4 for f in shown), sum(f.high < 4 for f in shown)
    what = "below 4 bits" if below else "at 4 bits (none was trained below, all parts together)"
    said = (
        f"Read off the losses at equal D, without a law: of {len(shown)} models with all parts {what} {more} need more than 4 "
        f"times the parameters of 16 bits beyond the noise, {less} fewer."
    )
    said += f" {_factor_by_fit(evidence)}"
    verdict = SUPPORTED if more == len(shown) and below else CONTRADICTED if less > len(shown) / 2 else UNDECIDED
    numbers = {"models": len(shown), "more_than_4": more, "less_than_4": less}
    return Finding("F3 few bits", FACTOR_CLAIM, verdict, form, said.strip(), numbers, _factor_rows(found))


def _factor_by_fit(evidence: Evidence) -> str:
    fit = evidence.fit_of("precision")
    if fit is None or len(surfaces.informed_parts(fit)) < 3:
        return ""
    factor = lambda values: float(
        np.divide(*surfaces.capacity(dataclasses.replace(fit, values=values))(np.array([HIGH_PRECISION_BITS, 4.0])))
    )
    drawn = [factor(surfaces.draw(fit, i).values) for i in range(surfaces.draws(fit))]
    span = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) >= 20 else None
    return f"The fitted law of precision says {factor(fit.values):.1f} {interval_text(span, '{:.1f}'.format)} at 4 bits.".replace(
        "  ", " "
    )


def _factor_rows(found) -> list[dict[str, object]]:
    show = lambda x: "above" if np.isinf(x) else f"{x:.2g}"
    return [
        {
            "P": f.p,
            "N": count_label(f.n),
            "D": count_label(f.d),
            "factor": f"above {f.low:.2g}" if np.isinf(f.value) else f"{f.value:.2g}",
            "by noise": f"{f.low:.2g} to {'open' if np.isinf(f.high) else show(f.high)}",
        }
        for f in found
    ]
