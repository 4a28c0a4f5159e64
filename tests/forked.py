"""Runs commands of the project in forks of one process that has imported them, so that a case takes a fraction of a
second.

`run` starts that process when it is first called. It is a process of its own because a fork of one that has used JAX
hangs, and a test before may have used it.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
KILLED = -signal.SIGKILL  # the exit code of a command that ran into its timeout


class Done(NamedTuple):
    """What a command left: its exit code (of a signal: minus its number), what it printed, and its seconds."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def run(module: str, argv: list[str] | tuple[str, ...], cwd: str | Path, timeout: float = 60.0) -> Done:
    """`python -m MODULE ARGV` in the directory `cwd`, killed with all it started after `timeout` seconds."""
    server = _server()
    request = {"module": module, "argv": [str(a) for a in argv], "cwd": str(cwd), "timeout": timeout}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    reply = server.stdout.readline()
    if not reply:
        raise RuntimeError(f"the process that runs the commands ended with {server.wait()}")
    return Done(**json.loads(reply))


def refusal(done: Done) -> str:
    """The one line that a command which refuses its input leaves on stderr, without the lines of progress bars."""
    assert done.code not in (0, KILLED), f"exit code {done.code}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    lines = [line for line in done.stderr.split("\n") if line.strip() and "\r" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr[-2000:]
    return lines[0]


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.stdin.close)  # its end
    return server


def _serve() -> None:
    """Answers requests, one a line, until stdin closes."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what an import prints is no reply
    for line in iter(requests.readline, ""):
        replies.write(json.dumps(_answer(**json.loads(line))._asdict()) + "\n")
        replies.flush()


def _answer(module: str, argv: list[str], cwd: str, timeout: float) -> Done:
    _preload(module)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _be_the_command(module, argv, cwd, out.fileno(), err.fileno())
        code = _wait(child, began + timeout)
        seconds = time.monotonic() - began
        return Done(code, *(_text(file) for file in (out, err)), seconds)


def _preload(module: str) -> None:
    """Imports what the command will; where that fails, the command itself says so."""
    try:
        if hasattr(importlib.import_module(module), "__path__"):
            importlib.import_module(f"{module}.__main__")
    except Exception:
        return


def _be_the_command(module: str, argv: list[str], cwd: str, out: int, err: int) -> None:
    os.setsid()
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(cwd)
        sys.argv = [module, *argv]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules after import", RuntimeWarning)  # it was preloaded
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, deadline: float) -> int:
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return KILLED
        time.sleep(0.005)


def _text(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    _serve()
