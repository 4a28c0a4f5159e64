"""Leases in a bucket, where there are no locks: who holds a name says so again every 15 seconds, or loses it.

A lease is an object `<name>.<number>`. Who takes it makes the next number with the precondition that there is no such
object, so of several one succeeds; who holds it writes its object again and again, and the time of that, by the store's
clock, says that it lives. An object that is SECONDS old is that of a dead process; one that ended said so. The highest
number counts: a holder that was silent for too long finds a higher one and ends at once, without a write.

A process that is stopped (not killed) for longer than that, in the middle of a request, can still send its last one
when it goes on. Rows are the same whoever measures them; a state that two processes wrote fails its fingerprint.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from precision_scaling.runtime import bucket
from precision_scaling.runtime.stopping import EXIT_AGAIN

SECONDS = 60.0  # after which a lease that is not renewed is lost
_RENEW_SECONDS = SECONDS / 4
_LATEST_SECONDS = SECONDS * 2 / 3  # a holder that could not renew it for so long ends, before others may take it
_CLOCK = "clock"  # an object that is written to read the store's clock


class Lease:
    """One that is held by this process, in a directory."""

    def __init__(self, directory: Path, name: str, number: int, content: bytes):
        self._directory, self._name, self._number, self._content = directory, name, number, content
        self._path = _object(directory, name, number)
        self._ended = threading.Event()
        self._renewed, self._why = time.monotonic(), "no answer"
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._renew, self._watch)]
        for thread in self._threads:
            thread.start()

    def held(self) -> list[str]:
        """The names of all leases in the directory that a process holds."""
        return [name for name, number in _newest(self._directory).items() if _lives(self._directory, name, number)]

    def end(self) -> None:
        """Gives it back."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(OSError):  # it runs out by itself
            bucket.write(self._path, json.dumps({"ended": True}).encode())

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_SECONDS):
            try:
                if _newest(self._directory).get(self._name) != self._number:
                    _give_up(f"{self._path} was taken over: this process was silent for too long")
                asked = time.monotonic()
                bucket.write(self._path, self._content)
                self._renewed = asked
            except OSError as error:
                self._why = str(error.strerror)

    def _watch(self) -> None:
        """Beside `_renew`: a request that is repeated, or has no answer, may take longer than the lease lasts."""
        while not self._ended.wait(max(0.0, self._renewed + _LATEST_SECONDS - time.monotonic())):
            if time.monotonic() - self._renewed >= _LATEST_SECONDS:
                _give_up(f"{self._path} could not be renewed for {_LATEST_SECONDS:.0f} seconds ({self._why})")


@contextlib.contextmanager
def hold(directory: Path, name: str) -> Iterator[Lease | None]:
    """Holds a lease of that name in the block; None where another process has it.

    Of a holder on another machine it waits for a sign of life, 15 seconds, or for its lease to run out, 60.
    """
    number = _newest(directory).get(name, 0)
    if number and _lives(directory, name, number, patient=True):
        yield None
        return
    content = json.dumps({"process": _process(), "token": secrets.token_hex(8)}).encode()
    if not bucket.create(_object(directory, name, number + 1), content):
        yield None  # another was faster
        return
    lease = Lease(directory, name, number + 1, content)
    if number:
        bucket.remove([_object(directory, name, number)])
    try:
        yield lease
    finally:
        lease.end()


def _object(directory: Path, name: str, number: int) -> Path:
    return directory / f"{name}.{number}"


def _newest(directory: Path) -> dict[str, int]:
    """{name: highest number} of the leases in a directory."""
    newest: dict[str, int] = {}
    for path in bucket.below(directory):
        if match := re.fullmatch(r"(.+)\.([1-9]\d*)", path.name):
            newest[match[1]] = max(newest.get(match[1], 0), int(match[2]))
    return newest


def _lives(directory: Path, name: str, number: int, patient: bool = False) -> bool:
    """Whether a process holds a lease; patient: not where it only did not run out yet."""
    path = _object(directory, name, number)
    try:
        said = json.loads(bucket.read(path))
        written = bucket.modified(path)
    except FileNotFoundError:  # taken over in this moment
        return True
    except ValueError:
        said, written = {}, bucket.modified(path)
    if said.get("ended"):
        return False
    process = said.get("process")
    if process and process[:-1] == _process()[:-1]:  # of this machine: its lease need not run out
        return os.path.exists(f"/proc/{process[-1]}")
    clock = directory / _CLOCK
    bucket.write(clock, b"clock")
    left = SECONDS - (bucket.modified(clock) - written)
    while patient and left > 0:
        time.sleep(min(left, _RENEW_SECONDS / 3))
        left -= _RENEW_SECONDS / 3
        try:
            if bucket.modified(path) > written:
                return True
        except FileNotFoundError:
            return True
    return left > 0


def _process() -> list[str | int]:
    """This process, among those of all machines."""
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return [socket.gethostname(), boot.read().strip(), os.readlink("/proc/self/ns/pid"), os.getpid()]


def _give_up(reason: str) -> None:
    """Ends this process before it writes anything more."""
    print(f"stopped: {reason}; run the same command again to go on", file=sys.stderr, flush=True)
    os._exit(EXIT_AGAIN)
