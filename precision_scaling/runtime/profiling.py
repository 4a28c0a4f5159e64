"""A trace of a few dispatches for `--profile`: what the devices do when.

`train` and `study` make one; `training.cohort` runs every dispatch in it.
"""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from precision_scaling.runtime import files, hosts


def define_flag(values: flags.FlagValues) -> flags.FlagHolder[int]:
    """The option --profile."""
    text = "Number of dispatches to trace into WORKDIR/profile, from the first one on."
    return flags.DEFINE_integer("profile", 0, text, lower_bound=0, flag_values=values)


class Profile:
    """Traces the first `dispatches` dispatches of the first process."""

    def __init__(self, directory: Path, dispatches: int):
        self.directory = directory
        self._asked = self._left = dispatches if hosts.primary() else 0
        self._running = False

    @contextlib.contextmanager
    def dispatch(self) -> Iterator[None]:
        """Encloses one dispatch until its results are on the host. Its program must be compiled before."""
        if not self._left:
            yield
            return
        if not self._running:
            jax.profiler.start_trace(self._local())
            self._running = True
        yield
        self._left -= 1
        if not self._left:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if files.is_remote(self.directory):
                local = self._local()
                for path in local.rglob("*"):
                    if path.is_file():
                        files.copy(path, self.directory.joinpath(path.relative_to(local)))
                shutil.rmtree(local)

    @functools.cached_property
    def _temporary(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="profile-"))

    def _local(self) -> Path:
        """Where JAX writes, which knows no buckets here."""
        return self._temporary if files.is_remote(self.directory) else self.directory

    def report(self) -> list[str]:
        """A line about the trace; none if none was requested."""
        traced = self._asked - self._left
        if not self._asked:
            return []
        if not traced:
            return ["nothing was profiled: nothing was left to train"]
        return [f"trace of {traced} dispatches in {self.directory}"]
