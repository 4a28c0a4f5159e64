"""From cells to the usable rows of a Table: every row is checked, and those left out are counted with the reason."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from analysis.table import reading, runs
from analysis.table.columns import (
    BASE,
    EMPTY,
    HIGH_PRECISION_BITS,
    KNOWN,
    LEAST,
    MODEL,
    MOST,
    NUMERIC,
    PRECISIONS,
    REQUIRED,
    SETTINGS,
)
from analysis.table.reading import TableError
from analysis.table.table import Table, describe

LONGEST = 30  # characters of a cell that are shown


def _numbers(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """The column as float64 and a mask of the entries that are neither a number nor empty."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    text, unread = np.isnan(numbers), column[np.isnan(numbers)]
    text[text] = ~(unread.isna() | unread.astype(str).str.strip().str.lower().isin(EMPTY)).to_numpy(dtype=bool)
    return numbers, text


def check(frame: pd.DataFrame, source: str, sha256: str, measured: bool = True) -> Table:
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
