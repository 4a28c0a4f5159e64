"""Tables that a law itself generates on the paper's grid, with known constants and noise, to test fits against."""

import itertools
from collections.abc import Mapping

import numpy as np

from analysis import laws
from analysis.laws import paper as paper_lib
from analysis.laws.law import LawError
from analysis.table import Table, from_columns

SIZES = (30e6, 60e6, 110e6, 220e6)
TOKENS = (1.5e9, 3e9, 6e9, 13e9, 26e9)
P_POST = (3.0, 4.0, 5.0, 6.0)
# training precisions (w, a, kv): bf16, one part varied, and combinations
PRECISIONS = (
    (16, 16, 16),
    *((bits, 16, 16) for bits in (3, 4, 5, 6, 8, 12)),
    *((16, bits, 16) for bits in (4, 5, 6, 8, 12)),
    *((16, 16, bits) for bits in (3, 4, 5, 6, 8)),
    *((bits, bits, bits) for bits in (4, 6, 8, 12)),
    *((4, 8, 16), (8, 4, 16)),
)
GROUP_SIZES = (32, 128, 512)
# Of the law of floating-point formats, whose last term is below the noise at the paper's sizes and formats: sizes and
# token budgets as in its source, arXiv 2501.02423, and exponent and mantissa bits from 3 bits up.
FLOAT_SIZES, FLOAT_TOKENS = (41e6, 85e6, 154e6, 679e6), (10e9, 20e9, 50e9, 100e9)
# Of the law with a channel's capacity, whose three noise terms no four sizes within a factor of ten tell apart.
CHANNEL_SIZES, CHANNEL_TOKENS = tuple(np.geomspace(1e7, 1e10, 8)), tuple(np.geomspace(1e8, 1e12, 12))
FORMATS = ((1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 1), (2, 3), (4, 3))
_OUTER = {"A": 2e6, "alpha": 0.7, "B": 1e7, "beta": 0.7, "E": 1.2, "g": 0.4}
_NOISY = {**_OUTER, "m": 0.3, "p": 1.7, "c_w": 0.02, "c_a": 0.08, "c_kv": 0.02}
# stand-ins where nothing is published; the rest of a law's constants are its source's, or the paper's Chinchilla
# constants
UNPUBLISHED = {
    "unified": {"C_w": 0.5, "C_a": 0.3, "C_kv": 0.8},
    "n_and_d_eff_untied": {
        **{"gamma_w_D": 2.0, "n_w_D": 0.2, "gamma_a_D": 1.8, "n_a_D": 1.0},
        **{"gamma_kv_D": 1.2, "n_kv_D": 1.5},
    },
    "quartet": {"gamma": 0.8, "eff_D_g4": 0.6, "eff_D_g8": 0.9},
    "capacity_gmse": {"L": 0.98, "F": 0.35, "C": 1.5},
    "chinchilla_outer": _OUTER,
    "noise": {**_OUTER, "d": 0.1, "q": 0.65, "c_w": 0.02, "c_a": 0.05, "c_kv": 0.01},
    "capacity_noise": _NOISY,
    "ptq_noise": {"C": 0.003, "gamma_D": 0.5, "gamma_N": 0.35},
    "unified_noise": {**_NOISY, "C": 0.003, "gamma_D": 0.5, "gamma_N": 0.35, "k": 5.0, "M": 0.3},
    "shannon": {
        **{"a": 0.1, "alpha": 0.05, "b": 1.0, "beta": 0.5, "c": 0.5, "gamma": 0.2},
        **{"d": 3.0, "delta": 0.3, "e": 2e4},
    },
    "power_laws": {"C_w": 2.0, "rho_w": 2.0, "C_a": 8.0, "rho_a": 2.5, "C_kv": 4.0, "rho_kv": 3.0},
}


def constants(law: str) -> dict[str, float]:
    """A complete set of constants of the law: published ones, with UNPUBLISHED standing in for those that are not."""
    law = laws.get(law)
    known = {**paper_lib.PUBLISHED, **law.published, **UNPUBLISHED.get(law.name, {})}
    if law.expand is not None:
        paper = paper_lib.PUBLISHED
        concrete = laws.resolve(law, columns=grid(law.name))
        for name in concrete.names:
            bits = laws.precisions_of(name)
            if bits is not None and name not in known:
                columns = {f"P_{x}": bits.get(x, 16.0) for x in ("w", "a", "kv")}
                known[name] = float(paper_lib.effective_parameters(paper, {"N": 1.0, **columns}))
        law = concrete
    missing = [name for name in law.names if name not in known and law.parameter(name).default is None]
    if missing:
        raise LawError(f"law {law.name}: no constants known for {', '.join(missing)}")
    values = {name: known[name] for name in law.names if name in known}
    if "C_T" in values:  # only C_T·e^b is identified: C_T carries both, as in a fit
        values["C_T"], values["b"] = values["C_T"] * np.exp(values["b"]), 0.0
    return values


def grid(law: str) -> dict[str, np.ndarray]:
    """Columns of the runs before PTQ at which the paper, or the law's own source, would measure."""
    law, sizes, tokens = laws.get(law), SIZES, TOKENS
    if "exponent_bits" in law.columns:
        sizes, tokens = FLOAT_SIZES, FLOAT_TOKENS
        settings = [(e, m, g) for (e, m), g in itertools.product(FORMATS, GROUP_SIZES)]
        names = ("exponent_bits", "mantissa_bits", "group_size")
    elif "P_grad" in law.columns:
        settings = [(*p, g) for p, g in itertools.product(PRECISIONS[::4], (16, 8, 4))]
        names = ("P_w", "P_a", "P_kv", "P_grad")
    elif "group_size" in law.columns:
        settings = [(16, 16, GROUP_SIZES[0]), *((4, 4, g) for g in GROUP_SIZES)]
        names = ("P_w", "P_a", "group_size")
    else:
        sizes, tokens = (CHANNEL_SIZES, CHANNEL_TOKENS) if law.name == "shannon" else (sizes, tokens)
        settings = PRECISIONS[:1] if law.high_precision_only else PRECISIONS
        names = ("P_w", "P_a", "P_kv")
    rows = np.array([(n, d, *s) for n, d, s in itertools.product(sizes, tokens, settings)], dtype=np.float64)
    return dict(zip(("N", "D", *names), rows.T, strict=True))


def table(law: str, noise: float = 0.0, seed: int = 0, params: Mapping[str, float] | None = None) -> Table:
    """Runs of `grid` with losses of the law, after PTQ too where the law knows it.

    `noise` is the standard deviation of log L before PTQ, and of log δ. A law of δ alone starts from the losses of
    the paper's law 3.
    """
    law = laws.get(law)
    params = constants(law.name) if params is None else params
    rng = np.random.default_rng(seed)
    columns = grid(law.name)
    base_law, base = ("precision", paper_lib.PUBLISHED) if law.target == "delta" else (law, params)
    if law.target == "delta":
        base = {name: base[name] for name in laws.get(base_law).names if name in base}
    loss = laws.predict(base_law, base, **columns)
    loss = loss * np.exp(noise * rng.standard_normal(loss.shape))
    count = len(loss)
    columns |= {
        "run": np.array([f"run-{i:04d}" for i in range(count)], dtype=object),
        "P_post": np.full(count, np.nan),
    }
    columns["loss"] = loss
    if law.log_delta is None:
        return from_columns(columns)
    after = {name: np.tile(column, len(P_POST)) for name, column in columns.items()}
    after["P_post"] = np.repeat(P_POST, count)
    delta = laws.predict(law, params, **after)
    if law.target == "loss":
        delta = delta - laws.predict(law, params, **{**after, "P_post": np.full(len(delta), np.nan)})
    after["loss"] = after["loss"] + delta * np.exp(noise * rng.standard_normal(delta.shape))
    return from_columns({name: np.concatenate([columns[name], after[name]]) for name in columns})
