"""Batches that a run leaves out, because its loss or gradient was not finite on them.

Kept beside the run by `cohort`. A run that goes back to a checkpoint and on without a batch ends where it would have
ended had the batch never been in its stream: which checkpoint that was, or a kill in between, changes nothing.
"""

import json
from pathlib import Path

from precision_scaling import results
from precision_scaling.errors import UserError

FILE = "rewinds.json"


def left_out(run_directory: Path) -> tuple[int, ...]:
    """The batches of its stream that a run leaves out, in their order. UserError for a file that is not ours."""
    path = run_directory / FILE
    if not path.exists():
        return ()
    try:
        return tuple(sorted(int(rewind["batch"]) for rewind in json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a list of rewinds; delete {run_directory} to train the run anew") from None


def leave_out(run_directory: Path, step: int) -> int:
    """Records that a run goes back to do a step (counted from 0) without its batch; returns the batch's number."""
    path = run_directory / FILE
    batch = batch_of(step, left_out(run_directory))
    rewinds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    results.atomic_write(path, json.dumps([*rewinds, {"step": step, "batch": batch}], indent=1) + "\n")
    return batch


def batch_of(step: int, left_out: tuple[int, ...]) -> int:
    """Which batch of its stream a run's step takes, both counted from 0."""
    for batch in left_out:
        step += batch <= step
    return step


def steps_in_a_row(step: int, left_out: tuple[int, ...]) -> float:
    """Steps from this one on whose batches follow each other; infinity where none is left out any more."""
    return min(
        (batch - batch_of(step, left_out) for batch in left_out if batch > batch_of(step, left_out)),
        default=float("inf"),
    )
