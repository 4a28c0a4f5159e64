"""Laws in which a precision acts as rounding noise: the variances of independent operands add.

Each reads s_x, the relative step of the grid of part x (derived.py): 1/(2^(P-1) - 1) for integers of P bits,
0 where nothing is rounded. docs/analysis.md says how they were found and on
what they were tested.
"""

import numpy as np

from analysis.laws.law import (
    OUTER_NEEDS,
    Law,
    LawStage,
    Need,
    Parameter,
    chinchilla_parameters,
    log_chinchilla,
    log_sum,
    outer_exponent,
)
from analysis.table.columns import PARTS, STEP

STEPS = tuple(f"{STEP}{x}" for x in PARTS)
SOURCE = "this project"


def _log_where_positive(x, xp, empty):
    """log x where x > 0, else `empty`, with a gradient that is finite everywhere."""
    positive = x > 0
    return xp.where(positive, xp.log(xp.where(positive, x, 1.0)), empty)


def _added_noise(p, c, xp):
    """log of D^d N^-nu (Σ_x c_x s_x²)^q; -inf where nothing is rounded."""
    variance = sum(p[f"c_{x}"] * c[f"s_{x}"] ** 2 for x in PARTS)
    rounded = variance > 0
    size = p["d"] * xp.log(c["D"]) - p["nu"] * xp.log(c["N"])
    return xp.where(rounded, size + p["q"] * _log_where_positive(variance, xp, 0.0), -xp.inf)


def _noise(p, c, xp):
    return log_sum(xp, log_chinchilla(p, c["N"], c["D"], xp), _added_noise(p, c, xp))


def _noisy_share(p, c, xp):
    """N_eff / N = 1 / (1 + N^m Σ_x c_x s_x^p)."""
    noise = 0.0
    for x in PARTS:
        log_power = p["p"] * _log_where_positive(c[f"s_{x}"], xp, 0.0)
        noise = noise + xp.where(c[f"s_{x}"] > 0, p[f"c_{x}"] * xp.exp(log_power), 0.0)
    return 1.0 / (1.0 + c["N"] ** p["m"] * noise)


def _capacity_noise(p, c, xp):
    return log_chinchilla(p, c["N"] * _noisy_share(p, c, xp), c["D"], xp)


def _log_growth(p, c, xp):
    """log of C D^gamma_D / N^gamma_N."""
    return xp.log(p["C"]) + p["gamma_D"] * xp.log(c["D"]) - p["gamma_N"] * xp.log(c["N"])


def _ptq_noise(p, c, xp):
    return _log_growth(p, c, xp) + p["p"] * _log_where_positive(c["s_post"], xp, -xp.inf)


def _unified_delta(p, c, xp):
    curvature = c["s_post"] ** 2 / (1.0 + p["k"] * c["s_w"] ** 2)
    return _log_growth(p, c, xp) + _log_where_positive(curvature + p["M"] * c["s_w"] ** 3, xp, -xp.inf)


def _amplitudes(grid: tuple[float, ...], unit: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(f"c_{x}", 1e-30, 1e30, grid, True, unit, held=1e-30) for x in PARTS)


def _names(params: tuple[Parameter, ...]) -> tuple[str, ...]:
    return tuple(p.name for p in params)


_CHINCHILLA = (*chinchilla_parameters({}), outer_exponent())
_CHINCHILLA_STAGE = LawStage("high_precision", _names(_CHINCHILLA))
_OUTER_EXAMPLE = {"A": 2e6, "alpha": 0.7, "B": 1e7, "beta": 0.7, "E": 1.2, "g": 0.4}
_AMPLITUDE_NEEDS = tuple(Need(f"s_{x}", 2, (f"c_{x}",)) for x in PARTS)

CHINCHILLA_OUTER = Law(
    "chinchilla_outer",
    "L = E + (A N^-alpha + B D^-beta)^g",
    SOURCE,
    _CHINCHILLA,
    ("N", "D"),
    lambda p, c, xp: log_chinchilla(p, c["N"], c["D"], xp),
    needs=OUTER_NEEDS,
    high_precision_only=True,
    holds=("chinchilla",),
    example=_OUTER_EXAMPLE,
)

_ADDED = (
    Parameter("d", -3.0, 3.0, (0.0, 0.2, 0.4), held=0.0),
    Parameter("nu", -3.0, 3.0, (0.0, 0.2), default=0.0, held=0.0, fit=False),
    Parameter("q", 0.05, 5.0, (0.4, 0.7, 1.0), held=0.5),
    *_amplitudes((1e-4, 1e-2, 1.0, 100.0), "(nats per token · tokens^-d)^(1/q)"),
)
NOISE = Law(
    "noise",
    "L = E + (A N^-alpha + B D^-beta)^g + D^d N^-nu (sum_x c_x s_x^2)^q, s_x the relative step of the grid of part x; "
    "nu = 0 unless freed",
    SOURCE,
    _CHINCHILLA + _ADDED,
    ("N", "D", *STEPS),
    _noise,
    needs=(
        *OUTER_NEEDS,
        *_AMPLITUDE_NEEDS,
        Need("D", 2, ("d",), "low"),
        Need("N", 2, ("nu",), "low"),
        Need(STEPS, 3, ("q",)),
    ),
    stages=(_CHINCHILLA_STAGE, LawStage("loss", _names(_ADDED))),
    example={**_OUTER_EXAMPLE, "d": 0.1, "q": 0.65, "c_w": 0.02, "c_a": 0.05, "c_kv": 0.01},
)

_CAPACITY = (
    Parameter("m", -1.0, 3.0, (0.0, 0.4, 0.8), held=0.0),
    Parameter("p", 0.1, 8.0, (1.0, 1.6, 2.2), held=2.0),
    *_amplitudes((1e-6, 1e-4, 1e-2, 1.0), "parameters^-m"),
)
_CAPACITY_NEEDS = (*OUTER_NEEDS, *_AMPLITUDE_NEEDS, Need("N", 2, ("m",), "low"), Need(STEPS, 3, ("p",)))
_CAPACITY_EXAMPLE = {**_OUTER_EXAMPLE, "m": 0.3, "p": 1.7, "c_w": 0.02, "c_a": 0.08, "c_kv": 0.02}
_CAPACITY_FORMULA = "L = E + (A N_eff^-alpha + B D^-beta)^g, N_eff = N / (1 + N^m sum_x c_x s_x^p)"
CAPACITY_NOISE = Law(
    "capacity_noise",
    _CAPACITY_FORMULA + ", s_x the relative step of the grid of part x",
    SOURCE,
    _CHINCHILLA + _CAPACITY,
    ("N", "D", *STEPS),
    _capacity_noise,
    needs=_CAPACITY_NEEDS,
    share=_noisy_share,
    share_varies=True,
    stages=(_CHINCHILLA_STAGE, LawStage("loss", _names(_CAPACITY))),
    example=_CAPACITY_EXAMPLE,
)

_GROWTH = (
    Parameter("C", 1e-30, 1e30, (1e-6, 1e-3, 1.0), True, "nats per token", held=1e-30),
    Parameter("gamma_D", -3.0, 3.0, (0.0, 0.3, 0.6), held=0.0),
    Parameter("gamma_N", -3.0, 3.0, (0.0, 0.3, 0.6), held=0.0),
)
_GROWTH_NEEDS = (Need("N", 2, ("gamma_N",), "delta"), Need("D", 2, ("gamma_D",), "delta"))
_GROWTH_EXAMPLE = {"C": 0.003, "gamma_D": 0.5, "gamma_N": 0.35}
PTQ_NOISE = Law(
    "ptq_noise",
    "delta = C s_post^p D^gamma_D / N^gamma_N, p = 2 unless freed, s_post the relative step of the grid of P_post bits",
    SOURCE,
    (*_GROWTH, Parameter("p", 0.0, 8.0, (1.5, 2.0, 2.5), default=2.0, held=2.0, fit=False)),
    ("N", "D", "s_post"),
    log_delta=_ptq_noise,
    needs=(*_GROWTH_NEEDS, Need("s_post", 2, ("p",), "delta")),
    high_precision_only=True,
    example=_GROWTH_EXAMPLE,
)

_SERVED = (
    *_GROWTH,
    Parameter("k", 1e-6, 1e6, (0.1, 1.0, 10.0), True, held=1e-6),
    Parameter("M", 1e-9, 1e9, (0.01, 0.1, 1.0), True, held=1e-9),
)
UNIFIED_NOISE = Law(
    "unified_noise",
    _CAPACITY_FORMULA + "; after PTQ plus delta = C D^gamma_D / N^gamma_N (s_post^2 / (1 + k s_w^2) + M s_w^3)",
    SOURCE,
    _CHINCHILLA + _CAPACITY + _SERVED,
    ("N", "D", *STEPS, "s_post"),
    _capacity_noise,
    _unified_delta,
    needs=(*_CAPACITY_NEEDS, *_GROWTH_NEEDS, Need("s_w", 2, ("k", "M"), "delta"), Need("s_post", 2, ("M",), "delta")),
    share=_noisy_share,
    share_varies=True,
    stages=(_CHINCHILLA_STAGE, LawStage("loss", _names(_CAPACITY)), LawStage("delta", _names(_SERVED))),
    example={**_CAPACITY_EXAMPLE, **_GROWTH_EXAMPLE, "k": 5.0, "M": 0.3},
)


# --- the capacity of a noisy channel


def _shannon(p, c, xp):
    log_n, log_d = xp.log(c["N"]), xp.log(c["D"])
    signal = xp.log(p["b"]) + p["beta"] * log_d
    joint, data = xp.log(p["c"]) + p["gamma"] * (log_n + log_d), xp.log(p["d"]) + p["delta"] * log_d
    noise = log_sum(xp, joint, data, xp.log(p["e"]))
    bits = xp.logaddexp(0.0, signal - noise) / np.log(2.0)
    return -(xp.log(p["a"]) + p["alpha"] * log_n + xp.log(bits))


_TINY_TO_LARGE = (1e-4, 1.0, 1e4, 1e8)
SHANNON = Law(
    "shannon",
    "L = 1/C, C = a N^alpha log2(1 + b D^beta / (c (D N)^gamma + d D^delta + e)), b = 1: b, c, d and e share a scale; "
    "fitted to the losses of one precision",
    "arXiv 2605.23901",
    (
        Parameter("a", 1e-9, 1e9, (1e-3, 1e-2, 0.1), True, "tokens per nat · parameters^-alpha", held=1e-9),
        Parameter("alpha", -3.0, 3.0, (0.0, 0.1, 0.2), held=0.0),
        Parameter("b", 1e-30, 1e30, (1.0,), True, "1", default=1.0, held=1.0, fit=False),
        Parameter("beta", -3.0, 3.0, (0.2, 0.5, 0.8), held=0.0),
        Parameter("c", 1e-30, 1e30, _TINY_TO_LARGE, True, held=1e-30),
        Parameter("gamma", -3.0, 3.0, (0.0, 0.2, 0.4), held=0.0),
        Parameter("d", 1e-30, 1e30, _TINY_TO_LARGE, True, held=1e-30),
        Parameter("delta", -3.0, 3.0, (0.0, 0.3, 0.6), held=0.0),
        Parameter("e", 1e-30, 1e30, _TINY_TO_LARGE, True, held=1e-30),
    ),
    ("N", "D"),
    _shannon,
    needs=(Need("N", 2, ("alpha", "c", "gamma")), Need("D", 2, ("beta",)), Need("D", 3, ("d", "delta"))),
    high_precision_only=True,
    example={
        **{"a": 0.1, "alpha": 0.05, "b": 1.0, "beta": 0.5, "c": 0.5, "gamma": 0.2},
        **{"d": 3.0, "delta": 0.3, "e": 2e4},
    },
    # four sizes within a factor of ten do not identify its three noise terms
    sizes=tuple(np.geomspace(1e7, 1e10, 8)),
    tokens=tuple(np.geomspace(1e8, 1e12, 12)),
)

LAWS = (CHINCHILLA_OUTER, NOISE, CAPACITY_NOISE, PTQ_NOISE, UNIFIED_NOISE, SHANNON)
