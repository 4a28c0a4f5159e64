"""Runs the study command again and again in processes that come to an end, each at a moment of its own.

python tests/killed_study.py MOMENT,MOMENT,... ARGUMENTS OF THE STUDY COMMAND

A moment is NAME:N, the N-th time that something happens in a process; "end" ends nothing. Most end by SIGKILL; some
send SIGTERM or fill the disk. Prints the exit status of each process. One import serves all: they are forked before JAX
has a backend.
"""

import os
import resource
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import simple_loops

from precision_scaling.runtime import files
from precision_scaling.study import (
    __main__,  # noqa: F401  imported once, for all processes
    results,
)
from precision_scaling.training import checkpoint, cohort


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk() -> None:
    """From now on no file can grow beyond 2 KB, which is what a full disk looks like to a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))


def kill_at_call(owner, name: str, call: int, *, after: bool, counts=lambda *arguments: True, end=die) -> None:
    """Ends this process before or after the call-th call that counts of a function."""
    original, seen = getattr(owner, name), []

    def killing(*arguments, **options):
        if counts(*arguments):
            seen.append(1)
            if len(seen) == call and not after:
                end()
        result = original(*arguments, **options)
        if len(seen) == call and after:
            end()
        return result

    setattr(owner, name, killing)


def kill_in_write_of_state(directory: Path, number: int) -> None:
    """Kills this process as soon as the temporary directory of the number-th cohort checkpoint's state has a file."""

    def watch():
        while True:
            for path in directory.glob(f"cohorts/*/{number}/*tmp*"):
                if any(path.iterdir()):
                    die()
            time.sleep(1e-4)

    threading.Thread(target=watch, daemon=True).start()


def prepare(moment: str, workdir: Path) -> None:
    """Sets the trap of a moment."""
    name, _, count = moment.partition(":")
    n = int(count or 0)
    if name == "after-cohort-checkpoint":
        kill_at_call(checkpoint.CohortCheckpoints, "_complete", n, after=True)
    elif name == "in-cohort-checkpoint":
        kill_in_write_of_state(workdir, n)
    elif name == "before-lanes":
        kill_at_call(files, "atomic_write", n, after=False, counts=lambda path, text: path.name == "lanes.json")
    elif name == "between-metrics-of-two-runs":
        kill_at_call(cohort._Trainer, "_log", n, after=False)
    elif name == "between-parameters-and-row":
        kill_at_call(results, "write_rows", n, after=False)
    elif name == "after-row":
        kill_at_call(results, "write_rows", n, after=True)
    elif name == "asked-to-stop":
        kill_at_call(cohort._Trainer, "_log", n, after=True, end=ask_to_stop)
    elif name == "full-disk":
        kill_at_call(cohort._Trainer, "_log", n, after=True, end=fill_disk)
    elif name != "end":
        raise ValueError(moment)


def main() -> None:
    moments, arguments = sys.argv[1].split(","), sys.argv[2:]
    workdir = Path(next(word for word in arguments if word.startswith("--workdir=")).removeprefix("--workdir="))
    for moment in moments:
        child = os.fork()
        if child == 0:
            prepare(moment, workdir)
            sys.argv = ["study", *arguments]
            status = 0
            try:
                runpy.run_module("precision_scaling.study", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code or 0
            sys.stderr.flush()
            os._exit(status)
        print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    simple_loops.use()
    main()
