"""Files of the safetensors format: a length, a JSON header with types, shapes and places, and the bytes of the tensors.

Used by `directory`. Read here because the format's own package cannot hand bfloat16 to NumPy; tensors are mapped from
the file, so that a model is never in memory twice.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from precision_scaling import files
from precision_scaling.errors import UserError

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, mapped and read-only. UserError for what is not a whole file of floating point."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, mode="r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
        return {name: _tensor(name, entry, data) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; allowed is a safetensors file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _tensor(name: str, entry: Mapping, data: np.ndarray) -> np.ndarray:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has the type {entry['dtype']}; allowed is one of {', '.join(_DTYPES)}")
    dtype, shape, (start, stop) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if not 0 <= start <= stop <= data.size or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} lies at bytes {start} to {stop} of {data.size}")
    return data[start:stop].view(dtype).reshape(shape)


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors in their own types, float64, float32, float16 or bfloat16; there whole or not at all."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
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
            np.ascontiguousarray(tensor).tofile(file)
