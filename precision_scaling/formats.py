"""Number formats: what each one is called, what it stores and which values it can take.

One registry serves training, post-training quantization, the table and the figures. `parse` turns what a user writes
into a `Format`; `Format.grid` turns that into the float32 scalars that `precision_scaling.numerics` rounds with.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

FAMILIES = ("none", "int", "float", "wide", "levels", "block")

# Floats whose top exponent is reserved for infinities and NaNs, as IEEE 754 does; every other eXmY is finite.
_IEEE_LIKE = frozenset({(5, 2), (4, 3), (3, 4), (5, 10)})


class FormatError(ValueError):
    """A number format that does not exist or cannot be used as asked."""


class Grid(NamedTuple):
    """The values of a format as float32 scalars; may be traced or stacked, so one program serves a whole family.

    The grid is every multiple of 2^(max(floor(log2 |x|), min_exponent) - mantissa_bits) up to ±max_value. An integer
    grid is the case where min_exponent is that of the largest level, so that the spacing is 1 throughout.
    """

    max_value: np.ndarray  # the largest level
    min_exponent: np.ndarray  # of the smallest normal number, an integer
    mantissa_bits: np.ndarray  # stored mantissa bits, an integer
    passthrough: np.ndarray  # 1 where nothing is rounded, else 0


class Kind(NamedTuple):
    """What must be static about a format: runs whose formats share a kind share one compiled program."""

    family: str
    block_size: int | None = None
    block_scale: str | None = None
    scale: str = "absmax"
    levels: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """One number format.

    name: canonical name, lower case.
    family: 'none' (passes through), 'int' (uniform, symmetric), 'float' (1 to 7 exponent bits), 'wide' (8 exponent
        bits, float32's own range: never scaled), 'levels' (any listed values) or 'block' (elements that share scales).
    bits: bits stored per element, scales included where a block has its own.
    max_value, min_exponent, mantissa_bits: the grid, see `Grid`.
    levels: all values, ascending, for family 'levels'.
    scale: 'absmax' maps the largest magnitude to max_value, 'absmean' maps the mean magnitude to it (family 'levels').
    block_size, block_scale: elements per shared scale and the scale's format: 'e8m0' (a power of two) or 'e4m3fn' (with
        one float32 scale for the tensor).
    element: name of the format of a block's elements.
    """

    name: str
    family: str
    bits: float
    max_value: float = 1.0
    min_exponent: int = 0
    mantissa_bits: int = 0
    levels: tuple[float, ...] | None = None
    scale: str = "absmax"
    block_size: int | None = None
    block_scale: str | None = None
    element: str | None = None

    def grid(self) -> Grid:
        """The format's values as NumPy float32 scalars."""
        return Grid(
            max_value=np.float32(self.max_value),
            min_exponent=np.float32(self.min_exponent),
            mantissa_bits=np.float32(self.mantissa_bits),
            passthrough=np.float32(self.family == "none"),
        )

    @property
    def kind(self) -> Kind:
        """The static part of the format."""
        return Kind(self.family, self.block_size, self.block_scale, self.scale, self.levels)

    def values(self) -> np.ndarray:
        """Every value of an element in float64, ascending, before any scale.

        Raises FormatError for a format that passes through.
        """
        if self.family == "none":
            raise FormatError(f"format {self.name!r} passes values through: it has no grid of levels to list")
        if self.levels is not None:
            return np.array(self.levels, np.float64)
        step = 2.0 ** (self.min_exponent - self.mantissa_bits)
        smallest_normal = 2.0**self.min_exponent
        positive = [np.arange(0.0, min(smallest_normal, self.max_value + step), step)]
        for exponent in range(self.min_exponent, math.frexp(self.max_value)[1]):
            positive.append(np.ldexp(1 + np.arange(2**self.mantissa_bits) / 2**self.mantissa_bits, exponent))
        positive = np.concatenate(positive)
        positive = positive[positive <= self.max_value]
        return np.concatenate([-positive[:0:-1], positive])


def _integer(bits: int) -> Format:
    # Every level lies below 2^(bits-1), so with this exponent and mantissa the spacing is 2^0 for all of them.
    return Format(f"int{bits}", "int", bits, 2.0 ** (bits - 1) - 1, min_exponent=bits - 2, mantissa_bits=bits - 2)


def _floating(exponent_bits: int, mantissa_bits: int, suffix: str = "") -> Format:
    bias = 2 ** (exponent_bits - 1) - 1
    ieee_like = exponent_bits == 8 or (not suffix and (exponent_bits, mantissa_bits) in _IEEE_LIKE)
    max_exponent = 2**exponent_bits - 1 - bias - ieee_like
    max_mantissa = 2 - 2.0**-mantissa_bits
    if (exponent_bits, mantissa_bits, suffix) == (4, 3, "fn"):
        max_mantissa = 1.75  # its last code is the NaN
    named_fn = (exponent_bits, mantissa_bits) in _IEEE_LIKE and suffix
    return Format(
        f"e{exponent_bits}m{mantissa_bits}{'fn' if named_fn else ''}",
        "wide" if exponent_bits == 8 else "float",
        1 + exponent_bits + mantissa_bits,
        max_value=max_mantissa * 2.0**max_exponent,
        min_exponent=1 - bias,
        mantissa_bits=mantissa_bits,
    )


def _block(name: str, element: Format, block_size: int, block_scale: str) -> Format:
    return Format(
        name,
        "block",
        element.bits + 8 / block_size,
        element.max_value,
        element.min_exponent,
        element.mantissa_bits,
        block_size=block_size,
        block_scale=block_scale,
        element=element.name,
    )


_REGISTRY: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Adds a format under its name, for everything that takes a format; returns it."""
    _REGISTRY[fmt.name] = fmt
    return fmt


for _bits in range(2, 17):
    register(_integer(_bits))
register(Format("bf16", "none", 16))
register(Format("fp16", "none", 16))
register(Format("fp32", "none", 32))
register(Format("ternary", "levels", math.log2(3), levels=(-1.0, 0.0, 1.0), scale="absmean"))
register(Format("binary", "levels", 1, levels=(-1.0, 1.0), scale="absmean"))
register(_block("mxfp4", _floating(2, 1), 32, "e8m0"))
register(_block("mxfp6", _floating(2, 3), 32, "e8m0"))
register(_block("mxfp6_e2m3", _floating(2, 3), 32, "e8m0"))
register(_block("mxfp6_e3m2", _floating(3, 2), 32, "e8m0"))
register(_block("mxfp8", _floating(4, 3, "fn"), 32, "e8m0"))
register(_block("mxfp8_e5m2", _floating(5, 2), 32, "e8m0"))
register(_block("mxint8", Format("mxint8_element", "int", 8, 127 / 64, 0, 6), 32, "e8m0"))
register(_block("nvfp4", _floating(2, 1), 16, "e4m3fn"))


def parse(spec: object) -> Format:
    """The format that `spec` names.

    spec: a Format, a name ('int4', 'e4m3', 'mxfp4'), or a number of bits: 2 to 15 are integers, 16 and above is bf16.
    Raises FormatError with one line that names the value and what is allowed.
    """
    if isinstance(spec, Format):
        return spec
    if isinstance(spec, str):
        name = spec.strip().lower()
        if name in _REGISTRY:
            return _REGISTRY[name]
        match = re.fullmatch(r"e(\d)m(\d\d?)(fn)?", name)
        if match:
            exponent_bits, mantissa_bits = int(match[1]), int(match[2])
            if 1 <= exponent_bits <= 8 and 1 + exponent_bits + mantissa_bits <= 16:
                return _floating(exponent_bits, mantissa_bits, match[3] or "")
        if re.fullmatch(r"\d+(\.0*)?", name):
            return parse(float(name))
    elif isinstance(spec, numbers.Real) and not isinstance(spec, bool):
        if spec >= 16 and math.isfinite(spec):
            return _REGISTRY["bf16"]
        if spec == int(spec) and f"int{int(spec)}" in _REGISTRY:
            return _REGISTRY[f"int{int(spec)}"]
    raise FormatError(
        f"format {spec!r} is not known; allowed: a number of bits from 2 (16 and above is bf16), "
        f"eXmY or eXmYfn with X from 1 to 8 and 1+X+Y at most 16, or one of {', '.join(sorted(_REGISTRY))}"
    )


def shared_kind(specs: Iterable[object]) -> Kind | None:
    """The kind that lets one compiled program serve all of `specs` through their grids, or None where there is none.

    Formats that pass through join any kind; integers join floats, on whose path they give the same bits.
    """
    kinds = {parse(spec).kind for spec in specs} - {Kind("none")}
    if kinds == {Kind("int"), Kind("float")}:
        return Kind("float")
    if len(kinds) > 1:
        return None
    return kinds.pop() if kinds else Kind("none")
