"""Laws in which precision multiplies N (or D) by a capacity: a free constant for every combination of precisions, or
predicted from the error of a format on Gaussian data.
"""

import functools
import re
from collections.abc import Callable

import numpy as np

from analysis.laws.law import (
    CHINCHILLA_NEEDS,
    FIXED_OPTIMUM,
    OUTER_NEEDS,
    Family,
    Law,
    LawError,
    Parameter,
    chinchilla_parameters,
    log_chinchilla,
    log_sum,
    outer_exponent,
)
from analysis.table.columns import HIGH_PRECISION_BITS, PARTS, PRECISIONS

FORWARD, BACKWARD = "eff_", "eff_D_"  # eff_w4_a4 multiplies N; eff_D_g4 multiplies D (gradients of 4 bits)


def bits_of(name: str) -> dict[str, float]:
    """{'w': 4.0, 'a': 4.0} of the capacity eff_w4_a4; {'g': 8.0} of eff_D_g8."""
    label = name.removeprefix(BACKWARD).removeprefix(FORWARD)
    found = dict(re.findall(r"(?:^|_)(kv|w|a|g)(\d+(?:\.\d+)?)", label))
    if not found or "_".join(f"{x}{bits}" for x, bits in found.items()) != label:
        raise LawError(f"capacity {name!r} is not of the form eff_w4_a4 (parts w, a, kv with their bits) or eff_D_g8")
    return {x: float(bits) for x, bits in found.items()}


def forward_names(columns) -> tuple[str, ...]:
    """One capacity per combination of training precisions below 16 bits, such as 'eff_w4_a4' or 'eff_kv3', sorted."""
    seen = np.unique(np.stack([np.ravel(columns[c]) for c in PRECISIONS], axis=1), axis=0)
    labels = (
        "_".join(f"{x}{bits:g}" for x, bits in zip(PARTS, row, strict=True) if bits < HIGH_PRECISION_BITS)
        for row in seen
    )
    return tuple(FORWARD + label for label in labels if label)


def both_names(columns) -> tuple[str, ...]:
    """Forward capacities, and one per backward precision below 16 bits."""
    backward = tuple(f"{BACKWARD}g{bits:g}" for bits in np.unique(columns["P_grad"]) if bits < HIGH_PRECISION_BITS)
    return forward_names(columns) + backward


def _matches(name: str, c, xp):
    bits = bits_of(name)
    if "g" in bits:
        return c["P_grad"] == bits["g"]
    match = True
    for x in PARTS:
        match = match & ((c[f"P_{x}"] == bits[x]) if x in bits else (c[f"P_{x}"] >= HIGH_PRECISION_BITS))
    return match


def _log_capacity(p, c, xp, names, columns):
    """log of the capacity of every row: 0 where all `columns` have 16 bits, NaN for one without a constant."""
    high = True
    for column in columns:
        high = high & (c[column] >= HIGH_PRECISION_BITS)
    log_capacity = xp.where(high, 0.0, xp.nan)
    for name in names:
        log_capacity = xp.where(_matches(name, c, xp), xp.log(p[name]), log_capacity)
    return log_capacity


def _capacities(names) -> tuple[Parameter, ...]:
    for name in names:
        bits_of(name)
    return tuple(Parameter(name, 1e-6, 10.0, (0.1, 0.3, 0.6, 1.0), True, "share of N or D") for name in names)


def _some_low_precision(columns: tuple[str, ...]) -> Callable:
    def check(c) -> str | None:
        high = np.all([np.asarray(c[column]) >= HIGH_PRECISION_BITS for column in columns])
        return "no row was trained below 16 bits" if high else None

    return check


@functools.cache
def _free(names: tuple[str, ...]) -> Law:
    def share(p, c, xp):
        return xp.exp(_log_capacity(p, c, xp, names, PRECISIONS))

    def log_loss(p, c, xp):
        return log_chinchilla(p, c["N"] * share(p, c, xp), c["D"], xp)

    return Law(
        "capacity",
        "L = A (N eff)^-alpha + B D^-beta + E, eff free for every combination of training precisions, 1 at 16 bits",
        "Panferov et al., arXiv 2502.05003; Frantar et al., arXiv 2502.16440",
        (*chinchilla_parameters({}), *_capacities(names), outer_exponent(fit=False)),
        ("N", "D", *PRECISIONS),
        log_loss,
        needs=OUTER_NEEDS,
        check=_some_low_precision(PRECISIONS),
        family=Family(FORWARD, _free, forward_names),
        share=share,
        holds=("chinchilla",),
        by_form=FIXED_OPTIMUM,
    )


@functools.cache
def _quartet(names: tuple[str, ...]) -> Law:
    forward = tuple(name for name in names if not name.startswith(BACKWARD))
    backward = tuple(name for name in names if name.startswith(BACKWARD))

    def log_loss(p, c, xp):
        log_n = xp.log(c["N"]) + _log_capacity(p, c, xp, forward, PRECISIONS)
        log_d = xp.log(c["D"]) + _log_capacity(p, c, xp, backward, ("P_grad",))
        size = xp.log(p["A"]) - p["alpha"] * log_n
        return log_sum(xp, p["gamma"] * log_sum(xp, size, xp.log(p["B"]) - p["beta"] * log_d), xp.log(p["E"]))

    columns = (*PRECISIONS, "P_grad")
    return Law(
        "quartet",
        "L = [A (N eff_N)^-alpha + B (D eff_D)^-beta]^gamma + E, eff_N free for every combination of forward bits, "
        "eff_D for every precision of the gradients (column P_grad, 16 where absent)",
        "Castro et al., arXiv 2505.14669",
        (
            *chinchilla_parameters({}),
            Parameter("gamma", 0.05, 5.0, (0.5, 1.0, 2.0), True, held=1.0),
            *_capacities(names),
        ),
        ("N", "D", *columns),
        log_loss,
        needs=CHINCHILLA_NEEDS,
        check=_some_low_precision(columns),
        family=Family(FORWARD, _quartet, both_names),
        holds=("capacity",),
        share=lambda p, c, xp: xp.exp(_log_capacity(p, c, xp, forward, PRECISIONS)),
        by_form=FIXED_OPTIMUM,
        example={"gamma": 0.8, "eff_D_g4": 0.6, "eff_D_g8": 0.9},
    )


def _log_gaussian_capacity(p, c, xp):
    """Σ_x log eff(gmse_x) with eff = L tanh(F log_{1/4} gmse)^C, and eff = 1 where nothing is rounded (gmse 0)."""
    total = 0.0
    for x in PARTS:
        gmse = c[f"gmse_{x}"]
        rounded = gmse > 0
        bits = -xp.log(xp.where(rounded, gmse, 0.25)) / np.log(4.0)
        log_eff = xp.log(p["L"]) + p["C"] * xp.log(xp.tanh(p["F"] * bits))
        total = total + xp.where(rounded, log_eff, 0.0)
    return total


def _gaussian_share(p, c, xp):
    return xp.exp(_log_gaussian_capacity(p, c, xp))


def _gaussian(p, c, xp):
    return log_chinchilla(p, c["N"] * _gaussian_share(p, c, xp), c["D"], xp)


def _some_error(c) -> str | None:
    errors = np.concatenate([np.ravel(c[f"gmse_{x}"]) for x in PARTS])
    if not np.any(errors > 0):
        return "no row was trained below 16 bits"
    return None if len(np.unique(errors[errors > 0])) > 2 else "L, F and C need three formats, the rows hold fewer"


GAUSSIAN = Law(
    "capacity_gmse",
    "L = A N_eff^-alpha + B D^-beta + E, N_eff = N prod_x L tanh(F log_{1/4} gmse_x)^C, gmse_x the mean squared error "
    "of the format of part x on Gaussian data (from the columns x_format, or P_x as integers), 1 at 16 bits",
    "Panferov et al., arXiv 2506.01863",
    (
        *chinchilla_parameters({}),
        Parameter("L", 0.1, 3.0, (0.9, 1.0), True, held=1.0),
        Parameter("F", 1e-2, 10.0, (0.2, 0.5, 1.0), True, held=10.0),
        Parameter("C", 1e-2, 20.0, (1.0, 2.0, 4.0), True, held=1e-2),
        outer_exponent(fit=False),
    ),
    ("N", "D", *(f"gmse_{x}" for x in PARTS)),
    _gaussian,
    needs=OUTER_NEEDS,
    check=_some_error,
    share=_gaussian_share,
    bits=tuple(map(float, range(2, 17))),  # errors of formats, not of fractions of a bit
    by_form=FIXED_OPTIMUM,
    example={"L": 0.98, "F": 0.35, "C": 1.5},
)

LAWS = (_free(()), _quartet(()), GAUSSIAN)
