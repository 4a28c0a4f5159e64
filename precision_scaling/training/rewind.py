"""Batches that a run leaves out, because its loss or gradient was not finite on them.

Kept beside the run by `cohort`. A run that goes back to a checkpoint and on without a batch ends where it would have
ended had the batch never been in its stream: which checkpoint that was, or a kill in between, changes nothing.
"""

from pathlib import Path
from typing import Any

from precision_scaling.errors import UserError
from precision_scaling.runtime import files, paths


def left_out(run_directory: Path) -> tuple[int, ...]:
    """The batches of its stream that a run leaves out, in their order. UserError for what was not written here."""
    return _batches(_read(run_directory))


def leave_out(run_directory: Path, step: int) -> int:
    """Records that a run goes back to do a step (counted from 0) without its batch; returns the batch's number."""
    path = run_directory / paths.REWINDS
    rewinds = _read(run_directory)
    batch = batch_of(step, _batches(rewinds))
    files.write_sealed(path, {"rewinds": [*rewinds, {"step": step, "batch": batch}]})
    return batch


def _batches(rewinds: list[dict[str, Any]]) -> tuple[int, ...]:
    return tuple(sorted(rewind["batch"] for rewind in rewinds))


def _read(run_directory: Path) -> list[dict[str, Any]]:
    path = run_directory / paths.REWINDS
    try:
        content = files.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        rewinds = files.unsealed_list(content, path, "rewinds")
        left_out: list[int] = []
        for rewind in rewinds:
            if rewind["batch"] != batch_of(rewind["step"], tuple(sorted(left_out))):
                raise ValueError(f"step {rewind['step']} does not take batch {rewind['batch']}")
            left_out.append(rewind["batch"])
        return rewinds
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a list of rewinds ({error}); delete {run_directory} to train the run anew"
        ) from None


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
