"""Errors that a user can mend: one line that names the key, the value and what is allowed."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from precision_scaling.stopping import EXIT_AGAIN, Stopped

# A disk that is full or cannot be written, or a path that leads nowhere: nothing is wrong with the program.
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
)


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line, shown without a traceback."""


class ConfigError(UserError):
    """An option of the config cannot be used."""

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"config.{key} = {value!r}: allowed is {allowed}")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """absl's app.run, with a UserError (or a misspelt option) shown as one line on stderr and exit status 2.

    Work that was stopped on request ends with EXIT_AGAIN, and one line that says so.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        _refuse_endless_config(argv)
        try:
            rest = flags.FLAGS(argv)
            if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
                flags.FLAGS["config"].value.items  # noqa: B018  a config file that failed to load says so when used
            return rest
        except SystemExit:  # --help was printed; absl would exit with 1
            sys.exit(0)
        except flags.Error as error:
            _fail(error)
        except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
            # A config file that cannot be read, an option it does not have, a value of another type.
            _fail(f"in the options of --config: {error}")

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell of every file otherwise
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options begin with --")
            main(argv)
        except UserError as error:
            _fail(error)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            _fail(
                f"{error.filename or 'a file'}: {error.strerror}; what was measured is kept, run the same command again"
            )
        except Stopped as stopped:
            print(f"stopped: {stopped}; run the same command again to go on", file=sys.stderr)
            sys.exit(EXIT_AGAIN)
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def _refuse_endless_config(argv: Sequence[str]) -> None:
    """Ends with one line where the config is a pipe or a device, which would be waited for while the flags are read."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = word.lstrip("-").partition("=")
        path = (value or following).partition(":")[0]  # PATH:ARGUMENT
        if word.startswith("-") and name == "config" and os.path.exists(path) and not os.path.isfile(path):
            _fail(f"--config={path}: is no regular file")


def _fail(error: object) -> None:
    message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
    print("error:", message, file=sys.stderr)
    sys.exit(2)
