"""Outputs of long computations: known to be writable before the work, and printed where they are not after it.

The commands of `analysis` ask `output` for the path first, and write the files within `writing`.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from precision_scaling.errors import UserError
from precision_scaling.runtime import files


def output(flag: str, text: str, within: Sequence[str] = (), reads: Sequence[str] = ()) -> Path:
    """The path of an output that can be written.

    within: names of the files to be written in it; it is then a directory, which may not exist yet.
    reads: files that the command reads, which no output may replace.

    Leaves nothing behind. UserError where something cannot be written, is no file, or is among `reads`.
    """
    path = files.place(text, f"--{flag}")
    try:
        if files.is_remote(path):
            if text in reads:
                raise UserError(f"--{flag}={text} cannot be written: it is what the command reads")
            trial = path / ".trial" if within else path.with_name(f".{path.name}.trial")
            files.atomic_write(trial, "")
            files.remove(trial)
            return path
        for file in [path / name for name in within] or [path]:
            if why := _why_not(file, [Path(name).expanduser() for name in reads]):
                raise UserError(f"--{flag}={text} cannot be written: {why}")
    except OSError as error:
        raise UserError(f"--{flag}={text} cannot be written: {error.strerror}") from None
    return path


@contextlib.contextmanager
def writing(flag: str, path: Path, instead: Callable[[], str]) -> Iterator[None]:
    """Where the files cannot be written after all, prints `instead()`, which took long to compute; then UserError."""
    try:
        yield
    except OSError as error:
        print(f"\n{instead()}")
        why = f"cannot be written: {error.strerror or error}"
        raise UserError(f"--{flag}={path} {why}; what should have stood there is printed instead") from None


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
