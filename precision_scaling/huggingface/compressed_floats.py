"""Floats as the compressed-tensors library (0.20) stores them: fp8, nvfp4 and the MX formats of OCP.

A linear layer (out, in) becomes `weight` (float8) or `weight_packed` (uint8, each row a stream of bits, the lowest of a
code first) with `weight_scale`; blocks are of adjacent inputs. Scales of nvfp4 are float8 and divided by
`weight_global_scale`, those of MX are the exponents of e8m0. Used by `compressed` and `quantized`; pure functions.
"""

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from precision_scaling.huggingface.quantization_config import FLOAT, KINDS, MXFP4, MXFP6, MXFP8, NAIVE, NVFP4, Grid
from precision_scaling.numerics import bit_patterns
from precision_scaling.numerics.formats import FOUR_OVER_SIX, Format, parse

PLAIN, PACKED, SCALE, GLOBAL = "weight", "weight_packed", "weight_scale", "weight_global_scale"
_FP8 = ml_dtypes.float8_e4m3fn
_FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)


class Stored(NamedTuple):
    """How a format is stored. element: our name of its elements' format. scale: of its blocks' scales; "" is any."""

    element: str
    scale: str = ""


STORED = {
    FLOAT: Stored("e4m3fn"),
    NAIVE: Stored("e4m3fn"),
    NVFP4: Stored("e2m1", "e4m3fn"),
    MXFP4: Stored("e2m1", "e8m0"),
    MXFP6: Stored("e2m3", "e8m0"),
    MXFP8: Stored("e4m3fn", "e8m0"),
}
ALLOWED = "integers, e4m3 and e4m3fn (fp8), nvfp4, mxfp4, mxfp6 and mxfp8"


def stored_as(fmt: Format) -> str | None:
    """The library's name for one of our formats; None where it has none."""
    if fmt.family == "float":
        return FLOAT if fmt.name in ("e4m3", "e4m3fn") else None  # the codes of e4m3 are some of the other's
    if fmt.family != "block" or fmt.block_scale is None:
        return None
    scale = fmt.block_scale.removesuffix(FOUR_OVER_SIX).removesuffix("_up")
    for name, stored in STORED.items():
        if (fmt.element, scale, fmt.block_size) == (*stored, KINDS[name].group_size):
            return name
    return None


def parts(grid: Grid) -> tuple[str, ...]:
    """The names of a layer's tensors."""
    weight = PLAIN if KINDS[grid.format].bits == (8,) else PACKED
    return (weight, SCALE, GLOBAL) if grid.format == NVFP4 else (weight, SCALE)


def encoded(name: str, code_OxI: np.ndarray, scale_OxG: np.ndarray, tensor_scale, grid: Grid) -> dict[str, np.ndarray]:
    """The tensors of a linear layer of that name (without ".weight").

    code_OxI: bit patterns (uint8). scale_OxG: those of scales of blocks, relative to tensor_scale where there is one;
    else the scales.
    """
    if parts(grid)[0] == PLAIN:
        found = {PLAIN: np.ascontiguousarray(code_OxI).view(_FP8)}
    else:
        found = {PACKED: _pack(code_OxI, grid.bits)}
    scale = np.ascontiguousarray(scale_OxG)
    found[SCALE] = scale.view(_FP8) if grid.format == NVFP4 else scale
    if grid.format == NVFP4:  # by which the library divides
        found[GLOBAL] = np.float32(1) / np.asarray([tensor_scale], np.float32)
    return {f"{name}.{part}": tensor for part, tensor in found.items()}


def weight(tensors: Mapping[str, np.ndarray | None], grid: Grid) -> np.ndarray:
    """A layer's weight (out, in) in float32. ValueError for tensors that do not fit together."""
    for part, tensor in tensors.items():
        if tensor is None:
            raise ValueError(f"has no {part}")
    stored, scale = STORED[grid.format], tensors[SCALE]
    if scale is None:
        raise ValueError(f"has no {SCALE}")
    codes = _codes(tensors, grid)
    rows, columns = codes.shape
    size = grid.group_size if grid.group_size > 0 else columns
    shapes = [(1,), (1, 1), ()] if grid.group_size < 0 else [(rows, columns // max(size, 1))]
    if not columns or columns % size or scale.shape not in shapes:
        raise ValueError(f"{SCALE} {list(scale.shape)} is not of {rows} x {columns} in groups of {size}")
    values = bit_patterns.decode(codes, parse(stored.element)).reshape(rows, -1, size)
    factor = _scales(tensors, grid)
    return (values * (factor if grid.group_size < 0 else factor[..., None])).reshape(rows, columns)


def _codes(tensors: Mapping[str, np.ndarray | None], grid: Grid) -> np.ndarray:
    """The bit patterns (out, in) of a layer."""
    part = parts(grid)[0]
    found, wanted = tensors[part], np.dtype(_FP8 if part == PLAIN else np.uint8)
    if found is None or found.ndim != 2 or found.dtype != wanted:
        said = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
        raise ValueError(f"{part} is {said}, not {wanted} of two axes")
    if part == PLAIN:
        return found.view(np.uint8)
    if found.shape[1] * 8 % grid.bits:
        raise ValueError(f"{part} has {found.shape[1]} bytes a row, no whole codes of {grid.bits} bits")
    return _unpack(found, grid.bits)


def _scales(tensors: Mapping[str, np.ndarray | None], grid: Grid) -> np.ndarray:
    """The scales of a layer in float32."""
    scale, divisor = tensors[SCALE], tensors.get(GLOBAL)
    assert scale is not None, "checked"
    stored = STORED[grid.format].scale
    wanted = {"e4m3fn": (_FP8,), "e8m0": (np.uint8,)}.get(stored, _FLOATS)
    if scale.dtype not in [np.dtype(one) for one in wanted]:
        raise ValueError(f"{SCALE} is of {scale.dtype}, not {' or '.join(str(np.dtype(one)) for one in wanted)}")
    if stored == "e8m0":
        return bit_patterns.powers_of_two(scale)
    if divisor is None:
        return scale.astype(np.float32)
    if divisor.shape != (1,) or divisor.dtype != np.float32 or not 0 < divisor[0] < np.inf:
        raise ValueError(f"{GLOBAL} is {divisor.dtype}{list(divisor.shape)}, not one float32 above 0")
    return bit_patterns.decode(scale.view(np.uint8), parse(stored)) / divisor


def _pack(codes_RxC: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as bytes (R, C · bits / 8), which are whole."""
    rows, columns = codes_RxC.shape
    stream = np.unpackbits(np.ascontiguousarray(codes_RxC)[..., None], axis=2, count=bits, bitorder="little")
    return np.packbits(stream.reshape(rows, columns * bits), axis=1, bitorder="little")


def _unpack(packed_RxB: np.ndarray, bits: int) -> np.ndarray:
    """What `_pack` packed."""
    rows, octets = packed_RxB.shape
    stream = np.unpackbits(np.ascontiguousarray(packed_RxB), axis=1, bitorder="little")
    return np.packbits(stream.reshape(rows, octets * 8 // bits, bits), axis=2, bitorder="little")[..., 0]
