"""Columns derived from others: errors on Gaussian data, relative steps, exponent and mantissa bits of the number
formats, and 16 bits for the backward pass by default.
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from analysis.laws.law import LawError, Values
from analysis.laws.steps import integer_step, relative_step
from analysis.table.columns import (
    FORMAT_COLUMNS,
    GAUSSIAN_ERROR,
    HIGH_PRECISION_BITS,
    METHOD_COLUMNS,
    STEP,
    mixture,
)
from precision_scaling.errors import UserError
from precision_scaling.numerics.gaussian import gaussian_mse

WIDE_FLOATS = {"bf16": (8, 7), "fp16": (5, 10), "fp32": (8, 23)}


def column(name: str, columns: Values, strict: bool = True) -> np.ndarray | None:
    """The column of that name computed from the others; None where they do not determine it.

    An unknown format raises LawError if `strict`, else gives NaN.
    """
    if name == "P_grad":
        return np.full(np.shape(columns.get("N", 0.0)), HIGH_PRECISION_BITS)
    if name.startswith(GAUSSIAN_ERROR):
        return _gaussian_errors(name.removeprefix(GAUSSIAN_ERROR), columns, strict)
    if name == "s_post":
        return _step_after_ptq(columns, strict)
    if name.startswith(STEP):
        return _steps(name.removeprefix(STEP), columns, strict)
    if name in ("exponent_bits", "mantissa_bits"):
        return _float_bits(("exponent_bits", "mantissa_bits").index(name), columns)
    return None


def _gaussian_errors(part: str, columns: Values, strict: bool) -> np.ndarray | None:
    """Mean squared error on unit Gaussian data at the best scale: of the format where a column names it, else of the
    symmetric integer of P bits; 0 at 16 bits or more.
    """
    named = next((c for c in FORMAT_COLUMNS[part] if c in columns), None)
    bits = np.asarray(columns.get(f"P_{part}", HIGH_PRECISION_BITS), np.float64)
    names = np.full(bits.shape, "") if named is None else np.asarray(columns[named]).astype(str)
    error = lambda name, bits: _mixture_error(name) if name else _integer_error(bits)
    return np.vectorize(lambda *of: _or_nan(strict, error, *of), otypes=[float])(names, bits)


def _or_nan(strict: bool, function: Callable[..., float], *arguments) -> float:
    """The function's value; where it raises LawError, that error if `strict`, else NaN."""
    try:
        return function(*arguments)
    except LawError:
        if strict:
            raise
        return np.nan


@functools.cache
def _integer_error(bits: float) -> float:
    if bits >= HIGH_PRECISION_BITS:
        return 0.0
    if bits != round(bits):
        raise LawError(f"no integer format has {bits:g} bits: give the format in a column such as w_format")
    return _format_error(f"int{bits:.0f}")


def _mixture_error(text: str) -> float:
    """The mean over what layers have: variances of independent roundings add."""
    return sum(share * _format_error(name) for name, share in mixture(text))


@functools.cache
def _format_error(name: str) -> float:
    try:
        return gaussian_mse(name)
    except UserError as error:
        raise LawError(str(error)) from None


# The column with the granularity of a part, and its granularity where that is empty (the paper's).
GRANULARITY_COLUMNS = {"w": "w_granularity", "a": "a_granularity", "kv": "attention_granularity"}
USUAL_GRANULARITY = {"w": "channel", "a": "tensor", "kv": "tensor"}


def _steps(part: str, columns: Values, strict: bool) -> np.ndarray:
    """Relative step of the grid of a part (see `laws.steps`): of the formats that the table names (keys and values by
    their root mean square), else of the symmetric integers of P bits.
    """
    bits = np.asarray(columns.get(f"P_{part}", HIGH_PRECISION_BITS), np.float64)
    by_bits = integer_step(bits)
    named = [name for name in FORMAT_COLUMNS[part] if name in columns]
    if not named:
        return _known(by_bits, bits, part, strict)
    shape = np.shape(bits)
    texts = [np.broadcast_to(np.asarray(columns[name]).astype(str), shape) for name in named]
    sharing = np.broadcast_to(np.asarray(columns.get(GRANULARITY_COLUMNS[part], "")).astype(str), shape)
    lengths = _vector_lengths(part, columns, shape)
    squares, usual = np.zeros(shape), USUAL_GRANULARITY[part]
    for text in texts:
        found = [
            step if not fmt else _or_nan(strict, _mixture_step, fmt, shared.split(",")[0], length, usual)
            for fmt, shared, length, step in zip(text.flat, sharing.flat, lengths.flat, by_bits.flat, strict=True)
        ]
        squares = squares + np.reshape(found, shape) ** 2 / len(texts)
    return _known(np.sqrt(squares), bits, part, strict)


def _mixture_step(text: str, granularity: str, length: float, usual: str) -> float:
    """The root mean square over what layers have."""
    found = [(share, relative_step(name, granularity, length, usual)) for name, share in mixture(text)]
    return sum(share * step**2 for share, step in found) ** 0.5 if len(found) > 1 else found[0][1]


def _vector_lengths(part: str, columns: Values, shape: tuple[int, ...]) -> np.ndarray:
    """Length of the contraction: the width of the model, or of a head; 0 where it is unknown."""
    try:
        width = np.asarray(columns.get("width", 0.0), np.float64)
        heads = np.asarray(columns.get("heads", 1.0), np.float64) if part == "kv" else 1.0
        length = np.nan_to_num(width / heads)
    except (TypeError, ValueError):
        length = np.zeros(())
    return np.broadcast_to(length, shape)


def _known(step: np.ndarray, bits: np.ndarray, part: str, strict: bool) -> np.ndarray:
    if not strict:
        return np.where(np.isinf(step), np.nan, step)
    if np.any(np.isinf(step)):
        fewest = f"{np.min(bits[np.isinf(step)]):g}"
        named = f"name the format in column {FORMAT_COLUMNS[part][0]}, or " if part in FORMAT_COLUMNS else ""
        raise LawError(
            f"P_{part} = {fewest}: symmetric integers have more than 1 bit; {named}give the relative step in column "
            f"s_{part}"
        )
    return step


def _step_after_ptq(columns: Values, strict: bool) -> np.ndarray | None:
    """Relative step of the grid of P_post bits: ±(2^(b-1) - 1) levels, or 2^b between the extremes where the method or
    its options contain asymmetric; NaN before PTQ. None without P_post.
    """
    if "P_post" not in columns:
        return None
    bits = np.asarray(columns["P_post"], np.float64)
    words = [np.asarray(columns[name]).astype(str) for name in (*METHOD_COLUMNS, "ptq_options") if name in columns]
    asymmetric = np.zeros(bits.shape, bool)
    for text in words:
        asymmetric = asymmetric | (np.char.find(text, "asymmetric") >= 0)
    step = np.where(asymmetric & (bits < HIGH_PRECISION_BITS), 2.0 / (2.0**bits - 1.0), integer_step(bits))
    return np.where(np.isnan(bits), np.nan, _known(step, bits, "post", strict))


def _float_bits(which: int, columns: Values) -> np.ndarray | None:
    """Exponent (0) or mantissa (1) bits of the weights' format; NaN for formats that are not floating-point."""
    if "w_format" not in columns:
        return None
    out = []
    for name in np.asarray(columns["w_format"]).astype(str):
        found = re.fullmatch(r"e(\d+)m(\d+)\w*", name.lower())
        bits = tuple(map(float, found.groups())) if found else WIDE_FLOATS.get(name.lower(), (np.nan, np.nan))
        out.append(bits[which])
    return np.array(out)
