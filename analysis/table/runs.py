"""Which rows of a table are duplicates, which are of one trained model, and to which loss before PTQ a row after PTQ
belongs.

A model was trained once: one run, one N, one training precision, one seed. A row after PTQ belongs to the loss
before PTQ of its model at the same D. Where a run has several such losses, it is the one that agrees with the row in
every column in which they differ. Nothing here depends on the order of the rows.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.table.columns import PRECISIONS

PLACE = ("run", "N", *PRECISIONS)
NONE, SEVERAL = -1, -2  # no row before PTQ; several, and no column decides


def of_ptq(name: str) -> bool:
    """Whether a column says how a model was quantized after training, and so nothing about rows before PTQ."""
    return name in ("P_post", "method", "stored_bits", "fallback_layers") or name.startswith(("ptq", "post_"))


def without_repeats(
    rows: pd.DataFrame, settings: Sequence[str], named: bool
) -> tuple[pd.DataFrame, list[tuple[str, pd.Index]]]:
    """The rows that are neither duplicates nor contradictions; and (reason, index of rows) of the rest.

    `settings` are the columns that make two rows of a run different measurements. Without run names of its own a table
    can only repeat rows as a whole.
    """
    apart = [name for name in rows if name != "run"]
    measurement = ["run", *settings]
    whole = [*measurement, "loss"] if named else apart
    dropped = []

    def drop(reason: str, which: pd.Series) -> None:
        nonlocal rows
        which = which.reindex(rows.index, fill_value=False)
        dropped.append((reason, rows.index[which]))
        rows = rows[~which]

    drop("the same row once more", rows.duplicated(whole))
    before = rows[rows["P_post"].isna()]
    drop("the same row once more", before.duplicated([name for name in whole if not of_ptq(name)]))
    if named:
        measured = rows[rows["loss"].notna()]
        drop("several losses for the same run and settings", measured.duplicated(measurement, keep=False))
        drop("the same rows under another run name", _copies(rows, apart))
    return rows, dropped


def _copies(rows: pd.DataFrame, apart: Sequence[str]) -> pd.Series:
    """True for rows of runs that repeat, under another name, all the rows of another run."""
    hashes = pd.util.hash_pandas_object(rows[list(apart)], index=False)
    whole = hashes.groupby(rows["run"], sort=False).agg(["sum", "count"])
    return rows["run"].isin(whole.index[whole.duplicated()])


def models(rows: pd.DataFrame, settings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The trained model of every row, and the position of the row before PTQ it belongs to (its own before PTQ).

    The latter is NONE or SEVERAL where there is no such row or where no column decides between several.
    """
    point_n = rows.groupby([*PLACE, "D"], sort=False).ngroup().to_numpy()
    seed_n = _codes(rows["seed"]) if "seed" in rows else np.zeros(len(rows), int)
    before_n = rows["P_post"].isna().to_numpy()
    model_n = _models_before_ptq(rows, point_n, seed_n, before_n, settings)
    base_n = np.where(before_n, np.arange(len(rows)), NONE)

    loss = rows["loss"].to_numpy()
    known_n = before_n & ~np.isnan(loss)
    count = np.bincount(point_n[known_n], minlength=point_n.max() + 1)
    first = np.zeros(len(count), int)
    first[point_n[known_n]] = np.flatnonzero(known_n)
    only = first[point_n]
    agrees = (seed_n == seed_n[only]) | (seed_n < 0) | (seed_n[only] < 0)
    single = ~before_n & (count[point_n] == 1) & agrees
    base_n[single] = only[single]

    several = np.flatnonzero(~before_n & (count[point_n] > 1))
    candidates: dict[int, list[int]] = {int(point): [] for point in np.unique(point_n[several])}
    for i in np.flatnonzero(known_n & np.isin(point_n, list(candidates))):
        candidates[int(point_n[i])].append(int(i))
    columns = {"seed": seed_n, **{name: _codes(rows[name]) for name in settings if name not in ("seed", "D", *PLACE)}}
    for i in several:
        base_n[i] = _belonging(int(i), np.array(candidates[point_n[i]]), columns, loss)

    paired = ~before_n & (base_n >= 0)
    model_n[paired] = model_n[base_n[paired]]
    return np.unique(model_n, return_inverse=True)[1], base_n


def _codes(column: pd.Series) -> np.ndarray:
    """An integer code for every value; -1 where the cell is empty."""
    return pd.factorize(column if pd.api.types.is_numeric_dtype(column) else column.where(column != ""))[0]


def _belonging(i: int, candidates: np.ndarray, columns: dict[str, np.ndarray], loss: np.ndarray) -> int:
    """Of the rows before PTQ at `candidates` the one that row i belongs to."""
    for name, codes in columns.items():
        found = codes[candidates]
        if len(set(found)) == 1 and name != "seed":
            continue
        equal = found == codes[i]
        candidates = candidates[equal if equal.any() and codes[i] >= 0 else (found < 0) | (codes[i] < 0)]
        if not len(candidates):
            return NONE if name == "seed" else SEVERAL
    return candidates[0] if len(set(loss[candidates])) == 1 else SEVERAL


def _models_before_ptq(rows, point_n, seed_n, before_n, settings) -> np.ndarray:
    """A number for every run, N, precision and seed.

    Where such a model has several losses at one D, it is as many models, by the columns in which those rows differ.
    """
    place_n = rows.groupby(list(PLACE), sort=False).ngroup().to_numpy()
    model_n = np.unique(np.stack([place_n, seed_n]), axis=1, return_inverse=True)[1].ravel()
    at = pd.DataFrame({"model": model_n, "point": point_n})[before_n]
    training = [n for n in settings if not of_ptq(n) and n not in ("seed", "D", *PLACE)]
    for model in at["model"][at.duplicated()].unique() if training else ():
        own = np.flatnonzero(before_n & (model_n == model))
        cells = pd.DataFrame({name: _codes(rows[name].iloc[own]) for name in training})
        differ = cells.columns[(cells.groupby(point_n[own]).nunique() > 1).any()]
        if len(differ):
            model_n[own] = model_n.max() + 1 + cells.groupby(list(differ)).ngroup().to_numpy()
    return model_n
