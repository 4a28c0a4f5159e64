"""The format `pack-quantized` of the compressed-tensors library (0.20), which transformers and vLLM load.

A linear layer (out, in) becomes `weight_packed`, `weight_scale`, `weight_shape` and, asymmetric, `weight_zero_point`.
Codes are stored from 0 on: 2^(b-1) above the signed levels of a symmetric grid. Each row is a stream of bits, the
lowest of a code first, filled up to whole int32. Pure functions; `quantized` makes such tensors of packed models.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.huggingface.reading import shown

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BITS = range(2, 9)
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"


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


def description(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """`quantization_config` of config.json for linear layers of one format; the head stays as it is.

    group_size: inputs that share a scale; 0 is all of them.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


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
    """The tensors of a directory with every packed layer as a plain weight in float32 (out, in), dequantized.

    config: its config.json's `quantization_config`. UserError, one line, for what is of another format or does not fit
    together.
    """
    bits, symmetric = check(config)
    names = [name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(f".{PACKED}")]
    if not names:
        raise UserError("quantization_config: no packed tensor is there; allowed is one for each linear layer")
    own = {f"{name}.{part}" for name in names for part in (PACKED, SCALE, SHAPE, ZERO)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in own}
    for name in names:
        parts = {part: tensors.get(f"{name}.{part}") for part in (PACKED, SCALE, SHAPE, ZERO)}
        try:
            plain[f"{name}.weight"] = _weight(parts, bits, symmetric)
        except ValueError as error:
            raise UserError(f"tensor {shown(name)}: {error}; allowed is a layer of {FORMAT} at {bits} bits") from None
    return plain


def check(config: Any) -> tuple[int, bool]:
    """(bits, symmetric) of all linear layers, by config.json's `quantization_config`.

    UserError for other formats than this module's, naming key, value and allowed.
    """
    if not isinstance(config, dict):
        _refuse("", config, "an object")
    if config.get("quant_method") != METHOD:
        _refuse(".quant_method", config.get("quant_method"), repr(METHOD))
    if config.get("format") != FORMAT:
        _refuse(".format", config.get("format"), repr(FORMAT))
    if config.get("kv_cache_scheme"):
        _refuse(".kv_cache_scheme", config["kv_cache_scheme"], "none")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        _refuse(".config_groups", groups, "one group")
    (group,) = groups.values()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        _refuse(".config_groups", groups, "a group with weights")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            _refuse(f".{key}", group[key], "none: weights alone are quantized")
    return _of_weights(group["weights"])


def _of_weights(weights: Mapping[str, Any]) -> tuple[int, bool]:
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    if weights.get("type", "int") != "int":
        _refuse(".weights.type", weights["type"], "'int'")
    if type(bits) is not int or bits not in BITS:
        _refuse(".weights.num_bits", bits, f"{BITS[0]} to {BITS[-1]}")
    if not isinstance(symmetric, bool):
        _refuse(".weights.symmetric", symmetric, "true or false")
    if weights.get("strategy") not in ("channel", "group"):
        _refuse(".weights.strategy", weights.get("strategy"), "'channel' or 'group'")
    if weights.get("actorder") not in (None, "static", "weight"):
        _refuse(".weights.actorder", weights["actorder"], "none, 'static' or 'weight': groups of adjacent inputs")
    return bits, symmetric


def _refuse(key: str, value: object, allowed: str) -> NoReturn:
    raise UserError(f"quantization_config{key} = {shown(value)}: allowed is {allowed}")


def _weight(parts: Mapping[str, np.ndarray | None], bits: int, symmetric: bool) -> np.ndarray:
    packed, scale, shape, zero = (parts[part] for part in (PACKED, SCALE, SHAPE, ZERO))
    if packed is None or scale is None or shape is None or (zero is None) != symmetric:
        raise ValueError(f"has not the tensors {PACKED}, {SCALE}, {SHAPE}{'' if symmetric else f', {ZERO}'} alone")
    if shape.shape != (2,) or packed.ndim != 2 or scale.ndim != 2 or packed.dtype != np.int32:
        raise ValueError(f"{SHAPE} is {shown(shape.tolist())}, {PACKED} {packed.dtype}{list(packed.shape)}")
    rows, columns = (int(size) for size in shape)
    groups = scale.shape[1]
    if packed.shape[0] != rows or scale.shape[0] != rows or not groups or columns % groups:
        raise ValueError(f"{PACKED} {list(packed.shape)} and {SCALE} {list(scale.shape)} are not of {rows} x {columns}")
    level = unpack(packed, bits, columns).astype(np.float32).reshape(rows, groups, -1)
    if zero is None:
        level -= 1 << (bits - 1)
    else:
        if zero.ndim != 2 or zero.shape[1] != groups or zero.dtype != np.int32:
            raise ValueError(f"{ZERO} is {zero.dtype}{list(zero.shape)}")
        level -= unpack(np.ascontiguousarray(zero.T), bits, rows).T.astype(np.float32)[..., None]
    return (level * scale.astype(np.float32)[..., None]).reshape(rows, columns)
