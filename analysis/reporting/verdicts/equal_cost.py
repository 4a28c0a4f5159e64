"""The best training precision of measured runs, without any law: runs of equal training cost compared,
and the size of the 16-bit model that is as good as one of few bits.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning.cost import CostModel
from analysis.reporting.evidence import Evidence
from analysis.table import PRECISIONS, Table
from analysis.table.seed_noise import Noise
from analysis.wording import count_label

EQUAL = 0.03  # relative difference of costs that count as equal: token budgets are whole steps
LEAST_PRECISIONS = 3


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs of one N, D and P of all parts: their mean loss and its standard deviation by the noise between seeds (0
    where that is not known).
    """

    n: float
    d: float
    p: float
    loss: float
    sd: float

    @property
    def cost(self) -> float:
        return float(CostModel().training(self.n, self.d, self.p))


def tied_cells(losses: Table, noise: Noise | None) -> list[Cell]:
    """The rows before PTQ whose parts all have the same precision, seeds averaged; 16 bits and more are 16."""
    bits = np.minimum(np.stack([losses[name] for name in PRECISIONS]), HIGH_PRECISION_BITS)
    groups: dict[tuple[float, float, float], list[float]] = {}
    for i in np.flatnonzero((bits == bits[0]).all(axis=0)):
        groups.setdefault((losses["N"][i], losses["D"][i], bits[0, i]), []).append(losses["loss"][i])
    sd = lambda n, d, p: 0.0 if noise is None else float(noise.at(N=n, D=d, P_w=p, P_a=p, P_kv=p))
    return [
        Cell(float(n), float(d), float(p), float(np.mean(found)), sd(n, d, p) / math.sqrt(len(found)))
        for (n, d, p), found in sorted(groups.items())
    ]


@dataclasses.dataclass(frozen=True)
class Match:
    """Runs of equal cost, and of one N where `n` is given: loss by precision, and which precisions are as good as the
    best within the noise.
    """

    cost: float
    n: float | None
    losses: Mapping[float, float]
    good: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.losses, key=self.losses.__getitem__)


def matches(evidence: Evidence) -> tuple[list[Match], list[Match]]:
    """Groups of three precisions or more at equal N·D·P: of one N each, and for each budget over the N of such groups
    (the best of them for each P).
    """
    cells, noise = tied_cells(evidence.losses, evidence.loss_noise), evidence.loss_noise
    by_size, by_budget = [], []
    for budget in _equal(cells):
        at_size = {n: [c for c in budget if c.n == n] for n in sorted({c.n for c in budget})}
        wide = {n: found for n, found in at_size.items() if len({c.p for c in found}) >= LEAST_PRECISIONS}
        by_size += [_match(found, noise, n) for n, found in wide.items()]
        if wide:
            by_budget.append(_match([c for found in wide.values() for c in found], noise, None))
    return by_size, by_budget


def _equal(cells: list[Cell]) -> list[list[Cell]]:
    cells = sorted(cells, key=lambda c: c.cost)
    groups: list[list[Cell]] = []
    for cell in cells:
        if groups and cell.cost <= groups[-1][0].cost * (1 + EQUAL):
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


def _match(cells: list[Cell], noise: Noise | None, n: float | None) -> Match:
    by_bits = {p: min((c for c in cells if c.p == p), key=lambda c: c.loss) for p in sorted({c.p for c in cells})}
    least = min(by_bits.values(), key=lambda c: c.loss)
    t = 0.0 if noise is None else noise.t
    good = [p for p, c in by_bits.items() if c.loss - least.loss <= t * math.hypot(c.sd, least.sd)]
    cost = float(np.exp(np.mean([math.log(c.cost) for c in cells])))
    return Match(cost, n, {p: c.loss for p, c in by_bits.items()}, tuple(good))


def match_rows(groups: list[Match]) -> list[dict[str, object]]:
    """One record for each group: cost, N, the best precision, those as good within noise, and the losses."""
    return [
        {
            "cost (FLOP at 16 bits)": f"{m.cost:.2g}",
            "N": "best of each P" if m.n is None else count_label(m.n),
            "best P": m.best,
            "as good within noise": ", ".join(f"{p:g}" for p in m.good),
            "loss by P": ", ".join(f"{p:g}: {loss:.4f}" for p, loss in m.losses.items()),
        }
        for m in groups
    ]


@dataclasses.dataclass(frozen=True)
class Factor:
    """N at P bits over the N of 16 bits that is as good at equal D, read off the measured losses; low and high by the
    noise between seeds; infinite where even the smallest 16-bit model is better, so that `low` is a bound.
    """

    n: float
    d: float
    p: float
    value: float
    low: float
    high: float


def size_factors(evidence: Evidence, most_bits: float = 4.0) -> list[Factor]:
    """The factor of every model with all parts at `most_bits` or fewer that has two or more 16-bit models of other N at
    its D beside it.
    """
    noise = evidence.loss_noise
    cells = tied_cells(evidence.losses, noise)
    found = []
    for cell in cells:
        if cell.p > most_bits:
            continue
        wide = sorted((c for c in cells if c.d == cell.d and c.p == HIGH_PRECISION_BITS), key=lambda c: c.n)
        losses = np.minimum.accumulate([c.loss for c in wide])
        if len(wide) < 2:
            continue
        sizes = np.log([c.n for c in wide])
        error = 0.0 if noise is None else noise.t * math.hypot(cell.sd, wide[0].sd)
        low, value, high = (
            cell.n / size if (size := _size_of(loss, losses, sizes)) else math.inf
            for loss in (cell.loss - error, cell.loss, cell.loss + error)
        )
        bound = cell.n / wide[0].n
        found.append(Factor(cell.n, cell.d, cell.p, value, min(low, bound) if math.isinf(low) else low, high))
    return found


def _size_of(loss: float, losses: np.ndarray, log_sizes: np.ndarray) -> float:
    """N of the 16-bit model of this loss, log N linear in the loss between measured ones; 0 above the worst, and the
    largest N below the best.
    """
    if loss > losses[0]:
        return 0.0
    return float(np.exp(np.interp(-loss, -losses, log_sizes)))
