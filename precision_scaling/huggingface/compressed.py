"""The tensors of the compressed-tensors library (0.20), which transformers and vLLM load: integers, and all of a model.

A linear layer (out, in) of integers becomes `weight_packed`, `weight_scale`, `weight_shape` and, asymmetric,
`weight_zero_point`. Codes are stored from 0 on: 2^(b-1) above the signed levels of a symmetric grid. Each row is a
stream of bits, the lowest of a code first, filled up to whole int32. `compressed_floats` has the other formats,
`quantization_config` what config.json says. Pure functions; `quantized` makes such tensors of packed models.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.huggingface import compressed_floats, quantization_config
from precision_scaling.huggingface.quantization_config import PACK, Grid
from precision_scaling.huggingface.reading import shown

PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
_PARTS = (PACKED, SCALE, SHAPE, ZERO)
_EMBEDDING = "model.embed_tokens"  # no linear layer


def pack(codes_RxC: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes from 0 to 2^bits - 1 in uint8 as int32 (R, ceil(C · bits / 32))."""
    rows, columns = codes_RxC.shape
    stream = np.unpackbits(codes_RxC[..., None], axis=2, count=bits, bitorder="little").reshape(rows, columns * bits)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def unpack(packed_RxW: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """What `pack` packed: uint8 (R, columns). ValueError where the words are too few or too many."""
    rows, words = packed_RxW.shape
    if words != -(-columns * bits // 32):
        raise ValueError(f"{words} words a row for {columns} codes of {bits} bits")
    octets = np.ascontiguousarray(packed_RxW, "<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, count=columns * bits, bitorder="little")
    return np.packbits(stream.reshape(rows, columns, bits), axis=2, bitorder="little")[..., 0]


def encoded(name: str, code_OxI, scale_OxG, zero_OxG, bits: int) -> dict[str, np.ndarray]:
    """The tensors of a linear layer of that name (without ".weight").

    code_OxI: levels in int8 of a symmetric grid, or codes from 0 in uint8 with zero points zero_OxG (uint8).
    """
    symmetric = zero_OxG is None
    codes = (code_OxI.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8) if symmetric else code_OxI
    tensors = {
        f"{name}.{PACKED}": pack(np.ascontiguousarray(codes), bits),
        f"{name}.{SCALE}": scale_OxG,
        f"{name}.{SHAPE}": np.array(code_OxI.shape, np.int64),
    }
    if not symmetric:  # packed along the outputs
        tensors[f"{name}.{ZERO}"] = np.ascontiguousarray(pack(np.ascontiguousarray(zero_OxG.T), bits).T)
    return tensors


def decoded(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a directory with every quantized layer as a plain weight in float32 (out, in), dequantized.

    config: its config.json's `quantization_config`. UserError, one line, for what is of another format or does not fit
    together.
    """
    groups = quantization_config.check(config)
    names = _quantized(tensors)
    if not names:
        raise UserError("quantization_config: no quantized tensor is there; allowed is one for each linear layer")
    grids = {name: quantization_config.grid_of(name, groups) for name in names}
    parts = {name: _PARTS if grid.format == PACK else compressed_floats.parts(grid) for name, grid in grids.items()}
    own = {f"{name}.{part}" for name in names for part in parts[name]}
    plain = {name: tensor for name, tensor in tensors.items() if name not in own}
    _check_ignored(config.get("ignore") or [], names, plain)
    for name, grid in grids.items():
        weight = _weight if grid.format == PACK else compressed_floats.weight
        try:
            plain[f"{name}.weight"] = weight({part: tensors.get(f"{name}.{part}") for part in parts[name]}, grid)
        except ValueError as error:
            allowed = f"a layer of {grid.format} at {grid.bits} bits"
            raise UserError(f"tensor {shown(name)}: {error}; allowed is {allowed}") from None
    return plain


def _quantized(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the layers that have a packed weight or a scale."""
    found = (name.removesuffix(f".{part}") for name in tensors for part in (PACKED, SCALE) if name.endswith(f".{part}"))
    return list(dict.fromkeys(found))


def _check_ignored(ignore: list[str], quantized: list[str], plain: Mapping[str, np.ndarray]) -> None:
    """What is quantized is not ignored, and a linear layer that is not is: the library goes by `ignore` alone."""
    for name in quantized:
        if quantization_config.is_ignored(name, ignore):
            raise UserError(f"tensors of {shown(name)}: allowed is none quantized; quantization_config.ignore names it")
    for tensor, value in plain.items():
        name = tensor.removesuffix(".weight")
        linear = tensor.endswith(".weight") and value.ndim == 2 and name != _EMBEDDING
        if linear and not quantization_config.is_ignored(name, ignore):
            raise UserError(f"tensor {shown(tensor)}: allowed is a packed one; quantization_config.ignore lacks it")


def _weight(parts: Mapping[str, np.ndarray | None], grid: Grid) -> np.ndarray:
    bits, symmetric, group_size, _ = grid
    packed, scale, shape, zero = (parts[part] for part in _PARTS)
    if packed is None or scale is None or shape is None or (zero is None) != symmetric:
        raise ValueError(f"has not the tensors {PACKED}, {SCALE}, {SHAPE}{'' if symmetric else f', {ZERO}'} alone")
    if shape.shape != (2,) or packed.ndim != 2 or scale.ndim != 2 or packed.dtype != np.int32:
        raise ValueError(f"{SHAPE} is {shown(shape.tolist())}, {PACKED} {packed.dtype}{list(packed.shape)}")
    rows, columns = (int(size) for size in shape)
    groups, size = scale.shape[1], group_size or columns
    if packed.shape[0] != rows or scale.shape[0] != rows or not groups or groups * size != columns:
        wanted = f"{rows} x {columns} in groups of {size}"
        raise ValueError(f"{PACKED} {list(packed.shape)} and {SCALE} {list(scale.shape)} are not of {wanted}")
    level = unpack(packed, bits, columns).astype(np.float32).reshape(rows, groups, -1)
    if zero is None:
        level -= 1 << (bits - 1)
    else:
        if zero.ndim != 2 or zero.shape[1] != groups or zero.dtype != np.int32:
            raise ValueError(f"{ZERO} is {zero.dtype}{list(zero.shape)}")
        level -= unpack(np.ascontiguousarray(zero.T), bits, rows).T.astype(np.float32)[..., None]
    return (level * scale.astype(np.float32)[..., None]).reshape(rows, columns)
