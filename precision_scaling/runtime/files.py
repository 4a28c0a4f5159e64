"""Files that outlive a process: written whole or not at all, sealed with a fingerprint, and read if they are files.

All files of runs, studies and token caches are written and read here. A directory may be shared with other users:
nothing is written through a link, and nothing that may never end, such as a pipe, is read. A path that `place` gave may
be in a bucket; functions whose paths are on this machine alone say so.
"""

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from absl import logging

from precision_scaling.errors import UserError
from precision_scaling.runtime import bucket

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
    if is_remote(path):
        return bucket.read(cast(Path, path))
    with naming(path), open_regular(path) as file:
        return file.read()


def read_all(paths: Iterable[Path]) -> list[bytes]:
    """The content of each file; of those in a bucket, many are read at the same time."""
    paths = list(paths)
    return bucket.read_all(paths) if paths and is_remote(paths[0]) else [read(path) for path in paths]


def is_remote(path: Path | str) -> bool:
    """Whether a path of `place` is in a bucket."""
    return not isinstance(path, str | Path)


def exists(path: Path) -> bool:
    """Whether there is such a file; on this machine, or a directory."""
    return bucket.exists(path) if is_remote(path) else path.exists()


def matching(directory: Path, pattern: str) -> list[Path]:
    """The files below a directory that match a pattern of relative paths, such as */lanes.json, in a fixed order.

    In a bucket, everything below what the pattern begins with is listed, a request for each thousand.
    """
    if not is_remote(directory):
        return sorted(directory.glob(pattern))
    parts = PurePosixPath(pattern).parts
    fixed = next(i for i, part in enumerate((*parts, "*")) if set("*?[") & set(part))
    below = bucket.below(directory.joinpath(*parts[:fixed]))
    relative = {path: PurePosixPath(*path.parts[len(directory.parts) :]) for path in below}
    return [path for path, name in relative.items() if len(name.parts) == len(parts) and name.match(pattern)]


def make_directory(path: Path) -> None:
    """Makes a directory where there is none; a bucket needs none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def size_below(directory: Path) -> int:
    """Bytes of all files below a directory."""
    if is_remote(directory):
        return bucket.size_below(directory)
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Removes a file, if it is there."""
    if is_remote(path):
        bucket.remove([path])
    else:
        path.unlink(missing_ok=True)


def remove_tree(directory: Path, first: str = "") -> None:
    """Removes a directory with all that is in it, as far as that can be done.

    first: names of files that go before the others, where one says that they are complete: a bucket has no rename.
    """
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    bucket.remove(sorted(bucket.below(directory), key=lambda path: path.name != first))


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
    """Opens a regular file on this machine, or a link to one, for reading. NotAFile for anything else."""
    check_regular(path)  # first: opening a device may have effects
    return _open(path, os.O_RDONLY)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A file on this machine to append to, made if missing. NotAFile for anything else, links included."""
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
    An object of a bucket is sent when the block ends.
    """
    if is_remote(path):
        content = io.BytesIO()
        yield content
        bucket.write(path, content.getvalue())
        return
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
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """`atomic_write` for bytes."""
    with replacing(path) as file:
        file.write(content)


def copy(source: Path, target: Path) -> None:
    """Copies a file, so that the copy is there whole or not at all."""
    if is_remote(source) or is_remote(target):
        atomic_write_bytes(target, read(source))
        return
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
    return unsealed(read(path), path, older)


def unsealed(content: bytes, path: Path, older: Callable[[Any], bool] = lambda found: False) -> Any:
    """What `read_sealed` returns, of the file's content."""
    try:
        found = json.loads(content.decode("utf-8"))
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
    return unsealed_list(read(path), path, name)


def unsealed_list(content: bytes, path: Path, name: str) -> Any:
    """What `read_sealed_list` returns, of the file's content."""
    found = unsealed(content, path, older=lambda found: isinstance(found, list))
    return found if isinstance(found, list) else found[name]


def fingerprint(plain: Any) -> str:
    """16 hex digits that stand for a value of JSON, however it is laid out."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def open_lock(path: Path) -> BinaryIO:
    """A file on this machine to lock, made if missing. NotAFile for anything else, links included."""
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


def place(path: str | Path, option: str) -> Path:
    """A user's path on this machine, as `expanded` has it, or in a bucket: gs://BUCKET/PATH. UserError for others."""
    if str(path).startswith(bucket.SCHEME):
        return bucket.path(str(path), option)
    return expanded(str(path), option, f"a path on this machine or {bucket.SCHEME}BUCKET/PATH")


def expanded(path: str, option: str, allowed: str = "a path on this machine") -> Path:
    """A user's path with "~" expanded.

    UserError for line breaks, control characters, an unknown home directory, or a URL: a path would make of it a
    directory that is called "gs:".
    """
    if any(ord(character) < 32 for character in path):
        raise UserError(f"{option}={path!r}: allowed is a path without line breaks and control characters")
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(f"{option}={path}: {scheme[0]} is not known here; allowed is {allowed}")
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
