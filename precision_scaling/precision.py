"""The precision of a run: parts, directions, granularity and rounding, from the options to what `quantize` compiles.

`from_options` and `parse` turn the config's `precision` section and a grid's shorthand into a `Spec`; `program_of` and
`Spec.table` split specs into the static `Program` that the runs of a cohort share and the traced grids of each.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from precision_scaling import formats, quantize
from precision_scaling.errors import ConfigError
from precision_scaling.formats import Format, Grid
from precision_scaling.model import ModelConfig
from precision_scaling.numerics import ROUNDINGS
from precision_scaling.quantize import BACKWARD, OPERANDS, OUTER, Operand, Program

MODES = ("simulated", "native")
ROTATIONS = ("none", "hadamard")
# What the paper's P_w, P_a and P_kv stand for, part by part, and the gradients that meet the projections.
PARTS = {"w": ("w",), "a": ("a",), "kv": ("k", "v"), "g": ("g_a", "g_w")}
FORWARD = OPERANDS + OUTER

# The option that holds an operand's format, and those that say what shares a scale and how it rounds where the format
# itself does not.
_TARGETS = {"a": "activations", "w": "weights", "q": "q", "k": "k", "p": "p", "v": "v"}
OPTIONS = {
    "w": "weights",
    "a": "activations",
    **{name: name for name in "qkvp"},
    "e": "embedding",
    "head_w": "head_weights",
    "head_a": "head_activations",
    **{f"g_{name}": f"backward.{target}_gradient" for name, target in _TARGETS.items()},
    **{f"s_{name}": f"backward.{target}_saved" for name, target in _TARGETS.items()},
}
_GROUPS = {
    "w": "weights",
    "a": "activations",
    **dict.fromkeys("qkvp", "attention"),
    "e": "embedding",
    "head_w": "weights",
    "head_a": "activations",
    **{name: f"backward.{'gradient' if name.startswith('g_') else 'saved'}" for name in BACKWARD},
}
_SOURCES = ("forward", "exact")

_UNQUANTIZED = {
    **{OPTIONS[name]: "bf16" for name in FORWARD},
    **{OPTIONS[name]: "forward" if name.startswith("s_") else "bf16" for name in BACKWARD},
    **{f"{group}_granularity": "tensor" for group in _GROUPS.values()},
    **{f"{group}_rounding": "nearest" for group in _GROUPS.values()},
    "weights_granularity": "channel",
    "embedding_granularity": "token",
    "rotation": "none",
    "mode": "simulated",
}
# Presets by name: every option's value. Each starts from the paper's setting, in which nothing is quantized yet.
PRESETS = {
    "paper": _UNQUANTIZED,
    # Weights only, forward only (the paper's quantization-aware training).
    "qat": {**_UNQUANTIZED, "weights": "int4"},
    # Weights, activations and the KV cache, forward only (the paper's low-precision training).
    "low_precision": {**_UNQUANTIZED, "weights": "int8", "activations": "int8", "k": "int8", "v": "int8"},
    # Projections in fp8 with a scale per tensor (arXiv 2209.05433): e4m3 forward, e5m2 for the incoming gradient.
    "fp8": {
        **_UNQUANTIZED,
        **dict.fromkeys(("weights", "activations"), "e4m3fn"),
        **dict.fromkeys(("backward.activations_gradient", "backward.weights_gradient"), "e5m2"),
        "weights_granularity": "tensor",
    },
    # All three products of a projection in int8, a scale per vector of each, gradients rounded at random.
    "int8_full": {
        **_UNQUANTIZED,
        **dict.fromkeys(("weights", "activations"), "int8"),
        **{f"backward.{x}_{side}": "int8" for x in ("weights", "activations") for side in ("gradient", "saved")},
        "activations_granularity": "token",
        "backward.gradient_granularity": "vector",
        "backward.saved_granularity": "vector",
        "backward.gradient_rounding": "stochastic",
    },
    # All three products of a projection in 4-bit blocks, gradients rounded at random (arXiv 2502.20586, 2509.25149).
    **{
        name: {
            **_UNQUANTIZED,
            **dict.fromkeys(("weights", "activations"), name),
            **{f"backward.{x}_{side}": name for x in ("weights", "activations") for side in ("gradient", "saved")},
            "backward.gradient_rounding": "stochastic",
        }
        for name in ("mxfp4", "nvfp4")
    },
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one operand is quantized. granularity: see `quantize.granularities`; that of a block format is its own."""

    format: Format
    granularity: str
    rounding: str

    def __str__(self) -> str:
        return f"{self.format.name}/{self.granularity}/{self.rounding}"


@dataclasses.dataclass(frozen=True)
class Spec:
    """The precision of one run, without what has no effect.

    settings: of the operands that are quantized, by name.
    exact: operands whose gradient is made with the exact saved operand.
    """

    settings: tuple[tuple[str, Setting], ...]
    exact: tuple[str, ...]
    rotated: bool
    native: bool

    def get(self, name: str) -> Setting | None:
        """The setting of an operand, None where it is not quantized."""
        return dict(self.settings).get(name)

    def format(self, name: str) -> Format:
        """The format of an operand; bf16 where it is not quantized."""
        setting = self.get(name)
        return setting.format if setting else formats.parse("bf16")

    def bits(self, *operands: str) -> float:
        """Bits of an operand; of several, the fewest. Unquantized formats count as 16."""
        return min(min(self.format(name).bits, 16.0) for name in operands)

    def granularity(self, *operands: str) -> str:
        """What shares a scale in an operand, or in several where they differ; empty where none is quantized."""
        found = dict.fromkeys(setting.granularity for name, setting in self.settings if name in operands)
        return ",".join(found)

    def describe(self) -> str:
        """All of it in one line, e.g. "w=int4/channel/nearest a=int8/tensor/nearest"; "bf16" for full precision."""
        words = [f"{name}={setting}" for name, setting in self.settings] + [f"s_{name}=exact" for name in self.exact]
        return " ".join(words + ["rotated"] * self.rotated + ["native"] * self.native) or "bf16"

    @property
    def short(self) -> str:
        """For names of runs: the forward formats, and marks of what else is special; "bf16" for full precision."""
        words = [name.replace("_", "") + setting.format.name for name, setting in self.settings if name in FORWARD]
        gradients = dict.fromkeys(setting.format.name for name, setting in self.settings if name.startswith("g_"))
        words += [f"g{name}" for name in gradients]
        words += ["rotated"] * self.rotated + ["native"] * self.native
        return "_".join(words) or "bf16"

    def table(self, program: Program, **replaced: object) -> dict[str, Grid]:
        """The grids of the operands that the program quantizes; `replaced` gives other formats for some."""
        chosen = {name: formats.parse(replaced.get(name, self.format(name))) for name, _ in program.operands}
        return {name: fmt.grid() for name, fmt in chosen.items()}


def from_options(options: Mapping[str, Any], preset: str | None = None, **replaced: str) -> Spec:
    """The spec that the config's `precision` section describes.

    options: as in configs/base.py; an empty leaf takes the preset's value. preset: another preset than the section's.
    replaced: formats by operand that take the place of the section's, with "/granularity" and "/rounding" if need be.
    Raises ConfigError for unknown values, and for values that contradict each other.
    """
    spec = _resolve(options, preset, replaced)
    if spec.native:
        _check_native(spec)
    return spec


def check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value of the config's `precision` section that does not exist, used or not.

    Whether the values go together is another question: a study's grid may replace some of them.
    """
    _resolve(options, None, {})


def _resolve(options: Mapping[str, Any], preset: str | None, replaced: Mapping[str, str]) -> Spec:
    preset = options["preset"] if preset is None else preset
    if preset not in PRESETS:
        raise ConfigError("precision.preset", preset, f"one of {', '.join(PRESETS)}")

    def chosen(key: str) -> tuple[Any, bool]:
        """The value of an option, and whether the user gave it rather than the preset."""
        section, _, leaf = key.rpartition(".")
        value = (options[section] if section else options)[leaf]
        return (PRESETS[preset][key], False) if value == "" else (value, True)

    settings, exact = {}, []
    for name in FORWARD + BACKWARD:
        value = replaced.get(name, chosen(OPTIONS[name])[0])
        granularity, rounding = chosen(f"{_GROUPS[name]}_granularity"), chosen(f"{_GROUPS[name]}_rounding")
        _check_group(name, granularity[0], rounding[0])
        if name.startswith("s_") and value in _SOURCES:
            exact += [name.removeprefix("s_")] * (value == "exact")
            continue
        setting = _setting(f"precision.{OPTIONS[name]}", name, value, granularity, rounding)
        if setting.format.family != "none":
            settings[name] = setting
    for key, allowed in (("rotation", ROTATIONS), ("mode", MODES)):
        if chosen(key)[0] not in allowed:
            raise ConfigError(f"precision.{key}", chosen(key)[0], f"one of {', '.join(allowed)}")
    return Spec(
        settings=tuple(settings.items()),
        # The exact saved operand is the forward one where that is not quantized.
        exact=tuple(name for name in exact if _partner(name) in settings),
        rotated=chosen("rotation")[0] == "hadamard" and bool({"a", "w"} & set(settings)),
        native=chosen("mode")[0] == "native" and bool(settings),
    )


def parse(text: str, options: Mapping[str, Any], key: str = "study.grid.*.precisions") -> Spec:
    """The spec of a grid's shorthand; what it leaves out is as in the config's `precision` section.

    text: "bf16" (nothing is quantized), a preset, or parts with formats joined by "_": w, a, kv, g (incoming gradients
    of the projections) or q, k, v, p one by one; "w4", "w4_a8_kv4", "we2m1/group:32", "fp8", "fp8_kv8". A part takes
    the place of what a preset before it, or the section, says; no part stands there twice. key: names text in errors.
    """
    if text == "bf16":
        nothing = {name: "forward" if name.startswith("s_") else "bf16" for name in FORWARD + BACKWARD}
        return from_options(options, **nothing)
    preset = next((name for name in PRESETS if text == name or text.startswith(f"{name}_")), None)
    parts = {**{name: (name,) for name in OPERANDS}, **PARTS}
    # Names of formats have a "_", too, but no part's name after it.
    first, *words = re.split(r"_(?=[waqkvpg])", text.removeprefix(preset or ""))
    words = [first, *words] if first or not preset else words
    replaced: dict[str, str] = {}
    for word in words:
        match = re.fullmatch(r"(kv|[waqkvpg])(\S+)", word)
        if not match:
            allowed = f"bf16, {', '.join(PRESETS)}, or w, a, kv, g, q, k, v, p with a format, joined by '_': w4_a8_kv4"
            raise ConfigError(key, text, allowed)
        names = parts[match[1]]
        if replaced.keys() & set(names):
            raise ConfigError(key, text, f"each part once, {match[1]} is there twice (kv is k and v)")
        _setting(key, names[0], match[2], ("tensor", False), ("nearest", False), text)
        replaced |= dict.fromkeys(names, match[2])
    return from_options(options, preset, **replaced)


def _partner(name: str) -> str:
    """The other operand of the forward product."""
    return next(b if name == a else a for a, b in quantize.PRODUCTS if name in (a, b))


def _setting(key: str, name: str, value: object, granularity, rounding, shown: str = "") -> Setting:
    """One operand's setting, from "FORMAT[/GRANULARITY][/ROUNDING]" and the group's (value, given by the user).

    shown: what stands for the value in errors, the shorthand that it is a part of.
    """
    text, *details = str(value).split("/")
    try:
        fmt = formats.parse(text)
    except formats.FormatError as error:
        allowed = str(error).partition("allowed: ")[2] or str(error)
        raise ConfigError(key, shown or value, f"{allowed}; not {text!r}" if shown else allowed) from None
    shared, rounds = granularity, rounding
    for detail in details:
        if detail in ROUNDINGS and rounds is rounding:
            rounds = (detail, True)
        elif _is_granularity(name, detail) and shared is granularity:
            shared = (detail, True)
        else:
            allowed = f"FORMAT[/GRANULARITY][/ROUNDING] of {', '.join(quantize.granularities(name) + ROUNDINGS)}"
            raise ConfigError(key, shown or value, allowed)
    if fmt.family == "block":
        own = f"group:{fmt.block_size}"
        if shared[1] and shared[0] != own:
            found = shown or f"{fmt.name} with granularity {shared[0]}"
            raise ConfigError(key, found, f"{own} for {fmt.name}, or none given")
        shared = (own, True)
    return Setting(fmt, shared[0], rounds[0])


def _check_group(name: str, granularity: object, rounding: object) -> None:
    """Raises ConfigError for what an operand's group of options cannot say."""
    if not _is_granularity(name, granularity):
        allowed = f"one of {', '.join(quantize.granularities(name))} for {OPTIONS[name]}"
        raise ConfigError(f"precision.{_GROUPS[name]}_granularity", granularity, allowed)
    if rounding not in ROUNDINGS:
        raise ConfigError(f"precision.{_GROUPS[name]}_rounding", rounding, f"one of {', '.join(ROUNDINGS)}")


def _is_granularity(name: str, text: object) -> bool:
    return text in quantize.granularities(name)[:-1] or bool(re.fullmatch(r"group:[1-9][0-9]*", str(text)))


# Shapes


def check_shape(spec: Spec, model: ModelConfig, tokens_per_part: int) -> None:
    """Raises ConfigError where groups or a rotation do not fit a decoder; before anything is compiled.

    tokens_per_part: tokens of a microbatch, over which weight gradients contract.
    """
    features = {"model.width": model.width, "model.hidden": model.hidden}
    features["the heads together"] = model.heads * model.head_dim
    qkv = (model.heads + 2 * model.key_heads) * model.head_dim
    outputs = {"queries, keys and values": qkv, "2 × model.hidden": 2 * model.hidden, "model.width": model.width}
    contracted = (
        (("w", "a"), features),
        (("head_w", "head_a", "e"), {"model.width": model.width}),
        (("q", "k", "g_p", "s_p"), {"the head dimension": model.head_dim}),
        (("p", "v", "g_q", "s_q", "g_k", "s_k", "g_v", "s_v"), {"model.sequence_length": model.sequence_length}),
        (("g_a", "s_a"), outputs),
        (("g_w", "s_w"), {"the tokens of a microbatch": tokens_per_part}),
    )
    for name, setting in spec.settings:
        size = quantize.group_size(setting.granularity)
        lengths = next(lengths for names, lengths in contracted if name in names)
        for what, length in lengths.items() if size else ():
            if length % size:
                raise ConfigError(
                    f"precision.{OPTIONS[name]}",
                    f"{setting.format.name}/{setting.granularity}",
                    f"a group that divides {what}, {length}",
                )
    if spec.rotated:
        for what, length in features.items():
            if length % 2:
                raise ConfigError("precision.rotation", "hadamard", f"none where {what} ({length}) is odd")


# Programs


def is_wide(fmt: Format) -> bool:
    """Whether bf16, which has 8 significant bits, would spoil what the format keeps: integers from 9 bits on, and
    floats with 7 bits of mantissa or more."""
    return fmt.family in ("int", "float", "wide", "block") and fmt.mantissa_bits >= 7


def _wide_products(spec: Spec, dtype: str) -> tuple[str, ...]:
    """Left operands of the products that need float32 operands."""
    if dtype == "float32":
        return ()

    def members(pair):
        return (name for x in pair for name in (x, f"g_{x}", f"s_{x}"))

    return tuple(pair[0] for pair in quantize.PRODUCTS if any(is_wide(spec.format(name)) for name in members(pair)))


def _saved(spec: Spec, name: str) -> str | None:
    """Where the gradient of an operand takes the saved one from; None where every source is the same values."""
    if name in spec.exact:
        return "exact"
    if spec.get(f"s_{name}"):
        return "own"
    return "forward" if spec.get(_partner(name)) else None


def program_of(specs: Iterable[Spec], dtype: str) -> Program | None:
    """The program that serves all specs through their grids, or None where what is static about them differs.

    dtype: compute dtype of the model. A spec that leaves an operand unquantized passes it through, bit for bit.
    """
    specs = tuple(specs)
    if len({(spec.native, spec.rotated, _wide_products(spec, dtype)) for spec in specs}) > 1:
        return None
    for name in OPERANDS:
        if len({_saved(spec, name) for spec in specs} - {None}) > 1:
            return None
    operands = []
    for name in FORWARD + BACKWARD:
        settings = [spec.get(name) for spec in specs]
        quantized = [setting for setting in settings if setting]
        if not quantized:
            continue
        kind = formats.shared_kind(setting.format for setting in quantized)
        containers = {setting and _container(setting.format) for setting in settings}
        if kind is None or len({(setting.granularity, setting.rounding) for setting in quantized}) > 1:
            return None
        if specs[0].native and len(containers) > 1:
            return None
        container = containers.pop() if specs[0].native else None
        operands.append((name, Operand(kind, quantized[0].granularity, quantized[0].rounding, container)))
    exact = tuple(name for name in OPERANDS if any(name in spec.exact for spec in specs))
    return Program(tuple(operands), exact, _wide_products(specs[0], dtype), specs[0].rotated)


def describe_program(program: Program) -> str:
    """What is static about a cohort, in one line: the quantized operands with the kind of their formats."""
    words = []
    for name, operand in program.operands:
        details = [operand.container or operand.kind.family]
        details += [] if operand.granularity == "tensor" else [operand.granularity]
        details += [] if operand.rounding == "nearest" else [operand.rounding]
        words.append(f"{name} ({', '.join(details)})")
    words += ["rotated"] * program.rotated + [f"float32 products of {', '.join(program.wide)}"] * bool(program.wide)
    return ", ".join(words) or "none"


# Native products


def _container(fmt: Format) -> str | None:
    """The dtype that the hardware multiplies a format's codes in, None where there is none."""
    if fmt.family == "int" and fmt.bits <= 8:
        return "int8"
    return {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2"}.get(fmt.name)


def _check_native(spec: Spec) -> None:
    """Raises ConfigError where a spec asks for products that no hardware has."""

    def refuse(value: str, allowed: str):
        raise ConfigError("precision.mode", f"native with {value}", allowed)

    for name, setting in spec.settings:
        text = f"{OPTIONS[name]} = {setting.format.name}/{setting.granularity}"
        if name == "e":
            refuse(text, "bf16, a look-up is no product")
        if _container(setting.format) is None:
            refuse(text, "int2 to int8, e4m3fn, e5m2, or mode simulated")
        if not quantize.output_scaled(name, setting.granularity):
            refuse(text, "a granularity whose scale is constant along the contraction")
    for left, right in quantize.PRODUCTS:
        pairs = [(left, right)]
        for x in (left, right):
            if gradient := spec.get(f"g_{x}"):
                saved = f"s_{x}" if spec.get(f"s_{x}") else _partner(x)
                pairs.append((f"g_{x}", saved))
                if x in spec.exact:
                    refuse(f"{OPTIONS[f's_{x}']} = exact", "forward or a format, as its gradient has one")
                if saved == _partner(x) and spec.get(saved) and spec.get(saved).granularity != "tensor":
                    text = f"{OPTIONS[f'g_{x}']} = {gradient.format.name} and {OPTIONS[f's_{x}']} = forward"
                    refuse(text, f"granularity tensor for {OPTIONS[saved]}, or a format for the saved operand")
            elif spec.get(f"s_{x}"):
                refuse(f"{OPTIONS[f's_{x}']} = {spec.format(f's_{x}').name}", f"a format for {OPTIONS[f'g_{x}']}, too")
        for one, other in pairs:
            found = [spec.get(one), spec.get(other)]
            if any(found) and not all(found):
                missing = one if spec.get(other) else other
                refuse(f"{OPTIONS[missing]} = bf16", f"formats for both {OPTIONS[one]} and {OPTIONS[other]}")
            kinds = {_container(setting.format) == "int8" for setting in found if setting}
            if len(kinds) > 1:
                refuse(f"{OPTIONS[one]} and {OPTIONS[other]} of two kinds", "both integers, or both fp8")


def check_device(spec: Spec, device: jax.Device | None = None) -> None:
    """Raises ConfigError where the device has no native product of the spec's formats.

    int8 products exist on CPUs, GPUs and TPUs; fp8 on GPUs of compute capability 8.9 and above.
    """
    device = device or jax.devices()[0]
    if not spec.native:
        return
    fp8 = sorted({setting.format.name for _, setting in spec.settings if _container(setting.format) != "int8"})
    capability = getattr(device, "compute_capability", "0")
    if fp8 and not (device.platform == "gpu" and tuple(map(int, str(capability).split("."))) >= (8, 9)):
        raise ConfigError(
            "precision.mode",
            "native",
            f"simulated for {', '.join(fp8)} on {device.device_kind} ({device.platform}); native fp8 needs a GPU of "
            "compute capability 8.9 or above",
        )
