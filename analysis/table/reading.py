"""From the bytes of a table to its cells as text: compression, encoding, line ends, separators, names of columns.

A file that is almost a table of the contract raises an error of one line that says what is wrong; nothing is guessed.
"""

import csv
import difflib
import hashlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from precision_scaling.errors import UserError
from precision_scaling.runtime import files

OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or a workbook",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PAR1": "a Parquet file",
}
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
# What other tables call the columns that every table needs.
SYNONYMS = {
    "N": ("params", "nparams", "numparams", "parameters", "modelsize"),
    "D": ("tokens", "ntokens", "numtokens", "trainingtokens", "traintokens"),
    "loss": ("valloss", "validationloss", "evalloss", "testloss", "celoss", "nll"),
}


class TableError(UserError):
    """A table that cannot be used: unreadable, a required column missing, or no usable row."""


def read(path: Path) -> tuple[pd.DataFrame, str]:
    """The cells of a CSV table (gzipped or not) as text, and the SHA-256 of the file. Raises TableError."""
    try:
        raw = files.read(path)
    except FileNotFoundError:
        raise TableError(f"no table at {path}") from None
    except files.NotAFile as error:
        raise TableError(str(error)) from None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    text = _text(path, raw)
    header = next((line for line in text.split("\n") if line.strip()), "")
    _check_separator(path, header)
    repeated = [name for name, count in Counter(_cells(header)).items() if count > 1 and name]
    if repeated:
        raise TableError(f"{path}: column {repeated[0]} appears more than once")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would shift silently
            frame = pd.read_csv(
                io.StringIO(text), dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False
            )
    except (ValueError, pd.errors.ParserWarning) as error:  # pandas' own errors are ValueErrors
        raise _unreadable(path, " ".join(str(error).split())) from None
    if text.count("\n") > len(frame):
        _check_rows(path, frame)
    return frame, hashlib.sha256(raw).hexdigest()


def _check_rows(path: Path, frame: pd.DataFrame) -> None:
    """Raises TableError where a cell holds a line break, as rows after an unclosed quotation mark do."""
    for name in frame:
        broken = frame[name].str.contains("\n", na=False, regex=False)
        if broken.any():
            raise _unreadable(path, f"row {broken.idxmax() + 1} has a line break in column {str(name)[:30]!r}")


def check_names(names: Iterable[str], required: Iterable[str], known: Iterable[str], source: str) -> None:
    """Raises TableError where a required column is missing, or a column's name is almost that of a known one.

    Unknown columns are allowed. `P_Post` is not: rows after PTQ would pass for rows before it.
    """
    names = list(names)
    absent = {_plain(name): name for name in (*required, *known) if name not in names}
    for name in names:
        meant = absent.get(_plain(name))
        if meant is None and name not in known and "P_post" in absent.values():
            meant = next(iter(difflib.get_close_matches(name, ["P_post"], cutoff=0.8)), None)
        if meant is not None and name not in known:
            raise TableError(f"{source}: column {name!r}: did you mean {meant!r}?")
    missing = [name for name in required if name not in names]
    if missing:
        alike = [name for name in names if _plain(name) in {s for m in missing for s in SYNONYMS.get(m, ())}]
        hint = f"; did you mean {', '.join(alike)}?" if alike else ""
        has = ", ".join(names[:30]) or "none"
        raise TableError(f"{source}: missing column {', '.join(missing)}; it has {has}{hint}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _unreadable(path: Path, why: str) -> TableError:
    return TableError(f"{path} is not a readable CSV table: {why}")


def _text(path: Path, raw: bytes) -> str:
    """The text of the file, its line ends all \\n."""
    try:
        raw = files.unzipped(raw)
    except ValueError as error:
        raise _unreadable(path, str(error)) from None
    for magic, what in OTHER_FILES.items():
        if raw.startswith(magic):
            raise _unreadable(path, f"it is {what}; want CSV text, gzipped or not")
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"it is not {'UTF-16' if wide else 'UTF-8'} text (byte {error.start})") from None
    if "\0" in text:
        raise _unreadable(path, "it holds NUL characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cells(line: str, separator: str = ",") -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    except csv.Error:  # an unclosed cell; pandas says where
        return []


def _check_separator(path: Path, header: str) -> None:
    needed = {*SYNONYMS, *(name.lower() for name in SYNONYMS)}
    if needed & set(_cells(header)):
        return
    for separator, name in OTHER_SEPARATORS.items():
        if len(needed & set(_cells(header, separator))) > 1:
            raise TableError(f"{path}: its columns are separated by {name}; want commas")
