"""The precisions beside the planned one: whole numbers of bits, and the formats that exist, each at its own best N
and D under the same budget.
"""

import dataclasses
import math

from scipy import optimize

from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning.cost import CostError
from analysis.planning.minimize import Budget, BudgetError, Point, evaluate, minimize, precisions
from analysis.planning.reach import reaches
from analysis.planning.surface import Surface
from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Format

WHOLE_BITS = tuple(float(bits) for bits in range(4, 17))  # compared at the same cost
STANDARD_FLOATS = ("e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2")  # of OCP MX and OFP8; the registry has the others by name
# Integers without hardware or a file format, and formats that pass through like bf16.
ONLY_SIMULATED = {f"int{bits}" for bits in (7, *range(9, 17))} | {"fp16", "fp32"}
NEAR = 2.0  # formats are listed from P*/2 to 2 P*


@dataclasses.dataclass(frozen=True)
class Option:
    """A precision to train in, the surface and the budget that hold for it, and the best point under them."""

    surface: Surface
    budget: Budget
    point: Point
    fmt: Format | None = None

    @property
    def bits(self) -> float:
        """Bits of the weights as served."""
        return float(self.budget.served_at(self.point.p))

    @property
    def fills_memory(self) -> bool:
        """Whether more memory would allow a larger model."""
        limit = self.budget.memory_bytes
        return limit is not None and self.budget.n is None and self.memory > limit * (1 - 1e-6)

    @property
    def memory(self) -> float:
        """Bytes as served."""
        return float(self.budget.serving.total(self.point.n, self.bits, self.point.p))


def whole_bits(surface: Surface, budget: Budget, best: Point) -> list[Option]:
    """The best N and D of the formats that have a speed, else of whole bits."""
    found = []
    for p in precisions(dataclasses.replace(budget, p=None)) or WHOLE_BITS:
        fixed = dataclasses.replace(budget, p=p)
        if (point := best_point(surface, fixed, best)) is not None:
            found.append(Option(surface, fixed, point))
    return found


def existing_formats(surface: Surface, budget: Budget, p: float) -> list[Format]:
    """The formats that exist near a precision, and bf16; by increasing bits. Empty where the law describes 16 bits or
    one precision alone.
    """
    if not surface.parts or surface.law.bits_given:
        return []
    named = {fmt.name: fmt for fmt in map(formats.parse, (*formats.names(), *STANDARD_FLOATS))}
    near = [f for f in named.values() if p / NEAR <= f.bits <= p * NEAR and f.name not in ONLY_SIMULATED]
    listed = {fmt.name: fmt for fmt in (*near, named["bf16"]) if budget.cost.has(fmt)}
    return sorted(listed.values(), key=lambda fmt: (fmt.bits, fmt.name))


def in_format(surface: Surface, budget: Budget, best: Point, fmt: Format) -> Option | None:
    """The best point of models trained in a format; None where the fit or the budget allows none."""
    special, fixed = trained_in(surface, budget, fmt)
    point = best_point(special, fixed, best)
    return None if point is None else Option(special, fixed, point, fmt)


def trained_in(surface: Surface, budget: Budget, fmt: Format) -> tuple[Surface, Budget]:
    """The surface and the budget of models trained in a format.

    Elements of no more than --serve_bits are served as they were trained, with the scales of their blocks.
    """
    element_bits = math.floor(fmt.bits) if fmt.family == "block" else fmt.bits  # scales take less than a bit
    trained = budget.serve_bits is None or element_bits <= budget.serve_bits
    serving = dataclasses.replace(budget.serving, stored_scales=not (trained and fmt.family == "block"))
    serve_bits = None if trained else budget.serve_bits
    budget = dataclasses.replace(budget, p=float(fmt.bits), serve_bits=serve_bits, serving=serving)
    return surface.in_format(fmt), budget


def best_point(surface: Surface, budget: Budget, best: Point) -> Point | None:
    """The best N and D at the budget's precision, or the plan's where nothing bounds them; None where none fits."""
    try:
        if budget.flops is not None:
            point = minimize(surface, budget)
        else:
            point = evaluate(surface, budget, best.n, best.d, best.p if budget.p is None else budget.p)
            if not budget.fits_memory(point.n, point.p):
                return None
    except (BudgetError, CostError):
        return None
    return point if math.isfinite(point.loss) else None


def row(option: Option, best: Option, ci: dict) -> dict:
    """An option as plan.json has it; `ci`: its intervals."""
    point, surface, budget = option.point, option.surface, option.budget
    outside = [reach.name for reach in reaches(surface, point, point.flops, budget.serve_bits) if reach.outside]
    found = {
        "P": point.p,
        "N": round(point.n),
        "D": round(point.d),
        "loss": point.loss,
        "delta": point.delta,
        "flops": point.flops,
        "extra_loss": point.loss - best.point.loss,
        "N_factor": _make_up_factor(surface, best.point, point.p),
        "outside": outside,
        "memory_bytes": option.memory,
        "fills_memory": option.fills_memory,
        **ci,
    }
    share = surface.share(point.p, point.n, point.d)
    if share is not None:
        found["capacity"] = float(share)
    if option.fmt is not None:
        found |= {
            "format": option.fmt.name,
            "served": "as trained" if budget.serve_bits is None else budget.serve_bits,
            "seen": surface.saw(option.fmt),
        }
    elif name := budget.cost.format_name(point.p):
        found["format"] = name
    return found


def _make_up_factor(surface: Surface, at: Point, p: float) -> float | None:
    """Factor on N that gives a model trained at p bits the loss of one trained in 16 bits at the plan's N and D, before
    PTQ.
    """
    target = float(surface.in_16_bits.loss(at.n, at.d, HIGH_PRECISION_BITS))
    gap = lambda log_factor: float(surface.loss(at.n * math.exp(log_factor), at.d, p)) - target
    low, high = math.log(1e-3), math.log(1e6)
    if not gap(low) > 0 > gap(high):
        return None
    return math.exp(optimize.brentq(gap, low, high, xtol=1e-12))
