"""The frame of this package's command lines: flags of its own that clash with nobody's, --help, one line
on bad input, and outputs that are known to be writable before anything is computed.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags

from precision_scaling.errors import UserError
from precision_scaling.runtime import files
from precision_scaling.runtime.cli import DISK_ERRORS, HELP, help_text

MOST_REPEATS = 100_000  # starts or resamples that a command takes


def run(description: str, values: flags.FlagValues, main: Callable[[], None], argv: Sequence[str]) -> int:
    """Parses `argv` into `values` and calls `main`; returns the exit status: 2 with one line for a UserError."""
    if (HELP | {"--helpfull"}) & set(argv[1:]):
        print(help_text(description, values))
        return 0
    try:
        try:
            stray = values(list(argv))[1:]
        except flags.Error as err:
            raise UserError(str(err)) from None
        if stray:
            raise UserError(f"unexpected argument {stray[0]!r}: every option starts with --")
        for name, value in values.flag_values_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name}={value}: it must be a finite number")
        main()
    except UserError as err:
        print("error:", " ".join(str(err).split()), file=sys.stderr)  # a cell or a flag may hold line breaks
        return 2
    except OSError as err:
        if err.errno not in DISK_ERRORS:
            raise
        print(f"error: {err.filename or 'a file'}: {err.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def finite(text: str) -> float | None:
    """The finite number that a text is, None where it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def output(flag: str, text: str, within: Sequence[str] = (), reads: Sequence[str] = ()) -> Path:
    """The path of an output, known to be writable; with `within`, the directory in which such files will be written.

    Raises UserError before any work is done, and leaves nothing behind. An output that would replace one of the files
    that the command reads is refused, and so is one that is no file.
    """
    path = files.expanded(text, f"--{flag}")
    try:
        for file in [path / name for name in within] or [path]:
            if why := _why_not(file, [Path(name).expanduser() for name in reads]):
                raise UserError(f"--{flag}={text} cannot be written: {why}")
    except OSError as err:
        raise UserError(f"--{flag}={text} cannot be written: {err.strerror}") from None
    return path


def _why_not(path: Path, reads: Sequence[Path]) -> str | None:
    if path.is_dir():
        return f"{path} is a directory"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path.with_name(f".{path.name}.{'0' * 16}.tmp"))  # raises where the name is too long
    if path.exists() and not path.is_file():
        return f"{path} is not a regular file"
    if any(path.exists() and other.exists() and path.samefile(other) for other in reads):
        return f"{path} is what the command reads"
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        return f"{there} is not a directory"
    with tempfile.TemporaryFile(dir=there):
        return None


@contextlib.contextmanager
def writing(flag: str, path: Path, instead: Callable[[], str]) -> Iterator[None]:
    """Where the files cannot be written after all, prints what should have stood in them: it took long to compute."""
    try:
        yield
    except OSError as err:
        print(f"\n{instead()}")
        why = f"cannot be written: {err.strerror or err}"
        raise UserError(f"--{flag}={path} {why}; what should have stood there is printed instead") from None
