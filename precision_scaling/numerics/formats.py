"""Number formats: what each one is called, what it stores and which values it can take.

One registry serves training, post-training quantization, the table and the figures. `parse` turns what a user writes
into a `Format`; `Format.grid` turns that into the float32 scalars that `rounding` rounds with.
"""

import dataclasses
import itertools
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from precision_scaling.errors import UserError

FAMILIES = ("none", "int", "float", "wide", "levels", "block")
SCALES = ("absmax", "absmean")
POWERS_OF_TWO = ("e8m0", "e8m0_up")  # scales of blocks: of the mantissa rounded down, or up
FOUR_OVER_SIX = "/4over6"  # after a float scale of blocks: the better of two, which map the largest to 6 or to 4

# Without a suffix these reserve the top exponent for infinities and NaNs, as IEEE 754 and ml_dtypes have them. Nothing
# is reserved in the other eXmY, the 4- and 6-bit floats of OCP MX v1.0 among them: every code is a number.
_IEEE_LIKE = frozenset({(3, 4), (4, 3), (5, 2), (5, 10)})


class FormatError(UserError):
    """A number format that does not exist or cannot be used as asked."""


class Grid(NamedTuple):
    """The values of a format as float32 scalars: NumPy's, traced ones or stacked arrays, so that one program serves a
    whole family.

    The grid is every multiple of 2^(max(floor(log2 |x|), min_exponent) - mantissa_bits) up to ±max_value. An integer
    grid is the case where min_exponent is that of the largest level, so that the spacing is 1 throughout.
    """

    max_value: Any  # the largest level
    min_exponent: Any  # of the smallest normal number, an integer
    mantissa_bits: Any  # stored mantissa bits, an integer
    passthrough: Any  # 1 where nothing is rounded, else 0


class Kind(NamedTuple):
    """What must be static about a format: formats of one kind differ in their grids only and share a program."""

    family: str
    scale: str = "absmax"
    levels: tuple[float, ...] | None = None
    block_size: int | None = None
    block_scale: str | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """One number format. Make new ones with `integer`, `floating`, `level_set` or `block`, then `register` them.

    name: canonical name, lower case.
    family: 'none' (passes through), 'int' (uniform, symmetric), 'float' (1 to 7 exponent bits), 'wide' (8 exponent
        bits, float32's own range: never scaled), 'levels' (any listed values) or 'block' (elements that share scales).
    bits: bits stored per element, scales included where a block has its own.
    max_value, min_exponent, mantissa_bits: the grid, see `Grid`.
    scale: 'absmax' maps the largest magnitude to max_value, 'absmean' maps the mean magnitude to it.
    levels: all values, ascending (family 'levels').
    element, block_size, block_scale: the format of a block's elements, how many share a scale, and the scale's format:
        'e8m0' or 'e8m0_up' (powers of two), or a float below one float32 scale for the tensor (family 'block').
    """

    name: str
    family: str
    bits: float
    max_value: float = 1.0
    min_exponent: int = 0
    mantissa_bits: int = 0
    scale: str = "absmax"
    levels: tuple[float, ...] | None = None
    element: str | None = None
    block_size: int | None = None
    block_scale: str | None = None

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
        return Kind(self.family, self.scale, self.levels, self.block_size, self.block_scale)

    def values(self) -> np.ndarray:
        """Every value of an element before any scale, float64, ascending. Raises FormatError for a pass-through."""
        if self.family == "none":
            raise FormatError(f"format {self.name!r} passes values through; only formats that round list values")
        if self.levels is not None:
            return np.array(self.levels, np.float64)
        per_binade = 2**self.mantissa_bits
        subnormal = np.arange(per_binade) * 2.0 ** (self.min_exponent - self.mantissa_bits)
        exponents = np.arange(self.min_exponent, math.frexp(self.max_value)[1])
        normal = np.ldexp(1 + np.arange(per_binade) / per_binade, exponents[:, None]).ravel()
        positive = np.concatenate([subnormal, normal])
        positive = positive[positive <= self.max_value]
        return np.concatenate([-positive[:0:-1], positive])


def integer(bits: int) -> Format:
    """Symmetric integers: the 2^bits - 1 levels from -(2^(bits-1) - 1) to 2^(bits-1) - 1."""
    return Format(f"int{bits}", "int", bits, 2.0 ** (bits - 1) - 1, min_exponent=bits - 2, mantissa_bits=bits - 2)


def floating(exponent_bits: int, mantissa_bits: int, fn: bool = False) -> Format:
    """Floats with a sign, subnormals and the bias 2^(exponent_bits - 1) - 1; values beyond the range saturate.

    e3m4, e4m3, e5m2, e5m10 and all with 8 exponent bits keep the top exponent for infinities and NaNs. All others, and
    `fn` variants, have finite values only; of these e4m3fn alone gives its last code to NaN (OCP OFP8, revision 1.0).
    """
    bias = 2 ** (exponent_bits - 1) - 1
    has_ieee_twin = (exponent_bits, mantissa_bits) in _IEEE_LIKE
    reserved = exponent_bits == 8 or (has_ieee_twin and not fn)
    largest = (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias - reserved)
    return Format(
        name=f"e{exponent_bits}m{mantissa_bits}" + "fn" * (has_ieee_twin and fn),
        family="wide" if exponent_bits == 8 else "float",
        bits=1 + exponent_bits + mantissa_bits,
        max_value=448.0 if (exponent_bits, mantissa_bits, fn) == (4, 3, True) else largest,
        min_exponent=1 - bias,
        mantissa_bits=mantissa_bits,
    )


def level_set(name: str, levels: Sequence[float], scale: str = "absmax") -> Format:
    """Any ascending list of values; midpoints round toward zero, and 0 itself up where it is a midpoint."""
    levels = tuple(float(level) for level in levels)
    largest = max(map(abs, levels), default=0.0)
    return Format(name, "levels", math.log2(max(len(levels), 1)), largest, scale=scale, levels=levels)


def block(name: str, element: Format, block_size: int, block_scale: str) -> Format:
    """Elements in blocks that each store a scale: 'e8m0' (OCP MX v1.0), 'e8m0_up' (the power of two above, under which
    nothing saturates) or a float below one scale for the tensor, which "/4over6" may follow.

    Raises FormatError for elements that are neither integers nor floats, and for other scales.
    """
    if element.family not in ("int", "float"):
        raise FormatError(f"format {name!r}: element {element.name!r} must be of family int or float")
    stored = block_scale.removesuffix(FOUR_OVER_SIX)
    if block_scale not in POWERS_OF_TWO and parse(stored).family != "float":
        raise FormatError(
            f"format {name!r}: block_scale {block_scale!r} must be {', '.join(POWERS_OF_TWO)} or of family float"
        )
    scale_bits = 8 if block_scale in POWERS_OF_TWO else parse(stored).bits
    return Format(
        name,
        "block",
        element.bits + scale_bits / block_size,
        element.max_value,
        element.min_exponent,
        element.mantissa_bits,
        element=element.name,
        block_size=block_size,
        block_scale=block_scale,
    )


_REGISTRY: dict[str, Format] = {}
_ALIASES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "mxfp6_e2m3": "mxfp6",
    "mxfp8_e4m3": "mxfp8",
}


def register(fmt: Format) -> Format:
    """Adds a format under its name, for everything that takes a format; returns it.

    Raises FormatError if the name is taken by another format or the fields contradict each other.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", fmt.name):
        raise FormatError(f"format name {fmt.name!r}: allowed are lower-case letters, digits and _, a letter first")
    if fmt.family not in FAMILIES:
        raise FormatError(f"format {fmt.name!r}: family {fmt.family!r} is not one of {', '.join(FAMILIES)}")
    if fmt.scale not in SCALES or (fmt.scale == "absmean" and fmt.family != "levels"):
        raise FormatError(f"format {fmt.name!r}: scale {fmt.scale!r} must be absmax, or absmean for family levels")
    if fmt.family == "levels":
        levels = fmt.levels or ()
        ascending = all(a < b for a, b in itertools.pairwise(levels)) and all(map(math.isfinite, levels))
        if not 2 <= len(levels) <= 256 or not ascending:
            raise FormatError(f"format {fmt.name!r}: levels must be 2 to 256 ascending finite numbers, got {levels!r}")
    elif fmt.family != "none" and fmt.max_value not in fmt.values():
        raise FormatError(f"format {fmt.name!r}: max_value {fmt.max_value!r} must be a value of its own grid")
    if fmt.family == "block" and not (fmt.block_size or 0) > 0:
        raise FormatError(f"format {fmt.name!r}: block_size {fmt.block_size!r} must be a positive number of elements")
    taken = _REGISTRY.get(fmt.name) or _unregistered(fmt.name)
    if taken not in (None, fmt):
        raise FormatError(f"format name {fmt.name!r} is taken by {taken}; allowed is any name not in use")
    _REGISTRY[fmt.name] = fmt
    return fmt


def names() -> list[str]:
    """The registered names; eXmY need no entry."""
    return sorted(_REGISTRY)


def parse(spec: object) -> Format:
    """The format that `spec` names.

    spec: a Format, a name ('int4', 'e4m3', 'mxfp4'), or a number of bits: 2 to 15 are integers, 16 and above is bf16.
    Raises FormatError with one line that names the value and what is allowed.
    """
    if isinstance(spec, Format):
        return spec
    fmt = None
    if isinstance(spec, str):
        name = spec.strip().lower()
        name = _ALIASES.get(name, name)
        fmt = _REGISTRY.get(name) or _unregistered(name)
    elif isinstance(spec, numbers.Real) and not isinstance(spec, bool):
        fmt = _of_bits(float(spec))
    if fmt is None:
        raise FormatError(
            f"format {spec!r} is not known; allowed: a number of bits (whole from 2 to 15, or 16 and above for bf16), "
            f"eXmY or eXmYfn with X from 1 to 8 and 1+X+Y at most 16, {', '.join(names())}"
        )
    return fmt


def shared_kind(specs: Iterable[object]) -> Kind | None:
    """The kind with which one program serves all of `specs` through their grids, or None where there is none.

    Formats that pass through join any kind; integers join floats, on whose path they give the same bits.
    """
    kinds = {parse(spec).kind for spec in specs}
    rounding = kinds - {Kind("none")}
    if rounding == {Kind("int"), Kind("float")}:
        return Kind("float")
    return next(iter(rounding or kinds)) if len(rounding) <= 1 else None


def _unregistered(name: str) -> Format | None:
    """The format of a name that follows a pattern: eXmY, eXmYfn, ml_dtypes' own names for these, a number of bits."""
    match = re.fullmatch(r"(float\d+_)?e([1-8])m(\d\d?)(fn)?", name, re.ASCII)
    if match:
        bits = 1 + int(match[2]) + int(match[3])
        if bits <= 16 and match[1] in (None, f"float{bits}_"):
            return floating(int(match[2]), int(match[3]), bool(match[4]))
    return _of_bits(float(name)) if re.fullmatch(r"\d+(\.\d*)?", name, re.ASCII) else None


def _of_bits(bits: float) -> Format | None:
    if 16 <= bits < math.inf:
        return _REGISTRY["bf16"]
    return _REGISTRY[f"int{int(bits)}"] if bits in range(2, 16) else None


for _bits in range(2, 17):
    register(integer(_bits))
for _name, _bits in (("bf16", 16), ("fp16", 16), ("fp32", 32)):
    register(Format(_name, "none", _bits))
# The mean magnitude as the scale: ternary as in BitNet b1.58 (arXiv 2402.17764), binary as in XNOR-Net (1603.05279).
register(level_set("ternary", (-1, 0, 1), scale="absmean"))
register(level_set("binary", (-1, 1), scale="absmean"))
register(block("mxfp4", floating(2, 1), 32, "e8m0"))
register(block("mxfp6", floating(2, 3), 32, "e8m0"))
register(block("mxfp6_e3m2", floating(3, 2), 32, "e8m0"))
register(block("mxfp8", floating(4, 3, fn=True), 32, "e8m0"))
register(block("mxfp8_e5m2", floating(5, 2), 32, "e8m0"))
register(block("mxfp8_up", floating(4, 3, fn=True), 32, "e8m0_up"))  # as MXFP8 is trained (arXiv 2506.08027)
# OCP MX gives its 8-bit integers six fraction bits; -128/64 is left out, as the standard allows, to stay symmetric.
register(block("mxint8", Format("int8/64", "int", 8, 127 / 64, min_exponent=0, mantissa_bits=6), 32, "e8m0"))
register(block("nvfp4", floating(2, 1), 16, "e4m3fn"))
register(block("nvfp4_4over6", floating(2, 1), 16, f"e4m3fn{FOUR_OVER_SIX}"))  # arXiv 2512.02010
register(block("nvint4", integer(4), 16, "e4m3fn"))  # arXiv 2510.25602
