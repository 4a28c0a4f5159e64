"""The frame of every command: --help, one line on stderr for a mistake, and the exit status."""

import errno
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from precision_scaling.errors import UserError
from precision_scaling.runtime.stopping import EXIT_AGAIN, Stopped

HELP = {"-h", "-help", "--help", "-?", "--helpshort"}  # words that ask for it
# A disk that is full or cannot be written, or a path that leads nowhere: nothing is wrong with the program.
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """absl's app.run, with a UserError (or a misspelt option) shown as one line on stderr and exit status 2.

    Work that was stopped on request ends with EXIT_AGAIN, and one line that says so.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        for argument in argv[1:]:
            if any(letter < " " or letter in "\x7f\x85\u2028\u2029" for letter in argument):
                fail(f"the argument {argument!a:.200}: allowed is one line without control characters")
        if HELP & set(argv[1:]):  # anywhere, and before a config is read
            print(help_text(sys.modules["__main__"].__doc__ or "", _own_flags()))
            sys.exit(0)
        try:
            return flags.FLAGS(argv)
        except SystemExit:  # --helpfull was printed; absl would exit with 1
            sys.exit(0)
        except flags.Error as error:
            fail(error)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a section that another takes the place of
            fail(f"in the options of --config: {error}")

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell of every file otherwise
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options begin with --")
            main(argv)
        except UserError as error:
            fail(error)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            fail(
                f"{error.filename or 'a file'}: {error.strerror}; what was measured is kept, run the same command again"
            )
        except Stopped as stopped:
            print(f"stopped: {stopped}; run the same command again to go on", file=sys.stderr)
            sys.exit(EXIT_AGAIN)
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def help_text(description: str, values: flags.FlagValues) -> str:
    """What --help prints: what the command is for, and all of its options in one list."""
    listed = flags.FlagValues()
    for name, flag in {values[name].name: values[name] for name in values}.items():  # short names are no second ones
        listed[name] = flag
    text = f"{description.strip()}\n\nOptions:\n{listed.get_help(prefix='  ', include_special_flags=False)}"
    if "config" in values:
        text += "\n  --config.key=value: Any option of the config; configs/base.py has them all, with what they do."
    return text


def _own_flags() -> flags.FlagValues:
    """The options of the command that runs, in whatever module of this project they are defined; none of libraries."""
    own = flags.FlagValues()
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module == sys.argv[0] or module.partition(".")[0] == __name__.partition(".")[0]:
            for flag in defined:
                own[flag.name] = flag
    return own


def fail(error: object) -> NoReturn:
    """Ends the process with one line on stderr and exit status 2."""
    message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
    print("error:", message, file=sys.stderr)
    sys.exit(2)
