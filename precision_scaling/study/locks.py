"""Who works on a study: of the processes that share a workdir, no two may be given the same runs.

The commands hold their share's lock file while they work. The kernel frees it when its holder dies. A bucket has no
locks: there it is a lease, see `runtime.lease`.
"""

import contextlib
import fcntl
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from absl import logging

from precision_scaling.errors import UserError
from precision_scaling.runtime import files, lease, paths

_NAME = re.compile(r"(0|[1-9]\d*)of([1-9]\d*)")


@contextlib.contextmanager
def hold(workdir: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Holds the shard (i, n) of a workdir. UserError where another process has it, or one that overlaps.

    Files of other names are not ours and left alone; NotAFile for anything else under a name of ours.
    """
    directory = workdir / paths.LOCKS
    if files.is_remote(workdir):
        with lease.hold(directory, _name(shard)) as mine:
            if mine is None:
                raise _taken(workdir, shard, shard)
            for name in mine.held():
                if (other := _shard(name)) and _overlaps(shard, other):
                    raise _taken(workdir, shard, other)
            yield
        return
    with contextlib.ExitStack() as stack:
        own = directory / _name(shard)
        if not _lock(stack.enter_context(files.open_lock(own)), fcntl.LOCK_EX):
            raise _taken(workdir, shard, shard)
        for path in directory.iterdir():
            other = _shard(path.name)
            if other and _overlaps(shard, other):
                with files.open_regular(path) as file:
                    if not _lock(file, fcntl.LOCK_SH):
                        raise _taken(workdir, shard, other)
        yield


def _name(shard: tuple[int, int]) -> str:
    return f"{shard[0]}of{shard[1]}"


def _shard(name: str) -> tuple[int, int] | None:
    """The shard that a lock's name stands for; None where it is not ours."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def _overlaps(shard: tuple[int, int], other: tuple[int, int]) -> bool:
    # Runs i, i + n, ... and j, j + m, ... meet where i and j differ by a multiple of gcd(n, m).
    return other != shard and (other[0] - shard[0]) % math.gcd(other[1], shard[1]) == 0


def _lock(file: BinaryIO, kind: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        return files.try_lock(file, kind)
    except OSError as error:
        logging.warning("%s: no locks on this file system (%s); two workers must not share a shard", file.name, error)
    return True


def _taken(workdir: Path, shard: tuple[int, int], other: tuple[int, int]) -> UserError:
    return UserError(
        f"--shard={shard[0]}/{shard[1]}: another process is at work on --shard={other[0]}/{other[1]} of {workdir}; "
        "allowed are shards that share no run, the same n for all workers"
    )
