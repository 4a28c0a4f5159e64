"""Ending on request: SIGTERM (a machine that is about to be taken away) and a time limit, both between two dispatches.

`cohort` and `ptq.runs` ask after every piece of work that is worth keeping; the commands exit with EXIT_AGAIN.
"""

import math
import signal
import time

from absl import flags

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on where this one stopped
_STARTED = time.monotonic()  # of the process, nearly: imports come first
_MOST_MINUTES = 60.0 * 24 * 365


def define_flag(values: flags.FlagValues) -> flags.FlagHolder[float]:
    """The option --time_limit."""
    text = "Minutes after which to end and exit with status 75; 0: none."
    return flags.DEFINE_float("time_limit", 0.0, text, 0.0, _MOST_MINUTES, flag_values=values)


class Stopped(Exception):
    """The work was ended on request; what was done is on disk."""


class Stop:
    """Whether to end, from when it is entered until it is left: outside, SIGTERM ends the process as ever.

    minutes: time limit counted from the process's start; 0: none.
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
        """Whether a signal came, or the limit would pass if the next piece of work took as long as the longest yet."""
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
