"""A run's metrics.jsonl: a line for some of its steps, and the cut back to where a resumed run starts."""

import json
import math
from pathlib import Path

from absl import logging

from precision_scaling.runtime import files
from precision_scaling.training.step import StepMetrics


def append(path: Path, found: StepMetrics, first: int, last: int, every: int, step_tokens: int, speed: dict) -> None:
    """Adds a line for every so many steps, and for the last of the run.

    found: arrays of the steps from `first` on, counted from 1. step_tokens: of a step. speed: more of each line.
    """
    with files.appending(path) as file:
        for step, (loss, grad_norm, rate) in enumerate(zip(*found, strict=True), first):
            if step % every == 0 or step == last:
                line = {
                    "step": step,
                    "tokens": step * step_tokens,
                    "loss": float(loss) if math.isfinite(loss) else None,
                    "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,
                    "learning_rate": float(rate),
                    **speed,
                }
                file.write(json.dumps(line).encode() + b"\n")


def truncate(path: Path, step: int) -> None:
    """Drops the lines after `step`, which will be written again, and a line cut short by a kill.

    Nothing is computed from this file: of lines that are damaged the others are kept, with a warning.
    """
    if not path.exists():
        return
    kept, damaged, last = [], 0, 0
    *lines, _cut = files.read(path).split(b"\n")
    for line in lines:
        found = _step(line)
        if found is None or found <= last:
            damaged += 1
        elif found <= step:
            kept.append(line + b"\n")
            last = found
    if damaged:
        logging.warning("%s: %d lines are damaged, and left out", path, damaged)
    with files.replacing(path) as file:
        file.write(b"".join(kept))


def _step(line: bytes) -> int | None:
    """The step of a line, None where it is none of ours."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) and not isinstance(step, bool) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
