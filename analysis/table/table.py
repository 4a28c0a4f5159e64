"""Table: the usable rows of measured losses, and the selections of rows that later stages make."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.table.columns import (
    BASE,
    BEYOND_WEIGHTS,
    EMPTY,
    FORMAT_COLUMNS,
    HIGH_PRECISION_BITS,
    METHOD_COLUMNS,
    MODEL,
    MOST,
    MOST_OF_OTHERS,
    NOT_NEGATIVE,
    NUMERIC,
    POSITIVE,
    PRECISIONS,
    UNROUNDED,
    is_of_format,
    mixture,
)
from analysis.table.reading import TableError


@dataclasses.dataclass(frozen=True)
class Table:
    """Usable rows: arrays of one length by column name (float64 for the numeric ones, P_post NaN before PTQ)."""

    columns: Mapping[str, np.ndarray]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    source: str = "memory"
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            named = ", ".join(column for column in self.columns if column not in (MODEL, BASE))
            raise TableError(f"{self.source}: no column {name}; it has {named}")
        return self.columns[name]

    def select(self, mask: np.ndarray, reason: str | None = None) -> "Table":
        """The rows where mask is true; with a reason, the others count as left out."""
        left_out = dict(self.left_out)
        dropped = int(len(mask) - np.count_nonzero(mask))
        if reason and dropped:
            left_out[reason] = left_out.get(reason, 0) + dropped
        return dataclasses.replace(self, columns={k: v[mask] for k, v in self.columns.items()}, left_out=left_out)

    def where(self, **values: str) -> "Table":
        """The rows whose column equals the value (or one of several, `a|b`); the others count as left out.

        Numbers compare as numbers. Rows before PTQ stay where the column is empty there, as the PTQ method is.
        """
        table = self
        for name, value in values.items():
            column = table[name]
            if np.issubdtype(column.dtype, np.number):
                try:
                    mask = np.isin(column, [float(v) for v in str(value).split("|")])
                except ValueError:
                    raise TableError(f"column {name} holds numbers, asked for {value!r}") from None
                empty = np.isnan(column)
            else:
                mask = np.isin(column.astype(str), str(value).split("|"))
                empty = column.astype(str) == ""
            if mask.any():
                mask |= empty & ~table.quantized
            else:
                seen = sorted({str(v) for v in column})
                raise TableError(f"{self.source}: no row has {name}={value}; it holds {', '.join(seen[:12])}")
            table = table.select(mask, f"{name} is not {value}")
        return table

    @property
    def quantized(self) -> np.ndarray:
        """True for rows measured after PTQ."""
        return ~np.isnan(self["P_post"])

    @property
    def high_precision(self) -> np.ndarray:
        """True for rows of runs trained with 16 bits or more in every part."""
        return np.all([self[c] >= HIGH_PRECISION_BITS for c in PRECISIONS], axis=0)

    @property
    def methods(self) -> np.ndarray | None:
        """The PTQ method of every row ("" before PTQ); None where no column names it."""
        column = next((name for name in METHOD_COLUMNS if name in self), None)
        return None if column is None else self[column].astype(str)

    def ptq_of_weights(self) -> "Table":
        """The rows before PTQ and those after PTQ of the weights alone, which the laws of δ describe."""
        beyond = np.zeros(len(self), bool)
        if "post_parts" in self:
            beyond |= ~np.isin(self["post_parts"].astype(str), ("", "w"))
        if self.methods is not None:
            beyond |= np.isin([name.lower().split("-")[0] for name in self.methods], BEYOND_WEIGHTS)
        return self.select(~(beyond & self.quantized), "PTQ of activations or KV cache, not of weights alone")

    @property
    def main_method(self) -> str | None:
        """The PTQ method of weights to fit: GPTQ (the paper's), else the one with most rows; None if none is named."""
        table = self.ptq_of_weights()
        if table.methods is None or not table.quantized.any():
            return None
        used = Counter(table.methods[table.quantized])
        return next((name for name in sorted(used) if name.lower() == "gptq"), _most_common(used))

    def one_method(self) -> "Table":
        """The rows before PTQ and those of the main PTQ method: two methods do not follow one law."""
        table, main = self.ptq_of_weights(), self.main_method
        if main is None:
            return table
        return table.select(~table.quantized | (table.methods == main), f"PTQ by another method than {main}")

    def one_schedule(self) -> "Table":
        """The rows of one learning-rate schedule: cosine (the paper's), else the one with most rows."""
        if "schedule" not in self:
            return self
        names = self["schedule"].astype(str)
        used = Counter(names)
        main = next((name for name in sorted(used) if name.lower().startswith("cos")), _most_common(used))
        return self.select(names == main, f"trained under another schedule than {main or '(unnamed)'}")

    def one_precision(self) -> "Table":
        """The rows of models whose precision stayed the same in training; of the others it tells the last alone."""
        if "switches" not in self:
            return self
        same = np.isin(self["switches"].astype(str), EMPTY)
        return self.select(same, "the precision changed in training")

    def one_average(self) -> "Table":
        """The rows of the parameters at the end of training, or where there are none of the average with most rows.

        An average (EMA) is measured beside the run whose parameters it is of: it is no other run.
        """
        if "average" not in self:
            return self
        names = self["average"].astype(str)
        if (own := np.isin(names, EMPTY)).any():
            return self.select(own, "of an average of the parameters")
        main = _most_common(Counter(names))
        return self.select(names == main, f"of another average than {main}")

    def integer_formats(self) -> "Table":
        """The rows trained in integers or in 16 bits and more; all rows where no integer format is named.

        A floating-point format of the same bits rounds differently and has another cost.
        """
        floating, integer = np.zeros(len(self), bool), np.zeros(len(self), bool)
        for part, names in FORMAT_COLUMNS.items():
            for name in names:
                if name in self:
                    formats, low = self[name].astype(str), self[f"P_{part}"] < HIGH_PRECISION_BITS
                    is_integer = np.array([_is_integer(text) for text in formats], bool)
                    floating |= low & ~is_integer & (formats != "")
                    integer |= low & is_integer
        return self.select(~floating, "trained in floating point below 16 bits") if integer.any() else self

    def usable(self, name: str) -> "Table":
        """The rows with a usable number in the column."""
        why = f"{name} is not known of its format" if is_of_format(name) else f"{name} is empty"
        table = self.select(~np.isnan(self[name]), why)
        table = table.select(~np.isinf(table[name]), f"{name} is infinite")
        if name in POSITIVE:
            table = table.select(table[name] > 0, f"{name} is zero or negative")
        if name in NOT_NEGATIVE:
            table = table.select(table[name] >= 0, f"{name} is negative")
        return table.select(np.abs(table[name]) <= MOST.get(name, MOST_OF_OTHERS), f"{name} is too large")

    def before_ptq(self) -> "Table":
        """The rows measured before PTQ (P_post empty)."""
        return self.select(~self.quantized)

    @property
    def models(self) -> np.ndarray:
        """The trained model of every row: numbers from 0 in the order in which they first appear."""
        return pd.factorize(self[MODEL])[0]

    def deltas(self) -> "Table":
        """The rows after PTQ with loss_before (of the same model and D before PTQ) and delta = loss - loss_before."""
        before, base = ~self.quantized, self[BASE]
        loss_of = pd.Series(self["loss"][before], index=base[before])
        loss_before = loss_of.reindex(base).to_numpy(dtype=np.float64)
        columns = {**self.columns, "loss_before": loss_before, "delta": self["loss"] - loss_before}
        paired = dataclasses.replace(self, columns=columns).select(self.quantized)
        return paired.select(~np.isnan(paired["loss_before"]), "after PTQ, but its run has no loss before PTQ")

    def in_order(self, *more: str) -> "Table":
        """The rows in an order that depends only on their content, not on their place or the names of runs.

        Sorted by the columns of the contract and `more`; ties by all other columns.
        """
        first = [n for n in dict.fromkeys((*NUMERIC, *more)) if n in self and self[n].dtype != object]
        others = sorted(set(self.columns) - {*first, "run", MODEL, BASE})
        order = np.lexsort([self[name] for name in reversed(first)])
        keys = np.stack([self[name][order] for name in first])
        if ((keys[:, 1:] == keys[:, :-1]) | (np.isnan(keys[:, 1:]) & np.isnan(keys[:, :-1]))).all(axis=0).any():
            ranks = [np.unique(self[name], return_inverse=True)[1] for name in others]
            order = np.lexsort([*reversed(ranks), *(self[name] for name in reversed(first))])
        return dataclasses.replace(self, columns={name: column[order] for name, column in self.columns.items()})


def describe(left_out: Mapping[str, int]) -> str:
    """The rows left out in words: '3 rows left out: 2 status diverged, 1 loss is empty or NaN'."""
    total = sum(left_out.values())
    if not total:
        return "no row left out"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1]))
    return f"{total} row{'s' if total > 1 else ''} left out: {reasons}"


def _is_integer(text: str) -> bool:
    """Whether a cell of a format column names integers; of several formats, those that round."""
    found = [name for name, _ in mixture(text)]
    return any(name.startswith("int") for name in found) and all(name.startswith(("int", *UNROUNDED)) for name in found)


def _most_common(counts: Counter) -> str:
    """The name counted most often; of several, the first in the alphabet."""
    return min(counts, key=lambda name: (-counts[name], name))
