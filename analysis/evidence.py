"""The table and the fits that figures, findings and report all draw on, with the cuts of the table they share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from analysis.fit import Fit
from analysis.law import HIGH_PRECISION_BITS
from analysis.table import PRECISIONS, Table

METHOD_COLUMNS = ("method", "ptq_method")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Usable rows of one PTQ method, and fits by the name of their law."""

    table: Table
    fits: Mapping[str, Fit] = dataclasses.field(default_factory=dict)
    other_methods: Table | None = None  # the same table with the rows of every PTQ method

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


def method_column(table: Table) -> str | None:
    """The column that names the PTQ method of a row, where the table has one."""
    return next((name for name in METHOD_COLUMNS if name in table), None)


def main_rows(table: Table) -> tuple[Table, str | None]:
    """The rows before PTQ and those of one PTQ method: GPTQ, the paper's, else the one with most rows; and its name.

    Losses of two methods are not one law's; the rows of the others are counted as left out.
    """
    column = method_column(table)
    if column is None or not table.quantized.any():
        return table, None
    names = table[column].astype(str)
    used = Counter(names[table.quantized])
    main = next((name for name in used if name.lower() == "gptq"), used.most_common(1)[0][0])
    return table.select(~table.quantized | (names == main), f"PTQ by another method than {main}"), main


def informs(fit: Fit, part: str) -> bool:
    """Whether the fit's table told f of this part (P_w, P_a, P_kv): its γ is reported."""
    name = f"gamma_{part.removeprefix('P_')}"
    return name in fit.values and name not in fit.refused
