"""F4: one law for training and serving precision, and models trained in low precision lose less under PTQ.

By row and PTQ method: a model whose weights were trained in P_w bits is compared with the 16-bit model of equal N and
D, both served at P_post bits, below, at and above P_w.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats

from analysis.fitting.statistics import LEVEL
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.finding import CONTRADICTED, SUPPORTED, UNDECIDED, Finding, undecided
from analysis.reporting.verdicts.optimum_by_law import near_best
from analysis.table import Table

LESS, MORE, ALIKE = "less", "more", "within noise"
BELOW, AT, ABOVE = "P_post < P_w", "P_post = P_w", "P_post > P_w"
FEW = 0.1  # share of the rows that may differ from 0 beyond the noise where the claim is that none does
LEAST_ROWS = 5

LESS_CLAIM = "Models trained in low precision lose less under PTQ than 16-bit ones."
NOTHING_CLAIM = "Served at the bits their weights were trained in, or more, models lose nothing."
ONE_CLAIM = "One law (law 4) predicts the loss at any pair of training and serving precisions."
ONE_FORM = (
    "Law 4 multiplies δ by Π_x [1 - exp(-C_x (P_x - P_post))], which is less than 1 for every model trained low, and "
    "0 once P_post reaches the bits of any part: that such models lose less, and nothing there, is forced."
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A row after PTQ of a model whose weights were trained low, and the 16-bit model beside it."""

    method: str
    side: str
    p_w: float
    p_post: float
    delta: float
    delta_16: float
    limit: float  # of the difference of the two δ
    limit_zero: float  # of δ itself
    loss: float
    loss_16: float
    loss_limit: float

    @property
    def loses(self) -> str:
        return _against(self.delta - self.delta_16, self.limit)

    @property
    def changes(self) -> str:
        """δ itself against 0."""
        return _against(self.delta, self.limit_zero)

    @property
    def served(self) -> str:
        """The loss as served against that of the 16-bit model."""
        return _against(self.loss - self.loss_16, self.loss_limit)


def _against(difference: float, limit: float) -> str:
    return ALIKE if abs(difference) <= limit else MORE if difference > 0 else LESS


def pairs(evidence: Evidence) -> list[Pair]:
    """Every row of weights trained below 16 bits that has a 16-bit model of equal N, D, P_post and method beside it."""
    found = []
    for method, deltas in evidence.deltas_by_method.items():
        found += _pairs(evidence, method, deltas)
    return found


def _pairs(evidence: Evidence, method: str, deltas: Table) -> list[Pair]:
    base: dict[tuple, list[int]] = {}
    keys = list(zip(deltas["N"], deltas["D"], deltas["P_post"], strict=True))
    for i in np.flatnonzero(deltas.high_precision):
        base.setdefault(keys[i], []).append(int(i))
    found = []
    for i in np.flatnonzero(deltas["P_w"] < HIGH_PRECISION_BITS):
        if keys[i] not in base:
            continue
        n, d, p_post = keys[i]
        beside, p_w = base[keys[i]], float(deltas["P_w"][i])
        noise, served = (evidence.noise_after_ptq(method, float(p_post), name) for name in ("delta", "loss"))
        seeds = (1, len(beside))
        limit = lambda noise, at=(seeds, n, d): 0.0 if noise is None else float(noise.limit(at[0], N=at[1], D=at[2]))
        found.append(
            Pair(
                method,
                BELOW if p_post < p_w else AT if p_post == p_w else ABOVE,
                p_w,
                float(p_post),
                float(deltas["delta"][i]),
                float(deltas["delta"][beside].mean()),
                limit(noise),
                0.0 if noise is None else noise.t * float(noise.at(N=n, D=d)),
                float(deltas["loss"][i]),
                float(deltas["loss"][beside].mean()),
                limit(served),
            )
        )
    return found


def pair_rows(found: Sequence[Pair]) -> list[dict[str, object]]:
    """One record for each method, side of P_w and P_w: rows, how δ and the loss as served compare, and δ itself."""
    records = []
    for key in sorted({(p.method, (BELOW, AT, ABOVE).index(p.side), p.p_w) for p in found}):
        mine = [p for p in found if (p.method, (BELOW, AT, ABOVE).index(p.side), p.p_w) == key]
        loses, served = Counter(p.loses for p in mine), Counter(p.served for p in mine)
        deltas = [p.delta for p in mine]
        records.append(
            {
                "method": key[0] or "PTQ",
                "served at": (BELOW, AT, ABOVE)[key[1]],
                "P_w": key[2],
                "rows": len(mine),
                "δ less than at 16 bits": loses[LESS],
                "more": loses[MORE],
                "alike": loses[ALIKE],
                "loss as served lower": served[LESS],
                "higher": served[MORE],
                "δ": f"{min(deltas):.2g} to {max(deltas):.2g}",
            }
        )
    return records


# --- the findings


def low_precision_loses_less(evidence: Evidence) -> Finding:
    """F4 on rows served in fewer bits than the weights were trained in; the verdict has to hold for every method."""
    every = pairs(evidence)
    found = [p for p in every if p.side == BELOW]
    if len(found) < LEAST_ROWS:
        why = "Too few models of low-precision weights were quantized to fewer bits with a 16-bit model beside them."
        return undecided("F4", LESS_CLAIM, ONE_FORM, f"{why} ({len(found)} rows)")
    verdicts, said = [], []
    for method in dict.fromkeys(p.method for p in found):
        mine = [p for p in found if p.method == method]
        loses = Counter(p.loses for p in mine)
        verdicts.append(_less(loses))
        said.append(
            f"{method.upper() or 'PTQ'}: {loses[LESS]} of {len(mine)} rows with P_post below P_w have a smaller δ "
            f"than the 16-bit model of equal N, D and P_post beyond the noise, {loses[MORE]} a larger one, the rest "
            "within it."
        )
    others = [p for p in every if p.side != BELOW]
    if others:
        loses, served = Counter(p.loses for p in others), Counter(p.served for p in others)
        said.append(
            f"With P_post at or above P_w, of {len(others)} rows of all methods {loses[LESS]} have a smaller and "
            f"{loses[MORE]} a larger δ, and {served[MORE]} a higher loss as served."
        )
    verdict = verdicts[0] if len(set(verdicts)) == 1 else UNDECIDED
    numbers = {
        "rows": len(found),
        "less": sum(p.loses == LESS for p in found),
        "more": sum(p.loses == MORE for p in found),
    }
    return Finding(
        "F4", f"{LESS_CLAIM[:-1]}, at P_post below P_w.", verdict, ONE_FORM, "\n".join(said), numbers, pair_rows(every)
    )


def _less(loses: Counter) -> str:
    """By the rows beyond the noise on either side, where they are more than the noise itself explains."""
    rows = sum(loses.values())
    beyond = lambda count: stats.binomtest(count, rows, (1 - LEVEL) / 2, "greater").pvalue < 1 - LEVEL
    less, more = beyond(loses[LESS]), beyond(loses[MORE])
    return UNDECIDED if less == more else SUPPORTED if less else CONTRADICTED


def nothing_lost_when_served_as_trained(evidence: Evidence) -> Finding:
    """F4 on rows served in the bits of training or more, where the law has δ = 0."""
    found = [p for p in pairs(evidence) if p.side != BELOW]
    if not found:
        return undecided("F4 nothing lost", NOTHING_CLAIM, ONE_FORM, "No such row has a 16-bit model beside it.")
    said, wrong = [], {}
    for method in dict.fromkeys(p.method for p in found):
        for side in (AT, ABOVE):
            mine = [p for p in found if (p.method, p.side) == (method, side)]
            if mine:
                wrong[method, side] = sum(p.changes == MORE for p in mine) / len(mine)
                said.append(_changes_words(method, side, mine))
    bad = [key for key, share in wrong.items() if share > FEW]
    verdict = SUPPORTED if not bad else CONTRADICTED
    where = ", ".join(f"{method.upper() or 'PTQ'} at {side}" for method, side in bad)
    why = f"It fails for {where}." if bad else ""
    numbers = {f"{m or 'PTQ'}, {side}": share for (m, side), share in wrong.items()}
    return Finding("F4 nothing lost", NOTHING_CLAIM, verdict, ONE_FORM, "\n".join([*said, why]).strip(), numbers)


def _changes_words(method: str, side: str, found: Sequence[Pair]) -> str:
    changes = Counter(p.changes for p in found)
    deltas = [p.delta for p in found]
    return (
        f"{method.upper() or 'PTQ'}, {side}: of {len(found)} rows δ is above 0 beyond the noise in {changes[MORE]} "
        f"and below it in {changes[LESS]}, {min(deltas):+.2g} to {max(deltas):+.2g}, median {np.median(deltas):+.2g}."
    )


def one_law(evidence: Evidence) -> Finding:
    """F4 on the law itself: its error on held-out rows beside that of the best law of both losses."""
    rows = [] if evidence.comparison is None else [r for r in evidence.comparison.rows if r.kind == "both"]
    paper = next((row for row in rows if row.law == "unified"), None)
    if paper is None:
        return undecided("F4 one law", ONE_CLAIM, ONE_FORM, "The unified law was not compared on this table.")
    noise = evidence.loss_noise
    relative = None if noise is None else noise.sd / float(np.exp(np.mean(np.log(evidence.losses["loss"]))))
    shown = "; ".join(f"{row.law} {_errors(row)}" for row in rows)
    said = f"Rms error of the loss on held-out rows, before and after PTQ: {shown}."
    said += "" if relative is None else f" Seeds alone: {100 * relative:.1f} %."
    numbers = {row.law: dict(row.held_out) for row in rows}
    if paper.difference is not None and "unified" not in near_best(evidence.comparison, "both"):
        said += f" The best law of both is better by {paper.difference.text()} % ({LEVEL:.0%}, mean absolute error)."
        return Finding("F4 one law", ONE_CLAIM, CONTRADICTED, ONE_FORM, said, numbers)
    errors = [error for error in paper.held_out.values() if error is not None]
    if relative is not None and errors and max(errors) < 2 * relative:
        return Finding("F4 one law", ONE_CLAIM, SUPPORTED, ONE_FORM, said, numbers)
    return Finding("F4 one law", ONE_CLAIM, UNDECIDED, ONE_FORM, said, numbers)


def _errors(row) -> str:
    shown = {"N": "N", "D": "D", "P": "bits", "compute": "largest runs"}
    found = [f"{100 * row.held_out[k]:.1f} % ({name})" for k, name in shown.items() if row.held_out.get(k) is not None]
    return ", ".join(found) or "none can be predicted"
