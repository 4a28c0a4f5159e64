"""Directories on an object store (gs://, s3://, whatever fsspec has a driver for). Used by `tokens`."""

from pathlib import Path

from precision_scaling.data import DataError

_LAST = "meta.json"  # says that the others are complete


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def fetch(url: str, directory: Path) -> bool:
    """Copies the directory at `url` here; False where there is none, or none that is complete."""
    system, path = _system(url)
    try:
        if not system.exists(f"{path}/{_LAST}"):
            return False
        directory.mkdir(parents=True, exist_ok=True)
        names = [Path(found).name for found in system.ls(path, detail=False)]
        for name in sorted(names, key=lambda name: name == _LAST):
            system.get_file(f"{path}/{name}", str(directory / name))
    except Exception as error:  # drivers raise errors of their own
        raise DataError(f"data.cache_dir={url!r}: cannot be read ({_first_line(error)})") from error
    return True


def store(directory: Path, url: str) -> None:
    """Copies the directory to `url`, where it appears complete or not at all."""
    system, path = _system(url)
    try:
        system.makedirs(path, exist_ok=True)
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
