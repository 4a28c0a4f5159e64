"""The relative step of a number format: how coarse its grid is on Gaussian data, in terms of the integers.

Symmetric integers of b bits have 2^(b-1) - 1 equal steps up to their largest value, a relative step of 1/(2^(b-1) - 1).
Any other format has the relative step of the integers, interpolated in b, with the same root mean square error on
Gaussian data. Each format keeps its own scales; the integers have those usual for the part. A law of rounding noise
then needs one constant for each part of the model, whatever the format, and the scales of blocks count.
"""

import functools

import numpy as np

from analysis.laws.law import LawError
from analysis.table.columns import HIGH_PRECISION_BITS
from precision_scaling.errors import UserError
from precision_scaling.numerics import formats
from precision_scaling.numerics.gaussian import gaussian_mse

TILE = "tile:"  # with the side of a square of values that share a scale
MANY = 2**20  # values of a tensor that shares one scale
USUAL_LENGTH = 1024  # of a contraction, where the table has no width
REFERENCE_BITS = np.arange(2, 9)  # at 8 bits the error is step/sqrt(12), so that finer grids go in proportion


def integer_step(bits) -> np.ndarray:
    """1/(2^(b-1) - 1), 0 from 16 bits on, infinite at 1 bit and below; NaN stays."""
    bits = np.asarray(bits, np.float64)
    levels = np.maximum(2.0 ** (np.minimum(bits, HIGH_PRECISION_BITS) - 1.0) - 1.0, 0.0)
    with np.errstate(divide="ignore"):
        return np.where(bits >= HIGH_PRECISION_BITS, 0.0, 1.0 / levels)


@functools.cache
def relative_step(name: str, granularity: str = "", length: float = 0, usual: str = "channel") -> float:
    """The relative step of the format of that name.

    granularity: what shares a scale: "tensor", "channel", "token", "vector", "group:g" for g values, "tile:g" for g²
        of them; "": as usual.
    length: values along the contraction, which share the scale of a channel, token or vector; 0 where it is not known.
    usual: granularity of the integers that it is compared with.
    Raises LawError for formats and granularities that do not exist.
    """
    try:
        fmt = formats.parse(name)
        if fmt.family == "none":
            return 0.0
        count, reference = _sharing(granularity or usual, length), _sharing(usual, length)
        if fmt.block_size:
            count = fmt.block_size**2 if granularity.startswith(TILE) else fmt.block_size
        if fmt.family == "int" and count == reference:
            return float(integer_step(fmt.bits))
        return _on_integer_curve(_error(fmt, count), reference)
    except UserError as error:
        raise LawError(str(error)) from None


def _sharing(granularity: str, length: float) -> int:
    """How many values share a scale."""
    for prefix, power in (("group:", 1), (TILE, 2)):
        if granularity.startswith(prefix) and granularity.removeprefix(prefix).isdigit():
            return int(granularity.removeprefix(prefix)) ** power
    if granularity == "tensor":
        return MANY
    if granularity in ("channel", "token", "vector"):
        return int(length) or USUAL_LENGTH
    raise LawError(f"granularity {granularity!r}: allowed are tensor, channel, token, vector, group:SIZE and tile:SIZE")


def _error(fmt: formats.Format, count: int) -> float:
    """Root mean square error on unit Gaussian data under the format's own scale, `count` values sharing one."""
    if fmt.scale == "absmean":
        return gaussian_mse(fmt, np.sqrt(2 / np.pi) / fmt.max_value) ** 0.5
    if fmt.family == "wide":
        return gaussian_mse(fmt, 1.0) ** 0.5
    return gaussian_mse(fmt, "absmax", count) ** 0.5


def _on_integer_curve(error: float, count: int) -> float:
    """The step of the integers with that error, `count` of them sharing a scale: log step linear in log error between
    whole bits, and in proportion beyond them.
    """
    errors = _integer_errors(count)[::-1]
    steps = integer_step(REFERENCE_BITS)[::-1]
    clipped = np.clip(error, errors[0], errors[-1])
    return float(np.exp(np.interp(np.log(clipped), np.log(errors), np.log(steps))) * error / clipped)


@functools.cache
def _integer_errors(count: int) -> np.ndarray:
    return np.array([_error(formats.parse(f"int{bits}"), count) for bits in REFERENCE_BITS])
