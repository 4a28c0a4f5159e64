"""Regular expressions from users: one line for a mistake, and a time limit."""

import contextlib
import re
import signal
from collections.abc import Iterable, Iterator

from precision_scaling.errors import UserError

SECONDS = 2.0  # for all texts of a study; an expression takes microseconds for one, or does not end


def check(option: str, pattern: str, texts: Iterable[str] = ()) -> None:
    """UserError where `pattern` is no regular expression, or where searching the texts takes too long.

    Some, such as ([\\w-]+)+!, take twice as long for each further letter. Python's search handles signals meanwhile.
    """
    try:
        with _at_most(SECONDS):
            compiled = re.compile(pattern)
            for text in texts:
                compiled.search(text)
    except TimeoutError:
        raise UserError(
            f"{option}={pattern}: takes more than {SECONDS:g} s to search; allowed is a regular expression without "
            "repetitions of what is repeated"
        ) from None
    except (re.error, OverflowError, RecursionError, TypeError) as error:
        raise UserError(f"{option}={pattern}: allowed is a regular expression ({error})") from None


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread when the time is over."""

    def end(*_) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
