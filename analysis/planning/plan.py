"""A plan: the best N, D and P under a budget by one or two fits, with alternatives and warnings."""

import dataclasses
import json
import math
from collections.abc import Sequence

from analysis.fitting.fit import Fit
from analysis.fitting.statistics import Interval
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning import options, served, spread
from analysis.planning.intervals import intervals
from analysis.planning.minimize import Budget, Point, minimize, turning_point
from analysis.planning.options import Option
from analysis.planning.reach import Reach, reaches
from analysis.planning.surface import Surface, SurfaceError, build_all
from analysis.planning.warnings import about_formats, warnings
from precision_scaling.numerics.formats import Format


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan with its intervals, alternatives and warnings; N in parameters, D in tokens, P in bits, losses in nats a
    token.

    alternatives: whole bits, and formats: those that exist near P, each at its best N and D under the same budget, as
    in plan.json. serving: plans for each number of bits served, within the memory.
    """

    chosen: Option
    budget: Budget  # as requested: what the plan chose is None
    loss_ci: Interval | None
    intervals: dict[str, Interval]
    alternatives: list[dict]
    formats: list[dict]
    serving: list[Option]
    opinions: list[spread.Opinion]
    critical_tokens: float | None
    reaches: list[Reach]
    warnings: list[str]

    @property
    def best(self) -> Point:
        return self.chosen.point

    @property
    def surface(self) -> Surface:
        return self.chosen.surface

    @property
    def parts(self) -> tuple[str, ...]:
        return self.surface.parts

    @property
    def laws(self) -> tuple[str, ...]:
        return tuple(fitted.name for fitted in self.surface.fitted)

    def to_json(self) -> str:
        best, turning = self.best, self.critical_tokens
        raw = {
            "N": round(best.n),
            "D": round(best.d),
            "P": best.p,
            "loss": best.loss,
            "loss_ci": self.loss_ci,
            "flops": best.flops,
            "alternatives": self.alternatives,
            "delta": best.delta,
            "tokens_per_parameter": best.d / best.n,
            "serve_bits": self.budget.serve_bits,
            "D_crit": None if turning is None or math.isinf(turning) else turning,
            **self.intervals,
            "format": self.chosen.fmt and self.chosen.fmt.name,
            "formats": self.formats,
            "memory": served.memory(self.chosen),
            "serving": [served.row(option) for option in self.serving],
            "model_spread": spread.record(self.chosen, self.opinions),
            "extrapolation": {reach.name: reach.record() for reach in self.reaches},
            "parts": list(self.parts),
            "laws": list(self.laws),
            "warnings": self.warnings,
        }
        return json.dumps(raw, indent=1, allow_nan=False) + "\n"


def plan(
    fits: Sequence[Fit],
    budget: Budget,
    parts: Sequence[str] | None = None,
    columns: dict | None = None,
    fmt: Format | None = None,
) -> Plan:
    """The best point of these fits under the budget, with intervals, alternatives and warnings. Raises UserError.

    fits: of the loss, the first of which makes the plan and the others its spread, and of δ. fmt: train in this format,
    of the budget's p bits.
    """
    surface, *others = build_all(fits, columns)
    if parts is not None:
        surface = surface.with_parts(parts)
    budget = _with_choices(surface, budget)
    chosen = _choose(surface, budget, fmt)
    best, bits = chosen.point, chosen.budget.serve_bits
    listed = options.existing_formats(surface, budget, best.p)
    near = [option for one in listed if (option := options.in_format(surface, budget, best, one)) is not None]
    beside = [*options.whole_bits(surface, budget, best), *near]
    spans = intervals(chosen, beside, budget)
    rows = [options.row(option, chosen, ci) for option, ci in zip(beside, spans.options, strict=True)]
    opinions = spread.opinions(chosen, others, budget)
    far = reaches(surface, best, best.flops, bits)
    found = Plan(
        chosen,
        budget,
        spans.loss,
        spans.optimum,
        rows[: len(rows) - len(near)],
        rows[len(rows) - len(near) :],
        served.by_bits(surface, budget) if None not in (budget.memory_bytes, budget.flops) else [],
        opinions,
        turning_point(chosen.surface, best.n, best.p, bits) if bits is not None else None,
        far,
        [],
    )
    without = [fmt.name for fmt in listed if fmt not in {option.fmt for option in near}]
    uninformed = surface.of_loss.uninformed if parts is None else ()
    words = warnings(chosen, budget, far, uninformed, spans.loss is not None)
    return dataclasses.replace(found, warnings=[*words, *about_formats(budget, without)])


def _with_choices(surface: Surface, budget: Budget) -> Budget:
    """The budget with the precisions that the law describes. Raises SurfaceError for what it cannot plan."""
    law, bits = surface.name, budget.serve_bits
    if bits is not None and surface.of_delta is None:
        raise SurfaceError(f"--serve_bits needs a law of δ: give --fit={law}.json,ptq.json or a fit of unified")
    if bits is not None and (rounded := surface.of_loss.fit.serve_bits) is not None:
        raise SurfaceError(
            f"--serve_bits={bits:g}: law {law} was fitted to losses after PTQ to {rounded:g} bits; leave the flag out"
        )
    serving = dataclasses.replace(budget.serving, cache_trained_low="kv" in surface.parts)
    budget = dataclasses.replace(budget, serving=serving)
    if budget.p is None:
        return dataclasses.replace(budget, p_choices=surface.precisions or ())
    if budget.p < HIGH_PRECISION_BITS and not surface.parts and not surface.law.bits_given:
        raise SurfaceError(f"--precision={budget.p:g}: law {law} as fitted describes training in 16 bits only")
    return budget


def _choose(surface: Surface, budget: Budget, fmt: Format | None) -> Option:
    if fmt is None:
        return Option(surface, budget, minimize(surface, budget))
    special, fixed = options.trained_in(surface, budget, fmt)
    return Option(special, fixed, minimize(special, fixed), fmt)
