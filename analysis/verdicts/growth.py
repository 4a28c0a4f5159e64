"""F1: the loss that PTQ adds grows with training length, and past D_crit more data makes the quantized model worse.

Read off the rows: a series is one PTQ method, N and P_post over the D at which it was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from analysis import closed_forms, laws
from analysis.evidence import Evidence
from analysis.seed_noise import Noise
from analysis.table import Table
from analysis.verdicts.finding import CONTRADICTED, LEVEL, SUPPORTED, UNDECIDED, Finding, undecided
from analysis.wording import count_label, interval_text

RISES, FALLS, FLAT, TURNS = "rises", "falls", "within noise", "turns"
DRAWS = 1000  # bootstrap of the runs
MOST = 0.9  # share of the series that counts as all but a few


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


def common_exponent(
    evidence: Evidence, method: str, series: Sequence[Series]
) -> tuple[float, tuple[float, float]] | None:
    """One exponent of D for the series whose δ lie above the noise at every D, each with its own level, and its 95 %
    interval over runs. None where there are none.
    """
    keys = {(s.n, s.p_post): i for i, s in enumerate(series) if s.above_noise and s.method == method}
    rows = evidence.deltas_by_method[method]
    rows = rows.select(rows.high_precision & (rows["delta"] > 0))
    which = np.array([keys.get(key, -1) for key in zip(rows["N"], rows["P_post"], strict=True)], int)
    if not (which >= 0).any():
        return None
    rows, which = rows.select(which >= 0), which[which >= 0]
    run = np.unique(rows["run"].astype(str), return_inverse=True)[1]
    x, y = np.log(rows["D"]), np.log(rows["delta"])
    slope = lambda weight: _slope_within(x, y, which, weight)
    runs = run.max() + 1
    counts = np.random.default_rng(0).multinomial(runs, np.full(runs, 1 / runs), size=DRAWS)
    drawn = np.array([slope(c[run].astype(float)) for c in counts])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < DRAWS / 2:
        return None
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return slope(np.ones(len(x))), (float(low), float(high))


def _slope_within(x, y, group, weight) -> float:
    """Weighted least-squares slope with an intercept for each group."""
    total = np.maximum(np.bincount(group, weight), 1e-300)
    dx = x - (np.bincount(group, weight * x) / total)[group]
    dy = y - (np.bincount(group, weight * y) / total)[group]
    spread = float(np.sum(weight * dx * dx))
    return float(np.sum(weight * dx * dy)) / spread if spread > 0 else math.nan


# --- δ grows with D -------------------------------------------------------------------------------------------------

GROWS = "The loss that PTQ adds (δ) grows with training length D at fixed N."
GROWS_FORM = (
    "δ = C_T D^γ_D / N^γ_N · exp(-P_post/γ_post) has one exponent of D for every N and P_post. Its sign is free, so that "
    "growth itself is not forced; that it is alike at all N and bits is."
)


def degradation_grows(evidence: Evidence) -> Finding:
    """F1 by the series of each PTQ method; the verdict has to hold for all of them."""
    series = all_series(evidence)
    if not series:
        return undecided("F1", GROWS, GROWS_FORM, "No N has rows after PTQ at two or more D.")
    verdicts, sentences, numbers = [], [], {}
    for method in dict.fromkeys(s.method for s in series):
        mine = [s for s in series if s.method == method]
        fitted = common_exponent(evidence, method, mine)
        verdicts.append(_grows(mine, fitted))
        sentences.append(_growth_words(evidence, method, mine, fitted))
        numbers[method or "PTQ"] = _growth_numbers(evidence, method, mine, fitted)
    verdict = verdicts[0] if len(set(verdicts)) == 1 else UNDECIDED
    law = _fitted_exponent(evidence)
    sentences += [law] if law else []
    return Finding("F1", GROWS, verdict, GROWS_FORM, " ".join(sentences), numbers, growth_rows(series))


def _grows(series: Sequence[Series], fitted) -> str:
    courses = Counter(s.course for s in series)
    if fitted is None or not courses[RISES] + courses[FALLS]:
        return UNDECIDED
    rising = courses[RISES] / (courses[RISES] + courses[FALLS])
    if fitted[1][0] > 0 and rising >= MOST:
        return SUPPORTED
    if fitted[1][1] < 0 and rising <= 1 - MOST:
        return CONTRADICTED
    return UNDECIDED


def _growth_numbers(evidence: Evidence, method: str, series: Sequence[Series], fitted) -> dict[str, object]:
    courses = Counter(s.course for s in series)
    deltas = evidence.deltas_by_method[method]
    mine = deltas["delta"][deltas.high_precision]
    return {
        "series": len(series),
        "rise_beyond_noise": courses[RISES],
        "fall_beyond_noise": courses[FALLS],
        "within_noise": courses[FLAT],
        "exponent": None if fitted is None else fitted[0],
        "exponent_ci": None if fitted is None else list(fitted[1]),
        "series_above_noise": sum(s.above_noise for s in series),
        "rows": len(mine),
        "rows_not_above_zero": int(np.sum(mine <= 0)),
    }


def _growth_words(evidence: Evidence, method: str, series: Sequence[Series], fitted) -> str:
    told = _growth_numbers(evidence, method, series, fitted)
    name = method.upper() if method else "PTQ"
    said = f"{name}: from least to most D δ rises beyond the noise in {told['rise_beyond_noise']} of {told['series']} "
    said += f"series of one N and P_post, falls beyond it in {told['fall_beyond_noise']}"
    said += f"; {told['rows_not_above_zero']} of {told['rows']} δ are 0 or less" if told["rows_not_above_zero"] else ""
    if fitted is not None:
        said += (
            f"; in the {told['series_above_noise']} series above the noise δ goes as D^{fitted[0]:.2f} "
            f"{interval_text(fitted[1], '{:.2f}'.format)}"
        )
    return said + "."


def growth_rows(series: Sequence[Series]) -> list[dict[str, object]]:
    """One record for each PTQ method and P_post: how many series rise, and the exponents of D by N."""
    records = []
    for method, p_post in dict.fromkeys((s.method, s.p_post) for s in series):
        mine = [s for s in series if (s.method, s.p_post) == (method, p_post)]
        courses = Counter(s.course for s in mine)
        exponents = [s.exponent for s in mine if math.isfinite(s.exponent)]
        records.append(
            {
                "method": method or "PTQ",
                "P_post": p_post,
                "sizes": len(mine),
                "rise": courses[RISES],
                "fall": courses[FALLS],
                "within noise": courses[FLAT],
                "exponent of D, least": round(min(exponents), 2) if exponents else None,
                "most": round(max(exponents), 2) if exponents else None,
                "δ at least D": f"{min(s.deltas[0] for s in mine):.2g} to {max(s.deltas[0] for s in mine):.2g}",
                "δ at most D": f"{min(s.deltas[-1] for s in mine):.2g} to {max(s.deltas[-1] for s in mine):.2g}",
            }
        )
    return records


def _fitted_exponent(evidence: Evidence) -> str:
    fit = evidence.fit_of("ptq")
    if fit is None or fit.params.get("gamma_D") is None:
        return ""
    interval = fit.ci.get("gamma_D")
    return f"The fitted law has γ_D = {fit.params['gamma_D']:.2f} {interval_text(interval, '{:.2f}'.format)}.".replace(
        " .", "."
    )


def growth_sentence(evidence: Evidence) -> str:
    """One sentence: whether δ grew with D/N, per N, at the fewest bits the models were quantized to."""
    found = [s for s in all_series(evidence) if s.method == next(iter(evidence.deltas_by_method))]
    if not found:
        return "Whether δ grows with D/N cannot be said: no N was quantized at two or more D."
    lowest = min(s.p_post for s in found)
    series = [s for s in found if s.p_post == lowest]
    each = "; ".join(
        f"N = {count_label(s.n)}: {s.deltas[0]:.3g} at D/N {s.tokens[0] / s.n:.3g}, {s.deltas[-1]:.3g} at D/N "
        f"{s.tokens[-1] / s.n:.3g}"
        for s in series
    )
    grew = sum(s.course == RISES for s in series)
    how = "at every N" if grew == len(series) else f"at {grew} of {len(series)} N" if grew else "at any N"
    return f"δ at {lowest:g} bits {'grew' if grew else 'did not grow'} with D/N {how} ({each})."


# --- past D_crit ----------------------------------------------------------------------------------------------------

WORSE = "Past some D_crit more data makes the quantized model worse."
WORSE_FORM = (
    "Wherever γ_D > 0 the law has a D_crit at every N and P_post, because what is left to learn, B D^-β, vanishes and δ "
    "does not: that there is one is forced, where it lies is an extrapolation unless the measured losses turn."
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
        f"The loss as served is least at some D and higher, beyond the noise between seeds, at the most D in {len(worse)} "
        f"of {len(series)} series ({_by_bits(worse)}); "
        if worse
        else f"In none of {len(series)} series is the loss as served higher at the most D than at its least, beyond the noise "
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
    return Finding("F1 D_crit", WORSE, verdict, WORSE_FORM, f"{said}. {fit.words}".strip(), numbers, turn_rows(series))


def _by_bits(series: Sequence[Series]) -> str:
    counted = Counter((s.method.upper() or "PTQ", s.p_post) for s in series)
    return ", ".join(f"{count} of {method} at {bits:g} bits" for (method, bits), count in sorted(counted.items()))


def _turn_words(series: Series) -> str:
    low, high = series.bounds()
    return (
        f"{series.method.upper() or 'PTQ'} {series.p_post:g} bits, N = {count_label(series.n)}: D/N {low / series.n:.3g} to "
        f"{high / series.n:.3g}"
    )


def turn_rows(series: Sequence[Series]) -> list[dict[str, object]]:
    """One record for each series whose loss as served is not simply falling."""
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
    """What the fits say of D_crit: in words, numbers, and in how many series they foretell a rise that is not there."""

    words: str = ""
    foretold: int = 0
    numbers: dict[str, object] = dataclasses.field(default_factory=dict)


def _by_fit(evidence: Evidence, series: Sequence[Series]) -> ByFit:
    """D_crit of the fitted laws at the fewest bits and smallest N, and how far they miss the losses it rests on."""
    ptq, base = evidence.fit_of("ptq"), evidence.fit_of("chinchilla", "precision")
    if ptq is None or base is None or {"gamma_D", "C_T", "gamma_post"} & set(ptq.refused) or "beta" in base.refused:
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
        f"By the fits alone D_crit at {at.p_post:g} bits and N = {count_label(at.n)} would be {turn / at.n:.3g} tokens per "
        f"parameter; they miss the {at.p_post:g}-bit losses by {misses.min():.2g} to {misses.max():.2g} nats"
    )
    words += f" and foretell a rise in {foretold} series where none was measured." if foretold else "."
    numbers = {"fit_D_crit_per_N": turn / at.n, "fit_misses": [float(misses.min()), float(misses.max())]}
    return ByFit(words, foretold, numbers)
