"""Fits as a plan uses them: the law of each resolved once, and which parts the fit's table identifies."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis import laws
from analysis.fitting import fit as fit_lib
from analysis.fitting.fit import Fit
from analysis.laws.law import HIGH_PRECISION_BITS, PARTS, Law
from precision_scaling.numerics.formats import Format

PAPER_RANGES = {  # fits to 220M parameters, checked at 1.7B
    "N": (30e6, 1.7e9),
    "D": (1.5e9, 26e9),
    "P": (3.0, 16.0),
    "P_post": (3.0, 6.0),
}
PAPER_FORMATS = dict.fromkeys(PARTS, [f"int{bits}" for bits in range(3, 13)] + ["bf16"])


@dataclasses.dataclass(frozen=True)
class FittedLaw:
    """A fit, its law with concrete parameters, and a value for each of them."""

    fit: Fit
    law: Law
    values: Mapping[str, Any]

    @classmethod
    def of(cls, fit: Fit) -> "FittedLaw":
        """Raises LawError where the fit lacks a constant of its law."""
        law = laws.resolve(fit.law, fit.values)
        return cls(fit, law, law.values(fit.values))

    @property
    def name(self) -> str:
        """The law, as given to analysis.fit."""
        return self.fit.law

    @property
    def draws(self) -> int:
        """Number of bootstrap samples of the constants."""
        return self.fit.draws

    def draw(self, index: int) -> "FittedLaw":
        """The law at one bootstrap sample of its constants; as fitted where there are not that many."""
        if index >= self.draws:
            return self
        drawn = self.fit.draw(index)
        return FittedLaw(drawn, self.law, self.law.values(drawn.values))

    def predict(self, **columns) -> np.ndarray:
        """Nats per token at the given columns, as analysis.laws.predict."""
        with np.errstate(divide="ignore", over="ignore"):
            complete = laws.complete_columns(self.law, columns)
            return np.asarray(self.law.evaluate(self.values, complete, np))[()]

    def data_range(self, column: str) -> tuple[float, float] | None:
        """Smallest and largest value of a column in the rows of the fit; None where not on record."""
        span = (self.fit.reporting.get("ranges") or {}).get(column)
        return None if span is None else (span[0], span[1])

    def saw(self, part: str, fmt: Format) -> bool | None:
        """Whether the fit's table has the part trained in the format; None where it is not on record."""
        seen = self.fit.reporting.get("formats") or {}
        return fmt.name in seen[part] if part in seen else None

    @functools.cached_property
    def own_capacities(self) -> tuple[Mapping[str, float], ...]:
        """The training precisions that have a capacity of their own, as bits by part."""
        found = [laws.precisions_of(name) for name in self.values]
        return tuple(bits for bits in found if bits is not None and set(bits) <= set(PARTS))

    def tied(self, parts: tuple[str, ...]) -> set[float]:
        """The precisions with a capacity of their own that just these parts share."""
        same = [bits for bits in self.own_capacities if tuple(bits) == parts and len({*bits.values()}) == 1]
        return {next(iter(bits.values())) for bits in same}

    @functools.cached_property
    def informed(self) -> tuple[str, ...]:
        """The parts whose training precision the law reads and the fit's table identifies, in the order w, a, kv."""
        if self.own_capacities:
            every = (tuple(bits) for bits in self.own_capacities)
            return max(every, key=lambda parts: (len(self.tied(parts)), len(parts)))
        return tuple(x for x in PARTS if self.law.reads_part(x) and self._informs(x))

    def _informs(self, part: str) -> bool:
        """Whether the amplitude of a part is reported; where a law has none of its own, whether rows were low in it."""
        params = self.law.part_params(part)
        if params:
            return params[0] in self.fit.values and params[0] not in self.fit.unidentified
        span = self.data_range(f"P_{part}")
        return span is None or span[0] < HIGH_PRECISION_BITS

    @property
    def uninformed(self) -> tuple[str, ...]:
        """The parts that the law reads and the fit's table does not identify."""
        if self.own_capacities:
            return ()
        return tuple(x for x in PARTS if self.law.reads_part(x) and x not in self.informed)

    @property
    def stand_ins(self) -> tuple[str, ...]:
        """The constants that the table does not identify, apart from those of single parts."""
        of_parts = {name for x in PARTS for name in self.law.part_params(x)}
        return tuple(name for name in self.fit.unidentified if name not in of_parts)


def published() -> list[Fit]:
    """The paper's constants: its law of training precision and its law of PTQ (the C_x of its unified law are
    unpublished).
    """
    return [
        dataclasses.replace(fit_lib.published(law), reporting={"ranges": PAPER_RANGES, "formats": PAPER_FORMATS})
        for law in ("precision", "ptq")
    ]


def load(text: str) -> list[Fit]:
    """`paper`, or one or more fit.json files separated by commas. Raises analysis.fit.FitError."""
    return published() if text.strip() == "paper" else [fit_lib.load(name.strip()) for name in text.split(",")]
