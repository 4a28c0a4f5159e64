"""F1: the loss that PTQ adds grows with training length, by the rows of every PTQ method."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from analysis.fitting.statistics import interval
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.finding import CONTRADICTED, SUPPORTED, UNDECIDED, Finding, undecided
from analysis.reporting.verdicts.series import FALLS, FLAT, RISES, Series, all_series
from analysis.wording import count_label, interval_text

DRAWS = 1000  # bootstrap of the runs
MOST = 0.9  # share of the series that counts as all but a few
GROWS = "The loss that PTQ adds (δ) grows with training length D at fixed N."
GROWS_FORM = (
    "δ = C_T D^γ_D / N^γ_N · exp(-P_post/γ_post) has one exponent of D for every N and P_post. Its sign is free, so "
    "that growth itself is not forced; that it is alike at all N and bits is."
)


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
    return slope(np.ones(len(x))), interval(drawn)


def _slope_within(x, y, group, weight) -> float:
    """Weighted least-squares slope with an intercept for each group."""
    total = np.maximum(np.bincount(group, weight), 1e-300)
    dx = x - (np.bincount(group, weight * x) / total)[group]
    dy = y - (np.bincount(group, weight * y) / total)[group]
    spread = float(np.sum(weight * dx * dx))
    return float(np.sum(weight * dx * dy)) / spread if spread > 0 else math.nan


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
    return Finding("F1", GROWS, verdict, GROWS_FORM, "\n".join(sentences), numbers, growth_rows(series))


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
    counts = _growth_numbers(evidence, method, series, fitted)
    name = method.upper() if method else "PTQ"
    said = (
        f"{name}: from least to most D δ rises beyond the noise in {counts['rise_beyond_noise']} of {counts['series']} "
    )
    said += f"series of one N and P_post, falls beyond it in {counts['fall_beyond_noise']}"
    said += (
        f"; {counts['rows_not_above_zero']} of {counts['rows']} δ are 0 or less"
        if counts["rows_not_above_zero"]
        else ""
    )
    if fitted is not None:
        said += (
            f"; in the {counts['series_above_noise']} series above the noise δ goes as D^{fitted[0]:.2f} "
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
