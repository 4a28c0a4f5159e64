"""Objects of a bucket (gs://BUCKET/...): read and written whole, made only where nothing is, listed below a prefix.

`files` calls it for paths that are not on this machine; nothing else does. gcsfs sends the requests; it repeats those
that fail for a while (408, 429, 5xx, cut connections, no answer, an expired token, with a new one) up to five times,
after 1, 2, 4, 8 and 16 seconds and a little.
Whatever fails for good is an OSError that names the object, as those of a disk do.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from precision_scaling.errors import UserError

SCHEME = "gs://"
SILENT_SECONDS = 30  # after which a request counts as lost whose connection carries nothing
_URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/.*)?")


def path(url: str, option: str) -> Path:
    """The path of a gs:// URL; it has the methods of a Path that are used, and Orbax and JAX know it, too.

    UserError for what is no URL of an object, or where the driver is not installed.
    """
    parts = url.removeprefix(SCHEME).rstrip("/").split("/")
    if not _URL.fullmatch(url) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{option}={url}: allowed is gs://BUCKET/PATH, without parts that are empty, . or ..")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{option}={url}: needs gcsfs; allowed is a path on this machine, or pip install -e '.[gcs]' first"
        )
    _driver()
    return _path(url)


def read(path: Path) -> bytes:
    """All of an object. FileNotFoundError where there is none."""
    with _naming(path):
        return _driver().cat_file(_key(path))


def read_all(paths: Iterable[Path]) -> list[bytes]:
    """The content of each object, read at the same time. Raises what `read` does."""
    paths = list(paths)
    keys = [_key(path) for path in paths]
    found = _driver().cat(keys, on_error="return") if keys else {}
    for path, key in zip(paths, keys, strict=True):
        if isinstance(found[key], Exception):
            with _naming(path):
                raise found[key]
    return [found[key] for key in keys]


def write(path: Path, content: bytes) -> None:
    """Replaces an object, or makes it: readers see all of the new content or what was there before."""
    with _naming(path, missing="there is no such bucket"):
        _driver().pipe_file(_key(path), content)


def create(path: Path, content: bytes) -> bool:
    """Makes an object where there is none; whether it did.

    The precondition ifGenerationMatch=0: of several that try, one succeeds. A request that was answered by a cut
    connection and sent again would find its own object: so `content` must be unlike that of all others.
    """
    with _naming(path, missing="there is no such bucket"):
        try:
            _driver().pipe_file(_key(path), content, mode="create")
            return True
        except FileExistsError:
            return read(path) == content


def modified(path: Path) -> float:
    """When an object was written, in seconds by the clock of the store. FileNotFoundError where there is none."""
    with _naming(path):
        return _driver().info(_key(path))["mtime"].timestamp()


def exists(path: Path) -> bool:
    """Whether there is such an object: one request. For those that are small, which are read."""
    try:
        read(path)
    except FileNotFoundError:
        return False
    return True


def below(directory: Path) -> list[Path]:
    """All objects below a path, sorted: a request for each thousand."""
    with _naming(directory):
        prefix = f"{_key(directory).rstrip('/')}/"
        found = _driver().find(prefix)
        return [_path(f"{SCHEME}{key}") for key in sorted(found) if not key.endswith("/")]


def size_below(directory: Path) -> int:
    """Bytes of all objects below a path."""
    with _naming(directory):
        return sum(found["size"] for found in _driver().find(f"{_key(directory)}/", detail=True).values())


def remove(paths: Iterable[Path]) -> None:
    """Removes objects, in their order; those that are gone already are no error."""
    for path in paths:
        with _naming(path), contextlib.suppress(FileNotFoundError):
            _driver().rm_file(_key(path))


def _path(url: str) -> Path:
    from etils import epath  # not above: commands that use no bucket start sooner

    return cast(Path, epath.Path(url))


def _key(path: Path) -> str:
    return os.fspath(path).removeprefix(SCHEME)


def _driver() -> Any:
    _configure()
    import fsspec

    return fsspec.filesystem("gcs")  # kept by fsspec, and made anew in a forked process


@functools.cache
def _configure() -> None:
    # Both before the first use, for Orbax's own driver, too. Lists that are kept would hide what other workers write.
    # Without the other, each process asks about the bucket's kind by gRPC first.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Both drivers, this one and TensorStore's, would wait for an answer without end.
    for name in ("LOW_SPEED_TIME_SECONDS", "CONNECT_TIMEOUT_SECONDS"):
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(SILENT_SECONDS))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    import aiohttp
    import fsspec

    waits = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
    fsspec.config.conf.setdefault("gcs", {}).update(use_listings_cache=False, requests_timeout=waits)


@contextlib.contextmanager
def _naming(path: Path, missing: str = "no such object") -> Iterator[None]:
    """Makes OSErrors of whatever the driver raises: FileNotFoundError, PermissionError, and EIO for all others."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, missing, os.fspath(path)) from None
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        code = getattr(error, "code", None)
        if code == 401:
            login = "the token has expired or is not accepted: gcloud auth application-default login"
            raise PermissionError(errno.EACCES, login, os.fspath(path)) from error
        if said.startswith("Forbidden") or code == 403:
            raise PermissionError(errno.EACCES, "no permission for this bucket", os.fspath(path)) from error
        raise OSError(errno.EIO, f"the bucket cannot be used ({said})", os.fspath(path)) from error
