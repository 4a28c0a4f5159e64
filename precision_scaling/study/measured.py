"""Runs of a study that are measured already, on another machine: taken over from its table, not done again.

`study` calls it before it trains: a study moves to a new machine with its config and its rows, without checkpoints.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precision_scaling.errors import UserError
from precision_scaling.ptq.registry import bits_post, planned
from precision_scaling.ptq.scheme import Scheme
from precision_scaling.runtime import files
from precision_scaling.study import results
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.run import Run

TRAINED = "trained"
_TEXTS = ("run", "status", "method", "average")
# Columns that older tables lack.
_NEW = {
    "post_format",
    "post_layers",
    "layers",
    "switches",
    "switched_share",
    "optimizer",
    "average",
    "within_documents",
}
# They say how a run came out or on what it was made, not what it is.
_FREE = ("loss", "status", "diverged_step", "batches_left_out", "device", "jax_version")


def take_over(table: Path, workspace: Workspace) -> int:
    """Writes the rows of the table's complete runs, as if they had been measured here; returns how many runs it holds.

    A run is complete if it has its loss, and where it is to be quantized one at every method and bit-width, or if it
    diverged. Rows that are here already stay. Raises UserError for a table that cannot be read, or whose row disagrees
    with the config or the corpus.
    """
    found = _read(table)
    complete = 0
    for trained in workspace.experiment.runs:
        models = workspace.experiment.models([trained])
        if not all(_is_complete(found.get(run.id, {}), run, workspace) for run in models):
            continue
        complete += 1
        for run in models:
            rows = found[run.id]
            _check(table, rows[TRAINED][0], run, workspace)
            for measurement, measured in rows.items():
                if not results.read_rows(workspace.directory(run), measurement):
                    results.write_rows(workspace.directory(run), measurement, measured)
    return complete


def _read(table: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{run: {measurement: rows}}."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    try:
        text = files.unzipped(files.read(table)).decode("utf-8")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if not set(results.COLUMNS) - _NEW <= set(reader.fieldnames or ()):
            raise ValueError
        for row in reader:
            row = {name: _value(name, text) for name, text in row.items() if name in results.COLUMNS}
            rows = found.setdefault(row["run"], {}).setdefault(row["method"] or TRAINED, [])
            if row in rows:
                continue
            if any(row["P_post"] == other["P_post"] for other in rows):
                what = f"{row['run']}, method {row['method']!r}, P_post {row['P_post']!r}"
                raise UserError(f"--rows={table}: different rows of {what}; allowed is one")
            rows.append(row)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--rows={table}: {error.strerror or error}") from None
    except (ValueError, csv.Error, TypeError):
        raise UserError(f"--rows={table}: not a table; allowed is the runs.csv or runs.csv.gz of this study") from None
    return found


def _value(name: str, text: str) -> Any:
    if not text:
        return "" if name in _TEXTS else None
    for kind in () if name in _TEXTS else (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_complete(rows: Mapping[str, list[dict[str, Any]]], run: Run, workspace: Workspace) -> bool:
    if TRAINED not in rows:
        return False
    ptq = workspace.experiment.config.ptq
    if rows[TRAINED][0]["status"] != "ok" or not run.ptq:
        return True

    def is_complete(scheme: Scheme, bits: tuple[float, ...]) -> bool:
        found = {row["P_post"] for row in rows.get(scheme.name, ())}
        # What a target comes to is known when it is done.
        return bool(found) if scheme.target_bits else {bits_post(scheme, b, run.shape.model) for b in bits} <= found

    return all(is_complete(*both) for both in planned(ptq))


def _check(table: Path, row: Mapping[str, Any], run: Run, workspace: Workspace) -> None:
    """Raises UserError where a row is of another corpus or setting than the run of that name is here."""
    for name, value in results.row(workspace, run, None).items():
        there, here = results.cell(row.get(name)), results.cell(value)
        if name not in _FREE and there != here and not (name in _NEW and name not in row):
            raise UserError(f"--rows={table}: run {run.id} has {name} = {there!r} there and {here!r} here")
