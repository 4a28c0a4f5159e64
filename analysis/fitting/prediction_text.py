"""Predictions as the table that `analysis.predict` writes, and as a summary."""

import csv
import io

import numpy as np

from analysis import table as tables
from analysis.fitting.prediction import Predictions
from analysis.table.columns import BASE, MODEL

NEW_COLUMNS = (
    *("predicted", "low", "high", "measured", "error"),
    *("law", "predicted_delta", "loss_before", "loss_before_from", "outside", "note"),
)


def to_csv(found: Predictions) -> str:
    """The table's rows with NEW_COLUMNS in place of its loss."""
    kept = [name for name in found.table.columns if name not in ("loss", MODEL, BASE, *NEW_COLUMNS)]
    new = (
        *(found.predicted, found.low, found.high, found.measured, found.error),
        *(found.law, found.delta, found.before, found.before_from, found.outside, found.note),
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*kept, *NEW_COLUMNS])
    for row in zip(*(found.table[name] for name in kept), *new, strict=True):
        writer.writerow([_cell(value) for value in row])
    return text.getvalue()


def _cell(value) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.10g}"
    return str(value)


def summary(found: Predictions) -> str:
    """How many rows each law predicted and, of measured rows, the rms error and the share within the interval."""
    lines = []
    for law in dict.fromkeys(found.law[found.law != ""]):
        for after, what in ((False, "before PTQ"), (True, "after PTQ")):
            rows = (found.law == law) & (found.table.quantized == after)
            if rows.any():
                lines.append(f"{law}, {what}: {_quality(found, rows)}")
    reasons = {why: int(np.sum(found.note == why)) for why in dict.fromkeys(found.note) if why}
    lines += [f"{count} rows without a prediction: {why}" for why, count in reasons.items()]
    far = [names for names in found.outside if names]
    if far:
        seen = ", ".join(dict.fromkeys(name for names in far for name in names.split()))
        lines.append(f"{len(far)} rows lie outside the range of their fit in {seen} (column outside)")
    lines += [tables.describe(found.table.left_out), *(f"note: {note}" for note in found.notes)]
    return "\n".join(lines)


def _quality(found: Predictions, rows: np.ndarray) -> str:
    words = f"{int(rows.sum())} rows predicted"
    origin = [name for name in dict.fromkeys(found.before_from[rows]) if name]
    if origin:
        counts = [f"{int(np.sum(found.before_from[rows] == name))} {name}" for name in origin]
        words += f" (loss before PTQ: {', '.join(counts)})"
    measured = rows & np.isfinite(found.measured)
    if not measured.any():
        return words + ", none measured"
    error = np.log(found.predicted[measured] / found.measured[measured])
    words += f", {int(measured.sum())} measured: rms error {100 * np.sqrt(np.mean(error**2)):.2f} % of the loss, mean "
    words += f"{100 * np.mean(error):+.2f} %"
    known = measured & np.isfinite(found.low)
    if known.any():
        inside = (found.low <= found.measured) & (found.measured <= found.high)
        words += f", {np.mean(inside[known]):.1%} within the {found.level:.0%} interval"
    return words
