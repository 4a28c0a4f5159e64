"""Files of the safetensors format: a length, a JSON header with types, shapes and places, and the bytes of the tensors.

Used by `directory`. Not the format's own package (`safetensors` 0.8, which the tests compare with): here tensors are
mapped when read and written one by one, so that a model is never in memory twice. The package copies each tensor that
it reads and writes from contiguous copies of all of them at once; a transposed view, as ours are, it writes in the
wrong order. In a header it accepts a name that stands there twice, keys outside the format, and shapes and types that
then fail in NumPy.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.huggingface import reading
from precision_scaling.huggingface.reading import shown
from precision_scaling.runtime import files

_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn},  # of quantized models
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, mapped and read-only. UserError for what is no whole file."""
    size = reading.regular_size(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, reading.MAX_JSON):
                raise ValueError(f"{size} bytes, and by the first 8 a header of {length}")
            header = reading.parse_json(file.read(length))
        _check_metadata(header.pop("__metadata__", {}))
        data = np.memmap(path, np.uint8, mode="r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
        found = {name: _tensor(name, entry, data) for name, entry in header.items()}
        _check_cover(header, data.size)
        return found
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; allowed is a safetensors file") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; allowed is a whole safetensors file") from None


def _check_metadata(metadata: Any) -> None:
    """Other frameworks than PyTorch may write the same names with other layouts."""
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ = {shown(metadata)}; allowed is an object of strings")
    if metadata.get("format", "pt") not in ("pt", "np"):
        raise ValueError(f"__metadata__ has the format {shown(metadata['format'])}; allowed is 'pt'")


def _tensor(name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} = {shown(entry)}; allowed is an object of dtype, shape and data_offsets")
    if entry["dtype"] not in tuple(_DTYPES):
        raise ValueError(f"{shown(name)} has the type {shown(entry['dtype'])}; allowed is one of {', '.join(_DTYPES)}")
    dtype, shape, offsets = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        found = f"shape {shown(shape)} and data_offsets {shown(offsets)}"
        raise ValueError(f"{shown(name)} has {found}; allowed is whole numbers from 0")
    start, stop = offsets
    if not start <= stop <= data.size or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shown(name)} of shape {shape} lies at bytes {start} to {stop} of {data.size}")
    return data[start:stop].view(dtype).reshape(shape)


def _counts(values: Any) -> bool:
    """Whether these are whole numbers from 0 in a list, and so few that an array can have them as its shape."""
    return isinstance(values, list) and len(values) <= 32 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_cover(header: Mapping[str, Any], size: int) -> None:
    """Every byte belongs to one tensor: what two share, or none has, was never written as a model."""
    end = 0
    for (start, stop), name in sorted((entry["data_offsets"], name) for name, entry in header.items()):
        if start != end:
            raise ValueError(
                f"{shown(name)} lies at bytes {start} to {stop}; allowed is from {end}, the end of another"
            )
        end = stop
    if end != size:
        raise ValueError(f"the tensors end at byte {end} of {size}")


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors in their own types, of those that can be read; there whole or not at all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with files.replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            # `tofile` would not say why a write failed.
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
