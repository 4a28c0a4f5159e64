"""Orbax checkpoints: the parameters of a finished run, and the state of a cohort under way.

Orbax writes to a temporary directory and renames it, so a checkpoint is there whole or not at all; in a bucket, where
nothing can be renamed, an object that it writes last says that the others are complete. A fingerprint of the
arrays stands beside them: OCDBT keeps checksums of its own tables but not of the arrays, and a bit that flipped on disk
would be read as another weight. It is taken on the devices, before and after, so it covers all on the way between them.
Arrays that are spread over hosts are written by all of them, and restored to whatever mesh there is then.
"""

import contextlib
import functools
import logging as standard_logging
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from precision_scaling.errors import UserError
from precision_scaling.runtime import cli, files, hosts, paths

_COMPLETE = "commit_success.txt"  # Orbax's, in a bucket


def save(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays as {"arrays", "fingerprint"}, replacing what was there; returns when it is on disk.

    UserError, one line, where it cannot be written.
    """
    begin_save(path, tree)()


def begin_save(path: Path, tree: Any) -> Callable[[], None]:
    """Starts what `save` does, and returns what ends it: until that has been called, nothing is known to be on disk.

    In between threads write; the arrays may go. Both raise as `save` does.
    """
    _quieten_orbax()
    with _one_line(path):
        if hosts.primary() and files.is_remote(path):
            remove(path)  # in this order; Orbax would begin anywhere
        elif hosts.primary():
            _make_a_directory_beside(path)
        fingerprint = _fingerprint(tree)
        checkpointer = _checkpointer(tree)
        with contextlib.ExitStack() as stack:
            stack.callback(checkpointer.close)
            checkpointer.save(_absolute(path), {"arrays": tree, "fingerprint": fingerprint}, force=True)
            stack.pop_all()

    def end() -> None:
        with _one_line(path), contextlib.closing(checkpointer):
            checkpointer.wait_until_finished()

    return end


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Of whatever is raised in it, a UserError: Orbax has errors of many kinds for a disk that is full."""
    try:
        yield
    except Exception as error:
        disk = re.search("|".join(map(os.strerror, cli.DISK_ERRORS)), str(error))
        raise UserError(f"{path}: cannot be written ({disk[0] if disk else _reason(error)})") from error


@functools.cache
def _quieten_orbax() -> None:
    """From now on, what Orbax raises is told once, by the error that `save` and `restore` make of it.

    Where a write fails, its threads and those of TensorStore also log it, print tracebacks, drop coroutines and call
    back into closed event loops, some of it long after the error has been raised: so this is never undone.
    """
    orbax = os.path.dirname(_orbax().__file__)
    logging.get_absl_logger().addFilter(lambda record: not record.pathname.startswith(orbax))
    standard_logging.getLogger("asyncio").disabled = True
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def closed_loop(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def of_orbax(error: BaseException | None) -> bool:
        frames = traceback.extract_tb(error.__traceback__) if error else []
        return closed_loop(error) or any(frame.filename.startswith(orbax) for frame in frames)

    uncaught, unraisable, of_threads = sys.excepthook, sys.unraisablehook, threading.excepthook
    sys.excepthook = lambda kind, error, trace: None if closed_loop(error) else uncaught(kind, error, trace)
    sys.unraisablehook = lambda found: None if of_orbax(found.exc_value) else unraisable(found)
    threading.excepthook = lambda found: None if of_orbax(found.exc_value) else of_threads(found)


def _make_a_directory_beside(path: Path) -> None:
    """OSError where Orbax could not make its own; its threads would wait minutes for that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".trial", dir=path.parent))


def restore(path: Path, abstract: Any) -> Any:
    """The pytree at `path`, with the shapes, types and shardings of `abstract`; without shardings, on one device.

    UserError, one line, where it cannot be read.
    """
    if not exists(path):
        raise UserError(f"{path}: no checkpoint there")
    _quieten_orbax()
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or one_device), abstract
    )
    try:
        if not files.is_remote(path):
            _check_files(path)
        with _checkpointer(abstract) as checkpointer:
            wanted = {"arrays": abstract, "fingerprint": np.zeros((), np.uint32)}
            found = checkpointer.restore(_absolute(path), wanted)
        for wanted, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(found["arrays"]), strict=True):
            if wanted.shape != leaf.shape or wanted.dtype != leaf.dtype:
                raise ValueError(f"holds {leaf.dtype}{leaf.shape} where {wanted.dtype}{wanted.shape} is wanted")
        if found["fingerprint"] != _fingerprint(found["arrays"]):
            raise ValueError("the arrays do not have the fingerprint they were written with")
        return found["arrays"]
    except Exception as error:  # Orbax raises errors of many kinds for a damaged file
        raise UserError(f"{path}: checkpoint is damaged or of another model ({_reason(error)})") from error


def _absolute(path: Path) -> Path:
    """What Orbax wants; a path in a bucket is one, and its own `absolute` would be below the working directory."""
    return path if files.is_remote(path) else path.absolute()


def exists(path: Path) -> bool:
    """Whether there is a checkpoint that is complete."""
    return files.exists(path / _COMPLETE) if files.is_remote(path) else path.exists()


def remove(path: Path) -> None:
    """Removes a checkpoint, if there is one."""
    files.remove_tree(path, first=_COMPLETE)


def _check_files(path: Path) -> None:
    """Raises NotAFile for what Orbax would wait for without end."""
    for directory, _, names in os.walk(path):
        for name in names:
            files.check_regular(Path(directory, name))


def _reason(error: Exception) -> str:
    message = str(error).partition("See full TensorStore details")[0].strip()
    return f"{type(error).__name__}: {message.splitlines()[0][:200] if message else 'no message'}"


def _orbax() -> Any:
    """The library, imported with the first checkpoint: it takes a quarter of what all imports of a command take."""
    import orbax.checkpoint

    return orbax.checkpoint


def _checkpointer(tree: Any) -> Any:
    """Of all processes that hold a part of the tree: one that works on its own waits for no other."""
    ocp = _orbax()
    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1 and all(
        device.process_index == jax.process_index() for leaf in jax.tree.leaves(tree) for device in _devices(leaf)
    ):
        me = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
        )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _devices(leaf: Any) -> frozenset[jax.Device]:
    """That hold an array; none hold one of NumPy."""
    return frozenset(getattr(getattr(leaf, "sharding", None), "device_set", ()))


def _fingerprint(tree: Any) -> np.ndarray:
    """A sum over all bits of all arrays, each element with an odd weight of its own: uint32.

    Integer sums do not depend on their order, so it is the same however the arrays are spread over devices and hosts. A
    changed element always changes it; of other changes one in 2^32 goes unseen.
    """
    leaves = jax.tree.leaves(tree)
    whole = tuple(len(_devices(leaf)) <= 1 for leaf in leaves)
    return np.asarray(_sum_of_bits(leaves, whole))


_PIECE = 1 << 22  # elements: a CPU writes all products to memory before it sums them


@functools.partial(jax.jit, static_argnames="whole")
def _sum_of_bits(leaves: list[Any], whole: tuple[bool, ...]) -> jax.Array:
    """whole: of each array, whether it lies on one device, where it can be taken in pieces."""
    total = jnp.zeros((), jnp.uint32)
    for number, (leaf, on_one) in enumerate(zip(leaves, whole, strict=True)):
        start = jnp.uint32(number + 1) * jnp.uint32(0x9E3779B9)
        if not on_one or leaf.size <= _PIECE:
            index = jnp.zeros(leaf.shape, jnp.uint32)  # of the element in the flat array, made where the element is
            for axis in range(leaf.ndim):
                index = index * leaf.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            total = total + _weighed(leaf, index + start)
            continue
        flat, pieces = leaf.reshape(-1), leaf.size // _PIECE
        index = jnp.arange(_PIECE, dtype=jnp.uint32)

        def add(i, total, flat=flat, index=index + start):
            piece = jax.lax.dynamic_slice(flat, (i * _PIECE,), (_PIECE,))
            return total + _weighed(piece, index + i.astype(jnp.uint32) * _PIECE)

        total = jax.lax.fori_loop(0, pieces, add, total)
        rest = flat[pieces * _PIECE :]
        index = jnp.arange(rest.size, dtype=jnp.uint32) + jnp.uint32(pieces * _PIECE & 0xFFFFFFFF)
        total = total + _weighed(rest, index + start)
    return total


def _weighed(leaf: jax.Array, index: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    weight = index * jnp.uint32(0x85EBCA6B)
    weight = (weight ^ (weight >> 15)) * jnp.uint32(0xC2B2AE35) | 1
    return jnp.sum(bits * weight, dtype=jnp.uint32)


class CohortCheckpoints:
    """The newest states of a cohort under way; `keep` of them, so that a damaged one is not the only one.

    Each is a directory `<n>` with the stacked train state and `lanes.json`: the run in each lane, its step, which the
    state holds, too, the batches that it leaves out, and the seconds that it took to write the state.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self._directory, self._keep = directory, keep
        self._writing: futures.Future[float] | None = None

    def save(self, lanes: list[dict[str, Any]], state: Any) -> float:
        """Writes the next checkpoint and removes those beyond `keep`; returns the seconds until it counted."""
        self.begin_save(lanes, state)
        seconds = self.end_save()
        assert seconds is not None
        return seconds

    def begin_save(self, lanes: list[dict[str, Any]], state: Any) -> None:
        """Starts what `save` does; a thread goes on with it, and the state may go. Ends the one under way first."""
        self.end_save()
        started = time.monotonic()
        number = hosts.largest(max(self._numbers(), default=0)) + 1
        path = self._directory / str(number)
        end = begin_save(path / paths.STATE, state)
        thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing = thread.submit(self._complete, path, lanes, started, end)
        thread.shutdown(wait=False)

    def end_save(self, wait: bool = True) -> float | None:
        """The seconds until the checkpoint under way counted; None where there is none or, without `wait`, not yet.

        Once for each. Raises what went wrong.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _complete(self, path: Path, lanes: list[dict[str, Any]], started: float, end: Callable[[], None]) -> float:
        end()
        if hosts.primary():
            # Last: without it the checkpoint does not count.
            record = {"lanes": lanes, "seconds": round(time.monotonic() - started, 2)}
            files.write_sealed(path / paths.LANES, record)
        seconds = time.monotonic() - started
        if hosts.primary():
            for old in self._numbers()[: -self._keep]:
                files.remove_tree(self._directory / str(old), first=paths.LANES)
        return seconds

    def restore(self, abstract_of_lanes) -> tuple[list[dict[str, Any]], Any] | None:
        """(lanes, state) of the newest readable checkpoint, or None where there is none.

        abstract_of_lanes: from a number of lanes to the abstract state. A damaged checkpoint is named in a warning.
        """
        self.end_save()
        for number in reversed(self._numbers()):
            path = self._directory / str(number)
            found = None
            try:
                lanes = _lanes(path / paths.LANES)
                state = restore(path / paths.STATE, abstract_of_lanes(len(lanes)))
                _compare_steps(path, lanes, state.step)
                found = lanes, state
            except UserError as error:
                logging.warning("%s; going back to the checkpoint before it", error)
            if not hosts.largest(found is None):  # one that a single process cannot read is of no use to the others
                return found
        return None

    def clear(self) -> None:
        """Removes all of them: the cohort is done."""
        self.end_save()
        if hosts.primary():
            files.remove_tree(self._directory, first=paths.LANES)

    def _numbers(self) -> list[int]:
        found = (path.parent.name for path in files.matching(self._directory, f"*/{paths.LANES}"))
        return sorted(int(name) for name in found if name.isdigit())


def _lanes(path: Path) -> list[dict[str, Any]]:
    try:
        lanes = files.read_sealed_list(path, "lanes")
        if not lanes or not all({"run", "step"} <= set(lane) for lane in lanes):
            raise ValueError("not a list of lanes")
        return lanes
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from error


def _compare_steps(path: Path, lanes: list[dict[str, Any]], step_R: jax.Array) -> None:
    """Raises UserError where a lane is not at the step that its state is at; of several hosts, each sees its own."""
    for shard in step_R.addressable_shards:
        for lane, step in zip(lanes[shard.index[0]], np.asarray(shard.data), strict=True):
            if lane["run"] is not None and lane["step"] != step:
                raise UserError(f"{path}: damaged (the state of {lane['run']} is at step {step}, not {lane['step']})")
