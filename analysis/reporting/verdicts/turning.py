"""F1 on D_crit: does more data make the quantized model worse?

D_crit is claimed only where measured losses turn: a least value inside the series, between a fall and a rise that are
both larger than the noise between seeds. Anything else is an extrapolation by a fit.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from analysis import laws
from analysis.planning import closed_forms
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.finding import CONTRADICTED, SUPPORTED, UNDECIDED, Finding, undecided
from analysis.reporting.verdicts.series import FALLS, RISES, TURNS, Series, all_series
from analysis.wording import count_label

WORSE = "Past some D_crit more data makes the quantized model worse."
WORSE_FORM = (
    "Wherever γ_D > 0 the law has a D_crit at every N and P_post, because what is left to learn, B D^-β, vanishes "
    "and δ does not: that there is one is forced, where it lies is an extrapolation unless the measured losses turn."
)


def more_data_hurts(evidence: Evidence) -> Finding:
    """F1 on D_crit: only from measured losses after PTQ that rise again by more than the noise between seeds."""
    series = all_series(evidence)
    if not series:
        return undecided("F1 D_crit", WORSE, WORSE_FORM, "No N has rows after PTQ at two or more D.")
    worse = [s for s in series if s.served in (TURNS, RISES)]
    turned = [s for s in worse if s.served == TURNS]
    sizes, all_sizes = {s.n for s in worse}, {s.n for s in series}
    main = series[0].method
    fit = _by_fit(evidence, [s for s in series if s.method == main])
    said = (
        "The loss as served is least at some D and higher, beyond the noise between seeds, at the most D in "
        f"{len(worse)} of {len(series)} series ({_by_bits(worse)}); "
        if worse
        else f"In none of {len(series)} series is the loss as served higher at the most D than at its least, beyond "
        f"the noise "
        "between seeds; "
    )
    said += (
        f"in {len(turned)} of them it first fell beyond the noise, which puts D_crit between measured D: "
        + "; ".join(_turn_words(s) for s in turned)
        if turned
        else "it nowhere first fell beyond the noise, so that no D_crit is measured"
        + (
            ", only that it lies below the second D of those series"
            if worse and all(s.lowest == 0 for s in worse)
            else ""
        )
    )
    numbers = {
        "series": len(series),
        "worse_beyond_noise": len(worse),
        "turned": len(turned),
        "sizes_worse": sorted(sizes),
        **fit.numbers,
    }
    if len(sizes) >= min(2, len(all_sizes)) and worse:
        verdict = SUPPORTED
    elif not worse and fit.foretold >= 3:
        verdict = CONTRADICTED
    else:
        verdict = UNDECIDED
    return Finding("F1 D_crit", WORSE, verdict, WORSE_FORM, f"{said}.\n{fit.words}".strip(), numbers, turn_rows(series))


def _by_bits(series: Sequence[Series]) -> str:
    counted = Counter((s.method.upper() or "PTQ", s.p_post) for s in series)
    return ", ".join(f"{count} of {method} at {bits:g} bits" for (method, bits), count in sorted(counted.items()))


def _turn_words(series: Series) -> str:
    low, high = series.bounds()
    return (
        f"{series.method.upper() or 'PTQ'} {series.p_post:g} bits, N = {count_label(series.n)}: D/N "
        f"{low / series.n:.3g} to {high / series.n:.3g}"
    )


def turn_rows(series: Sequence[Series]) -> list[dict[str, object]]:
    """One record for each series whose loss as served does not fall throughout."""
    return [
        {
            "method": s.method or "PTQ",
            "P_post": s.p_post,
            "N": count_label(s.n),
            "least at D/N": round(float(s.tokens[s.lowest] / s.n), 1),
            "least loss": round(float(s.losses[s.lowest]), 4),
            "most D/N": round(float(s.tokens[-1] / s.n), 1),
            "loss there": round(float(s.losses[-1]), 4),
            "course": s.served if s.losses[-1] > s.losses[s.lowest] else FALLS,
        }
        for s in series
        if s.lowest < len(s.tokens) - 1
    ]


@dataclasses.dataclass(frozen=True)
class ByFit:
    """D_crit by the fits: in words, numbers, and in how many series they predict a rise that was not measured."""

    words: str = ""
    foretold: int = 0
    numbers: dict[str, object] = dataclasses.field(default_factory=dict)


def _by_fit(evidence: Evidence, series: Sequence[Series]) -> ByFit:
    """D_crit of the fitted laws at the fewest bits and smallest N, and how far they miss the losses it rests on."""
    ptq, base = evidence.fit_of("ptq"), evidence.fit_of("chinchilla", "precision")
    if (
        ptq is None
        or base is None
        or {"gamma_D", "C_T", "gamma_post"} & set(ptq.unidentified)
        or "beta" in base.unidentified
    ):
        return ByFit()
    constants = {**base.values, **ptq.values}
    predict = lambda s: (
        laws.predict(base.law, base.values, N=s.n, D=s.tokens)
        + laws.predict("ptq", ptq.values, N=s.n, D=s.tokens, P_post=s.p_post)
    )
    at = min(series, key=lambda s: (s.p_post, s.n))
    turn = float(closed_forms.critical_tokens(constants, at.n, at.p_post))
    bits = [s for s in series if s.p_post == at.p_post]
    misses = np.abs(np.concatenate([predict(s) - s.losses for s in bits]))
    foretold = 0
    for s in series:
        noise = evidence.noise_after_ptq(s.method, s.p_post, "loss")
        rise = predict(s)[-1] - predict(s).min()
        limit = 0.0 if noise is None else float(noise.limit(N=s.n, D=s.tokens[-1]))
        foretold += bool(rise > limit and s.served not in (TURNS, RISES))
    if math.isinf(turn):
        return ByFit("By the fits the quantized model never turns worse.", foretold, {"fit_D_crit": None})
    words = (
        f"By the fits alone D_crit at {at.p_post:g} bits and N = {count_label(at.n)} would be {turn / at.n:.3g} "
        f"tokens per parameter; they miss the {at.p_post:g}-bit losses by {misses.min():.2g} to {misses.max():.2g} "
        "nats"
    )
    words += f" and predict a rise in {foretold} series where none was measured." if foretold else "."
    numbers = {"fit_D_crit_per_N": turn / at.n, "fit_misses": [float(misses.min()), float(misses.max())]}
    return ByFit(words, foretold, numbers)
