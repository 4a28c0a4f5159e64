"""Orbax checkpoints: the parameters of a finished run, and the state of a cohort under way.

Orbax writes to a temporary directory and renames it, so a checkpoint is there whole or not at all. A checksum of the
arrays stands beside them: a bit that flipped on disk would otherwise be read as another weight.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from precision_scaling import results
from precision_scaling.errors import UserError


def save(path: Path, tree: Any) -> None:
    """Writes a pytree of arrays as {"arrays", "checksum"}, replacing what was there; returns when it is on disk."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), {"arrays": tree, "checksum": _checksum(tree)}, force=True)


def restore(path: Path, abstract: Any) -> Any:
    """The pytree at `path`, with the shapes and types of `abstract`. UserError, one line, where it cannot be read."""
    if not path.exists():
        raise UserError(f"{path}: no checkpoint there")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checksum = jax.ShapeDtypeStruct((), np.uint32)
            found = checkpointer.restore(path.absolute(), {"arrays": abstract, "checksum": checksum})
        for wanted, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(found["arrays"]), strict=True):
            if wanted.shape != leaf.shape or wanted.dtype != leaf.dtype:
                raise ValueError(f"holds {leaf.dtype}{leaf.shape} where {wanted.dtype}{wanted.shape} is wanted")
        if found["checksum"] != _checksum(found["arrays"]):
            raise ValueError("the arrays do not have the checksum they were written with")
        return found["arrays"]
    except Exception as error:  # Orbax raises errors of many kinds for a damaged file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"
        raise UserError(
            f"{path}: checkpoint is damaged or of another model ({type(error).__name__}: {reason})"
        ) from error


def _checksum(tree: Any) -> np.ndarray:
    """CRC-32 of all arrays, leaf by leaf."""
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
    return np.array(checksum, np.uint32)


class CohortCheckpoints:
    """The newest states of a cohort under way; `keep` of them, so that a damaged one is not the only one.

    Each is a directory `<n>` with the stacked train state and `lanes.json`: the run and step in each lane.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self._directory, self._keep = directory, keep

    def save(self, lanes: list[dict[str, Any]], state: Any) -> None:
        """Writes the next checkpoint and removes those beyond `keep`."""
        number = max(self._numbers(), default=0) + 1
        path = self._directory / str(number)
        save(path / "state", state)
        results.atomic_write(path / "lanes.json", json.dumps(lanes))  # last: without it the checkpoint does not count
        for old in self._numbers()[: -self._keep]:
            shutil.rmtree(self._directory / str(old))

    def restore(self, abstract_of_lanes) -> tuple[list[dict[str, Any]], Any] | None:
        """(lanes, state as NumPy arrays) of the newest readable checkpoint, or None where there is none.

        abstract_of_lanes: from a number of lanes to the abstract state. A damaged checkpoint is named in a warning.
        """
        for number in reversed(self._numbers()):
            path = self._directory / str(number)
            try:
                lanes = json.loads((path / "lanes.json").read_text())
                state = restore(path / "state", abstract_of_lanes(len(lanes)))
                return lanes, jax.tree.map(np.asarray, state)
            except (UserError, ValueError) as error:
                logging.warning("%s; going back to the checkpoint before it", error)
        return None

    def clear(self) -> None:
        """Removes all of them: the cohort is done."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _numbers(self) -> list[int]:
        return sorted(
            int(path.parent.name) for path in self._directory.glob("*/lanes.json") if path.parent.name.isdigit()
        )
