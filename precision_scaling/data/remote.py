"""Directories on an object store (gs://, s3://, whatever fsspec has a driver for). Used by `tokens`."""

import re
import shutil
from pathlib import Path

from precision_scaling.data import DataError
from precision_scaling.runtime import files

_LAST = "meta.json"  # says that the others are complete
# Of token files; nothing else is copied.
_NAMES = re.compile(r"meta\.json|tokenizer\.json|(train|validation)-\d{5,}\.bin")
_BLOCK_BYTES = 1 << 22


def is_remote(path: str) -> bool:
    """Whether a path is a URL. DataError for one of several lines."""
    if "://" in path and any(ord(character) < 32 for character in path):
        raise DataError(f"data.cache_dir={path!r}: allowed is a URL without line breaks and control characters")
    return "://" in path


def fetch(url: str, directory: Path) -> list[str]:
    """Copies the token files at `url` here; their names, none where there are none that are complete."""
    system, path = _system(url)
    try:
        if not system.exists(f"{path}/{_LAST}"):
            return []
        found = (str(name).rstrip("/").rsplit("/", 1)[-1] for name in system.ls(path, detail=False))
        names = sorted(filter(_NAMES.fullmatch, found), key=lambda name: name == _LAST)
        for name in names:
            with system.open(f"{path}/{name}", "rb") as stored, files.replacing(directory / name) as file:
                shutil.copyfileobj(stored, file, _BLOCK_BYTES)
        return names
    except OSError as error:
        if error.filename is not None and Path(str(error.filename)).parent == directory:
            raise  # of this machine's disk
        raise DataError(f"data.cache_dir={url!r}: cannot be read ({_first_line(error)})") from error
    except Exception as error:  # drivers raise errors of their own
        raise DataError(f"data.cache_dir={url!r}: cannot be read ({_first_line(error)})") from error


def store(directory: Path, url: str) -> None:
    """Copies the directory to `url`, where it appears complete or not at all."""
    system, path = _system(url)
    try:
        system.makedirs(path, exist_ok=True)
        if system.exists(f"{path}/{_LAST}"):  # of files that were damaged: first of all, it says that they are complete
            system.rm_file(f"{path}/{_LAST}")
        for file in sorted(directory.iterdir(), key=lambda file: file.name == _LAST):
            system.put_file(str(file), f"{path}/{file.name}")
    except Exception as error:
        raise DataError(f"data.cache_dir={url!r}: cannot be written ({_first_line(error)})") from error


def _system(url: str):
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # no driver, or none of that name
        raise DataError(f"data.cache_dir={url!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
