"""Processes that share a list of tasks. Used by `tokenize`; a worker is `python -m precision_scaling.data.workers`.

Not `multiprocessing`: its children begin by importing the caller's main module, which for the commands is all of JAX,
and forking a process that has JAX's threads is not safe.
"""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from precision_scaling.data import DataError


@contextlib.contextmanager
def pool(n: int) -> Iterator[Callable[[Callable, Iterable[tuple]], Iterator[Any]]]:
    """Gives run(function, tasks), which yields function(*task) as tasks end, in any order, by n processes.

    The function is one of a module's top level. With n = 1 everything runs in this process. What a task raises is
    raised here, and no further task begins; OSError for a process that died.
    """
    if n == 1:
        yield lambda function, tasks: (function(*task) for task in tasks)
        return
    workers = [_Worker() for _ in range(n)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def one(function: Callable, task: tuple) -> Any:
        worker = idle.get()
        try:
            worker.send((function.__module__, function.__qualname__, task))
            failed, result = worker.receive()
        except (EOFError, OSError, pickle.UnpicklingError):
            raise OSError("a process that tokenizes has died (of memory?): run it again to go on") from None
        finally:
            idle.put(worker)
        if failed:
            raise result
        return result

    def run(function: Callable, tasks: Iterable[tuple]) -> Iterator[Any]:
        with ThreadPoolExecutor(n) as threads:
            futures = [threads.submit(one, function, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

    try:
        yield run
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A process that does one task after the other."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "precision_scaling.data.workers"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdin and self._process.stdout  # as both are pipes
        self._tasks, self._answers = self._process.stdin, self._process.stdout

    def send(self, task: Any) -> None:
        pickle.dump(task, self._tasks)
        self._tasks.flush()

    def receive(self) -> Any:
        return pickle.load(self._answers)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may have died
            self._tasks.close()  # ends it, as does the end of this process
        self._answers.close()
        self._process.terminate()
        self._process.wait()


def _work() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed goes there, and not between the answers
    while True:
        try:
            module, name, task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (False, getattr(importlib.import_module(module), name)(*task))
        except Exception as error:
            answer = (True, error if isinstance(error, DataError | OSError) else DataError(f"{name}: {error!r}"))
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # the other side says it
        _work()
