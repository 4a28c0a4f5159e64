"""A run's metrics.jsonl: a line for some of its steps, and the cut back to where a resumed run starts."""

import json
import math
from pathlib import Path

from precision_scaling import results
from precision_scaling.step import StepMetrics

FILE = "metrics.jsonl"


def append(path: Path, found: StepMetrics, first: int, last: int, every: int, step_tokens: int, speed: dict) -> None:
    """Adds a line for every so many steps, and for the last of the run.

    found: arrays of the steps from `first` on, counted from 1. step_tokens: of a step. speed: more of each line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
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
                file.write(json.dumps(line) + "\n")


def truncate(path: Path, step: int) -> None:
    """Drops the lines after `step`, which will be written again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    results.atomic_write(path, "".join(kept))
