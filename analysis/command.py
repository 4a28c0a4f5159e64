"""The frame of this package's command lines: flags of its own that clash with nobody's, --help, one line
on bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import flags

from precision_scaling.errors import HELP, UserError, help_text


def run(description: str, values: flags.FlagValues, main: Callable[[], None], argv: Sequence[str]) -> int:
    """Parses `argv` into `values` and calls `main`; returns the exit status: 2 with one line for a UserError."""
    if (HELP | {"--helpfull"}) & set(argv[1:]):
        print(help_text(description, values))
        return 0
    try:
        try:
            stray = values(list(argv))[1:]
        except flags.Error as err:
            raise UserError(" ".join(str(err).split())) from None
        if stray:
            raise UserError(f"unexpected argument {stray[0]!r}: every option starts with --")
        main()
    except UserError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
