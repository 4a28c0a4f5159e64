"""What config.json's `quantization_config` says of a directory of the compressed-tensors library (0.20).

Written and read here, every key of it; `compressed` has the tensors that go with it. Pure functions.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from precision_scaling.errors import UserError
from precision_scaling.huggingface.reading import shown

METHOD, MIXED = "compressed-tensors", "mixed-precision"
PACK, FLOAT, NAIVE = "pack-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP6, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"


class Kind(NamedTuple):
    """What `weights` of a format says. group_size: 0 for any. scale_dtypes: of `scale_dtype`, the first is written;
    empty where the key has no part."""

    type: str
    bits: tuple[int, ...]
    strategies: tuple[str, ...]
    group_size: int = 0
    scale_dtypes: tuple[str | None, ...] = ()


_FP8 = Kind("float", (8,), ("channel", "group", "tensor"), 0, (None,))
_U8, _F8 = ("torch.uint8", None), ("torch.float8_e4m3fn", None)
KINDS = {
    PACK: Kind("int", tuple(range(2, 9)), ("channel", "group")),
    FLOAT: _FP8,
    NAIVE: _FP8,  # the name that the library gives the same where weights alone are quantized
    NVFP4: Kind("float", (4,), ("tensor_group",), 16, _F8),
    MXFP4: Kind("float", (4,), ("group",), 32, _U8),
    MXFP6: Kind("float", (6,), ("group",), 32, _U8),
    MXFP8: Kind("float", (8,), ("group",), 32, _U8),
}
# Every key counts. These have no part in the weights, or are read.
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


class Grid(NamedTuple):
    """Of a layer. group_size: inputs that share a scale; 0 is all of an output's, -1 all of the layer."""

    bits: int
    symmetric: bool
    group_size: int
    format: str = PACK


class Group(NamedTuple):
    """Layers of one grid. targets: names, patterns after "re:", or "Linear" for all."""

    targets: list[str]
    grid: Grid


def description(grids: Mapping[Grid, list[str]]) -> dict[str, Any]:
    """`quantization_config` of layers with these grids, by the layers' names; the head stays as it is."""
    groups = {}
    for i, (grid, layers) in enumerate(sorted(grids.items())):
        kind, size = KINDS[grid.format], grid.group_size
        weights = {
            "num_bits": grid.bits,
            "type": kind.type,
            "symmetric": grid.symmetric,
            "strategy": "channel" if not size else "group" if "group" in kind.strategies else kind.strategies[0],
            "group_size": size or None,
            "dynamic": False,
            "actorder": None,
        }
        if any(kind.scale_dtypes):
            weights |= {"scale_dtype": kind.scale_dtypes[0], "zp_dtype": kind.scale_dtypes[0]}
        groups[f"group_{i}"] = {"targets": ["Linear"] if len(grids) == 1 else layers, "weights": weights}
        if grid.format != PACK:  # what the library would take for another
            groups[f"group_{i}"] |= {"format": grid.format}
    (name,) = {grid.format for grid in grids}
    return {
        "quant_method": METHOD,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def check(config: Any) -> list[Group]:
    """What config.json's `quantization_config` says of the linear layers.

    UserError for formats that are not in KINDS and for keys that are not known, naming key, value and allowed.
    """
    if not isinstance(config, dict):
        _refuse("", config, "an object")
    if config.get("quant_method") != METHOD:
        _refuse(".quant_method", config.get("quant_method"), repr(METHOD))
    if config.get("format") not in (*KINDS, MIXED):
        _refuse(".format", config.get("format"), f"one of {', '.join(KINDS)}, or {MIXED} of them")
    for key in _EMPTY:
        if config.get(key):
            _refuse(f".{key}", config[key], "none")
    _check_known("", config, (*_KEYS, *_EMPTY))
    _check_names(".ignore", config.get("ignore") or [])
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _refuse(".config_groups", groups, "one group or more")
    return [_group(groups, group, config["format"]) for group in groups.values()]


def grid_of(name: str, groups: list[Group]) -> Grid:
    """The grid of a quantized layer. UserError where not just one group has it."""
    has = lambda group: any(target == "Linear" or _matches(target, name) for target in group.targets)
    found = [group.grid for group in groups if has(group)]
    if len(found) != 1:
        said = "no group" if not found else f"{len(found)} groups"
        raise UserError(f"tensor {shown(name)}: {said} of quantization_config has it; allowed is one")
    return found[0]


def is_ignored(name: str, ignore: Iterable[str]) -> bool:
    """Whether an entry of `ignore` names a layer."""
    return any(_matches(entry, name) for entry in ignore)


def _check_names(key: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(one, str) and _is_pattern(one) for one in names):
        _refuse(key, names, "a list of names of layers, or of 're:' and a pattern with .* up to three times")


def _group(groups: Mapping[str, Any], group: Any, outer: str) -> Group:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        _refuse(".config_groups", groups, "a group with weights")
    _check_known(".config_groups", group, _GROUP_KEYS)
    targets = group.get("targets")
    if len(groups) == 1 and targets != ["Linear"]:
        _refuse(".targets", targets, "['Linear']")
    _check_names(".targets", targets or [])
    if len(groups) > 1 and (not targets or "Linear" in targets):
        _refuse(".targets", targets, "names or patterns of layers, where there are several groups")
    named = outer if group.get("format") is None else group["format"]
    if named not in KINDS or outer not in (named, MIXED):
        allowed = f"one of {', '.join(KINDS)}" if outer == MIXED else repr(outer)
        _refuse(".config_groups.format", named, allowed)
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            _refuse(f".{key}", group[key], "none: weights alone are quantized")
    return Group(list(targets or []), _of_weights(group["weights"], named))


def _of_weights(weights: Mapping[str, Any], name: str) -> Grid:
    _check_known(".weights", weights, _WEIGHT_KEYS)
    kind = KINDS[name]
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if weights.get("type", "int") != kind.type:
        _refuse(".weights.type", weights.get("type"), f"{kind.type!r} with {name}")
    if type(bits) is not int or bits not in kind.bits:
        allowed = f"{kind.bits[0]} to {kind.bits[-1]}" if len(kind.bits) > 1 else f"{kind.bits[0]}"
        _refuse(".weights.num_bits", bits, f"{allowed} with {name}")
    if not isinstance(symmetric, bool) or not (symmetric or kind.type == "int"):
        _refuse(".weights.symmetric", symmetric, "true or false" if kind.type == "int" else f"true with {name}")
    if strategy not in kind.strategies:
        _refuse(".weights.strategy", strategy, f"{' or '.join(map(repr, kind.strategies))} with {name}")
    grouped = strategy in ("group", "tensor_group")
    if grouped and (type(size) is not int or size < 1 or kind.group_size not in (0, size)):
        allowed = f"{kind.group_size or 'a whole number from 1'}"
        _refuse(".weights.group_size", size, f"{allowed} for strategy {strategy!r} with {name}")
    if not grouped and size not in (None, 0, -1):
        _refuse(".weights.group_size", size, f"none for strategy {strategy!r}")
    if kind.scale_dtypes and weights.get("scale_dtype") not in kind.scale_dtypes:
        allowed = " or ".join("none" if one is None else repr(one) for one in kind.scale_dtypes)
        _refuse(".weights.scale_dtype", weights["scale_dtype"], f"{allowed} with {name}")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        _refuse(".weights.actorder", weights["actorder"], "none, 'static' or 'weight': groups of adjacent inputs")
    for key in ("dynamic", "block_structure"):
        if weights.get(key):
            _refuse(f".weights.{key}", weights[key], "none")
    return Grid(bits, symmetric, int(size or 0) if grouped else -1 if strategy == "tensor" else 0, name)


def _matches(entry: str, name: str) -> bool:
    return bool(re.match(entry.removeprefix("re:"), name)) if entry.startswith("re:") else entry == name


def _is_pattern(entry: str) -> bool:
    """Whether an entry of `ignore` is a name, or a pattern that can be matched."""
    if not entry.startswith("re:"):
        return True
    try:
        re.compile(entry.removeprefix("re:"))
    except re.error:
        return False
    return _PATTERN.fullmatch(entry) is not None


def _check_known(place: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key, value in values.items():
        if key not in known:
            _refuse(f"{place}.{shown(key)[1:-1]}", value, "the key left out: it is not known what it changes")


def _refuse(key: str, value: object, allowed: str) -> NoReturn:
    raise UserError(f"quantization_config{key} = {shown(value)}: allowed is {allowed}")
