"""Warnings about a plan: extrapolation, constants that are not identified, bounds that were reached."""

from collections.abc import Sequence

from analysis.fitting.multistart import NO_INTERVALS
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning.memory import bytes_label
from analysis.planning.minimize import Budget, precisions
from analysis.planning.options import Option
from analysis.planning.reach import Reach
from analysis.wording import parts_text


def warnings(
    plan: Option, budget: Budget, far: Sequence[Reach], uninformed: Sequence[str], has_interval: bool
) -> list[str]:
    """The warnings. `budget` leaves free what the plan chose; `uninformed` parts were kept at 16 bits."""
    surface, best, serve_bits = plan.surface, plan.point, plan.budget.serve_bits
    law, found = surface.law, []
    if uninformed:
        parts = parts_text(uninformed)
        found.append(f"the fit's table does not identify the cost of low precision in {parts}: kept at 16 bits")
    if budget.p_choices == (HIGH_PRECISION_BITS,):
        found.append(f"law {surface.name} as fitted describes training in 16 bits only: P is not chosen")
    found += [reach.words for reach in far if reach.outside]
    if plan.fmt is not None and surface.saw(plan.fmt) is False:
        found.append(f"the fit's table has no run trained in {plan.fmt.name}")
    if plan.fmt is not None and not surface.reads_formats:
        found.append(
            f"law {surface.name} reads bits alone: {plan.fmt.name} is any format of {plan.fmt.bits:g} bits to it"
        )
    if serve_bits is not None and surface.of_delta is not surface.of_loss and best.p < HIGH_PRECISION_BITS:
        found.append(
            "δ comes from a law of models trained in 16 bits: below 16 bits it is the most that PTQ would cost"
        )
    if (rounded := surface.of_loss.fit.serve_bits) is not None:
        found.append(f"law {surface.name} was fitted to losses after PTQ to {rounded:g} bits: this loss is after PTQ")
    kv_bits = budget.serving.kv_bits
    if kv_bits is not None and kv_bits < (best.p if "kv" in surface.parts else HIGH_PRECISION_BITS):
        found.append(f"the cost of rounding the cache to {kv_bits:g} bits after training is not modelled")
    used = surface.fitted if serve_bits is not None else (surface.of_loss,)
    for one in used:
        if one.stand_ins:
            names = ", ".join(one.stand_ins)
            found.append(f"{one.name}: the fit's table does not identify {names}; held values were used")
        found += [f"{one.name}: {note}" for note in one.fit.notes]
    given = (serve_bits, budget.p, budget.n, budget.d, budget.memory_bytes)
    if law.by_form and not any(given):
        found.append(f"by the form of law {surface.name} alone, {law.by_form}")
    if budget.p is None and not precisions(budget) and budget.flops is not None:
        for bound, word in zip(budget.p_range, ("lowest", "highest"), strict=True):
            if abs(best.p - bound) < 1e-3:
                found.append(f"P ends at {bound:g} bits, the {word} that was searched")
    few_runs = any(note.startswith(NO_INTERVALS) for one in used for note in one.fit.notes)
    if not has_interval and any(one.fit.n for one in used) and not few_runs:
        found.append("no interval: the fit carries no bootstrap samples (fit again with --bootstrap=1000)")
    return found


def about_formats(budget: Budget, without: Sequence[str]) -> list[str]:
    """Warnings about the list of formats. `without`: those for which there is no plan."""
    if not without or budget.memory_bytes is None:
        return []
    return [f"within {bytes_label(budget.memory_bytes)} there is no plan in {', '.join(without)}"]
