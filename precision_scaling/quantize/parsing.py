"""From options to the precision of a run: the config's `precision` section, and a grid's shorthand."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from precision_scaling.errors import ConfigError
from precision_scaling.numerics import formats
from precision_scaling.numerics.rounding import ROUNDINGS
from precision_scaling.quantize import layers, operands, switches
from precision_scaling.quantize.native import check_products
from precision_scaling.quantize.operands import BACKWARD, FORWARD, OPERANDS, OPTIONS, PARTS, partner
from precision_scaling.quantize.precision import Precision, Quantizer
from precision_scaling.quantize.presets import GROUPS, MODES, PRESETS, ROTATIONS, SOURCES
from precision_scaling.quantize.static import static_of

_PARTS = {**{name: (name,) for name in OPERANDS}, **PARTS}  # of shorthand
_OWN_OPTIONS = tuple(name for name in PRESETS["paper"] if name not in ("layers", "switches"))  # that a grid may name


def from_options(
    options: Mapping[str, Any], preset: str | None = None, rules: str | None = None, **replaced: str
) -> Precision:
    """The precision that the config's `precision` section describes, in all of training.

    options: as in configs/base.py; an empty leaf takes the preset's value. preset: another preset than the section's.
    rules: in place of the section's `layers`. replaced: formats by operand that take the place of the section's, with
    "/granularity" and "/rounding" if need be.
    Raises ConfigError for unknown values, and for values that contradict each other.
    """
    stages, whens = [_stage(options, preset, rules, replaced)], []
    for when, said in _switches(options, preset):
        whens.append(when)
        stages.append(parse(said, {**options, "switches": "none"}, "precision.switches"))
    return _in_turn(stages, whens)


def _stage(options: Mapping[str, Any], preset: str | None, rules: str | None, replaced: Mapping[str, str]) -> Precision:
    """The precision of a section, its switches aside."""
    precision = _resolve(options, preset, replaced, rules)
    _check_layers(precision)
    _check_gradients(precision)
    if precision.native:
        check_products(precision)
    return precision


def _switches(options: Mapping[str, Any], preset: str | None) -> list[tuple[str, str]]:
    """(when, formats) of a section's switches."""
    text = options["switches"] or PRESETS[options["preset"] if preset is None else preset]["switches"]
    try:
        return switches.split(str(text))
    except ValueError as error:
        raise ConfigError("precision.switches", str(error), switches.GRAMMAR) from None


def _in_turn(stages: list[Precision], whens: list[str]) -> Precision:
    """One precision after the other. Raises ConfigError where no single program serves them."""
    pairs = zip(whens, stages[:-1], stages[1:], strict=True)
    whole = dataclasses.replace(
        stages[-1],
        rotated=any(stage.rotated for stage in stages),
        native=any(stage.native for stage in stages),
        before=tuple((when, stage) for when, stage, after in pairs if stage != after),
    )
    if static_of([whole], "float32") is None:
        allowed = "precisions of the same kinds of formats, granularity, rounding, saved operands and mode"
        raise ConfigError("precision.switches", whole.describe(), allowed)
    return whole


def check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value of the config's `precision` section that does not exist, used or not.

    Whether the values go together is another question: a study's grid may replace some of them.
    """
    _resolve(options, None, {})
    _switches(options, None)


def _resolve(
    options: Mapping[str, Any], preset: str | None, replaced: Mapping[str, str], rules: str | None = None
) -> Precision:
    preset = options["preset"] if preset is None else preset
    if preset not in PRESETS:
        raise ConfigError("precision.preset", preset, f"one of {', '.join(PRESETS)}")

    def chosen(key: str) -> tuple[Any, bool]:
        """The value of an option, and whether the user gave it rather than the preset."""
        section, _, leaf = key.rpartition(".")
        value = (options[section] if section else options)[leaf]
        return (PRESETS[preset][key], False) if value == "" else (value, True)

    found: dict[str, Quantizer] = {}
    exact: list[str] = []
    for name in FORWARD + BACKWARD:
        value = replaced.get(name, chosen(OPTIONS[name])[0])
        granularity, rounding = chosen(f"{GROUPS[name]}_granularity"), chosen(f"{GROUPS[name]}_rounding")
        _check_group(name, granularity[0], rounding[0])
        if name.startswith("s_") and value in SOURCES:
            exact += [name.removeprefix("s_")] * (value == "exact")
            continue
        found[name] = _quantizer(f"precision.{OPTIONS[name]}", name, value, granularity, rounding)
    quantizers = {name: quantizer for name, quantizer in found.items() if quantizer.format.family != "none"}
    rules = chosen("layers")[0] if rules is None else rules
    by_layer = _rules(rules, frozenset(quantizers))
    for name, fmt in (pair for rule in by_layer for pair in rule.formats):
        if fmt.family != "none" and name not in quantizers:  # quantized in these layers alone
            shared, rounding = chosen(f"{GROUPS[name]}_granularity"), chosen(f"{GROUPS[name]}_rounding")
            quantizer = _quantizer("precision.layers", name, fmt.name, shared, rounding)
            quantizers[name] = dataclasses.replace(quantizer, format=formats.parse("bf16"))
    rotations = {
        name: _gradient_rotation(key, chosen(key)[0])
        for name, key in (("w", "backward.weights_rotation"), ("a", "backward.activations_rotation"))
    }
    for key, allowed in (("rotation", ROTATIONS), ("mode", MODES)):
        if chosen(key)[0] not in allowed:
            raise ConfigError(f"precision.{key}", chosen(key)[0], f"one of {', '.join(allowed)}")
    return Precision(
        quantizers=tuple((name, quantizers[name]) for name in FORWARD + BACKWARD if name in quantizers),
        # The exact saved operand is the forward one where that is not quantized.
        exact=tuple(name for name in exact if partner(name) in quantizers),
        rotated=chosen("rotation")[0] == "hadamard" and bool({"a", "w"} & set(quantizers)),
        native=chosen("mode")[0] == "native" and bool(quantizers),
        layers=by_layer,
        gradient_rotations=tuple(
            (name, width) for name, width in rotations.items() if width and {f"g_{name}", f"s_{name}"} & set(quantizers)
        ),
    )


def _gradient_rotation(key: str, text: str) -> int:
    match = re.fullmatch(r"none|hadamard:([1-9]\d*)", text)
    width = int(match[1] or 0) if match else 1
    if width & (width - 1) or width == 1:
        raise ConfigError(f"precision.{key}", text, "none, or hadamard:WIDTH with a power of two from 2")
    return width


def _check_gradients(precision: Precision) -> None:
    """Raises ConfigError where gradients are rotated, or rounded by "eden", without what that needs."""
    for name, width in precision.gradient_rotations:
        gradient, saved = precision.get(f"g_{name}"), precision.get(f"s_{name}")
        # Codes of other formats than blocks are AQT's, which rotates nothing.
        if not (gradient and saved) or (precision.native and gradient.format.family != "block"):
            target = {"a": "activations", "w": "weights"}[name]
            allowed = f"none, where {target}_gradient and {target}_saved do not both have formats, simulated"
            raise ConfigError(f"precision.backward.{target}_rotation", f"hadamard:{width}", allowed)
    rotated = {f"{side}_{name}": width for name, width in precision.gradient_rotations for side in "gs"}
    for name, quantizer in precision.quantizers:
        size = quantizer.format.block_size
        if quantizer.rounding == "eden" and not (
            size and quantizer.format.block_scale not in formats.POWERS_OF_TWO and rotated.get(name, 1) % size == 0
        ):
            allowed = "nearest or stochastic; eden for gradients in blocks with float scales, rotated by whole blocks"
            raise ConfigError(f"precision.{OPTIONS[name]}", str(quantizer), allowed)


def _rules(text: str, quantized: frozenset[str]) -> tuple[layers.Rule, ...]:
    """The rules of the option `layers`. quantized: the operands that a format without a part is for."""
    key = "precision.layers"
    try:
        split = layers.split(str(text))
    except ValueError as error:
        raise ConfigError(key, str(error), layers.GRAMMAR) from None
    found = []
    for where, place, said in split:
        there = {name for name in OPERANDS + BACKWARD if set(layers.places(name)) & set(layers.matching(place))}
        try:
            fmt = formats.parse(said)
            chosen, words = dict.fromkeys(sorted(quantized & there), fmt), [fmt.name]
        except formats.FormatError:
            chosen, words = {}, []
            for part, value in _split(said, key, layers.GRAMMAR):
                quantizer = _quantizer(key, _PARTS[part][0], value, ("tensor", False), ("nearest", False), said)
                names = [name for name in _PARTS[part] if name in there]
                if "/" in value or not names or chosen.keys() & set(names):
                    allowed = f"formats alone, each of a part once, and of parts in {', '.join(layers.matching(place))}"
                    raise ConfigError(key, f"{where}.{place}={said}", allowed) from None
                chosen |= dict.fromkeys(names, quantizer.format)
                words.append(part + quantizer.format.name)
        rule = layers.Rule(where, place, tuple(chosen.items()), "_".join(words))
        if rule.formats or rule.text != "bf16":  # what is not quantized stays so
            found.append(rule)
    return tuple(found)


def _check_layers(precision: Precision) -> None:
    """Raises ConfigError where formats by layer cannot be served by one program."""
    key = "precision.layers"
    if precision.layers and precision.native:
        raise ConfigError(key, precision.rules, "none with precision.mode native, where nothing passes through")
    for rule in precision.layers:
        if not rule.formats:
            raise ConfigError(key, str(rule), "a part with the format, such as w4, where nothing else is quantized")
    for name, _ in precision.quantizers:
        possible = precision.possible(name)
        if formats.shared_kind(possible) is None:
            names = ", ".join(dict.fromkeys(fmt.name for fmt in possible))
            allowed = f"formats of one kind for {OPTIONS[name]}: integers and floats, or blocks of one size and scale"
            raise ConfigError(key, names, allowed)


def parse(text: str, options: Mapping[str, Any], key: str = "study.grid.*.precisions") -> Precision:
    """The precision of a grid's shorthand; what it leaves out is as in the config's `precision` section.

    text: "bf16" (nothing is quantized), a preset, or parts with formats joined by "_": w, a, kv, g (incoming gradients
    of the projections) or q, k, v, p one by one; "w4", "w4_a8_kv4", "we2m1/group:32", "fp8", "fp8_kv8". A part takes
    the place of what a preset before it, or the section, says; no part stands there twice. "w4@0.8": from that share of
    the steps on, "w8_w4@decay": from where the learning rate decays. After a blank: when the parts begin that do not
    say so themselves, rules by layer in place of the section's, and options in place of the section's or the preset's;
    "w4_a4 @0.8 first:2=bf16 *.down=e4m3", "nvfp4_train backward.weights_rotation=none".
    key: names text in errors.
    """
    text, *said = text.split(" ")
    own = [word for word in said if word.partition("=")[0] in _OWN_OPTIONS]
    given = [word for word in said if word not in own]
    if own and text == "bf16":
        raise ConfigError(key, " ".join([text, *said]), "no options with bf16, which quantizes nothing")
    options = _with_options(options, own, key)
    starting = [word for word in given if word.startswith("@")]
    if len(starting) > (text != "bf16"):
        raise ConfigError(key, " ".join([text, *given]), "one @SHARE after the parts, none after bf16: w4_a4 @0.8")
    others = [word for word in given if word and not word.startswith("@")]
    if any("=" not in word and word != layers.NONE for word in others):
        allowed = "@SHARE, rules by layer or options after a blank: w4_a4 @0.8 first:2=bf16 rotation=hadamard"
        raise ConfigError(key, " ".join([text, *given]), allowed)
    rules = " ".join(others) or None
    if text == "bf16":
        nothing = {name: "forward" if name.startswith("s_") else "bf16" for name in FORWARD + BACKWARD}
        return _stage(options, None, rules or "", nothing)
    allowed = (
        f"bf16, {', '.join(PRESETS)}, or w, a, kv, g, q, k, v, p with a format, joined by '_': w4_a8_kv4; each with "
        "@SHARE of the steps, or @decay, from which it holds"
    )
    named = re.match(rf"({'|'.join(sorted(PRESETS, key=len, reverse=True))})(?:@({switches.WHEN}))?(?=_|$)", text)
    preset, preset_from = (named[1], named[2] or "") if named else (None, "")
    words = [
        (part, *_timed(value, key))
        for part, value in _split(text[named.end() :] if named else text, key, allowed, text)
    ]
    preset_from = preset_from and switches.canonical(preset_from)
    if starting:
        _, start = _timed(starting[0], key)
        words = [(part, value, when or start) for part, value, when in words]
        preset_from = preset_from or start
    for part, value, _ in words:
        _quantizer(key, _PARTS[part][0], value, ("tensor", False), ("nearest", False), text)
    starts = dict.fromkeys(when for when in (preset_from, *(when for _, _, when in words)) if when)
    if not starts:
        return from_options(options, preset, rules, **_formats(words, "", key, text))
    whens, stages = switches.in_order(starts), []
    replaced: dict[str, str] = {}
    for now, passed in (("", False), *((when, True) for when in whens)):
        replaced |= _formats(words, now, key, text)
        begun = preset if not preset_from or (passed and whens.index(now) >= whens.index(preset_from)) else None
        stages.append(_stage(options, begun, rules, replaced))
    return _in_turn(stages, whens)


def _with_options(options: Mapping[str, Any], words: list[str], key: str) -> Mapping[str, Any]:
    """The section with the options of some words, OPTION=VALUE; each once."""
    if not words:
        return options
    found = {**options, "backward": {**options["backward"]}}
    for word in words:
        name, _, value = word.partition("=")
        if not value or sum(other.startswith(f"{name}=") for other in words) > 1:
            raise ConfigError(key, word, "an option once, with a value: backward.weights_rotation=none")
        section, _, leaf = name.rpartition(".")
        (found[section] if section else found)[leaf] = value
    return found


def _formats(words: list[tuple[str, str, str]], now: str, key: str, text: str) -> dict[str, str]:
    """The formats by operand of the parts that begin then."""
    replaced: dict[str, str] = {}
    for part, value, when in words:
        if when == now:
            if replaced.keys() & set(_PARTS[part]):
                raise ConfigError(key, text, f"each part once, {part} is there twice (kv is k and v)")
            replaced |= dict.fromkeys(_PARTS[part], value)
    return replaced


def _timed(value: str, key: str) -> tuple[str, str]:
    """A format and when it begins; empty: at once."""
    fmt, at, when = value.partition("@")
    if at and not re.fullmatch(switches.WHEN, when):
        raise ConfigError(key, value, "after @ a share of the steps above 0 and below 1, or decay: w4@0.8")
    return fmt, switches.canonical(when) if at else ""


def _split(text: str, key: str, allowed: str, whole: str = "") -> list[tuple[str, str]]:
    """(part, format) of each word of shorthand. whole: text with the preset before it, which needs no word."""
    # Names of formats have a "_", too, but no part's name after it.
    first, *words = re.split(r"_(?=[waqkvpg])", text)
    words = [first, *words] if first or text == whole or not whole else words
    found = [re.fullmatch(r"(kv|[waqkvpg])(\S+)", word) for word in words]
    if not all(found):
        raise ConfigError(key, whole or text, allowed)
    return [(match[1], match[2]) for match in found if match]


def _quantizer(key: str, name: str, value: object, granularity, rounding, shown: str = "") -> Quantizer:
    """One operand's quantizer, from "FORMAT[/GRANULARITY][/ROUNDING]" and the group's (value, given by the user).

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
            allowed = f"FORMAT[/GRANULARITY][/ROUNDING] of {', '.join(operands.granularities(name) + ROUNDINGS)}"
            raise ConfigError(key, shown or value, allowed)
    if fmt.family == "block":
        own = [f"group:{fmt.block_size}", *([f"tile:{fmt.block_size}"] if name in operands.TILED else [])]
        if shared[1] and shared[0] not in own:
            found = shown or f"{fmt.name} with granularity {shared[0]}"
            raise ConfigError(key, found, f"{' or '.join(own)} for {fmt.name}, or none given")
        shared = shared if shared[0] in own else (own[0], True)
    return Quantizer(fmt, shared[0], rounds[0])


def _check_group(name: str, granularity: object, rounding: object) -> None:
    """Raises ConfigError for what an operand's group of options cannot say."""
    if not _is_granularity(name, granularity):
        allowed = f"one of {', '.join(operands.granularities(name))} for {OPTIONS[name]}"
        raise ConfigError(f"precision.{GROUPS[name]}_granularity", granularity, allowed)
    if rounding not in ROUNDINGS:
        raise ConfigError(f"precision.{GROUPS[name]}_rounding", rounding, f"one of {', '.join(ROUNDINGS)}")


def _is_granularity(name: str, text: object) -> bool:
    plain = [one for one in operands.granularities(name) if ":" not in one]
    kinds = "group|tile" if name in operands.TILED else "group"
    return text in plain or bool(re.fullmatch(rf"(?:{kinds}):[1-9][0-9]*", str(text)))
