"""F3: is the cost-optimal training precision 7 to 8 bits at every budget?

A law in which P acts through a share f(P) of N alone has argmax f(P)/P at every budget: by its form, not by the table.
So the verdict rests on every law that predicts held-out rows as well as the best, and on runs of equal cost without a
law.
"""

from collections.abc import Sequence

import numpy as np

from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.equal_cost import Match, match_rows, matches
from analysis.reporting.verdicts.finding import CONTRADICTED, FORCED, SUPPORTED, UNDECIDED, Finding
from analysis.reporting.verdicts.optimum_by_law import Optimum, optima
from analysis.table import PRECISIONS
from analysis.wording import interval_text

CLAIM = "Cost-optimal training precision is about 7 to 8 bits, whatever the budget."
RANGE = (6.5, 8.5)  # bits that count as about 7 to 8
ABOUT = (5.0, 12.0)  # bits of which enough must be measured for a law to find the best
LEAST_BETWEEN = 3
APART = 4.0  # factor between budgets that count as different


def lowered(evidence: Evidence) -> dict[str, np.ndarray]:
    """The bits below 16 at which each part was lowered alone, and all parts together, by their names."""
    names = {"P_w": "weights", "P_a": "activations", "P_kv": "KV cache"}
    found = {name: evidence.part_alone(part)[part] for part, name in names.items()}
    losses = evidence.losses
    found["all together"] = losses["P_w"][np.all([losses[part] == losses["P_w"] for part in PRECISIONS], axis=0)]
    return {name: np.unique(bits[bits < HIGH_PRECISION_BITS]) for name, bits in found.items()}


def gaps(evidence: Evidence) -> str:
    """The bits at which each part was lowered alone, and all together, in words."""
    each = "; ".join(f"{name} {_bits_words(bits)}" for name, bits in lowered(evidence).items())
    return f"Measured bits below 16, one part alone or all together: {each}."


def few_between(evidence: Evidence) -> str:
    """Which parts were lowered, alone or all together, to too few precisions about P*; empty where none was."""
    low, high = ABOUT
    bits = lowered(evidence)
    together, few = bits.pop("all together"), []
    for name, alone in bits.items():
        near = sorted({b for b in (*alone, *together) if low <= b <= high})
        few += [f"{name} at {_bits_words(near)}"] if len(near) < LEAST_BETWEEN else []
    said = f"Too few precisions between {low:g} and {high:g} bits were measured for a law to find the best"
    return f"{said} ({'; '.join(few)})." if few else ""


def _bits_words(bits) -> str:
    return ", ".join(f"{b:g}" for b in bits) or "none"


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
        verdict, why = _by_laws([o for o in found if o.near_best], few_between(evidence))
    said = [why, *(_law_words(found) if found else ["No fitted law gives the cost of lowering all three parts."])]
    said += [_match_words(by_budget), gaps(evidence)]
    numbers = {
        "P_star": {o.law: dict(zip(map(str, o.budgets), o.bits, strict=True)) for o in found},
        "P_star_ci": {o.law: [o.interval(i) for i in range(len(o.budgets))] for o in found},
        "constant_by_form": [o.law for o in found if o.constant],
        "near_best": [o.law for o in found if o.near_best],
        "groups_of_equal_cost": len(by_size),
    }
    rows = match_rows([*by_size, *by_budget]) or _law_rows(found)
    return Finding("F3", CLAIM, verdict, _form(found), "\n".join(filter(None, said)), numbers, rows)


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
            "starts at the best fit": "" if o.starts_at_best is None else f"{o.starts_at_best:.1%}",
        }
        for o in found
    ]


def _match_words(groups: Sequence[Match]) -> str:
    if not groups:
        return "No three precisions of all parts were measured at equal cost, so no run shows it without a law."
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
    return UNDECIDED, "Runs of equal cost do not distinguish 7 to 8 bits from others beyond the noise."


def _by_laws(near: Sequence[Optimum], few: str) -> tuple[str, str]:
    """The verdict by the laws near the best, which must agree; `few` says which part was measured at too few bits for
    them to be more than their form.
    """
    if not near:
        return UNDECIDED, "No law near the best in held-out error gives the cost of all three parts."
    outside = [
        o
        for o in near
        if any((span := o.interval(i)) and (span[1] < RANGE[0] or span[0] > RANGE[1]) for i in range(len(o.bits)))
    ]
    if all(o.constant for o in near) and len(outside) < len(near):
        why = "All laws near the best have one P* by their form: that it is the same at every budget is not tested."
        return FORCED, why
    if few:
        return UNDECIDED, few
    if len(outside) == len(near):
        return CONTRADICTED, "Every law near the best has a P* outside 6.5 to 8.5 bits at some measured budget."
    if any(o.constant for o in near):
        why = "Of the laws near the best some force one P* and others do not: the table does not decide between them."
        return UNDECIDED, why
    rises = [o.rise for o in near]
    if all(rise is not None and rise[0] > 0 for rise in rises):
        return CONTRADICTED, "By every law near the best P* rises with the budget."
    if all(rise is not None and rise[0] <= 0 <= rise[1] and rise[1] - rise[0] < 2 for rise in rises) and not outside:
        return SUPPORTED, "By every law near the best, none of which forces it, P* stays about 7 to 8 bits."
    return UNDECIDED, "The laws near the best do not agree on whether P* changes with the budget."
