"""The metrics.jsonl of the runs under way: a line for some of their steps, and the cut back to where a run goes on.

A bucket has no append: there the lines are sent in parts, `metrics/<first step>.jsonl` beside the file, and joined into
metrics.jsonl when the run ends or goes on. `read` gives them all at any time.
"""

import json
import math
import time
from pathlib import Path

from absl import logging

from precision_scaling.runtime import files, paths
from precision_scaling.training.step import StepMetrics

_PART_SECONDS = 60.0  # between two parts of a run, unless a checkpoint asks for one


class MetricsLog:
    """Writes the metrics of the runs under way; `path` is each run's metrics.jsonl.

    On this machine a line is in its file when `append` returns, in a bucket when `flush` does.
    """

    def __init__(self) -> None:
        self._unsent: dict[Path, list[tuple[int, bytes]]] = {}
        self._flushed_at = time.monotonic()

    def append(
        self, path: Path, found: StepMetrics, first: int, last: int, every: int, step_tokens: int, speed: dict
    ) -> None:
        """Adds a line for every so many steps, and for the last of the run.

        found: arrays of the steps from `first` on, counted from 1. step_tokens: of a step. speed: more of each line.
        """
        lines = _lines(found, first, last, every, step_tokens, speed)
        if not files.is_remote(path):
            with files.appending(path) as file:
                for _, line in lines:
                    file.write(line)
            return
        self._unsent.setdefault(path, []).extend(lines)
        if time.monotonic() - self._flushed_at > _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends what is not in the bucket yet, a part for each run."""
        for path, lines in self._unsent.items():
            if lines:
                files.atomic_write_bytes(paths.metrics_part(path, lines[0][0]), b"".join(line for _, line in lines))
        self._unsent.clear()
        self._flushed_at = time.monotonic()

    def truncate(self, path: Path, step: int) -> None:
        """Drops the lines after `step`, which will be written again, and a line cut short by a kill.

        Nothing is computed from this file: of lines that are damaged the others are kept, with a warning.
        """
        self._unsent.pop(path, None)
        self._rewrite(path, step)

    def end(self, path: Path) -> None:
        """Of a run that is at its end: joins its parts into one file."""
        if files.is_remote(path):
            self.flush()
            self._rewrite(path, math.inf)

    def copy(self, source: Path, target: Path) -> None:
        """Begins a run with the lines of another."""
        self.flush()
        if content := read(source):
            files.atomic_write_bytes(target, content)

    def _rewrite(self, path: Path, step: float) -> None:
        content, parts = _content(path)
        if content is None:
            return
        kept, damaged, last = [], 0, 0
        *lines, _cut = content.split(b"\n")
        for line in lines:
            found = _step(line)
            if found is None or (found <= last and not parts):
                damaged += 1
            elif last < found <= step:  # of parts that were joined before a kill, what is there twice is left out
                kept.append(line + b"\n")
                last = found
        if damaged:
            logging.warning("%s: %d lines are damaged, and left out", path, damaged)
        with files.replacing(path) as file:
            file.write(b"".join(kept))
        for part in parts:
            files.remove(part)


def read(path: Path) -> bytes:
    """All lines of a run's metrics.jsonl, with those that are still in parts; none where there is no file."""
    return _content(path)[0] or b""


def _content(path: Path) -> tuple[bytes | None, list[Path]]:
    """(the lines of the file and its parts, None where there is neither; the parts)."""
    parts = files.matching(path.parent, f"{paths.METRICS_PARTS}/*.jsonl") if files.is_remote(path) else []
    whole = [path] if files.exists(path) else []
    return b"".join(files.read_all([*whole, *parts])) if whole or parts else None, parts


def _lines(
    found: StepMetrics, first: int, last: int, every: int, step_tokens: int, speed: dict
) -> list[tuple[int, bytes]]:
    lines = []
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
            lines.append((step, json.dumps(line).encode() + b"\n"))
    return lines


def _step(line: bytes) -> int | None:
    """The step of a line, None where it is none of ours."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) and not isinstance(step, bool) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
