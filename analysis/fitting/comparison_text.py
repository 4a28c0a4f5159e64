"""A comparison as compare.csv, as compare.json and in words."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable
from typing import Any

from analysis import table as tables
from analysis.fitting import crossval
from analysis.fitting.comparison import HELD_OUT, Comparison, Row
from analysis.fitting.forms import KINDS
from analysis.fitting.statistics import finite_or_null

FILES = ("compare.csv", "compare.json")
COLUMNS = (
    *("kind", "law", "n", "k", "r2", "mse", "objective", "aic", "bic"),
    *(f"{how}_{scheme}" for how in ("held_out", "served") for scheme in (*HELD_OUT, crossval.CHOSEN)),
    *("r2_held_out", "difference", "difference_low", "difference_high"),
    *("starts_at_best", "condition", "refused", "seconds"),
)


def as_record(row: Row) -> dict[str, Any]:
    """The row as one line of compare.csv."""
    mid, low, high = row.difference or (None, None, None)
    record = dataclasses.asdict(row)
    record |= {f"held_out_{scheme}": value for scheme, value in row.held_out.items()}
    record |= {f"served_{scheme}": value for scheme, value in row.served.items()}
    record |= {"difference": mid, "difference_low": low, "difference_high": high, "refused": " ".join(row.unidentified)}
    return {name: record.get(name) for name in COLUMNS}


def to_csv(comparison: Comparison) -> str:
    """The comparison as compare.csv, a line for each law and kind."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in as_record(row).items()} for row in comparison.rows)
    return text.getvalue()


def to_json(comparison: Comparison) -> str:
    """The comparison as compare.json; numbers that are not finite are null."""
    record = dataclasses.asdict(comparison)
    for row in record["rows"]:
        row["refused"] = row.pop("unidentified")
    return json.dumps(finite_or_null(record), indent=1, allow_nan=False) + "\n"


def summary(comparison: Comparison) -> str:
    """The comparison as text: one table per kind, best held-out error first."""
    lines = []
    for kind, title in KINDS.items():
        rows = [row for row in comparison.rows if row.kind == kind]
        if not rows:
            continue
        lines += [f"{title}: {rows[0].n} rows; held-out columns are rms log errors, n/a where a law cannot predict"]
        titles = [HELD_OUT.get(scheme, "chosen rows") for scheme in rows[0].held_out]
        header = f"  {'law':<19} {'k':>3} {'R2':>8} {'AIC':>9} {'BIC':>9}"
        lines.append(header + _line(titles) + "  mean |error| - best")
        for row in rows:
            held = _line(row.held_out.values()).removeprefix(" ")
            r2 = "n/a" if row.r2 is None else f"{row.r2:.4f}"
            gap = "best" if row is rows[0] else "n/a"
            if row.difference is not None:
                mean, low, high = row.difference
                gap = f"{mean:+.5f} " + (f"[{low:+.5f}, {high:+.5f}]" if low is not None else "(few runs)")
            lines.append(f"  {row.law:<19} {row.k:>3} {r2:>8} {row.aic:>9.1f} {row.bic:>9.1f} {held}  {gap}")
        if kind in ("delta", "both"):
            lines.append(f"  {'the loss as served':<44}{_line(titles)}")
            lines += [f"  {row.law:<44}{_line(row.served.values())}" for row in rows]
        lines += [f"  {tables.describe(rows[0].left_out)}", ""]
    lines += [f"likelihood ratio: {test.in_words}" for test in comparison.nested]
    test = comparison.multiplicativity
    if test is None:
        lines.append(f"multiplicativity not testable: {comparison.multiplicativity_skipped}")
    else:
        lines.append(
            f"multiplicativity: {test.in_words} ({test.marginal_runs} marginal runs, {test.joint_runs} joint runs)"
        )
    lines += [f"skipped {name}: {why}" for name, why in comparison.skipped.items()]
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join(lines)


def _line(cells: Iterable[str | float | None]) -> str:
    shown = ["n/a" if v is None else v if isinstance(v, str) else f"{v:.4f}" for v in cells]
    return "".join(f" {cell:>12}" for cell in shown)
