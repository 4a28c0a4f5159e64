"""Files that outlive a process: written whole or not at all, sealed with a fingerprint, and read if they are files.

All files of runs, studies and token caches are written and read here. A directory may be shared with other users:
nothing is written through a link, and nothing that may never end, such as a pipe, is read.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from absl import logging

from precision_scaling.errors import UserError

FINGERPRINT = "fingerprint"
_GZIP = b"\x1f\x8b"  # the first bytes of gzip data
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


class NotAFile(UserError):
    """Something else stands where a regular file is expected."""

    def __init__(self, path: Path | str, mode: int):
        super().__init__(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; allowed is a regular file")


def read(path: Path | str) -> bytes:
    """All of a regular file. NotAFile at once for anything else; OSErrors name the file."""
    with naming(path), open_regular(path) as file:
        return file.read()


def unzipped(content: bytes) -> bytes:
    """The content without its gzip compression, recognized by its first bytes, not by a name; other content as it is.

    Raises ValueError for damaged gzip data.
    """
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"its gzip data are damaged ({error})") from None


def check_regular(path: Path | str) -> None:
    """Raises NotAFile where there is no regular file, or link to one."""
    _refuse(path, os.stat(path).st_mode)


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading. NotAFile for anything else."""
    check_regular(path)  # first: opening a device may have effects
    return _open(path, os.O_RDONLY)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A file to append to, made if missing. NotAFile for anything else, links included."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_other_than_file(path)
        with _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW) as file:
            yield file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the block ends without an error: a reader, now or after a crash, sees all of
    it or what was there before.

    Until then it has an unpredictable name beside `path`. Such files of killed processes are removed; their age and a
    lock distinguish them from those in use. NotAFile where `path` is no file. OSErrors name it.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():  # a link itself is replaced, never what it points to
            _refuse_other_than_file(path)
        _remove_leftovers(path)
        file, temporary = _new_beside(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write(path: Path, text: str) -> None:
    """Writes a file so that a reader, now or after a crash, sees all of it or what was there before."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def copy(source: Path, target: Path) -> None:
    """Copies a file, so that the copy is there whole or not at all."""
    with open_regular(source) as original, replacing(target) as file:
        while block := original.read(1 << 20):
            file.write(block)


def write_sealed(path: Path, record: Mapping[str, Any], indent: int | None = 1) -> None:
    """Writes a record as a JSON object with the fingerprint of its content."""
    plain = json.loads(json.dumps(record))  # with tuples and keys as they will be read
    atomic_write(path, json.dumps({**plain, FINGERPRINT: fingerprint(plain)}, indent=indent) + "\n")


def read_sealed(path: Path, older: Callable[[Any], bool] = lambda found: False) -> Any:
    """The record that `write_sealed` wrote.

    older: recognizes files from before there were fingerprints, which are accepted with a warning.

    Raises:
      ValueError: the content is not what was written; one line, without the path.
      NotAFile, OSError: these name the path.
    """
    try:
        found = json.loads(read(path).decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if isinstance(found, dict) and FINGERPRINT in found:
        written = found.pop(FINGERPRINT)
        if written != fingerprint(found):
            raise ValueError("the content does not have the fingerprint it was written with")
        return found
    if not older(found):
        raise ValueError("no fingerprint")
    message = "%s: written before files had fingerprints; it, and others as old, are read unchecked"
    logging.log_first_n(logging.WARNING, message, 1, path)
    return found


def read_sealed_list(path: Path, name: str) -> Any:
    """What `write_sealed` wrote under `name`; before there were fingerprints, such a list was the whole file.

    Raises: what `read_sealed` does; KeyError or TypeError where the record has no such name.
    """
    found = read_sealed(path, older=lambda found: isinstance(found, list))
    return found if isinstance(found, list) else found[name]


def fingerprint(plain: Any) -> str:
    """16 hex digits that stand for a value of JSON, however it is laid out."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_lock(path: Path) -> BinaryIO:
    """A file to lock, made if missing. NotAFile for anything else, links included."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_other_than_file(path)
        try:
            return _open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except PermissionError:  # another user's can be locked, too
            return _open(path, os.O_RDONLY | os.O_NOFOLLOW)


def try_lock(file: BinaryIO, kind: int = fcntl.LOCK_EX) -> bool:
    """Takes a lock if it is free; whether it was. OSError where the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Makes OSErrors name the file, which those of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or _TEMPORARY.search(os.fsdecode(error.filename))):
            error.filename = os.fspath(path)
        raise


def expanded(path: str, option: str) -> Path:
    """A user's path with "~" expanded.

    UserError for line breaks, control characters, an unknown home directory, or a URL: a path would make of it a
    directory that is called "gs:".
    """
    if any(ord(character) < 32 for character in path):
        raise UserError(f"{option}={path!r}: allowed is a path without line breaks and control characters")
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(f"{option}={path}: {scheme[0]} is not known here; allowed is a path on this machine")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{option}={path}: there is no such home directory; allowed is a path without ~") from None


def user_cache(option: str) -> Path:
    """The user's cache directory of this project: below XDG_CACHE_HOME, or below ~/.cache.

    option: of the config, that names a directory instead. UserError where there is no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # its specification: relative ones are to be ignored
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        allowed = "a directory, or the environment variable XDG_CACHE_HOME set to one"
        raise UserError(f"config.{option} = '': there is no home directory; allowed is {allowed}")
    return Path(base) / "precision_scaling"


_LEFT_SECONDS = 3600  # since the last write to a leftover: not all file systems know the locks of other machines
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp$")


def _new_beside(path: Path) -> tuple[BinaryIO, Path]:
    """A new file with a unique name, locked where the file system has locks."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = _open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        try:
            locked = try_lock(file)
        except OSError:
            locked = True
        if locked and os.path.lexists(temporary):
            return file, temporary
        file.close()  # another process takes it for a leftover


def _remove_leftovers(path: Path) -> None:
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and _TEMPORARY.search(name):
            leftover = path.with_name(name)
            try:
                with _open(leftover, os.O_RDWR | os.O_NOFOLLOW) as file:
                    if time.time() - os.fstat(file.fileno()).st_mtime > _LEFT_SECONDS and try_lock(file):
                        leftover.unlink()
            except (OSError, NotAFile):  # it is gone, another user's, or there are no locks
                pass


def _open(path: Path | str, flags: int) -> BinaryIO:
    # O_NONBLOCK: a pipe that was put there in this moment is not waited for.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _refuse(path, os.fstat(descriptor).st_mode)
        mode = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "w+b"}[flags & os.O_ACCMODE]
        return cast(BinaryIO, os.fdopen(descriptor, "ab" if flags & os.O_APPEND else mode))
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_other_than_file(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        _refuse(path, os.lstat(path).st_mode)


def _refuse(path: Path | str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFile(path, mode)
