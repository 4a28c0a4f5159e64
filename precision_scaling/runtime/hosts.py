"""Several processes as one: how they find each other, who writes files, and what they decide together.

A run on many hosts is the same program in every process, and all must take the same branches. What only one process
knows (a clock, a signal, the state of a file system) is therefore shared by `largest`.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from precision_scaling.errors import UserError
from precision_scaling.runtime.stopping import EXIT_AGAIN, Stopped

# After which a process that does not answer counts as lost, and all others end.
HEARTBEAT_SECONDS = 30


def define_flags(values: flags.FlagValues) -> None:
    """The command-line options of a run on several processes, which `start` reads."""
    text = "HOST:PORT of process 0, for a run of several processes."
    flags.DEFINE_string("coordinator_address", "", text, flag_values=values)
    text = "Number of processes of the run, the same in each of them."
    flags.DEFINE_integer("num_processes", 0, text, lower_bound=0, flag_values=values)
    text = "Index of this process, from 0; -1: not given."
    flags.DEFINE_integer("process_id", -1, text, lower_bound=-1, flag_values=values)
    text = "A run of several processes that find each other: on a TPU pod, under SLURM or MPI."
    flags.DEFINE_bool("distributed", False, text, flag_values=values)


def start(values: flags.FlagValues) -> None:
    """Joins the other processes, as the options of `define_flags` say; before anything asks JAX for its devices.

    UserError for options that do not go together, and where the other processes are not found.
    """
    address, count, index = values.coordinator_address, values.num_processes, values.process_id
    if not address and not values.distributed:
        if count > 0 or index >= 0:
            raise UserError("--num_processes and --process_id: allowed with --coordinator_address=HOST:PORT only")
        return
    options: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if address:
        if values.distributed:
            raise UserError("--distributed with --coordinator_address: allowed is one of them")
        if not re.fullmatch(r"[^\s:/]+:\d{1,5}|\[[^\s\]/]+\]:\d{1,5}", address, re.ASCII):
            raise UserError(f"--coordinator_address={address}: allowed is HOST:PORT")
        if not 0 <= index < count:
            raise UserError(f"--process_id={index}: allowed is 0 or more, below --num_processes={count}")
        options |= {"coordinator_address": address, "num_processes": count, "process_id": index}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of several on the CPU; others have their own
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        where = f"--coordinator_address={address}" if address else "--distributed"
        raise UserError(f"{where}: the processes did not find each other ({error})") from None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process at once when an exception is raised in the block, so that the others notice and end, too.

    JAX's own shutdown would wait for the others, while they wait for this process in the middle of a step.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, Stopped):  # all processes stop together
            raise
        lost = _another_is_gone(error)
        message = " ".join(str(error).split())[:300] or type(error).__name__
        if lost:
            message = f"another process of the run is gone ({message}); start all of them again to go on"
        elif not isinstance(error, UserError | OSError):
            traceback.print_exc()
        print(f"error: process {jax.process_index()} of {jax.process_count()}: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_AGAIN if lost else 2 if isinstance(error, UserError | OSError) else 1)


def _another_is_gone(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is that of a connection to another process."""
    words = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection closed", "Connection reset", "heartbeat")
    while error is not None:
        if not isinstance(error, OSError) and any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def primary() -> bool:
    """Whether this process writes what is written once: rows, metrics, the config."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest `value` of all processes, each of which must call this."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value, np.int32))))


def wait_for_all(what: str) -> None:
    """Returns when every process has called this; what: a name for the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
