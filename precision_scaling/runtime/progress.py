"""Progress bars of all commands: on a terminal a bar that moves, in a log file a line now and then."""

import sys
from collections.abc import Iterable
from time import monotonic

from tqdm import tqdm

Bar = tqdm
LINE_SECONDS = 30.0  # between two lines of a log file


def progress_bar(iterable: Iterable | None = None, **options) -> tqdm:
    """A bar of tqdm, with its options, on stderr.

    Where stderr is no terminal, it writes lines with share, rate and time left: at most one in LINE_SECONDS, and one at
    the end. A bar that leaves nothing on a terminal (leave=False) writes the last line only if it wrote one before.
    """
    return (tqdm if sys.stderr.isatty() else _Lines)(iterable, **options)


class _Lines(tqdm):
    """A bar for a file, in which no line can be overwritten."""

    leave: bool | None  # of tqdm, which has no types

    def __init__(self, iterable: Iterable | None = None, **options):
        self._next_line = monotonic() + LINE_SECONDS
        self._written: tuple | None = None  # the state in the last line
        super().__init__(iterable, ncols=0, **options)  # no columns: numbers alone

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm some times a second, with its lock."""
        del msg, pos
        if monotonic() >= self._next_line:
            self._write(str(self))

    def close(self) -> None:
        if not self.disable:
            if self._written != self._state() and (self.leave or self._written is not None):
                with self.get_lock():
                    self._write(self.format_meter(**{**self.format_dict, "rate": None}))  # that of the whole time
            self.leave = False  # tqdm would write a bar
        super().close()

    def _write(self, line: str) -> None:
        self.fp.write(line.strip() + "\n")
        self.fp.flush()
        self._next_line, self._written = monotonic() + LINE_SECONDS, self._state()

    def _state(self) -> tuple:
        return self.desc, self.n, self.total
