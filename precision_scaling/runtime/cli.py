"""The frame of every command: its options, --help, one line on stderr for a mistake, and the exit status.

A command defines its options in a `flags.FlagValues` of its own, apart from those of libraries, and ends with

    command = functools.partial(cli.run, main, FLAGS)

    if __name__ == "__main__":
        sys.exit(command())

`command` is also what setup.py's console scripts call.
"""

import contextlib
import errno
import faulthandler
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from precision_scaling.errors import UserError
from precision_scaling.runtime.stopping import EXIT_AGAIN, Stopped

EXIT_MISTAKE = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
HELP = {"-h", "-help", "--help", "-?", "--helpshort", "--helpfull", "-helpfull"}
# A disk that is full or cannot be written, or a path that leads nowhere: nothing is wrong with the program.
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
)


def run(
    main: Callable[[], None],
    values: flags.FlagValues,
    argv: Sequence[str] | None = None,
    required: Sequence[str] = (),
    defaults: Sequence[str] = (),
) -> int:
    """Parses the command line into `values`, calls `main`, and returns the exit status.

    A mistake (UserError, or an option that cannot be parsed) and a disk that cannot be used are one line on stderr and
    EXIT_MISTAKE; work that was stopped on request is one line and EXIT_AGAIN. Other exceptions are left to Python.

    main: its module's docstring heads what --help prints.
    values: the command's options. "-" and "_" in their names are the same.
    argv: the program's name and its arguments; sys.argv if not given.
    required: names of options that must have a value.
    defaults: arguments such as --config=FILE, which count where the command line has no such option.
    """
    argv = sys.argv if argv is None else argv
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # stderr may be no file
        faulthandler.enable()
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX log every file otherwise
    flags.FLAGS(argv[:1])  # libraries read the defaults of their own options
    try:
        if HELP & set(argv[1:]):  # anywhere, and before a config is read
            print(help_text(sys.modules[main.__module__].__doc__ or "", values), flush=True)
            return 0
        _parse(values, [argv[0], *_arguments(values, argv[1:], defaults)], required)
        main()
    except UserError as error:
        return report_mistake(error)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        kept = "what was measured is kept, run the same command again"
        return report_mistake(f"{error.filename or 'a file'}: {error.strerror}; {kept}")
    except Stopped as stopped:
        print(f"stopped: {stopped}; run the same command again to go on", file=sys.stderr)
        return EXIT_AGAIN
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def report_mistake(error: object) -> int:
    """Prints one line on stderr and returns EXIT_MISTAKE."""
    message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
    print("error:", message, file=sys.stderr)
    return EXIT_MISTAKE


def help_text(description: str, values: flags.FlagValues) -> str:
    """What --help prints: what the command is for, and all of its options in one list."""
    listed = flags.FlagValues()
    for name, flag in {values[name].name: values[name] for name in values}.items():  # short names are no second ones
        listed[name] = flag
    text = f"{description.strip()}\n\nOptions:\n{listed.get_help(prefix='  ', include_special_flags=False)}"
    if "config" in values:
        text += (
            "\n  --config.key=value: Any option of the config; precision_scaling/config/base.py has them all, with what"
            "\n    they do."
        )
    return text


def finite(text: str) -> float | None:
    """The finite number that a text is, None where it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _parse(values: flags.FlagValues, argv: Sequence[str], required: Sequence[str]) -> None:
    try:
        stray = values(argv)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if "config" not in values or isinstance(error, UserError):
            raise
        # ml_collections, where one override takes the place of a section that another is in
        raise UserError(f"in the options of --config: {error}") from None
    if stray:
        raise UserError(f"unexpected argument {stray[0]!r}; options begin with --")
    for name in values:
        if isinstance(value := values[name].value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value}: allowed is a finite number")
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name} is required; --help lists all options")


def _arguments(values: flags.FlagValues, given: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """The arguments and those by default, with flag files read and --serve-bits=4 as --serve_bits=4."""
    for argument in given:
        if any(letter < " " or letter in "\x7f\x85\u2028\u2029" for letter in argument):
            raise UserError(f"the argument {argument!a:.200}: allowed is one line without control characters")
    try:
        arguments = values.read_flags_from_files(list(given), force_gnu=False)
    except flags.Error as error:
        raise UserError(str(error)) from None
    arguments = [_underscored(argument, values) for argument in arguments]
    names = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    return [default for default in defaults if default.lstrip("-").partition("=")[0] not in names] + arguments


def _underscored(argument: str, values: flags.FlagValues) -> str:
    if found := re.match(r"--?(?:no)?([\w-]+)(?==|$)", argument):
        name = found[1].replace("-", "_")
        if name in values:
            return argument[: found.start(1)] + name + argument[found.end(1) :]
    return argument
