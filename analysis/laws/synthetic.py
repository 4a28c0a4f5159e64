"""Tables that a law itself generates, with known constants and noise, to test fits against.

A law is measured at its own sizes and token budgets (`Law.sizes`, `Law.tokens`: the paper's, or those of its source).
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import laws
from analysis.laws import paper
from analysis.laws.law import Law, LawError
from analysis.table import Table, from_columns
from analysis.table.columns import PRECISIONS

P_POST = (3.0, 4.0, 5.0, 6.0)
# training precisions (w, a, kv): bf16, one part varied, and combinations
TRAINED = (
    (16, 16, 16),
    *((bits, 16, 16) for bits in (3, 4, 5, 6, 8, 12)),
    *((16, bits, 16) for bits in (4, 5, 6, 8, 12)),
    *((16, 16, bits) for bits in (3, 4, 5, 6, 8)),
    *((bits, bits, bits) for bits in (4, 6, 8, 12)),
    *((4, 8, 16), (8, 4, 16)),
)
GROUP_SIZES = (32, 128, 512)
FORMATS = ((1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 1), (2, 3), (4, 3))  # exponent and mantissa bits


def constants(name: str) -> dict[str, float]:
    """A complete set of constants of the law: its source's, else `Law.example`, else the paper's Chinchilla constants.

    Raises LawError where these leave one open.
    """
    law = laws.resolve(name, columns=grid(name))
    known = {**paper.PUBLISHED, **law.published, **law.example}
    for parameter in law.names:
        bits = laws.precisions_of(parameter) if law.family is not None else None
        if bits is not None and parameter not in known:
            columns = {column: bits.get(column.removeprefix("P_"), 16.0) for column in PRECISIONS}
            known[parameter] = float(paper.effective_parameters(paper.PUBLISHED, {"N": 1.0, **columns}))
    missing = [p.name for p in law.params if p.name not in known and p.default is None]
    if missing:
        raise LawError(f"law {name}: no constants known for {', '.join(missing)}")
    values = {parameter: known[parameter] for parameter in law.names if parameter in known}
    if "C_T" in values:  # only C_T·e^b is identified: C_T carries both, as in a fit
        values["C_T"], values["b"] = values["C_T"] * np.exp(values["b"]), 0.0
    return values


def grid(name: str) -> dict[str, np.ndarray]:
    """Columns of the runs before PTQ at which the paper, or the law's own source, would measure."""
    law = laws.get(name)
    names, settings = _settings(law)
    rows = np.array([(n, d, *s) for n, d, s in itertools.product(law.sizes, law.tokens, settings)], dtype=np.float64)
    return dict(zip(("N", "D", *names), rows.T, strict=True))


def _settings(law: Law) -> tuple[tuple[str, ...], Sequence[tuple[int, ...]]]:
    """The columns beside N and D, and their values."""
    if "exponent_bits" in law.columns:
        grouped = [(e, m, g) for (e, m), g in itertools.product(FORMATS, GROUP_SIZES)]
        return ("exponent_bits", "mantissa_bits", "group_size"), grouped
    if "P_grad" in law.columns:
        return (*PRECISIONS, "P_grad"), [(*p, g) for p, g in itertools.product(TRAINED[::4], (16, 8, 4))]
    if "group_size" in law.columns:
        return ("P_w", "P_a", "group_size"), [(16, 16, GROUP_SIZES[0]), *((4, 4, g) for g in GROUP_SIZES)]
    return PRECISIONS, TRAINED[:1] if law.high_precision_only else TRAINED


def table(name: str, noise: float = 0.0, seed: int = 0, params: Mapping[str, float] | None = None) -> Table:
    """Runs of `grid` with losses of the law, after PTQ too where the law knows it.

    `noise` is the standard deviation of log L before PTQ, and of log δ. A law of δ alone starts from the losses of
    the paper's law 3.
    """
    law = laws.get(name)
    params = constants(name) if params is None else params
    rng = np.random.default_rng(seed)
    columns = grid(name)
    if law.target == "delta":
        base = {p.name: paper.PUBLISHED[p.name] for p in paper.PRECISION.params if p.published is not None}
        loss = laws.predict(paper.PRECISION, base, **columns)
    else:
        loss = laws.predict(law, params, **columns)
    loss = loss * np.exp(noise * rng.standard_normal(loss.shape))
    count = len(loss)
    columns |= {
        "run": np.array([f"run-{i:04d}" for i in range(count)], dtype=object),
        "P_post": np.full(count, np.nan),
        "loss": loss,
    }
    if law.log_delta is None:
        return from_columns(columns)
    after = {column: np.tile(values, len(P_POST)) for column, values in columns.items()}
    after["P_post"] = np.repeat(P_POST, count)
    delta = laws.predict(law, params, **after)
    if law.target == "loss":
        delta = delta - laws.predict(law, params, **{**after, "P_post": np.full(len(delta), np.nan)})
    after["loss"] = after["loss"] + delta * np.exp(noise * rng.standard_normal(delta.shape))
    return from_columns({column: np.concatenate([columns[column], after[column]]) for column in columns})
