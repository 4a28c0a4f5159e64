"""The noise of L and δ between seeds, estimated from runs that differ only in their seed.

No finding may rest on a difference between rows that is below this noise.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy import stats

from analysis.table.columns import ALL_FORMAT_COLUMNS, HIGH_PRECISION_BITS, METHOD_COLUMNS, PRECISIONS
from analysis.table.table import Table

# Columns in which runs that differ only in their seed agree; those that the table lacks are ignored.
SAME = (
    *("N", "D", *PRECISIONS, "P_post", *METHOD_COLUMNS, "schedule", "precision"),
    *ALL_FORMAT_COLUMNS,
    *("w_granularity", "a_granularity", "attention_granularity", "ptq_granularity", "ptq_options", "post_parts"),
    *("group_size", "peak_rate", "optimizer", "average", "batch_size", "corpus", "within_documents", "width", "depth"),
)
LEAST_FREEDOM = 3  # degrees of freedom below which there is no estimate
FREEDOM_PER_SLOPE = 10  # degrees of freedom for each slope of the noise that is fitted
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviation between seeds, in nats per token.

    sd: root of the pooled variance. freedom: its degrees of freedom. slopes: of log variance on log N, log D and on
    being trained below 16 bits, about `center`; empty where its variation is not significant (p > 0.05).
    """

    sd: float
    freedom: int
    slopes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    center: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base: float = 0.0  # log variance at the center

    def at(self, **columns) -> np.ndarray:
        """Standard deviation at these N, D and P_w, P_a, P_kv."""
        shape = np.broadcast_shapes(*(np.shape(v) for v in columns.values())) if columns else ()
        if not self.slopes:
            return np.full(shape, self.sd)
        terms = _terms(columns)
        log_variance = self.base + sum(b * (terms[x] - self.center[x]) for x, b in self.slopes.items() if x in terms)
        return np.broadcast_to(np.exp(0.5 * log_variance), shape)

    @property
    def t(self) -> float:
        """Student's factor of a two-sided 95 % interval."""
        return float(stats.t.ppf(0.5 + LEVEL / 2, self.freedom))

    def limit(self, seeds: tuple[float, float] = (1, 1), **columns) -> np.ndarray:
        """The 95 % limit of noise in a difference of two means over `seeds` seeds each."""
        return self.t * self.at(**columns) * np.sqrt(1 / seeds[0] + 1 / seeds[1])

    @property
    def words(self) -> str:
        """The noise as text, with its dependence on N, D and precision."""
        names = {"N": "N", "D": "D", "low": "training below 16 bits"}
        if not self.slopes:
            return f"{self.sd:.2g} nats ({self.freedom} degrees of freedom)"
        how = ", ".join(
            f"x {np.exp(0.5 * slope):.2g} by {names[x]}" if x == "low" else f"as {names[x]}^{0.5 * slope:+.2f}"
            for x, slope in self.slopes.items()
        )
        return f"{self.sd:.2g} nats ({self.freedom} degrees of freedom; {how})"


def noise_of(table: Table, column: str = "loss") -> Noise | None:
    """The noise of `column` over rows repeated with another seed; None where these have under LEAST_FREEDOM degrees of
    freedom.
    """
    groups = repeated(table)
    freedom = sum(len(group) - 1 for group in groups)
    if freedom < LEAST_FREEDOM:
        return None
    free = np.array([len(group) - 1 for group in groups], np.float64)
    variance = np.array([np.var(table[column][group], ddof=1) for group in groups])
    pooled = float(np.average(variance, weights=free))
    if pooled <= 0:
        return Noise(0.0, freedom)
    first = np.array([group[0] for group in groups])
    terms = _terms({name: table[name][first] for name in ("N", "D", *PRECISIONS)})
    terms = {name: x for name, x in terms.items() if np.ptp(x) > 0}
    if not terms or freedom < FREEDOM_PER_SLOPE * (1 + len(terms)):
        return Noise(pooled**0.5, freedom)
    center = {name: float(np.average(x, weights=free)) for name, x in terms.items()}
    centred = np.column_stack([np.ones(len(free)), *(x - center[name] for name, x in terms.items())])
    found = _log_variance(centred, variance, free, pooled)
    gain = _log_likelihood(centred @ found, variance, free) - _log_likelihood(np.log(pooled), variance, free)
    if stats.chi2.sf(2 * gain, len(terms)) > 1 - LEVEL:
        return Noise(pooled**0.5, freedom)
    return Noise(pooled**0.5, freedom, dict(zip(terms, map(float, found[1:]), strict=True)), center, float(found[0]))


def noise_floor(deltas: Table) -> float | None:
    """Standard deviation of δ between seeds at the largest P_post with repeats: what remains as δ vanishes.

    deltas: rows after PTQ with `delta`. None where no row is repeated with another seed.
    """
    groups = repeated(deltas)
    for bits in sorted({float(deltas["P_post"][group[0]]) for group in groups}, reverse=True):
        here = [group for group in groups if deltas["P_post"][group[0]] == bits]
        squares = sum(float(np.sum((deltas["delta"][group] - deltas["delta"][group].mean()) ** 2)) for group in here)
        if squares > 0:
            return float(np.sqrt(squares / sum(len(group) - 1 for group in here)))
    return None


def repeated(table: Table) -> list[np.ndarray]:
    """Indices of the rows that differ only in their seed, a group for each setting with two seeds or more."""
    if "seed" not in table or not len(table):
        return []
    names = [name for name in SAME if name in table]
    columns = [np.unique(table[name].astype(str), return_inverse=True)[1].ravel() for name in names]
    setting = np.unique(np.column_stack(columns), axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(setting, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(setting[order])) + 1)
    return [group for group in groups if len(group) > 1 and len(set(table["seed"][group])) == len(group)]


def _terms(columns: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Regressors of the log variance: log N, log D, and 1 where a part was trained below 16 bits."""
    terms = {name: np.log(np.asarray(columns[name], np.float64)) for name in ("N", "D") if name in columns}
    bits = [np.asarray(columns[name], np.float64) for name in PRECISIONS if name in columns]
    if bits:
        terms["low"] = np.any([b < HIGH_PRECISION_BITS for b in np.broadcast_arrays(*bits)], axis=0).astype(float)
    return terms


def _log_likelihood(log_variance, variance: np.ndarray, free: np.ndarray) -> float:
    """Log likelihood of variances with these degrees of freedom (chi-square), up to a constant."""
    return float(-0.5 * np.sum(free * (log_variance + variance / np.exp(log_variance))))


def _log_variance(terms: np.ndarray, variance: np.ndarray, free: np.ndarray, pooled: float) -> np.ndarray:
    """Maximum-likelihood coefficients of log variance on the terms, by Fisher scoring with step halving."""
    found = np.zeros(terms.shape[1])
    found[0] = np.log(pooled)
    best = _log_likelihood(terms @ found, variance, free)
    gram = np.linalg.pinv(terms.T @ (free[:, None] * terms))
    for _ in range(100):
        step = gram @ (terms.T @ (free * (variance / np.exp(terms @ found) - 1)))
        for _ in range(30):
            value = _log_likelihood(terms @ (found + step), variance, free)
            if value >= best:
                break
            step = step / 2
        found, gain, best = found + step, value - best, value
        if abs(gain) < 1e-10:
            break
    return found
