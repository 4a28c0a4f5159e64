"""Columns that a table need not hold because its number formats determine them: errors on Gaussian data, exponent and
mantissa bits, and 16 bits for the backward pass where nothing else is said.
"""

import functools
import re
from collections.abc import Mapping

import numpy as np

from analysis.law import HIGH_PRECISION_BITS, LawError
from analysis.table import FORMAT_COLUMNS
from precision_scaling.errors import UserError
from precision_scaling.gaussian import gaussian_mse

WIDE_FLOATS = {"bf16": (8, 7), "fp16": (5, 10), "fp32": (8, 23)}


def column(name: str, columns: Mapping[str, object]) -> np.ndarray | None:
    """The column of that name worked out from the others; None where they do not determine it. Raises LawError."""
    if name == "P_grad":
        return np.full(np.shape(columns.get("N", 0.0)), HIGH_PRECISION_BITS)
    if name.startswith("gmse_"):
        return _gaussian_errors(name.removeprefix("gmse_"), columns)
    if name in ("exponent_bits", "mantissa_bits"):
        return _float_bits(("exponent_bits", "mantissa_bits").index(name), columns)
    return None


def _gaussian_errors(part: str, columns: Mapping[str, object]) -> np.ndarray | None:
    """Mean squared error on unit Gaussian data at the best scale: of the format where a column names it, else of the
    symmetric integer of P bits; 0 at 16 bits or more.
    """
    named = next((c for c in FORMAT_COLUMNS[part] if c in columns), None)
    bits = np.asarray(columns.get(f"P_{part}", HIGH_PRECISION_BITS), np.float64)
    if named is None:
        return np.vectorize(_integer_error, otypes=[float])(bits)
    names = np.asarray(columns[named]).astype(str)
    return np.array([_format_error(f) if f else _integer_error(b) for f, b in zip(names, bits, strict=True)])


@functools.cache
def _integer_error(bits: float) -> float:
    if bits >= HIGH_PRECISION_BITS:
        return 0.0
    if bits != round(bits):
        raise LawError(f"no integer format has {bits:g} bits: give the format in a column such as w_format")
    return _format_error(f"int{bits:.0f}")


@functools.cache
def _format_error(name: str) -> float:
    try:
        return gaussian_mse(name)
    except UserError as err:
        raise LawError(str(err)) from None


def _float_bits(which: int, columns: Mapping[str, object]) -> np.ndarray | None:
    """Exponent (0) or mantissa (1) bits of the weights' format; NaN for formats that are not floating-point."""
    if "w_format" not in columns:
        return None
    out = []
    for name in np.asarray(columns["w_format"]).astype(str):
        found = re.fullmatch(r"e(\d+)m(\d+)\w*", name.lower())
        bits = tuple(map(float, found.groups())) if found else WIDE_FLOATS.get(name.lower(), (np.nan, np.nan))
        out.append(bits[which])
    return np.array(out)
