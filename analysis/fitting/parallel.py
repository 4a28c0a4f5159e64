"""Independent pieces of work in parallel processes, or one after the other in this one.

No threads: compiled programs that run side by side in one process can wait for each other's threads forever.
"""

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator

from analysis.fitting.levenberg_marquardt import stay_off_accelerators


class Serial(concurrent.futures.Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, function: Callable, /, *arguments, **named) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def workers(processes: int) -> Iterator[concurrent.futures.Executor]:
    """An executor of that many processes; with one, this process itself. Arguments and results are pickled."""
    if processes < 2:
        yield Serial()
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that has started JAX may hang
    with concurrent.futures.ProcessPoolExecutor(processes, context, stay_off_accelerators) as pool:
        yield pool
