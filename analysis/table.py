"""The table of measured losses: reads runs.csv, checks every row and counts the rows left out with the reason.

Everything in analysis starts from a Table: one row per measured validation loss, δ by pairing the rows of a run.
"""

import csv
import dataclasses
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from precision_scaling.errors import UserError

COUNTS = ("N", "D")
PRECISIONS = ("P_w", "P_a", "P_kv")
NUMERIC = (*COUNTS, *PRECISIONS, "P_post", "loss")
SETTINGS = (
    *COUNTS,
    *PRECISIONS,
    "P_post",
    "seed",
    "group_size",
)  # with every text column: what makes two rows repeats
FORMAT_COLUMNS = {"w": ("w_format",), "a": ("a_format",), "kv": ("k_format", "v_format")}
METHOD_COLUMNS = ("method", "ptq_method")
BEYOND_WEIGHTS = ("smoothquant", "kv_cache")  # PTQ methods that quantize activations or the KV cache
HIGH_PRECISION_BITS = 16.0


class TableError(UserError):
    """A table that cannot be used: unreadable, a required column missing, or no usable row."""


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
            raise TableError(f"{self.source}: no column {name}; it has {', '.join(self.columns)}")
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
        return next((name for name in used if name.lower() == "gptq"), used.most_common(1)[0][0])

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
        main = next((name for name in used if name.lower().startswith("cos")), used.most_common(1)[0][0])
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

    def before_ptq(self) -> "Table":
        """The rows measured before PTQ (P_post empty)."""
        return self.select(~self.quantized)

    def deltas(self) -> "Table":
        """The rows after PTQ with loss_before (of the same run, N and D before PTQ) and delta = loss - loss_before."""
        before = ~self.quantized
        keys = list(zip(self["run"], self["N"], self["D"], strict=True))
        base = {}
        for i in np.flatnonzero(before):
            base.setdefault(keys[i], self["loss"][i])
        loss_before = np.array([base.get(key, np.nan) for key in keys], dtype=np.float64)
        columns = {**self.columns, "loss_before": loss_before, "delta": self["loss"] - loss_before}
        paired = dataclasses.replace(self, columns=columns).select(self.quantized)
        return paired.select(~np.isnan(paired["loss_before"]), "after PTQ, but its run has no loss before PTQ")


def from_columns(columns: Mapping[str, object], source: str = "memory") -> Table:
    """A Table from arrays or lists, checked as a file is."""
    return _check(pd.DataFrame({k: np.ravel(v) for k, v in columns.items()}), source, "")


def load(path: str | Path, measured: bool = True) -> Table:
    """Read runs.csv. Raises TableError where the file, a required column (N, D, loss) or every row is unusable.

    measured False takes planned rows, too, whose loss is absent or empty (NaN then).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        header = next(csv.reader(io.StringIO(raw.split(b"\n", 1)[0].decode("utf-8-sig"))), [])
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would shift silently
            frame = pd.read_csv(
                path, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig", index_col=False
            )
    except FileNotFoundError:
        raise TableError(f"no table at {path}") from None
    except (
        OSError,
        UnicodeDecodeError,
        pd.errors.ParserError,
        pd.errors.ParserWarning,
        pd.errors.EmptyDataError,
    ) as err:
        raise TableError(f"{path} is not a readable CSV table: {' '.join(str(err).split())}") from None
    repeated = [name for name, count in Counter(name.strip() for name in header).items() if count > 1]
    if repeated:
        raise TableError(f"{path}: column {repeated[0]} appears more than once")
    if not measured and "loss" not in frame:
        frame["loss"] = ""
    return _check(frame, str(path), hashlib.sha256(raw).hexdigest(), measured)


def _numbers(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """The column as float64 and a mask of the entries that are neither a number nor empty."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    text = column.astype(str).str.strip().str.lower()
    empty = column.isna().to_numpy() | text.isin(["", "nan", "none", "null"]).to_numpy()
    return numbers, np.isnan(numbers) & ~empty


def _check(frame: pd.DataFrame, source: str, sha256: str, measured: bool = True) -> Table:
    frame = frame.rename(columns=lambda name: str(name).strip()).reset_index(drop=True)
    missing = [name for name in ("N", "D", "loss") if name not in frame]
    if missing:
        raise TableError(f"{source}: missing column {', '.join(missing)}; it has {', '.join(frame.columns) or 'none'}")
    if frame.empty:
        raise TableError(f"{source}: the table has no rows")
    for name in PRECISIONS:
        if name not in frame:
            frame[name] = HIGH_PRECISION_BITS
    if "P_post" not in frame:
        frame["P_post"] = np.nan
    if "run" not in frame:
        frame["run"] = [f"row-{i + 1}" for i in range(len(frame))]

    keep = np.ones(len(frame), dtype=bool)
    left_out: dict[str, int] = {}

    def leave_out(bad: np.ndarray, reason: str) -> None:
        count = int(np.count_nonzero(bad & keep))
        if count:
            left_out[reason] = count
        keep[bad] = False

    if "status" in frame:
        status = frame["status"].fillna("").astype(str).str.strip().str.lower()
        for value in sorted(set(status) - {"", "ok"}):
            leave_out((status == value).to_numpy(), f"status {value}")
    columns: dict[str, np.ndarray] = {}
    for name in NUMERIC:
        values, text = _numbers(frame[name])
        leave_out(text, f"{name} is not a number")
        if name != "P_post" and (measured or name != "loss"):
            leave_out(np.isnan(values), f"{name} is empty or NaN")
        with np.errstate(invalid="ignore"):
            leave_out(np.isinf(values), f"{name} is infinite")
            leave_out(values <= 0, f"{name} is zero or negative")
        columns[name] = values
    columns["run"] = frame["run"].fillna("").astype(str).str.strip().to_numpy(dtype=object)
    leave_out(columns["run"] == "", "run is empty")
    for name in frame.columns:
        if name not in columns:
            values, text = _numbers(frame[name])
            numeric = not text.any() and not np.isnan(values).all()
            columns[name] = values if numeric else frame[name].fillna("").astype(str).str.strip().to_numpy(dtype=object)

    order = ["run", *(n for n in NUMERIC), *(n for n in columns if n not in NUMERIC and n != "run")]
    checked = pd.DataFrame({name: columns[name] for name in order})
    kept = checked[keep]
    leave_out(keep & ~checked.index.isin(kept.drop_duplicates().index), "the same row once more")
    kept = checked[keep]
    setting = [name for name in order if name in SETTINGS or columns[name].dtype == object or name.startswith("ptq")]
    repeats = keep & ~checked.index.isin(kept.drop_duplicates(subset=setting).index)
    leave_out(repeats, "another loss for the same run and settings")
    if not keep.any():
        raise TableError(f"{source}: no usable row of {len(frame)}: {describe(left_out)}")
    return Table({name: columns[name][keep] for name in order}, left_out, source, sha256)


def describe(left_out: Mapping[str, int]) -> str:
    """The rows left out in words: '3 rows left out: 2 status diverged, 1 loss is empty or NaN'."""
    total = sum(left_out.values())
    if not total:
        return "no row left out"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1]))
    return f"{total} row{'s' if total > 1 else ''} left out: {reasons}"
