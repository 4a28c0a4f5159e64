"""What is stored of numbers on a format's grid: elements and scales of at most eight bits, as codes in uint8.

`ptq.packed` keeps quantized kernels so, and `huggingface` writes them so for others. Pure functions of NumPy arrays;
what is decoded is what was encoded, bit for bit, but for the sign of a zero in formats that have but one.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from precision_scaling.numerics.formats import FOUR_OVER_SIX, POWERS_OF_TWO, Format, parse

BITS = 8  # that a code can have
_PIECE = 1 << 20  # elements that are looked up together
_ULPS = (0, 1, -1, 2, -2)  # of a quotient, within which the exact scale of a tensor is
_SAMPLE = 1024  # scales that a guess is tried on first


class Layout(NamedTuple):
    """How numbers of a format are stored. bits: of an element's code. scale_bits: of a scale. tensor_scale: the scales
    are relative to a float32 one for all."""

    bits: int
    scale_bits: int
    tensor_scale: bool


def layout(fmt: Format) -> Layout | None:
    """None where an element or a scale takes more than a byte."""
    if fmt.family in ("none", "wide"):
        return None
    table = _table(fmt)
    bits = (len(table) - 1).bit_length()
    if bits > BITS:
        return None
    if fmt.family != "block":
        return Layout(bits, 32, False)
    if fmt.block_scale in POWERS_OF_TWO:
        return Layout(bits, BITS, False)
    scale = layout(scale_format(fmt))
    return None if scale is None else Layout(bits, BITS, True)


def scale_format(fmt: Format) -> Format:
    """Of the scales of a format of blocks that are floats below one scale for the tensor."""
    assert fmt.block_scale is not None, "formats of blocks have scales of their own"
    return parse(fmt.block_scale.removesuffix(FOUR_OVER_SIX))


def encode(values: np.ndarray, fmt: Format) -> np.ndarray:
    """Codes (uint8, of values' shape) of a format's elements before any scale, float32.

    Floats are sign, exponent and mantissa; integers two's complement of multiples of their step; other levels are
    numbered from the lowest. ValueError for values that the format has not.
    """
    flat, codes = np.ascontiguousarray(values, np.float32).reshape(-1), np.empty(np.size(values), np.uint8)
    table = _table(fmt)
    order = np.argsort(table, kind="stable")  # NaN, which is no value, comes last
    known, half = table[order][: np.count_nonzero(~np.isnan(table))], len(table) // 2
    signed = table[half] == 0 and np.signbit(table[half])
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        place = np.minimum(np.searchsorted(known, piece), len(known) - 1)
        if not np.array_equal(known[place], piece):
            raise ValueError(f"values that are none of {fmt.name}")
        negative_zero = signed & (piece == 0) & np.signbit(piece)
        codes[start : start + _PIECE] = np.where(negative_zero, half, order[place])
    return codes.reshape(np.shape(values))


def decode(codes: np.ndarray, fmt: Format) -> np.ndarray:
    """The values of codes in float32; NaN for those that no number has."""
    return _table(fmt)[codes]


@functools.lru_cache(maxsize=64)
def _table(fmt: Format) -> np.ndarray:
    """The values by code, float32; NaN where a code has none. More than 2^8 for formats that no code here has."""
    values = fmt.values()
    if fmt.levels is not None:
        table = np.full(1 << max(1, (len(values) - 1).bit_length()), np.nan)
        table[: len(values)] = values
    elif _is_integer(fmt):
        half = 1 << math.ceil(math.log2(len(values) // 2 + 1))
        table = np.full(2 * half, np.nan)
        table[np.arange(-(len(values) // 2), len(values) // 2 + 1)] = values  # what is negative from the end
    else:
        positive = values[len(values) // 2 :]
        half = 1 << (len(positive) - 1).bit_length()
        table = np.full(2 * half, np.nan)
        table[: len(positive)], table[half : half + len(positive)] = positive, -positive
    table = table.astype(np.float32)
    table.flags.writeable = False
    return table


def _is_integer(fmt: Format) -> bool:
    """Whether elements are multiples of one step, and no floats that happen to be."""
    name = fmt.element or fmt.name
    uniform = len(set(np.diff(fmt.values()))) == 1
    return fmt.family in ("int", "block") and uniform and not re.fullmatch(r"e\d+m\d+(fn)?", name)


def encode_scales(scales: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.float32 | None]:
    """(codes in uint8, scale of the tensor) of the float32 scales of a format of blocks; None for powers of two.

    scales: all that are below one scale of a tensor, any shape. That scale is not known beside their products, and
    found from them: `decode_scales` gives these very products. ValueError for scales that the format has not.
    """
    scales = np.ascontiguousarray(scales, np.float32)
    if fmt.block_scale in POWERS_OF_TWO:
        bits = scales.view(np.uint32)
        codes = bits >> 23
        if np.any(bits & 0x7FFFFF) or np.any(codes == 0) or np.any(codes >= 255):
            raise ValueError(f"scales that are none of {fmt.name}")
        return codes.astype(np.uint8), None
    relative = scale_format(fmt)
    positive = relative.values()
    positive = positive[positive > 0].astype(np.float32)
    largest = np.max(scales, initial=0)
    if largest == 0:
        return np.zeros(scales.shape, np.uint8), np.float32(1)
    flat = scales.reshape(-1)
    sample = np.unique(flat)[:: max(1, flat.size // _SAMPLE)]
    for level in positive[::-1]:  # the largest is one of the format's; the first, but for scales with room above
        for tensor_scale in _near(largest / level):
            if _products(sample, positive, tensor_scale) is not None:
                found = _products(flat, positive, tensor_scale)
                if found is not None:
                    return found.reshape(scales.shape), tensor_scale
    raise ValueError(f"scales that are none of {fmt.name}")


def _near(value: np.float32) -> list[np.float32]:
    bits = np.float32(value).view(np.int32)
    near = [(bits + np.int32(ulps)).view(np.float32) for ulps in _ULPS]
    return [one for one in near if np.isfinite(one) and one > 0]


def _products(scales: np.ndarray, positive: np.ndarray, tensor_scale: np.float32) -> np.ndarray | None:
    """Codes whose values times the tensor's scale are these scales, or None. A float's code is its place."""
    quotient = scales.astype(np.float64) / np.float64(tensor_scale)
    values = np.concatenate([np.zeros(1, np.float32), positive])
    middle = (values[1:].astype(np.float64) + values[:-1]) / 2
    codes = np.searchsorted(middle, quotient)
    with np.errstate(over="ignore", under="ignore"):
        same = np.array_equal(values[codes] * tensor_scale, scales)
    return codes.astype(np.uint8) if same else None


def decode_scales(codes: np.ndarray, fmt: Format, tensor_scale: np.ndarray | None) -> np.ndarray:
    """The float32 scales. tensor_scale: of a shape that is broadcast to that of the codes."""
    if tensor_scale is None:
        return powers_of_two(codes)
    with np.errstate(over="ignore", under="ignore"):
        return decode(codes, scale_format(fmt)) * np.asarray(tensor_scale, np.float32)


def powers_of_two(codes: np.ndarray) -> np.ndarray:
    """The values of e8m0 codes, 2^-127 to 2^127 in float32; NaN for 255 (OCP MX v1.0)."""
    exponents = codes.astype(np.int32) - 127
    return np.where(exponents == 128, np.float32(np.nan), np.ldexp(np.float32(1), np.minimum(exponents, 127)))
