"""The table, its subsets and the fits that the figures, the findings and the report share."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from analysis.fitting.comparison import Comparison
from analysis.fitting.fit import Fit
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.table import PRECISIONS, Table
from analysis.table.seed_noise import Noise, noise_of

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Usable rows of one PTQ method and schedule, fits by the name of their law, and how laws compare."""

    table: Table
    fits: Mapping[str, Fit] = dataclasses.field(default_factory=dict)
    whole: Table | None = None  # the same table with the rows of every PTQ method and schedule
    comparison: Comparison | None = None
    forecasts: Mapping[str, object] | None = (
        None  # analysis.reporting.verdicts.multiply.forecasts, where made beforehand
    )

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
    def every_row(self) -> Table:
        """The rows of every PTQ method of weights and every schedule, of integer formats."""
        every = self.table if self.whole is None else self.whole
        return every.ptq_of_weights().one_precision().one_average().integer_formats()

    @cached_property
    def deltas_by_schedule(self) -> Table:
        """δ of the models that were trained in 16 bits or more, under every learning-rate schedule."""
        deltas = self.every_row.one_method().deltas()
        return deltas.select(deltas.high_precision)

    @cached_property
    def deltas_by_method(self) -> dict[str, Table]:
        """δ under every PTQ method of weights and one schedule, the method of the fits first."""
        return _by_method(self.every_row.one_schedule().deltas(), self.main_method)

    @property
    def main_method(self) -> str:
        """The PTQ method of the fits; "" where the table names none."""
        return self.table.main_method or ""

    @cached_property
    def loss_noise(self) -> Noise | None:
        """The noise between seeds of losses before PTQ."""
        return noise_of(self.every_row.before_ptq())

    @cached_property
    def _after_ptq(self) -> dict[str, Table]:
        return _by_method(self.every_row.deltas(), self.main_method)

    @cached_property
    def _made(self) -> dict[Callable, Any]:
        return {}

    def once(self, make: Callable[["Evidence"], Made]) -> Made:
        """`make` of this evidence, which several findings and figures need, computed at the first call."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    @cached_property
    def _noise_by_setting(self) -> dict[tuple[str, str, float], Noise | None]:
        return {}

    def noise_after_ptq(self, method: str, p_post: float, column: str = "delta") -> Noise | None:
        """The noise between seeds of δ (or, with column="loss", of the loss after PTQ) at these bits."""
        key = (column, method, p_post)
        known = self._noise_by_setting
        if key not in known:
            rows = self._after_ptq.get(method)
            known[key] = None if rows is None else noise_of(rows.select(rows["P_post"] == p_post), column)
        return known[key]

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
        """The fit of the loss before PTQ, by the law of most precision effects."""
        return self.fit_of("precision", "unified", "chinchilla")


def _by_method(deltas: Table, first: str) -> dict[str, Table]:
    if not len(deltas):
        return {}
    if deltas.methods is None:
        return {"": deltas}
    names = sorted(set(deltas.methods), key=lambda name: (name != first, name))
    return {str(name): deltas.select(deltas.methods == name) for name in names}


def main_rows(table: Table) -> tuple[Table, str | None]:
    """The rows that one law can describe: of one learning-rate schedule, one kind of formats and a precision that
    stayed the same in training, before PTQ and after the main method of PTQ of weights; and the name of that method.
    All others are counted as left out.
    """
    table = table.one_schedule().one_precision().one_average().integer_formats()
    return table.one_method(), table.main_method


def informs(fit: Fit, part: str) -> bool:
    """Whether the fit's table identifies f of this part (P_w, P_a, P_kv): its γ is reported."""
    name = f"gamma_{part.removeprefix('P_')}"
    return name in fit.values and name not in fit.unidentified
