"""The challenge of arXiv 2510.06213: does δ grow because the learning rate decays rather than because D grows?

Only matched runs answer: a decaying and a constant schedule at equal N, D, seed and bits.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from analysis.fitting.statistics import interval
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.finding import CONTRADICTED, SUPPORTED, UNDECIDED, Finding, undecided
from analysis.table import Table
from analysis.wording import count_label, interval_text

CLAIM = "The growth of δ comes from the decay of the learning rate rather than from data (arXiv 2510.06213)."
FORM = "No law here has the schedule in it: each is fitted to runs of one, and attributes all growth to D."
LEAST_UNITS = 3  # N and seeds that are matched
LITTLE, MOST = 0.25, 0.5  # share of the exponent left without decay that counts as little, and as most
DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Matched:
    """δ over the shared D of two schedules at one PTQ method, N, seed and P_post."""

    method: str
    decaying: str
    n: float
    seed: float
    p_post: float
    tokens: np.ndarray
    decayed: np.ndarray
    constant: np.ndarray
    above_noise: bool

    @property
    def exponents(self) -> tuple[float, float]:
        """Of D, under decay and under a constant rate; NaN where fewer than two D or a δ of 0 or less."""
        return _exponent(self.tokens, self.decayed), _exponent(self.tokens, self.constant)

    @property
    def ratios(self) -> np.ndarray:
        """δ under a constant rate over δ under decay, at each D."""
        return self.constant / self.decayed

    @property
    def unit(self) -> tuple[float, float]:
        return self.n, self.seed


def _exponent(tokens: np.ndarray, deltas: np.ndarray) -> float:
    if len(tokens) < 2 or (deltas <= 0).any():
        return math.nan
    return float(np.polyfit(np.log(tokens), np.log(deltas), 1)[0])


def matched(evidence: Evidence) -> list[Matched]:
    """Every matched series, the method of the fits first."""
    every = evidence.every_row.deltas()
    every = every.select(every.high_precision)
    if "schedule" not in every or not len(every):
        return []
    names = np.array([str(name) for name in every["schedule"]])
    constant = next((name for name in sorted(set(names)) if "const" in name.lower()), None)
    if constant is None:
        return []
    methods = np.full(len(every), "") if every.methods is None else every.methods
    found = []
    for method in sorted(set(methods), key=lambda name: (name != evidence.main_method, name)):
        for decaying in sorted(set(map(str, names)) - {constant, ""}):
            mine = [every.select((methods == method) & (names == name)) for name in (decaying, constant)]
            found += _matched(evidence, str(method), decaying, *mine)
    return found


def _matched(evidence: Evidence, method: str, decaying: str, decay: Table, constant: Table) -> list[Matched]:
    seed = lambda table: table["seed"] if "seed" in table else np.zeros(len(table))
    settings = lambda table: zip(table["N"], seed(table), table["P_post"], table["D"], table["delta"], strict=True)
    by_setting = [{tuple(map(float, key)): float(delta) for *key, delta in settings(t)} for t in (decay, constant)]
    shared = sorted(set(by_setting[0]) & set(by_setting[1]))
    found = []
    for n, s, p_post in sorted({key[:3] for key in shared}):
        keys = [key for key in shared if key[:3] == (n, s, p_post)]
        decayed, steady = (np.array([values[key] for key in keys]) for values in by_setting)
        noise = evidence.noise_after_ptq(method, p_post)
        tokens = np.array([key[3] for key in keys])
        floor = 0.0 if noise is None else noise.t * noise.at(N=n, D=tokens)
        above = bool(np.all(np.minimum(decayed, steady) > floor))
        found.append(Matched(method, decaying, n, s, p_post, tokens, decayed, steady, above))
    return found


@dataclasses.dataclass(frozen=True)
class Shares:
    """Exponents of D under decay and without it, means over the series above the noise, and how much of the exponent is
    left without decay, with its interval over matched N and seeds (None with fewer than three).
    """

    decaying: str
    series: int
    units: int
    decayed: float
    constant: float
    higher: int  # series in which decay has the larger exponent
    share_ci: tuple[float, float] | None

    @property
    def share(self) -> float:
        return self.constant / self.decayed

    @property
    def words(self) -> str:
        return (
            f"{self.decaying} {self.decayed:.2f}, constant {self.constant:.2f} ({self.series} pairs of one N, seed "
            f"and bits above the noise, of {self.units} N and seeds; decay has the larger exponent in {self.higher}; "
            f"a constant rate keeps {self.share:.2f} {interval_text(self.share_ci, '{:.2f}'.format)}".rstrip()
            + " of the exponent)"
        )


def shares(found: Sequence[Matched], method: str) -> list[Shares]:
    """Of one PTQ method, one for each decaying schedule."""
    out = []
    for decaying in dict.fromkeys(m.decaying for m in found):
        mine = [m for m in found if m.method == method and m.decaying == decaying and m.above_noise]
        mine = [m for m in mine if all(map(math.isfinite, m.exponents))]
        if not mine:
            continue
        exponents = np.array([m.exponents for m in mine])
        units = sorted({m.unit for m in mine})
        index = np.array([units.index(m.unit) for m in mine])
        out.append(
            Shares(
                decaying,
                len(mine),
                len(units),
                float(exponents[:, 0].mean()),
                float(exponents[:, 1].mean()),
                int(np.sum(exponents[:, 0] > exponents[:, 1])),
                _share_interval(exponents, index) if len(units) >= LEAST_UNITS else None,
            )
        )
    return out


def _share_interval(exponents: np.ndarray, unit: np.ndarray) -> tuple[float, float]:
    units = unit.max() + 1
    counts = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=DRAWS)[:, unit]
    sums = counts @ exponents
    return interval(sums[:, 1] / sums[:, 0])


def schedule_or_data(evidence: Evidence) -> Finding:
    """The challenge by matched exponents of the PTQ method of the fits; the rows hold ratios of δ."""
    found = matched(evidence)
    if not found:
        why = "No constant schedule was run beside another at equal N, D, seed and bits with PTQ."
        return undecided("Challenge", CLAIM, FORM, why)
    by_decay = shares(found, found[0].method)
    if not by_decay:
        why = "No matched pair has δ above the noise at two or more D."
        return Finding("Challenge", CLAIM, UNDECIDED, FORM, why, {}, matched_rows(found))
    named = found[0].method.upper() or "PTQ"
    said = f"Exponent of D in δ at matched settings ({named}): {'; '.join(s.words for s in by_decay)}."
    said += f"\n{_ratio_words(found, found[0].method)}"
    for method in dict.fromkeys(m.method for m in found[1:] if m.method != found[0].method):
        other = shares(found, method)
        each = "; ".join(f"{s.decaying} {s.decayed:.2f}, constant {s.constant:.2f} ({s.series} pairs)" for s in other)
        said += f"\n{method.upper()}: {each}." if other else ""
    verdict = _verdict(by_decay)
    if min(s.units for s in by_decay) < LEAST_UNITS:
        said += f"\nFewer than {LEAST_UNITS} matched N and seeds are too few to decide."
    numbers = {s.decaying: dataclasses.asdict(s) for s in by_decay}
    return Finding("Challenge", CLAIM, verdict, FORM, said, numbers, matched_rows(found))


def _verdict(by_decay: Sequence[Shares]) -> str:
    spans = [s.share_ci for s in by_decay if s.share_ci is not None]
    if len(spans) < len(by_decay):
        return UNDECIDED
    if all(high < LITTLE for _, high in spans):
        return SUPPORTED
    return CONTRADICTED if all(low > MOST for low, _ in spans) else UNDECIDED


def _ratio_words(found: Sequence[Matched], method: str) -> str:
    ratios = np.concatenate([m.ratios for m in found if m.method == method and m.above_noise] or [np.array([])])
    if not len(ratios):
        return ""
    return (
        f"At equal N, D, seed and bits δ under a constant rate is {np.min(ratios):.2f} to {np.max(ratios):.2f} times "
        f"that under decay, below it in {int(np.sum(ratios < 1))} of {len(ratios)}."
    )


def matched_rows(found: Sequence[Matched]) -> list[dict[str, object]]:
    """One record for each matched pair of series."""
    show = lambda value: "none" if math.isnan(value) else f"{value:.2f}"
    return [
        {
            "method": m.method or "PTQ",
            "decaying schedule": m.decaying,
            "N": count_label(m.n),
            "seed": f"{m.seed:g}",
            "P_post": m.p_post,
            "D": ", ".join(count_label(d) for d in m.tokens),
            "exponent of D": show(m.exponents[0]),
            "without decay": show(m.exponents[1]),
            "δ without decay / with, at each D": ", ".join(f"{r:.2f}" for r in m.ratios),
            "above noise": "yes" if m.above_noise else "no",
        }
        for m in found
    ]
