"""Precision by layer and projection: rules that say where in the decoder another format holds.

`parsing` reads the rules of the option `precision.layers`, `precision` answers from them which format an operand has in
a place, and `static` stacks the grids of all places: data, so that one program serves every choice.
"""

import dataclasses
import fnmatch
import re

from precision_scaling.numerics.formats import Format
from precision_scaling.quantize.operands import OUTER

PROJECTIONS = ("qkv", "out", "gate_up", "down")
ATTENTION = ("attention",)  # where queries, keys, values and probabilities meet
PLACES = PROJECTIONS + ATTENTION
NONE = "none"  # instead of rules, where a preset has some
GRAMMAR = (
    f"{NONE}, or rules LAYERS[.PLACE]=FORMAT with commas between them; LAYERS is *, first:N, last:N (layers, or N% of "
    f"them), a number or a range I-J, from 0; PLACE a pattern of {', '.join(PLACES)}; FORMAT a format, or parts with "
    "formats (w4_a8)"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Other formats for some operands in some layers and places. Of several rules for an operand the first counts.

    layers: "*", "first:2", "last:2", "3" or "2-5", from 0 and both included. place: a pattern of `PLACES`.
    formats: (operand, format) pairs. text: FORMAT as the user gave it, with the formats' own names.
    """

    layers: str
    place: str
    formats: tuple[tuple[str, Format], ...]
    text: str

    def __str__(self) -> str:
        return f"{self.layers}{'' if self.place == '*' else f'.{self.place}'}={self.text}"

    def format(self, name: str, layer: int, depth: int, place: str) -> Format | None:
        """What the rule says of an operand there; None: nothing."""
        found = dict(self.formats).get(name)
        return found if found and place in matching(self.place) and layer in covered(self.layers, depth) else None


def places(name: str) -> tuple[str, ...]:
    """Where in a layer an operand, forward or backward, is multiplied; nowhere if it is outside of the blocks."""
    if name in OUTER:
        return ()
    return PROJECTIONS if name.removeprefix("g_").removeprefix("s_") in ("a", "w") else ATTENTION


def index(name: str, place: str) -> int:
    """Of a place among those of an operand."""
    return places(name).index(place) if place in places(name) else 0


def matching(pattern: str) -> tuple[str, ...]:
    """The places that a pattern names."""
    return tuple(fnmatch.filter(PLACES, pattern))


def covered(layers: str, depth: int) -> range:
    """The layers that the words mean in a decoder of that depth; past its ends where it has too few."""
    if layers == "*":
        return range(depth)
    if ":" in layers:
        side, _, number = layers.partition(":")
        share = number.removesuffix("%")
        count = int(share) if share == number else int(int(share) / 100 * depth + 0.5)
        return range(count) if side == "first" else range(depth - count, depth)
    low, _, high = layers.partition("-")
    return range(int(low), int(high or low) + 1)


def split(text: str) -> list[tuple[str, str, str]]:
    """(layers, place, FORMAT) of each rule in a text with commas or blanks between them. ValueError: the wrong rule."""
    words = [word for word in re.split(r"[,\s]+", text) if word]
    return [] if words == [NONE] else [_rule(word) for word in words]


def _rule(word: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(\*|(?:first|last):(?:[1-9]\d*|[1-9]\d?%|100%)|\d+(?:-\d+)?)(?:\.([^=\s]+))?=(\S+)", word)
    if not match or not matching(match[2] or "*"):
        raise ValueError(word)
    if "-" in match[1] and not covered(match[1], 0):
        raise ValueError(word)
    return match[1], match[2] or "*", match[3]
