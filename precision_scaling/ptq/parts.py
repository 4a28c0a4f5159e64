"""The blocks of a model that are quantized already, on disk: a command that was killed goes on behind them.

A file for each block, an .npz, whose members have checksums. They are no packed model, which `packed` writes when all
blocks are done: codes are as `apply` has them.
"""

import contextlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from precision_scaling.ptq.apply import QuantizedBlock
from precision_scaling.ptq.codes import Codes
from precision_scaling.ptq.projection import Report
from precision_scaling.runtime import files

_KEY = "key"


class Parts:
    """The parts in a directory that were made under the same key: whatever their values depend on, in words."""

    def __init__(self, directory: Path, key: str):
        self._directory, self._key = directory, key

    def read(self, layer: int) -> QuantizedBlock | None:
        """The block, or None where it is not there. A damaged or another model's one counts as missing."""
        path = self._path(layer)
        if not files.exists(path):
            return None
        try:
            with np.load(io.BytesIO(files.read(path)), allow_pickle=False) as found:
                arrays = dict(found)
            if str(arrays.pop(_KEY)) != self._key:
                return None
            return _unflattened(arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logging.warning("%s is damaged (%s): its block is quantized again", path, error)
            return None

    def write(self, layer: int, block: QuantizedBlock) -> None:
        """Keeps a block; there whole or not at all. OSErrors name the file."""
        arrays: dict[str, Any] = {_KEY: np.asarray(self._key), **_flattened(block)}
        content = io.BytesIO()
        np.savez(content, **arrays)
        files.atomic_write_bytes(self._path(layer), content.getvalue())

    def clear(self) -> None:
        """Removes all of them: the model is done."""
        files.remove_tree(self._directory)
        if not files.is_remote(self._directory):  # a bucket has no directories
            with contextlib.suppress(OSError):  # packed models are beside it
                self._directory.parent.rmdir()

    def _path(self, layer: int) -> Path:
        return self._directory / f"{layer:04d}.npz"


def _flattened(block: QuantizedBlock) -> dict[str, Any]:
    """Its arrays by their places in it, as JSON lists."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        {"kernels": {m: {n: _of(codes) for n, codes in names.items()} for m, names in block.kernels.items()}}
        | {"rest": block.rest, "report": block.report._asdict()}
    )
    return {json.dumps([entry.key for entry in path]): np.asarray(leaf) for path, leaf in leaves}


def _of(codes: Codes) -> dict[str, Any]:
    return {name: array for name, array in codes._asdict().items() if array is not None}


def _unflattened(arrays: dict[str, np.ndarray]) -> QuantizedBlock:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *places, last = json.loads(name)
        node = tree
        for place in places:
            node = node.setdefault(place, {})
        node[last] = array
    kernels = {m: {n: Codes(**codes) for n, codes in names.items()} for m, names in tree["kernels"].items()}
    return QuantizedBlock(kernels, tree["rest"], Report(**tree["report"]))
