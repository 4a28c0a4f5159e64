"""The laws of Kumar et al. (arXiv 2411.04330), and the alternatives that they tested."""

import numpy as np

from analysis.laws.law import (
    CHINCHILLA_NEEDS,
    FIXED_OPTIMUM,
    OUTER_EXPONENT,
    OUTER_NEEDS,
    Law,
    LawStage,
    Need,
    Parameter,
    Values,
    chinchilla_parameters,
    fraction,
    fraction_needs,
    fraction_parameters,
    log_chinchilla,
    log_power_law,
    log_sum,
    outer_exponent,
)
from analysis.table.columns import PARTS, PRECISIONS

PAPER = "Kumar et al., arXiv 2411.04330"
# Table 2 of the paper, alpha = beta tied. C_w, C_a, C_kv of the unified law are not published.
PUBLISHED = {
    **{"A": 4299.0, "alpha": 0.4965, "B": 18060.0, "beta": 0.4965, "E": 2.7648},
    **{"gamma_w": 2.6745, "n_w": 0.3037, "gamma_a": 2.2102, "n_a": 1.4072, "gamma_kv": 0.9578, "n_kv": 2.4185},
    **{"C_T": 0.0598, "gamma_D": 0.5068, "gamma_N": 0.3439, "gamma_post": 0.5907, "b": 1.1277},
}


def effective_parameters(params: Values, columns: Values, xp=np):
    """N_eff = N · f_w(P_w) · f_a(P_a) · f_kv(P_kv) in parameters (2411.04330, eq. 4; biased form)."""
    n_eff = xp.asarray(columns["N"])
    for x in PARTS:
        n_eff = n_eff * fraction(columns[f"P_{x}"], params[f"gamma_{x}"], params[f"n_{x}"], xp)
    return n_eff


def _capacity(p, c, xp, suffix=""):
    """Π_x f_x(P_x) with the parameters that end in `suffix`."""
    product = 1.0
    for x in PARTS:
        product = product * fraction(c[f"P_{x}"], p[f"gamma_{x}{suffix}"], p[f"n_{x}{suffix}"], xp)
    return product


def _chinchilla(p, c, xp):
    return log_chinchilla(p, c["N"], c["D"], xp)


def _precision(p, c, xp):
    return log_chinchilla(p, effective_parameters(p, c, xp), c["D"], xp)


def _ptq(p, c, xp, n=None):
    n = c["N"] if n is None else n
    size = xp.log(p["C_T"]) + p["gamma_D"] * xp.log(c["D"]) - p["gamma_N"] * xp.log(n)
    return size + p["b"] - c["P_post"] / p["gamma_post"]


def _unified_delta(p, c, xp):
    log_delta = _ptq(p, c, xp, n=effective_parameters(p, c, xp))
    for x in PARTS:
        gap = xp.maximum(c[f"P_{x}"] - c["P_post"], 0.0)  # nothing is lost where P_post is not below P_x
        share = -xp.expm1(-p[f"C_{x}"] * gap)
        # the inner where keeps the gradient finite where the share is zero
        log_delta = log_delta + xp.where(share > 0, xp.log(xp.where(share > 0, share, 1.0)), -xp.inf)
    return log_delta


def _d_eff(p, c, xp):
    return log_chinchilla(p, c["N"], c["D"] * _capacity(p, c, xp), xp)


def _n_and_d_eff(p, c, xp):
    capacity = _capacity(p, c, xp)
    return log_chinchilla(p, c["N"] * capacity, c["D"] * capacity, xp)


def _n_and_d_eff_untied(p, c, xp):
    return log_chinchilla(p, c["N"] * _capacity(p, c, xp), c["D"] * _capacity(p, c, xp, "_D"), xp)


def _power_laws(p, c, xp):
    terms = [log_power_law(p[f"C_{x}"], p[f"rho_{x}"], c[f"P_{x}"], xp) for x in PARTS]
    return log_sum(xp, _chinchilla(p, c, xp), *terms)


def _ptq_parameters() -> tuple[Parameter, ...]:
    amplitude_grid = (1e-4, 1e-2, 1.0, 100.0)
    exponent_grid = (0.0, 0.3, 0.6)
    get = PUBLISHED.get
    return (
        Parameter("C_T", 1e-30, 1e30, amplitude_grid, True, "nats per token", get("C_T"), held=1e-30),
        Parameter("gamma_D", -3.0, 3.0, exponent_grid, published=get("gamma_D"), held=0.0),
        Parameter("gamma_N", -3.0, 3.0, exponent_grid, published=get("gamma_N"), held=0.0),
        Parameter("gamma_post", 0.05, 50.0, (0.3, 0.6, 1.2, 2.4), True, "bits", get("gamma_post"), held=0.5907),
        # only C_T·e^b is identified: b stays 0 in a fit and C_T carries it
        Parameter("b", -10.0, 10.0, (0.0,), published=get("b"), default=0.0, held=0.0, fit=False),
    )


_CHINCHILLA = chinchilla_parameters(PUBLISHED)
_OUTER = (outer_exponent(fit=False),)
_FRACTIONS = fraction_parameters(PUBLISHED)
_BIASES = tuple(f"n_{x}" for x in PARTS)
_PTQ = _ptq_parameters()
_PTQ_NEEDS = (
    Need("N", 2, ("gamma_N",), "delta"),
    Need("D", 2, ("gamma_D",), "delta"),
    Need("P_post", 2, ("gamma_post",), "delta"),
)
_CHINCHILLA_STAGE = LawStage("high_precision", ("A", "alpha", "B", "beta", "E", OUTER_EXPONENT))
_FRACTION_NAMES = tuple(p.name for p in _FRACTIONS)
_PRECISION_FORMULA = "L = A N_eff^-alpha + B D^-beta + E, N_eff = N f_w f_a f_kv, f_x = 1 - exp(-P_x/gamma_x + n_x)"


def _alternative(name: str, formula: str, log_loss, effects=_FRACTIONS, needs=None, biases=_BIASES, **more) -> Law:
    needs = OUTER_NEEDS + fraction_needs() if needs is None else needs
    later = tuple(p.name for p in effects)
    return Law(
        name,
        formula,
        f"{PAPER}, Table 1 (alternatives)",
        _CHINCHILLA + effects + _OUTER,
        ("N", "D", *PRECISIONS),
        log_loss,
        needs=needs,
        stages=(_CHINCHILLA_STAGE, LawStage("loss", later)),
        biases=biases,
        **more,
    )


CHINCHILLA = Law(
    "chinchilla",
    "L = A N^-alpha + B D^-beta + E",
    f"Hoffmann et al., arXiv 2203.15556; constants of {PAPER}, Table 2",
    _CHINCHILLA,
    ("N", "D"),
    _chinchilla,
    needs=CHINCHILLA_NEEDS,
    high_precision_only=True,
    baseline=True,
)
PTQ = Law(
    "ptq",
    "delta = C_T D^gamma_D / N^gamma_N exp(-P_post/gamma_post + b)",
    f"{PAPER}, eq. 2",
    _PTQ,
    ("N", "D", "P_post"),
    log_delta=_ptq,
    needs=_PTQ_NEEDS,
    high_precision_only=True,
)
PRECISION = Law(
    "precision",
    _PRECISION_FORMULA,
    f"{PAPER}, eq. 3-4",
    _CHINCHILLA + _FRACTIONS + _OUTER,
    ("N", "D", *PRECISIONS),
    _precision,
    needs=OUTER_NEEDS + fraction_needs(),
    stages=(_CHINCHILLA_STAGE, LawStage("loss", _FRACTION_NAMES)),
    biases=_BIASES,
    share=_capacity,
    by_form=FIXED_OPTIMUM,
)
UNIFIED = Law(
    "unified",
    _PRECISION_FORMULA + "; after PTQ plus delta = C_T D^gamma_D / N_eff^gamma_N exp(-P_post/gamma_post + b) "
    "prod_x [1 - exp(-C_x max(P_x - P_post, 0))]",
    f"{PAPER}, eq. 9",
    _CHINCHILLA
    + _FRACTIONS
    + _PTQ
    + tuple(Parameter(f"C_{x}", 1e-3, 100.0, (0.1, 0.3, 1.0, 3.0), True, "1/bits", held=100.0) for x in PARTS)
    + _OUTER,
    ("N", "D", *PRECISIONS, "P_post"),
    _precision,
    _unified_delta,
    needs=OUTER_NEEDS + fraction_needs() + _PTQ_NEEDS + tuple(Need(f"P_{x}", 2, (f"C_{x}",), "delta") for x in PARTS),
    stages=(
        _CHINCHILLA_STAGE,
        LawStage("loss", _FRACTION_NAMES),
        LawStage("delta", tuple(p.name for p in _PTQ) + tuple(f"C_{x}" for x in PARTS)),
    ),
    biases=_BIASES,
    share=_capacity,
    by_form=FIXED_OPTIMUM,
    example={"C_w": 0.5, "C_a": 0.3, "C_kv": 0.8},
)
D_EFF = _alternative(
    "d_eff",
    "L = A N^-alpha + B D_eff^-beta + E, D_eff = D f_w f_a f_kv, f_x = 1 - exp(-P_x/gamma_x + n_x)",
    _d_eff,
    by_form=FIXED_OPTIMUM,
)
N_AND_D_EFF = _alternative(
    "n_and_d_eff",
    "L = A N_eff^-alpha + B D_eff^-beta + E, the same f_w f_a f_kv on N and on D",
    _n_and_d_eff,
    share=_capacity,
    by_form=FIXED_OPTIMUM,
)
N_AND_D_EFF_UNTIED = _alternative(
    "n_and_d_eff_untied",
    "L = A N_eff^-alpha + B D_eff^-beta + E, f with parameters gamma_x, n_x on N and gamma_x_D, n_x_D on D",
    _n_and_d_eff_untied,
    _FRACTIONS + fraction_parameters({}, suffix="_D"),
    OUTER_NEEDS + fraction_needs() + fraction_needs(suffix="_D"),
    _BIASES + tuple(f"{n}_D" for n in _BIASES),
    share=_capacity,
    holds=("n_and_d_eff",),
    by_form=FIXED_OPTIMUM,
    example={
        **{"gamma_w_D": 2.0, "n_w_D": 0.2, "gamma_a_D": 1.8, "n_a_D": 1.0},
        **{"gamma_kv_D": 1.2, "n_kv_D": 1.5},
    },
)
POWER_LAWS = _alternative(
    "power_laws",
    "L = A N^-alpha + B D^-beta + E + sum_x C_x P_x^-rho_x",
    _power_laws,
    tuple(
        p
        for x in PARTS
        for p in (
            Parameter(f"C_{x}", 1e-8, 1e8, (0.1, 1.0, 10.0), True, "nats · bits^rho", held=1e-8),
            Parameter(f"rho_{x}", 0.0, 20.0, (1.0, 2.0, 4.0), held=1.0),
        )
    ),
    OUTER_NEEDS
    + tuple(Need(f"P_{x}", 2, (f"C_{x}", f"rho_{x}")) for x in PARTS)
    + tuple(Need(f"P_{x}", 3, (f"rho_{x}",)) for x in PARTS),
    (),
    example={"C_w": 2.0, "rho_w": 2.0, "C_a": 8.0, "rho_a": 2.5, "C_kv": 4.0, "rho_kv": 3.0},
)

LAWS = (CHINCHILLA, PTQ, PRECISION, UNIFIED, D_EFF, N_AND_D_EFF, N_AND_D_EFF_UNTIED, POWER_LAWS)
