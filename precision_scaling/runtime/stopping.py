"""Stopping on request: SIGTERM (a machine that is about to be taken away) and a time limit, between two dispatches.

`training.cohort` and `study.ptq` ask after every piece of work that is worth keeping; commands exit with EXIT_AGAIN.
"""

import math
import signal
import time

from absl import flags

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command continues where this one stopped
_STARTED = time.monotonic()  # shortly after the process, which imports first
_MOST_MINUTES = 60.0 * 24 * 365


def define_flag(values: flags.FlagValues) -> flags.FlagHolder[float]:
    """The option --time_limit."""
    text = "Minutes after which to end and exit with status 75; 0: none."
    return flags.DEFINE_float("time_limit", 0.0, text, 0.0, _MOST_MINUTES, flag_values=values)


class Stopped(Exception):
    """The work was stopped on request; what was done is on disk."""


class Stop:
    """Whether to stop. Within its `with` block SIGTERM asks for it; outside, SIGTERM ends the process as usual.

    minutes: time limit from the start of the process; 0: none.
    """

    def __init__(self, minutes: float = 0.0):
        self.reason = "another process was asked to"
        self._deadline = _STARTED + 60 * minutes if minutes else math.inf
        self._signalled = False
        self._asked_at = time.monotonic()
        self._longest = 0.0

    def __enter__(self) -> "Stop":
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        self._asked_at = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, *_) -> None:
        self._signalled = True

    def asked(self) -> bool:
        """Whether a signal came, or the next piece of work, if as long as the longest so far, would pass the limit."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked_at)
        self._asked_at = now
        if self._signalled:
            self.reason = "by SIGTERM"
        elif now + self._longest >= self._deadline:
            self.reason = "before the time limit"
        else:
            return False
        return True
