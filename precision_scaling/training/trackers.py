"""Where a run's metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, as extras.

metrics.jsonl is the record; a tracker follows that file and shows what it holds, so that a run that goes on after a
kill, or from another's trunk, has one curve without gaps and doubles.
"""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from precision_scaling.errors import ConfigError
from precision_scaling.runtime import paths


class Tracker(Protocol):
    """Takes the lines of one run, in order. package: what has to be installed for it."""

    package: str

    def __init__(self, run_directory: Path): ...

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's directory, under `tensorboard`, made anew."""

    package = "tensorboardX"

    def __init__(self, run_directory: Path):
        from tensorboardX import SummaryWriter

        directory = run_directory / paths.TENSORBOARD
        shutil.rmtree(directory, ignore_errors=True)
        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases with the run's name; project, entity and mode are those of wandb's environment."""

    package = "wandb"

    def __init__(self, run_directory: Path):
        import wandb

        # Of the runs that train at once each has one of its own. A run that goes on keeps its id: wandb passes over the
        # steps it has.
        self._run = wandb.init(
            id=run_directory.name,
            name=run_directory.name,
            group=run_directory.parent.parent.name,
            dir=str(run_directory),
            resume="allow",
            reinit="create_new",
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


# {what config.train.trackers names: its class}
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that does not exist or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError("train.trackers", tuple(names), f"any of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            allowed = f"none, or {name} after pip install -e '.[{name}]'"
            raise ConfigError("train.trackers", tuple(names), allowed)


class Followers:
    """The trackers of the runs under way, by the run's metrics.jsonl."""

    def __init__(self, names: Sequence[str]):
        self._names = tuple(names)
        self._open: dict[Path, tuple[tuple[Tracker, ...], int]] = {}  # and how much of the file they have seen

    def follow(self, path: Path) -> None:
        """Passes on what is new in a run's metrics.jsonl; of a run not seen before, all of it."""
        if not self._names:
            return
        trackers, offset = self._open.get(path) or (tuple(TRACKERS[name](path.parent) for name in self._names), 0)
        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                step, values = scalars(json.loads(line))
                for tracker in trackers:
                    tracker.write(step, values)
            self._open[path] = trackers, file.tell()

    def end(self, path: Path) -> None:
        """Closes the trackers of a run."""
        trackers, _ = self._open.pop(path, ((), 0))
        for tracker in trackers:
            tracker.close()

    def close(self) -> None:
        """Closes all of them."""
        for path in list(self._open):
            self.end(path)


def scalars(line: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """(step, what was measured there) of a line of metrics.jsonl; a loss that is not finite has no value."""
    return line["step"], {name: value for name, value in line.items() if name != "step" and value is not None}
