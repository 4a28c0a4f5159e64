"""Precision-aware laws of other papers, in the form that laws/__init__.py registers: same columns, other formulas."""

import numpy as np

from analysis.laws.law import (
    CHINCHILLA_NEEDS,
    Law,
    Need,
    Parameter,
    chinchilla_parameters,
    log_chinchilla,
    log_sum,
)
from analysis.table.columns import HIGH_PRECISION_BITS

# --- low-bit quantization favours undertrained models


def _qid(p, c, xp):
    return xp.log(p["k"]) + p["beta"] * xp.log(c["D"]) - p["alpha"] * xp.log(c["N"]) - p["gamma"] * xp.log(c["P_post"])


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
        Parameter("gamma", 1e-10, 1e30, (1e2, 1e4, 1e6), True, "tokens^beta / parameters^alpha", 11334.5197, held=1e30),
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
    bits_given=True,
    # those of its source: its last term is below the noise at the paper's sizes
    sizes=(41e6, 85e6, 154e6, 679e6),
    tokens=(10e9, 20e9, 50e9, 100e9),
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
    return log_sum(xp, log_chinchilla(p, c["N"], c["D"], xp), xp.where(_quantized(c, xp), error, -xp.inf))


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
    bits_given=True,
)


LAWS = (QID, FLOATING_POINT, QAT)
