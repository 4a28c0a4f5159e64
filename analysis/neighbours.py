"""Precision-aware laws of other papers, in the form that analysis/laws.py registers: same columns, other formulas."""

import re

import numpy as np

from analysis.law import (
    CHINCHILLA_NEEDS,
    HIGH_PRECISION_BITS,
    PRECISION_COLUMNS,
    Law,
    LawError,
    Need,
    Parameter,
    chinchilla_parameters,
    log_power_law,
    log_sum,
)

PARTS = ("w", "a", "kv")


def _log_floor(p, n, d, xp):
    size, data = log_power_law(p["A"], p["alpha"], n, xp), log_power_law(p["B"], p["beta"], d, xp)
    return log_sum(xp, size, data, xp.log(p["E"]))


# --- low-bit quantization favours undertrained models


def _qid(p, c, xp):
    return (
        xp.log(p["k"]) + p["beta"] * xp.log(c["D"]) - p["alpha"] * xp.log(c["N"]) - p["gamma"] * xp.log(c["P_post"])
    )


QID = Law(
    "qid",
    "delta = k D^beta / (N^alpha P_post^gamma)",
    "Ouyang et al., arXiv 2411.17691; constants for GPTQ on Pythia",
    (
        Parameter("k", 1e-30, 1e30, (1e-4, 1e-2, 1.0, 100.0), True, "nats per token", 0.017, held=1e-30),
        Parameter("beta", -3.0, 3.0, (0.0, 0.3, 0.6), published=0.5251, held=0.0),
        Parameter("alpha", -3.0, 3.0, (0.0, 0.3, 0.6), published=0.2261, held=0.0),
        Parameter("gamma", 0.0, 40.0, (2.0, 4.0, 8.0), published=5.4967, held=5.4967),
    ),
    ("N", "D", "P_post"),
    log_delta=_qid,
    needs=(
        Need("N", 2, ("alpha",), "delta"),
        Need("D", 2, ("beta",), "delta"),
        Need("P_post", 2, ("gamma",), "delta"),
    ),
    high_precision_only=True,
)


# --- floating-point training


def _floating_point(p, c, xp):
    log_n, log_d = xp.log(c["N"]), xp.log(c["D"])
    format_term = (
        p["beta"] * log_d
        - p["alpha"] * log_n
        + xp.log(xp.log2(c["group_size"]))
        - xp.log(p["gamma"])
        - p["delta"] * xp.log(c["exponent_bits"] + 0.5)
        - p["nu"] * xp.log(c["mantissa_bits"] + 0.5)
    )
    return log_sum(
        xp, xp.log(p["n"]) - p["alpha"] * log_n, xp.log(p["d"]) - p["beta"] * log_d, xp.log(p["epsilon"]), format_term
    )


def _group_size_above_one(c) -> str | None:
    return None if np.all(np.asarray(c["group_size"]) > 1) else "log2 of group_size must be positive: group_size > 1"


FLOATING_POINT = Law(
    "floating_point",
    "L = n/N^alpha + d/D^beta + epsilon + (D^beta/N^alpha) log2(group_size) / "
    "(gamma (exponent_bits + .5)^delta (mantissa_bits + .5)^nu)",
    "Sun et al., arXiv 2501.02423",
    (
        Parameter("n", 1e-6, 1e30, (1.0, 148.4, 22026.0), True, "nats · parameters^alpha", 69.2343, held=1e-6),
        Parameter("alpha", 0.0, 3.0, (0.1, 0.3, 0.6), published=0.2368, held=0.5),
        Parameter("d", 1e-6, 1e30, (148.4, 22026.0, 3.269e6), True, "nats · tokens^beta", 68973.0621, held=1e-6),
        Parameter("beta", 0.0, 3.0, (0.1, 0.3, 0.6), published=0.5162, held=0.5),
        Parameter("epsilon", 1e-3, 30.0, (0.3679, 1.0, 2.7183), True, "nats per token", 1.9061, held=1e-3),
        Parameter(
            "gamma", 1e-10, 1e30, (1e2, 1e4, 1e6), True, "tokens^beta / parameters^alpha", 11334.5197, held=1e30
        ),
        Parameter("delta", 0.0, 20.0, (1.0, 3.0), published=3.1926, held=0.0),
        Parameter("nu", 0.0, 20.0, (1.0, 3.0), published=2.9543, held=0.0),
    ),
    ("N", "D", "exponent_bits", "mantissa_bits", "group_size"),
    _floating_point,
    needs=(
        Need("N", 2, ("n", "alpha")),
        Need("D", 2, ("d", "beta")),
        Need("exponent_bits", 2, ("delta",)),
        Need("mantissa_bits", 2, ("nu",)),
    ),
    check=_group_size_above_one,
)


# --- quantization-aware training


def _quantized(c, xp):
    """True where weights or activations were trained below 16 bits."""
    return xp.minimum(c["P_w"], c["P_a"]) < HIGH_PRECISION_BITS


def _qat(p, c, xp):
    error = (
        xp.log(p["k"])
        + p["gamma_D"] * xp.log(c["D"])
        + p["gamma_G"] * xp.log(xp.log2(c["group_size"]))
        - p["gamma_N"] * xp.log(c["N"])
    )
    return log_sum(xp, _log_floor(p, c["N"], c["D"], xp), xp.where(_quantized(c, xp), error, -xp.inf))


def _one_low_precision(c) -> str | None:
    pairs = np.unique(np.stack([np.ravel(c["P_w"]), np.ravel(c["P_a"])])[:, np.ravel(_quantized(c, np))], axis=1)
    if pairs.shape[1] == 0:
        return "no row was trained below 16 bits in weights or activations"
    if pairs.shape[1] > 1:
        return f"k holds for one low precision, the rows mix {pairs.shape[1]} pairs of (P_w, P_a)"
    return _group_size_above_one(c)


QAT = Law(
    "qat",
    "L = A N^-alpha + B D^-beta + E + k D^gamma_D (log2 group_size)^gamma_G / N^gamma_N, the last if P_w or P_a < 16",
    "Chen et al., arXiv 2505.14302; constants of the quantization error at W4A4",
    (
        *chinchilla_parameters({}),
        Parameter("k", 1e-12, 1e12, (1e-2, 0.1, 1.0), True, "nats per token", 0.1582, held=1e-12),
        Parameter("gamma_N", -3.0, 3.0, (0.0, 0.2, 0.4), published=0.2186, held=0.0),
        Parameter("gamma_D", -3.0, 3.0, (0.0, 0.1, 0.2), published=0.0745, held=0.0),
        Parameter("gamma_G", -5.0, 5.0, (0.0, 0.5, 1.0), published=0.7779, held=0.0),
    ),
    ("N", "D", "P_w", "P_a", "group_size"),
    _qat,
    needs=(
        *CHINCHILLA_NEEDS,
        Need("N", 2, ("gamma_N",)),
        Need("D", 2, ("gamma_D",)),
        Need("group_size", 2, ("gamma_G",)),
    ),
    check=_one_low_precision,
)


# --- a free capacity per format


def precision_labels(columns) -> tuple[str, ...]:
    """One label per combination of training precisions below 16 bits, such as 'w4_a4' or 'kv3', in sorted order."""
    combinations = np.unique(np.stack([np.ravel(columns[c]) for c in PRECISION_COLUMNS], axis=1), axis=0)
    labels = (
        "_".join(f"{x}{bits:g}" for x, bits in zip(PARTS, row, strict=True) if bits < 16) for row in combinations
    )
    return tuple(label for label in labels if label)


def bits_of(label: str) -> dict[str, float]:
    """{'w': 4.0, 'a': 4.0} of the label 'w4_a4'."""
    found = dict(re.findall(r"(?:^|_)(kv|w|a|g)(\d+(?:\.\d+)?)", label))
    if "_".join(f"{x}{bits}" for x, bits in found.items()) != label:
        raise LawError(f"capacity {label!r} is not of the form w4_a4 (parts w, a, kv with their bits)")
    return {x: float(bits) for x, bits in found.items()}


def _matches(label: str, c, xp):
    bits = bits_of(label)
    match = True
    for x in PARTS:
        match = match & ((c[f"P_{x}"] == bits[x]) if x in bits else (c[f"P_{x}"] >= HIGH_PRECISION_BITS))
    return match


def _log_capacity(p, c, xp, names: dict[str, str]):
    """log eff of every row, by parameter name -> label; 16-bit rows have eff = 1, unknown combinations NaN."""
    log_eff = xp.where(_all_high(c, xp), 0.0, xp.nan)
    for name, label in names.items():
        log_eff = xp.where(_matches(label, c, xp), xp.log(p[name]), log_eff)
    return log_eff


def _all_high(c, xp):
    high = True
    for column in PRECISION_COLUMNS:
        high = high & (c[column] >= HIGH_PRECISION_BITS)
    return high


def _efficiency(name: str) -> Parameter:
    return Parameter(name, 1e-6, 10.0, (0.1, 0.3, 0.6, 1.0), True, "share of N")


def _capacity_family(names: tuple[str, ...]) -> Law:
    labels = {name: name.removeprefix("eff_") for name in (n if n.startswith("eff_") else f"eff_{n}" for n in names)}

    def log_loss(p, c, xp):
        return _log_floor(p, xp.exp(xp.log(c["N"]) + _log_capacity(p, c, xp, labels)), c["D"], xp)

    return Law(
        "capacity",
        "L = A (N eff)^-alpha + B D^-beta + E, eff free for every combination of training precisions, 1 at 16 bits",
        "Panferov et al., arXiv 2502.05003; Frantar et al., arXiv 2502.16440",
        (*chinchilla_parameters({}), *(_efficiency(name) for name in labels)),
        ("N", "D", *PRECISION_COLUMNS),
        log_loss,
        needs=CHINCHILLA_NEEDS,
        check=_some_low_precision,
        expand=_capacity_family,
        labels=precision_labels,
    )


def _some_low_precision(c) -> str | None:
    return "no row was trained below 16 bits" if np.all(_all_high(c, np)) else None


LAWS = (QID, FLOATING_POINT, QAT, _capacity_family(()))
