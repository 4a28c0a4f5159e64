"""The rows that a law is fitted to, chosen from a table by the law and the options of the fit."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from analysis.fitting.options import FitError, Options
from analysis.laws import derived
from analysis.laws.law import AFTER_PTQ, Law
from analysis.table import Table, describe
from analysis.table.expression import rows_where


def with_derived(law: Law, table: Table) -> Table:
    """The table with the columns that the law reads and the table's formats determine.

    Raises FitError where another column is missing.
    """
    found = {name: derived.column(name, table.columns, strict=False) for name in law.columns if name not in table}
    more = {name: column for name, column in found.items() if column is not None}
    missing = [name for name in found if name not in more]
    if missing:
        raise FitError(f"law {law.name} needs column {', '.join(missing)}, which {table.source} does not have")
    return dataclasses.replace(table, columns={**table.columns, **more})


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The rows before and after PTQ that a law is fitted to, those after PTQ that have no residual, and the
    counts of all rows left out.
    """

    loss: Table | None
    delta: Table | None
    unheld: Table | None
    left_out: Mapping[str, int]

    @property
    def joined(self) -> Table:
        if self.loss is None or self.delta is None:
            rows = self.delta if self.loss is None else self.loss
            assert rows is not None  # a law has one of the two
            return rows
        return concatenated(self.loss, self.delta)

    def observed(self, law: Law) -> np.ndarray:
        """The loss of every row in nats per token, or δ for a law of δ alone."""
        return self.joined["delta" if law.target == "delta" else "loss"]


def choose(law: Law, table: Table, options: Options) -> Chosen:
    """The rows that the law describes and the options choose. Raises FitError where none is left."""
    table = table.one_average()
    if law.high_precision_only:
        table = table.select(table.high_precision, f"trained below 16 bits, which law {law.name} does not describe")
    if options.serve_bits is not None:
        table = _served(law, table, options.serve_bits)
    elif law.log_loss is not None and law.log_delta is None:
        table = table.select(~table.quantized, f"after PTQ, which law {law.name} does not describe")
    table = _usable(law, table, options.sigma_column)
    if law.log_delta is not None:
        table = table.one_method()
    delta_rows = table.deltas() if law.log_delta is not None else None
    loss_rows = None
    if law.log_loss is not None:
        loss_rows = table if options.serve_bits is not None else table.before_ptq()
    left_out = dict(table.left_out if delta_rows is None else delta_rows.left_out)
    if options.fit_where is not None:
        loss_rows, delta_rows, dropped = _where(loss_rows, delta_rows, options.fit_where)
        left_out |= dropped
    unheld = None
    if delta_rows is not None and options.delta_residual_of(law) == "log_delta":
        why = "delta is zero or negative and has no log"
        positive = delta_rows["delta"] > 0
        unheld, delta_rows = delta_rows.select(~positive), delta_rows.select(positive)
        left_out |= {why: len(unheld)} if len(unheld) else {}
    if delta_rows is not None and not len(delta_rows):
        raise FitError(
            f"law {law.name} needs losses after PTQ (P_post) with those of the same run before it; none usable"
            f" ({describe(left_out)})"
        )
    if loss_rows is not None and not len(loss_rows):
        raise FitError(
            f"law {law.name} needs losses {_which(options)}; none usable in {table.source} ({describe(left_out)})"
        )
    return Chosen(loss_rows, delta_rows, unheld, left_out)


def _usable(law: Law, table: Table, sigma_column: str | None) -> Table:
    """The rows with a usable value in every column that the law and its residuals read."""
    for name in law.columns:
        if name not in AFTER_PTQ:
            if table[name].dtype == object:
                seen = next((str(value) for value in table[name]), "")
                raise FitError(f"law {law.name} needs numbers in column {name}; it holds {seen[:30]!r}")
            table = table.usable(name)
        elif name != "P_post":
            known = ~table.quantized | np.isfinite(table[name])
            table = table.select(known, f"{name} is not known of its format")
    if sigma_column is None:
        return table
    if table[sigma_column].dtype == object:
        raise FitError(f"sigma_column = {sigma_column}: it holds {table[sigma_column][0]!r}, not numbers")
    known = np.isfinite(table[sigma_column]) & (table[sigma_column] > 0)
    return table.select(known, f"{sigma_column} is empty, zero or negative")


def _where(loss_rows: Table | None, delta_rows: Table | None, text: str):
    """The rows that satisfy the expression, before and after PTQ, and the count of the others."""
    kept = [None if rows is None else rows.select(rows_where(text, rows)) for rows in (loss_rows, delta_rows)]
    dropped = sum(map(_count, (loss_rows, delta_rows))) - sum(map(_count, kept))
    return (*kept, {f"outside of {text}": dropped} if dropped else {})


def _count(rows: Table | None) -> int:
    return 0 if rows is None else len(rows)


def concatenated(first: Table, second: Table) -> Table:
    """The rows of both tables, with the columns that both have, and with `loss_before`."""
    joined = {name: np.concatenate([first[name], second[name]]) for name in first.columns if name in second}
    sides = [rows["loss_before"] if "loss_before" in rows else rows["loss"] for rows in (first, second)]
    return dataclasses.replace(first, columns={**joined, "loss_before": np.concatenate(sides)})


def _which(options: Options) -> str:
    bits = options.serve_bits
    return "before PTQ (P_post empty)" if bits is None else f"after PTQ to {bits:g} bits (P_post)"


def _served(law: Law, table: Table, bits: float) -> Table:
    """The rows after PTQ to that many bits by the main method. Raises FitError for a law that knows PTQ itself."""
    if law.log_delta is not None:
        raise FitError(f"serve_bits = {bits:g}: law {law.name} has P_post in it; allowed for laws of the loss alone")
    served = table.one_method()
    return served.select(served["P_post"] == bits, f"not after PTQ to {bits:g} bits")
