"""Series along D: δ and the loss as served of one PTQ method, N and P_post, set against the noise between seeds."""

import dataclasses
import math

import numpy as np

from analysis.reporting.evidence import Evidence
from analysis.table import Table
from analysis.table.seed_noise import Noise

RISES, FALLS, FLAT, TURNS = "rises", "falls", "within noise", "turns"


@dataclasses.dataclass(frozen=True)
class Series:
    """δ and the loss as served along D at one PTQ method, N and P_post; seeds are averaged.

    course: of δ from least to most D, against the noise between seeds. served: of the loss after PTQ: it turns where it
    falls to a least value inside and rises again, both by more than the noise.
    """

    method: str
    n: float
    p_post: float
    tokens: np.ndarray
    deltas: np.ndarray
    losses: np.ndarray
    seeds: np.ndarray
    course: str
    served: str
    above_noise: bool  # δ at every D

    @property
    def exponent(self) -> float:
        """Of D, by least squares on log δ where δ > 0; NaN with fewer than two such D."""
        positive = self.deltas > 0
        if positive.sum() < 2:
            return math.nan
        return float(np.polyfit(np.log(self.tokens[positive]), np.log(self.deltas[positive]), 1)[0])

    @property
    def lowest(self) -> int:
        return int(np.argmin(self.losses))

    def bounds(self) -> tuple[float, float]:
        """D between which the loss as served was least: its measured neighbours, 0 where none is below."""
        below = self.tokens[self.lowest - 1] if self.lowest else 0.0
        return float(below), float(self.tokens[min(self.lowest + 1, len(self.tokens) - 1)])


def all_series(evidence: Evidence) -> list[Series]:
    """Every method, N and P_post with δ of models trained in 16 bits at two D or more; the method of the fits first."""
    found = []
    for method, deltas in evidence.deltas_by_method.items():
        deltas = deltas.select(deltas.high_precision)
        for n in sorted(set(deltas["N"])):
            for p_post in sorted(set(deltas["P_post"])):
                here = deltas.select((deltas["N"] == n) & (deltas["P_post"] == p_post))
                if len(set(here["D"])) > 1:
                    noises = [evidence.noise_after_ptq(method, p_post, column) for column in ("delta", "loss")]
                    found.append(_series(method, float(n), float(p_post), here, *noises))
    return found


def _series(method: str, n: float, p_post: float, here: Table, delta: Noise | None, loss: Noise | None) -> Series:
    tokens, at = np.unique(here["D"], return_inverse=True)
    seeds = np.bincount(at)
    deltas, losses = (np.bincount(at, here[name]) / seeds for name in ("delta", "loss"))
    limit = lambda noise, i, j: (
        0.0 if noise is None else float(noise.limit((seeds[i], seeds[j]), N=n, D=tokens[[i, j]]).max())
    )
    last, low = len(tokens) - 1, int(np.argmin(losses))
    change, least = deltas[last] - deltas[0], limit(delta, 0, last)
    course = RISES if change > least else FALLS if change < -least else FLAT
    fell = losses[0] - losses[low] > limit(loss, 0, low)
    rose = losses[last] - losses[low] > limit(loss, low, last)
    served = TURNS if fell and rose else RISES if rose else FALLS if fell else FLAT
    floor = 0.0 if delta is None else delta.t * delta.at(N=n, D=tokens) / np.sqrt(seeds)
    return Series(method, n, p_post, tokens, deltas, losses, seeds, course, served, bool(np.all(deltas > floor)))
