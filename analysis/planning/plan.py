"""A plan: the best N, D and P under a budget by one or two fits, with alternatives and warnings."""

import dataclasses
import json
import math
from collections.abc import Sequence

from analysis import laws as laws_lib
from analysis.fitting.fit import Fit
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning import options, served, spread
from analysis.planning import surface as surfaces
from analysis.planning.intervals import Interval, intervals
from analysis.planning.minimize import Budget, Point, minimize, turning_point
from analysis.planning.options import Option
from analysis.planning.reach import Reach, reaches
from analysis.planning.surface import Surface, SurfaceError
from analysis.planning.warnings import about_formats, named, warnings
from precision_scaling.numerics.formats import Format


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan and what to know before acting on it; N in parameters, D in tokens, P in bits, losses in nats a token.

    alternatives: whole bits, and formats: those that exist near P, each at its best N and D under the same budget, as
    in plan.json. serving: bits to serve in under the memory.
    """

    chosen: Option
    budget: Budget  # as asked for: what the plan chose is None
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
        return tuple(fit.law for fit in self.surface.fits)

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
    informed, *others = surfaces.pairs(fits, columns)
    surface = _with_parts(informed, parts)
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
    without = [one.name for one in listed if one.name not in {option.fmt.name for option in near}]
    uninformed = surfaces.uninformed_parts(surface.fit) if parts is None else ()
    words = warnings(chosen, budget, far, uninformed, spans.loss is not None)
    return dataclasses.replace(found, warnings=[*words, *about_formats(budget, without)])


def _with_parts(surface: Surface, parts: Sequence[str] | None) -> Surface:
    """The surface with these parts trained low, which the fit's table must inform; None: those that it informs."""
    if parts is None:
        return surface
    name = surface.fit.law
    if unread := [x for x in parts if not surface.law.reads_part(x)]:
        raise SurfaceError(f"--parts: law {name} does not read the training precision of {named(unread)}")
    if unknown := [x for x in parts if x in surfaces.uninformed_parts(surface.fit)]:
        raise SurfaceError(
            f"--parts: the fit's table does not inform {named(unknown)}; it informs {named(surface.parts)}"
        )
    return dataclasses.replace(surface, parts=tuple(parts))


def _with_choices(surface: Surface, budget: Budget) -> Budget:
    """The budget with the precisions that the law knows. Raises SurfaceError for what it cannot plan."""
    fit = surface.fit
    if budget.serve_bits is not None and surface.delta_fit is None:
        raise SurfaceError(f"--serve-bits needs a law of δ: give --fit={fit.law}.json,ptq.json or a fit of unified")
    if budget.serve_bits is not None and fit.serve_bits is not None:
        raise SurfaceError(
            f"--serve-bits={budget.serve_bits:g}: law {fit.law} is one of losses after PTQ to {fit.serve_bits:g} bits "
            "already; leave the flag out"
        )
    in_16_bits_only = budget.p is not None and not surface.parts and not laws_lib.get(fit.law).bits_given
    if in_16_bits_only and budget.p < HIGH_PRECISION_BITS:
        raise SurfaceError(f"--precision={budget.p:g}: law {fit.law} as fitted knows training in 16 bits only")
    serving = dataclasses.replace(budget.serving, cache_trained_low="kv" in surface.parts)
    choices = () if budget.p is not None else surfaces.known_precisions(fit, surface.parts) or ()
    return dataclasses.replace(budget, serving=serving, p_choices=choices)


def _choose(surface: Surface, budget: Budget, fmt: Format | None) -> Option:
    if fmt is None:
        return Option(surface, budget, minimize(surface, budget))
    special, fixed = options.trained_in(surface, budget, fmt)
    return Option(special, fixed, minimize(special, fixed), fmt)
