"""Errors that a user can mend: one line that names the key, the value and what is allowed."""

import sys
from collections.abc import Callable, Sequence

from absl import app, logging


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line, shown without a traceback."""


class ConfigError(UserError):
    """An option of the config cannot be used."""

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"config.{key} = {value!r}: allowed is {allowed}")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """absl's app.run, with a UserError (or a misspelt option) shown as one line on stderr and exit status 2."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell of every file otherwise
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    app.run(guarded)
