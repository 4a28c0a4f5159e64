"""The table of measured losses: reads runs.csv, checks every row and counts the rows left out with the reason.

Everything in analysis starts from a Table: one row per measured validation loss, δ by pairing the rows of a run.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis.table import reading
from analysis.table.checking import check
from analysis.table.columns import BASE, FORMAT_COLUMNS, HIGH_PRECISION_BITS, METHOD_COLUMNS, MODEL, NUMERIC, PRECISIONS
from analysis.table.reading import TableError
from analysis.table.table import Table, describe
from precision_scaling.runtime import files

__all__ = [
    "BASE",
    "FORMAT_COLUMNS",
    "HIGH_PRECISION_BITS",
    "METHOD_COLUMNS",
    "MODEL",
    "NUMERIC",
    "PRECISIONS",
    "Table",
    "TableError",
    "describe",
    "from_columns",
    "load",
]


def from_columns(columns: Mapping[str, ArrayLike], source: str = "memory", measured: bool = True) -> Table:
    """A Table from arrays or lists, checked as a file is; measured: as for `load`."""
    frame = pd.DataFrame({k: np.ravel(v) for k, v in columns.items() if k not in (MODEL, BASE)})
    return check(frame, source, "", measured)


def load(path: str | Path, measured: bool = True) -> Table:
    """Reads runs.csv, gzipped or not.

    measured: False also accepts planned rows, whose loss is absent or empty (then NaN). Raises TableError for a file
    that cannot be read, a missing column (N, D, loss), or a table without a usable row.
    """
    path = files.place(path, "--runs")
    frame, sha256 = reading.read(path)
    return check(frame, str(path), sha256, measured)
