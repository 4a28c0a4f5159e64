"""Kills a small study with SIGKILL at random moments, again and again, and compares its end with one left alone.

    python -m benchmarks.kills [--kills=50] [--seed=0] [--directory=DIR] [--bucket]

Every process is the study command, forked from this one, which has the imports. Each is killed at a moment drawn
uniformly from its start to a little after its first steps, so that some die while they compile, some in a step, in a
checkpoint or a row. In the end runs.csv must be equal byte by byte, all parameters bit by bit, and every step must
stand in the metrics once, with the same loss. Exits with 1 where they are not. With --bucket the killed study keeps
everything in a bucket, of an object store on this machine, and is compared with one on the disk.
"""

import contextlib
import fnmatch
import json
import math
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import flags, logging

from benchmarks import object_store
from precision_scaling.errors import UserError
from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_KILLS = flags.DEFINE_integer("kills", 50, "SIGKILLs.", lower_bound=1, flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.", flag_values=FLAGS)
_DIRECTORY = flags.DEFINE_string(
    "directory", None, "Where the studies are kept; default: deleted afterwards.", flag_values=FLAGS
)

_BUCKET = flags.DEFINE_bool("bucket", False, "The study that is killed is in a bucket.", flag_values=FLAGS)

CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.compilation_cache = {cache!r}
    c.model.width, c.model.depth, c.model.heads, c.model.mlp_width, c.model.sequence_length = 16, 2, 2, 24, 16
    c.train.batch_size, c.train.log_every, c.train.checkpoint_seconds = 4, 1, 0.2
    c.train.steps_per_dispatch, c.study.lanes, c.ptq.methods, c.ptq.bits = 10, 2, ("rtn",), (3, 4)
    c.evaluate.sequences, c.evaluate.batch_size = 8, 4
    c.study.grid.all = base.grid(("25k",), (64 * {steps}, 64 * {steps} // 2), ("bf16", "w3_a4_kv4"), ptq=True)
    return c
"""
STEPS = 20000  # so many that, of fifty processes, nearly half come past their start


class Study:
    """The workdir of a study: a directory, or with a store what is below its name in the bucket."""

    def __init__(self, directory: Path, store: object_store.Store | None = None):
        self.directory, self._store = directory, store
        self.log = directory.with_suffix(".log")
        self.workdir = f"{store.url}/{directory.name}" if store else str(directory)

    def checkpoints(self) -> set[str]:
        """What a process would go on from."""
        pattern, name = "cohorts/*/*/lanes.json", self.directory.name
        if self._store is None:
            return {str(path) for path in self.directory.glob(pattern)}
        return set(fnmatch.filter(self._store.objects(f"{name}/cohorts/"), f"{name}/{pattern}"))

    def fetch(self) -> Path:
        """A directory with all of it."""
        for name in self._store.objects(f"{self.directory.name}/") if self._store else ():
            path = self.directory.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._store.read(name))
        return self.directory


def _serve(ports) -> None:
    with object_store.bucket() as store:
        ports.send((store.port, store.own))
        ports.recv()


@contextlib.contextmanager
def served() -> Iterator[object_store.Store]:
    """A bucket that another process serves: this one is forked, and would leave the server's threads behind."""
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(its,), daemon=True)
    process.start()
    its.close()  # else nothing tells that the server's process has ended
    store = object_store.Store(*mine.recv())
    os.environ.update(store.environment)
    try:
        yield store
    finally:
        mine.send(None)
        process.join()


def start(config: Path, study: Study) -> int:
    """The study command in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    log = os.open(study.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["study", f"--config={config}", f"--workdir={study.workdir}"]
    status = 0
    try:
        runpy.run_module("precision_scaling.study", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    os._exit(status if isinstance(status, int) else 1)


def finish(config: Path, study: Study) -> float:
    """Runs the study to its end; returns the seconds it took."""
    started = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(start(config, study), 0)[1])
    if status:
        sys.exit(f"the study ended with {status}: see {study.log}")
    return time.monotonic() - started


def seconds_to_first_step(config: Path, study: Study) -> float:
    """How long a process takes from its start to its first checkpoint, with programs that were compiled before."""
    started = time.monotonic()
    child = start(config, study)
    while not study.checkpoints():
        time.sleep(0.01)
    seconds = time.monotonic() - started
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return seconds


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two studies that have ended."""
    found = []
    if (one / "runs.csv").read_bytes() != (other / "runs.csv").read_bytes():
        found.append("runs.csv")
    names = sorted(path.name for path in (one / "runs").iterdir())
    if names != sorted(path.name for path in (other / "runs").iterdir()):
        return [*found, "the runs"]
    for name in names:
        curves = []
        for study in (one, other):
            lines = (study / "runs" / name / "metrics.jsonl").read_text().splitlines()
            curves.append([(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)])
        if curves[0] != curves[1]:
            found.append(f"metrics of {name}")
        if parameters(one / "runs" / name) != parameters(other / "runs" / name):
            found.append(f"parameters of {name}")
    return found


def parameters(run: Path) -> list[bytes]:
    """All parameters of a finished run."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((run / "checkpoint").absolute())["arrays"]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays)]


def _main() -> None:
    if _BUCKET.value and not object_store.is_installed():
        raise UserError("--bucket: the server is missing; allowed is pip install -e '.[dev]' first")
    from precision_scaling.study import __main__  # noqa: F401  imported once, for all processes

    logging.set_verbosity(logging.WARNING)
    kills, moments = _KILLS.value, random.Random(_SEED.value)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(served()) if _BUCKET.value else None
        directory = Path(_DIRECTORY.value or stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        config = directory / "study.py"
        config.write_text(CONFIG.format(cache=str(directory / "xla"), steps=STEPS))
        first, left_alone, killed_study = (
            Study(directory / "first"),
            Study(directory / "whole"),
            Study(directory / "killed", store),
        )
        finish(config, first)  # compiles
        whole = finish(config, left_alone)
        startup = seconds_to_first_step(config, Study(directory / "startup", store))
        # A process that is killed at t > startup has worked for t - startup. Moments go so far past the start that all
        # together do half of the work, so that there is something left to kill when the last one falls.
        share = max(whole - startup, 1.0) / 2 / kills
        latest = startup + share + math.sqrt(share * (share + 2 * startup))
        print(
            f"left alone: {whole:.1f} s, {startup:.1f} s to the first checkpoint; kills from 0 to {latest:.1f} s",
            flush=True,
        )
        killed, further, found = 0, 0, killed_study.checkpoints()
        while killed < kills:
            child = start(config, killed_study)
            time.sleep(moments.uniform(0, latest))
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended and status:
                sys.exit(f"a process ended by itself, with an error: see {killed_study.log}")
            if ended:
                print(f"the study was complete after {killed} kills", flush=True)
                break
            before, found = found, killed_study.checkpoints()
            further += bool(found - before)
            os.kill(child, signal.SIGKILL)
            killed += os.waitpid(child, 0)[1] == signal.SIGKILL  # or it had just ended
        last = finish(config, killed_study)
        wrong = differences(first.directory, left_alone.directory)
        wrong += differences(left_alone.directory, killed_study.fetch())
        print(
            f"{killed} kills, {further} of them of a process that had written a new checkpoint; "
            f"the last process took {last:.1f} s: "
            + (f"DIFFERENT: {', '.join(wrong)}" if wrong else "same table, parameters and metrics, bit for bit")
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    sys.exit(cli.run(_main, FLAGS))
