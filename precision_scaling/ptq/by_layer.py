"""Formats by layer and projection after training: from a user's rules to one for each, and back.

    "first:1=8, last:1=8, *.down=4, 3-5.qkv=3"

The rules are those of `precision.layers`, see `quantize.layers`: the first that names a projection counts, what none
names keeps the base.
"""

from collections.abc import Mapping

from precision_scaling.errors import ConfigError, UserError
from precision_scaling.numerics import bit_patterns, formats
from precision_scaling.numerics.formats import Format, FormatError
from precision_scaling.ptq.scheme import LINEARS, Linear
from precision_scaling.quantize import layers as rules

NAMES: dict[str, Linear] = {linear[1]: linear for linear in LINEARS}
ALLOWED = (
    "rules LAYERS[.PROJECTION]=FORMAT with commas between them, such as first:2=8, *.down=4 or 3-5.qkv=3; projections "
    f"are {', '.join(NAMES)}, formats 2 to 8 or names"
)

ByLayer = tuple[Mapping[Linear, Format], ...]  # a format of each projection, for each layer


def parse(text: str, base: Format, depth: int) -> ByLayer:
    """The formats that `ptq.layers` gives a decoder of that depth. ConfigError for what it has not."""
    found = [dict.fromkeys(LINEARS, base) for _ in range(depth)]
    for where, place, fmt in reversed(split(text)):
        layers = rules.covered(where, depth)
        if not layers or not 0 <= layers[0] <= layers[-1] < depth:
            named = where if place == "*" else f"{where}.{place}"
            raise ConfigError("ptq.layers", named, f"layers from 0 to {depth - 1}, the decoder's {depth}")
        for layer in layers:
            found[layer] |= {NAMES[name]: fmt for name in rules.matching(place) if name in NAMES}
    return tuple(found)


def split(text: str) -> list[tuple[str, str, Format]]:
    """(layers, pattern of projections, format) of each rule. ConfigError for what is none, or names no projection."""
    try:
        found = [(where, place, _format(word)) for where, place, word in rules.split(text)]
    except ValueError as error:
        raise ConfigError("ptq.layers", str(error), ALLOWED) from None
    for _, place, _ in found:
        if not set(rules.matching(place)) & set(NAMES):
            raise ConfigError("ptq.layers", place, ALLOWED)
    return found


def describe(by_layer: ByLayer) -> str:
    """The shortest of these words that give the same formats, layers in their order; "" where all are alike."""
    if len({fmt for wanted in by_layer for fmt in wanted.values()}) == 1:
        return ""
    parts: list[str] = []
    for low, high, wanted in _runs(by_layer):
        where = str(low) if low == high else f"{low}-{high}"
        kinds = set(wanted.values())
        names = [("", next(iter(kinds)))] if len(kinds) == 1 else [(f".{name}", wanted[NAMES[name]]) for name in NAMES]
        parts += [f"{where}{name}={_word(fmt)}" for name, fmt in names]
    return ", ".join(parts)


def _runs(by_layer: ByLayer) -> list[tuple[int, int, Mapping[Linear, Format]]]:
    """(first, last, formats) of layers that follow each other and are alike."""
    runs: list[tuple[int, int, Mapping[Linear, Format]]] = []
    for layer, wanted in enumerate(by_layer):
        if runs and runs[-1][2] == wanted:
            runs[-1] = runs[-1][0], layer, wanted
        else:
            runs.append((layer, layer, wanted))
    return runs


def check_packable(by_layer: ByLayer, found: str) -> None:
    """UserError for formats that `packed` cannot keep. found: what asks for them, in the message."""
    for linear in LINEARS:
        kinds = {wanted[linear] for wanted in by_layer}
        if wide := [fmt.name for fmt in kinds if bit_patterns.layout(fmt) is None]:
            allowed = "formats whose elements, and scales of blocks, take 8 bits at most"
            raise UserError(f"{found}: {wide[0]} cannot be packed; allowed are {allowed}")
        if len(kinds) > 1 and any(fmt.family != "int" for fmt in kinds):
            names = " and ".join(sorted(fmt.name for fmt in kinds))
            allowed = "one format of a projection in all layers, or integers of several widths"
            raise UserError(f"{found}: {names} in {linear[1]} cannot be packed together; allowed is {allowed}")


def _format(text: str) -> Format:
    try:
        found = formats.parse(int(text) if text.isdigit() else text)
    except FormatError as error:
        raise ConfigError("ptq.layers", text, f"a bit-width from 2 to 8 or a format ({error})") from None
    if found.family == "none":
        raise ConfigError(
            "ptq.layers", text, "a bit-width from 2 to 8 or a format that rounds; 8 bits lose next to nothing"
        )
    return found


def _word(fmt: Format) -> str:
    return f"{fmt.bits:g}" if fmt.family == "int" else fmt.name
