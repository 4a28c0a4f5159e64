"""How far a plan lies from the rows that its fits were made from."""

import dataclasses

from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning.cost import FLOPS_PER_PARAMETER_TOKEN
from analysis.planning.minimize import Point
from analysis.planning.surface import Surface
from analysis.wording import count_label

SLACK = 0.01  # of a range, within which a value counts as inside
TIMES = ("N", "D", "budget")  # quantities whose distance is a factor


@dataclasses.dataclass(frozen=True)
class Reach:
    """One quantity of a plan and its range in the fit's table."""

    name: str
    value: float
    low: float
    high: float
    bound: bool = False  # the ends are bounds: the largest N with the largest D in 16 bits, the least with the least

    @property
    def outside(self) -> bool:
        return not self.low * (1 - SLACK) <= self.value <= self.high * (1 + SLACK)

    @property
    def factor(self) -> float:
        """How many times the value lies above the range, or below it; 1 inside."""
        return max(self.value / self.high, self.low / self.value, 1.0)

    @property
    def words(self) -> str:
        show = {"N": count_label, "D": count_label, "budget": "{:.3g} FLOPs".format}.get(self.name, "{:.3g}".format)
        side = "above" if self.value > self.high else "below"
        how = f"{self.factor:.3g} times {side}" if self.name in TIMES else side
        ends = f"{show(self.low)} to {show(self.high)}{', if all were combined' if self.bound else ''}"
        return f"extrapolation: {self.name} = {show(self.value)} is {how} the fit's data ({ends})"

    def record(self) -> dict:
        return {"value": self.value, "data": [self.low, self.high], "outside": self.outside, "factor": self.factor}


def reaches(surface: Surface, point: Point, flops: float, serve_bits: float | None = None) -> list[Reach]:
    """N, D, P, training cost and P_post of a plan beside their ranges in the table, where these are on record."""
    found = [
        Reach(name, value, *span)
        for name, value in (("N", point.n), ("D", point.d), ("P", point.p))
        if (span := surface.data_range(name))
    ]
    if span := surface.data_range("C"):
        found.append(Reach("budget", flops, *span))
    elif (n := surface.data_range("N")) and (d := surface.data_range("D")) and (p := surface.data_range("P")):
        low = FLOPS_PER_PARAMETER_TOKEN * n[0] * d[0] * min(p[0], HIGH_PRECISION_BITS) / HIGH_PRECISION_BITS
        found.append(Reach("budget", flops, low, FLOPS_PER_PARAMETER_TOKEN * n[1] * d[1], bound=True))
    if serve_bits is not None and (span := surface.data_range("P_post")):
        found.append(Reach("P_post", serve_bits, *span))
    return found
