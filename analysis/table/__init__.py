"""The table of measured losses: reads runs.csv, checks every row and counts the rows left out with the reason.

Everything in analysis starts from a Table: one row per measured validation loss, δ by pairing the rows of a run.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.table import reading, runs
from analysis.table.reading import TableError

__all__ = ["Table", "TableError", "describe", "from_columns", "load"]

REQUIRED = ("N", "D", "loss")
COUNTS = ("N", "D")
PRECISIONS = ("P_w", "P_a", "P_kv")
NUMERIC = (*COUNTS, *PRECISIONS, "P_post", "loss")
# With every text column: what makes two rows of a run different measurements.
SETTINGS = (*COUNTS, *PRECISIONS, "P_post", "seed", "group_size", "P_grad", "exponent_bits", "mantissa_bits")
KNOWN = ("run", *NUMERIC, *SETTINGS, "status", "method")
# Beyond these no count, number of bits or loss is one; squares of them stay far from the end of float64.
LEAST = {"N": 1.0, "D": 1.0, **dict.fromkeys((*PRECISIONS, "P_post"), 0.1)}
MOST = {"N": 1e20, "D": 1e20, "loss": 1e6, **dict.fromkeys((*PRECISIONS, "P_post"), 256.0)}
MOST_OF_OTHERS = 1e12
POSITIVE, NOT_NEGATIVE = ("group_size", "P_grad"), ("exponent_bits", "mantissa_bits")
EMPTY = ("", "nan", "na", "n/a", "none", "null")
LONGEST = 30  # characters of a cell that are shown
# Columns that every checked table has: see runs.models. No file has them, as their names hold a space.
MODEL, BASE = "trained model", "row before PTQ"
FORMAT_COLUMNS = {"w": ("w_format",), "a": ("a_format",), "kv": ("k_format", "v_format")}
METHOD_COLUMNS = ("method", "ptq_method")
BEYOND_WEIGHTS = ("smoothquant", "kv_cache")  # PTQ methods that quantize activations or the KV cache
HIGH_PRECISION_BITS = 16.0


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
        """The rows where mask is true; with a reason, the others are counted as left out."""
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
        """The rows before PTQ and after PTQ of the weights alone, of which the laws of δ speak."""
        beyond = np.zeros(len(self), bool)
        if "post_parts" in self:
            beyond |= ~np.isin(self["post_parts"].astype(str), ("", "w"))
        if self.methods is not None:
            beyond |= np.isin([name.lower().split("-")[0] for name in self.methods], BEYOND_WEIGHTS)
        return self.select(~(beyond & self.quantized), "PTQ of activations or KV cache, not of weights alone")

    @property
    def main_method(self) -> str | None:
        """The PTQ method of weights to fit: GPTQ, the paper's, if there, else the one with most rows; None if none is
        named.
        """
        table = self.ptq_of_weights()
        if table.methods is None or not table.quantized.any():
            return None
        used = Counter(table.methods[table.quantized])
        return next((name for name in sorted(used) if name.lower() == "gptq"), _most_common(used))

    def one_method(self) -> "Table":
        """The rows before PTQ and those of the main PTQ method: losses of two methods are not one law's."""
        table, main = self.ptq_of_weights(), self.main_method
        if main is None:
            return table
        return table.select(~table.quantized | (table.methods == main), f"PTQ by another method than {main}")

    def one_schedule(self) -> "Table":
        """The rows of one learning-rate schedule: cosine, the paper's, if there, else the one with most rows."""
        if "schedule" not in self:
            return self
        names = self["schedule"].astype(str)
        used = Counter(names)
        main = next((name for name in sorted(used) if name.lower().startswith("cos")), _most_common(used))
        return self.select(names == main, f"trained under another schedule than {main or '(unnamed)'}")

    def integer_formats(self) -> "Table":
        """The rows trained in integers or 16 bits and more, where integers are there; else all.

        A floating-point format of as many bits rounds in another way, and costs something else.
        """
        floating, integer = np.zeros(len(self), bool), np.zeros(len(self), bool)
        for part, names in FORMAT_COLUMNS.items():
            for name in names:
                if name in self:
                    formats, low = self[name].astype(str), self[f"P_{part}"] < HIGH_PRECISION_BITS
                    is_integer = np.char.startswith(formats, "int")
                    floating |= low & ~is_integer & (formats != "")
                    integer |= low & is_integer
        return self.select(~floating, "trained in floating point below 16 bits") if integer.any() else self

    def usable(self, name: str) -> "Table":
        """The rows whose number in a column that a law reads can be used."""
        derived = name.startswith(("gmse_", "s_"))
        why = f"{name} is not known of its format" if derived else f"{name} is empty"
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
        """The rows in an order that depends on what they say, not on where they stand or on the names of runs.

        By the columns of the contract and those of `more`, then, where rows are equal in those, by all others.
        """
        first = [n for n in dict.fromkeys((*NUMERIC, *more)) if n in self and self[n].dtype != object]
        others = sorted(set(self.columns) - {*first, "run", MODEL, BASE})
        order = np.lexsort([self[name] for name in reversed(first)])
        keys = np.stack([self[name][order] for name in first])
        if ((keys[:, 1:] == keys[:, :-1]) | (np.isnan(keys[:, 1:]) & np.isnan(keys[:, :-1]))).all(axis=0).any():
            ranks = [np.unique(self[name], return_inverse=True)[1] for name in others]
            order = np.lexsort([*reversed(ranks), *(self[name] for name in reversed(first))])
        return dataclasses.replace(self, columns={name: column[order] for name, column in self.columns.items()})


def _most_common(counts: Counter) -> str:
    """The name counted most often, of several the first in the alphabet."""
    return min(counts, key=lambda name: (-counts[name], name))


def from_columns(columns: Mapping[str, object], source: str = "memory") -> Table:
    """A Table from arrays or lists, checked as a file is."""
    return _check(pd.DataFrame({k: np.ravel(v) for k, v in columns.items() if k not in (MODEL, BASE)}), source, "")


def load(path: str | Path, measured: bool = True) -> Table:
    """Read runs.csv, gzipped or not. Raises TableError where the file, a required column (N, D, loss) or every row is
    unusable.

    measured False takes planned rows, too, whose loss is absent or empty (NaN then).
    """
    path = Path(path).expanduser()
    frame, sha256 = reading.read(path)
    return _check(frame, str(path), sha256, measured)


def _numbers(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """The column as float64 and a mask of the entries that are neither a number nor empty."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    text, unread = np.isnan(numbers), column[np.isnan(numbers)]
    text[text] = ~(unread.isna() | unread.astype(str).str.strip().str.lower().isin(EMPTY)).to_numpy(dtype=bool)
    return numbers, text


def _check(frame: pd.DataFrame, source: str, sha256: str, measured: bool = True) -> Table:
    """The usable rows, each with its model and the row before PTQ that it belongs to; the others counted."""
    frame = frame.rename(columns=lambda name: str(name).strip()).reset_index(drop=True)
    if not measured and "loss" not in frame:
        frame["loss"] = np.nan
    reading.check_names(frame.columns, REQUIRED, KNOWN, source)
    if frame.empty:
        raise TableError(f"{source}: the table has no rows")
    named = "run" in frame
    absent = {**dict.fromkeys(PRECISIONS, HIGH_PRECISION_BITS), "P_post": np.nan, "run": ""}
    frame = frame.assign(**{name: value for name, value in absent.items() if name not in frame})
    if not named:
        frame["run"] = [f"row-{i + 1}" for i in range(len(frame))]

    keep = np.ones(len(frame), dtype=bool)
    left_out: dict[str, int] = {}

    def leave_out(bad: np.ndarray, reason: str) -> None:
        count = int(np.count_nonzero(bad & keep))
        if count:
            left_out[reason] = left_out.get(reason, 0) + count
        keep[bad] = False

    columns = _columns(frame, ("P_post",) if measured else ("P_post", "loss"), leave_out)
    rows = pd.DataFrame(columns)[keep]
    text = {name for name in columns if columns[name].dtype == object}
    settings = [n for n in columns if n != "run" and (n in SETTINGS or n in text or n.startswith("ptq"))]
    rows, dropped = runs.without_repeats(rows, settings, named)
    for reason, index in dropped:
        leave_out(np.isin(np.arange(len(frame)), index), reason)
    if keep.any():
        model_n, base_n = runs.models(rows, settings)
        columns |= {name: np.full(len(frame), runs.NONE) for name in (MODEL, BASE)}
        columns[MODEL][keep], columns[BASE][keep] = model_n, base_n
        leave_out(columns[BASE] == runs.SEVERAL, "after PTQ, and its run has several losses before PTQ")
    if not keep.any():
        raise TableError(f"{source}: no usable row of {len(frame)}: {describe(left_out)}")
    return Table({name: column[keep] for name, column in columns.items()}, left_out, source, sha256)


def _columns(
    frame: pd.DataFrame, may_be_empty: Sequence[str], leave_out: Callable[[np.ndarray, str], None]
) -> dict[str, np.ndarray]:
    """The columns of the contract, then the others: numbers where all cells of a column are, else text.

    Rows that cannot be used are named to `leave_out` with the reason.
    """
    if "status" in frame:
        status = frame["status"].fillna("").astype(str).str.strip().str.lower()
        for value in sorted(set(status) - {"ok", *EMPTY}):
            leave_out((status == value).to_numpy(), f"status {value[:LONGEST]}")
    columns = {"run": frame["run"].fillna("").astype(str).str.strip().to_numpy(dtype=object)}
    for name in NUMERIC:
        values, text = _numbers(frame[name])
        if text.any():
            leave_out(text, f"{name} is not a number (such as {min(frame[name].astype(str)[text])[:LONGEST]!r})")
        if name not in may_be_empty:
            leave_out(np.isnan(values), f"{name} is empty or NaN")
        leave_out(np.isinf(values), f"{name} is infinite")
        leave_out(values <= 0, f"{name} is zero or negative")
        leave_out(values < LEAST.get(name, 0), f"{name} is below {LEAST.get(name, 0):g}")
        leave_out(values > MOST[name], f"{name} is above {MOST[name]:g}")
        columns[name] = values
    leave_out(columns["run"] == "", "run is empty")
    for name in frame.columns:
        if name not in columns:
            values, text = _numbers(frame[name])
            numeric = not text.any() and not np.isnan(values).all()
            columns[name] = values if numeric else frame[name].fillna("").astype(str).str.strip().to_numpy(dtype=object)
    return columns


def describe(left_out: Mapping[str, int]) -> str:
    """The rows left out in words: '3 rows left out: 2 status diverged, 1 loss is empty or NaN'."""
    total = sum(left_out.values())
    if not total:
        return "no row left out"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1]))
    return f"{total} row{'s' if total > 1 else ''} left out: {reasons}"
