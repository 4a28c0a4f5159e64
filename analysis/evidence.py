"""The table and the fits that figures, findings and report all draw on, with the cuts of the table they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from analysis.compare import Comparison
from analysis.fit import Fit
from analysis.law import HIGH_PRECISION_BITS
from analysis.table import PRECISIONS, Table


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Usable rows of one PTQ method and schedule, fits by the name of their law, and how laws compare."""

    table: Table
    fits: Mapping[str, Fit] = dataclasses.field(default_factory=dict)
    whole: Table | None = None  # the same table with the rows of every PTQ method and schedule
    comparison: Comparison | None = None

    @cached_property
    def losses(self) -> Table:
        """Rows measured before PTQ."""
        return self.table.before_ptq()

    @cached_property
    def deltas(self) -> Table:
        """Rows measured after PTQ, with loss_before and delta."""
        return self.table.deltas()

    @cached_property
    def high_precision_deltas(self) -> Table:
        """δ of the models that were trained in 16 bits or more."""
        return self.deltas.select(self.deltas.high_precision)

    @cached_property
    def deltas_by_schedule(self) -> Table:
        """δ of the models that were trained in 16 bits or more, under every learning-rate schedule."""
        deltas = (self.table if self.whole is None else self.whole).one_method().deltas()
        return deltas.select(deltas.high_precision)

    def part_alone(self, part: str) -> Table:
        """Rows before PTQ in which no part but `part` (P_w, P_a, P_kv) was trained below 16 bits; 16-bit rows
        included.
        """
        others = [c for c in PRECISIONS if c != part]
        return self.losses.select(np.all([self.losses[c] >= HIGH_PRECISION_BITS for c in others], axis=0))

    def fit_of(self, *laws: str) -> Fit | None:
        """The first of these laws that was fitted."""
        return next((self.fits[law] for law in laws if law in self.fits), None)

    @property
    def loss_fit(self) -> Fit | None:
        """The fit that predicts loss before PTQ with the most precision in it."""
        return self.fit_of("precision", "unified", "chinchilla")


def main_rows(table: Table) -> tuple[Table, str | None]:
    """The rows that one law can hold: of one learning-rate schedule and one kind of formats, before PTQ and after the
    main method of PTQ of weights; and the name of that method. The others are counted as left out.
    """
    table = table.one_schedule().integer_formats()
    return table.one_method(), table.main_method


def informs(fit: Fit, part: str) -> bool:
    """Whether the fit's table told f of this part (P_w, P_a, P_kv): its γ is reported."""
    name = f"gamma_{part.removeprefix('P_')}"
    return name in fit.values and name not in fit.refused
