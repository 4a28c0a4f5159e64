"""The format `pack-quantized` of the compressed-tensors library (0.20), which transformers and vLLM load.

A linear layer (out, in) becomes `weight_packed`, `weight_scale`, `weight_shape` and, asymmetric, `weight_zero_point`.
Codes are stored from 0 on: 2^(b-1) above the signed levels of a symmetric grid. Each row is a stream of bits, the
lowest of a code first, filled up to whole int32. Pure functions; `quantized` makes such tensors of packed models.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.huggingface.reading import shown

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BITS = range(2, 9)
PACKED, SCALE, SHAPE, ZERO = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
# Every key of `quantization_config` counts. These have no part in the weights, or are read.
_KEYS = (
    *("quant_method", "format", "config_groups", "ignore"),
    *("quantization_status", "global_compression_ratio", "version", "run_compressed", "dequantize"),
)
_EMPTY = ("kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config")  # change what is computed
_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_WEIGHT_KEYS = (
    *("num_bits", "type", "symmetric", "strategy", "group_size", "actorder", "dynamic", "block_structure"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)
# Patterns of `ignore` come from a file of others: these are matched in little time, whatever they are.
_PATTERN = re.compile(r"re:(?=(?:[^*]*\*){0,3}[^*]*$)[\w.*^$\\]{1,100}")
_EMBEDDING = "model.embed_tokens"  # no linear layer


class Grid(NamedTuple):
    """Of all quantized layers. group_size: inputs that share a scale; 0 is all of them."""

    bits: int
    symmetric: bool
    group_size: int


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


def description(names: Mapping[int, list[str]], group_size: int, symmetric: bool) -> dict[str, Any]:
    """`quantization_config` of config.json; the head stays as it is.

    names: of the linear layers at each bit-width. group_size: inputs that share a scale; 0 is all of them.
    """
    groups = {}
    for i, (bits, layers) in enumerate(sorted(names.items())):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if group_size else "channel",
            "group_size": group_size or None,
            "dynamic": False,
            "actorder": None,
        }
        groups[f"group_{i}"] = {"targets": ["Linear"] if len(names) == 1 else layers, "weights": weights}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
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
    groups = check(config)
    names = [name.removesuffix(f".{PACKED}") for name in tensors if name.endswith(f".{PACKED}")]
    if not names:
        raise UserError("quantization_config: no packed tensor is there; allowed is one for each linear layer")
    own = {f"{name}.{part}" for name in names for part in (PACKED, SCALE, SHAPE, ZERO)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in own}
    _check_ignored(config.get("ignore") or [], names, plain)
    for name in names:
        parts = {part: tensors.get(f"{name}.{part}") for part in (PACKED, SCALE, SHAPE, ZERO)}
        grid = _grid_of(name, groups)
        try:
            plain[f"{name}.weight"] = _weight(parts, grid)
        except ValueError as error:
            allowed = f"a layer of {FORMAT} at {grid.bits} bits"
            raise UserError(f"tensor {shown(name)}: {error}; allowed is {allowed}") from None
    return plain


class Group(NamedTuple):
    """Layers of one grid. targets: names, patterns after "re:", or "Linear" for all."""

    targets: list[str]
    grid: Grid


def check(config: Any) -> list[Group]:
    """What config.json's `quantization_config` says of the linear layers.

    UserError for other formats than this module's and for keys that it does not know, naming key, value and allowed.
    """
    if not isinstance(config, dict):
        _refuse("", config, "an object")
    if config.get("quant_method") != METHOD:
        _refuse(".quant_method", config.get("quant_method"), repr(METHOD))
    if config.get("format") != FORMAT:
        _refuse(".format", config.get("format"), repr(FORMAT))
    for key in _EMPTY:
        if config.get(key):
            _refuse(f".{key}", config[key], "none")
    _check_known("", config, (*_KEYS, *_EMPTY))
    _check_names(".ignore", config.get("ignore") or [])
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _refuse(".config_groups", groups, "one group or more")
    return [_group(groups, group) for group in groups.values()]


def _check_names(key: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(one, str) and _is_pattern(one) for one in names):
        _refuse(key, names, "a list of names of layers, or of 're:' and a pattern with .* up to three times")


def _group(groups: Mapping[str, Any], group: Any) -> Group:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        _refuse(".config_groups", groups, "a group with weights")
    _check_known(".config_groups", group, _GROUP_KEYS)
    targets = group.get("targets")
    if len(groups) == 1 and targets != ["Linear"]:
        _refuse(".targets", targets, "['Linear']")
    _check_names(".targets", targets or [])
    if len(groups) > 1 and (not targets or "Linear" in targets):
        _refuse(".targets", targets, "names or patterns of layers, where there are several groups")
    if group.get("format") not in (None, FORMAT):
        _refuse(".config_groups.format", group["format"], repr(FORMAT))
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            _refuse(f".{key}", group[key], "none: weights alone are quantized")
    return Group(list(targets or []), _of_weights(group["weights"]))


def _grid_of(name: str, groups: list[Group]) -> Grid:
    """The grid of a packed layer. UserError where not just one group has it."""
    has = lambda group: any(target == "Linear" or _matches(target, name) for target in group.targets)
    found = [group.grid for group in groups if has(group)]
    if len(found) != 1:
        said = "no group" if not found else f"{len(found)} groups"
        raise UserError(f"tensor {shown(name)}: {said} of quantization_config has it; allowed is one")
    return found[0]


def _matches(entry: str, name: str) -> bool:
    return bool(re.match(entry.removeprefix("re:"), name)) if entry.startswith("re:") else entry == name


def _check_known(place: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key, value in values.items():
        if key not in known:
            _refuse(f"{place}.{shown(key)[1:-1]}", value, "the key left out: it is not known what it changes")


def _of_weights(weights: Mapping[str, Any]) -> Grid:
    _check_known(".weights", weights, _WEIGHT_KEYS)
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if weights.get("type", "int") != "int":
        _refuse(".weights.type", weights["type"], "'int'")
    if type(bits) is not int or bits not in BITS:
        _refuse(".weights.num_bits", bits, f"{BITS[0]} to {BITS[-1]}")
    if not isinstance(symmetric, bool):
        _refuse(".weights.symmetric", symmetric, "true or false")
    if strategy not in ("channel", "group"):
        _refuse(".weights.strategy", strategy, "'channel' or 'group'")
    if strategy == "group" and (type(size) is not int or size < 1):
        _refuse(".weights.group_size", size, "a whole number from 1 for strategy 'group'")
    if strategy == "channel" and size not in (None, 0, -1):
        _refuse(".weights.group_size", size, "none for strategy 'channel'")
    if weights.get("actorder") not in (None, "static", "weight"):
        _refuse(".weights.actorder", weights["actorder"], "none, 'static' or 'weight': groups of adjacent inputs")
    for key in ("dynamic", "block_structure"):
        if weights.get(key):
            _refuse(f".weights.{key}", weights[key], "none")
    return Grid(bits, symmetric, int(size) if strategy == "group" and size else 0)


def _is_pattern(entry: str) -> bool:
    """Whether an entry of `ignore` is a name, or a pattern that can be matched."""
    if not entry.startswith("re:"):
        return True
    try:
        re.compile(entry.removeprefix("re:"))
    except re.error:
        return False
    return _PATTERN.fullmatch(entry) is not None


def _check_ignored(ignore: list[str], packed: list[str], plain: Mapping[str, np.ndarray]) -> None:
    """What is packed is not ignored, and a linear layer that is not packed is: the library goes by `ignore` alone."""

    def ignored(name: str) -> bool:
        return any(_matches(entry, name) for entry in ignore)

    for name in packed:
        if ignored(name):
            raise UserError(f"tensor {shown(name)}.{PACKED}: allowed is none, as quantization_config.ignore names it")
    for tensor, value in plain.items():
        name = tensor.removesuffix(".weight")
        if tensor.endswith(".weight") and value.ndim == 2 and name != _EMBEDDING and not ignored(name):
            raise UserError(f"tensor {shown(tensor)}: allowed is a packed one; quantization_config.ignore lacks it")


def _refuse(key: str, value: object, allowed: str) -> NoReturn:
    raise UserError(f"quantization_config{key} = {shown(value)}: allowed is {allowed}")


def _weight(parts: Mapping[str, np.ndarray | None], grid: Grid) -> np.ndarray:
    bits, symmetric, group_size = grid
    packed, scale, shape, zero = (parts[part] for part in (PACKED, SCALE, SHAPE, ZERO))
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
