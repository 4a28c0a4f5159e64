"""The findings of Scaling Laws for Precision (arXiv 2411.04330) put to a table: supported, refuted or not testable,
each with the statistic that says so. The report prints them; nothing here looks at a figure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from analysis import closed_forms
from analysis import surface as surfaces
from analysis.cost import CostModel
from analysis.evidence import Evidence
from analysis.fit import Fit
from analysis.law import MIN_FRACTION, fraction
from analysis.search import least_resamples
from analysis.table import Table
from analysis.wording import count_label, fixed, interval_text

SUPPORTED, REFUTED, NOT_TESTABLE = "supported", "refuted", "not testable"
LEVEL = (2.5, 97.5)
LEAST_JOINT_RUNS = 3
FEW_CROSS_TERMS = 0.25  # cross terms below this share of the joint effect itself count as few


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim of the paper, the verdict of this table on it, the statistic in one sentence, and its numbers."""

    key: str
    claim: str
    verdict: str
    statistic: str
    numbers: Mapping[str, object] = dataclasses.field(default_factory=dict)


def all_findings(evidence: Evidence) -> list[Finding]:
    """F1 to F4 and the challenge to F1, in order."""
    return [
        degradation_grows(evidence),
        effects_multiply(evidence),
        optimal_precision(evidence),
        low_precision_robust(evidence),
        schedule_or_data(evidence),
    ]


# --- F1 -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Growth:
    """δ along D at one N and P_post: exponent of D by least squares on log δ, and δ at the least and the most D."""

    n: float
    p_post: float
    ratios: tuple[float, float]
    deltas: tuple[float, float]
    exponent: float

    @property
    def grew(self) -> bool:
        return self.deltas[1] > max(self.deltas[0], 0.0)


def growths(deltas: Table) -> list[Growth]:
    """One Growth per (N, P_post) with two or more D in a table with δ; seeds are averaged."""
    found = []
    for n in sorted(set(deltas["N"])):
        for p_post in sorted(set(deltas["P_post"])):
            here = deltas.select((deltas["N"] == n) & (deltas["P_post"] == p_post))
            tokens = np.unique(here["D"])
            means = np.array([here["delta"][here["D"] == d].mean() for d in tokens])
            if len(tokens) < 2:
                continue
            positive = means > 0
            slope = math.nan
            if positive.sum() > 1:
                slope = float(np.polyfit(np.log(tokens[positive]), np.log(means[positive]), 1)[0])
            ends = (float(tokens[0] / n), float(tokens[-1] / n))
            found.append(Growth(float(n), float(p_post), ends, (float(means[0]), float(means[-1])), slope))
    return found


def growth_sentence(evidence: Evidence) -> str:
    """One sentence: whether δ grew with D/N, per N, at the fewest bits the models were quantized to."""
    found = growths(evidence.high_precision_deltas)
    if not found:
        return "Whether δ grows with D/N cannot be said: no N was quantized at two or more D."
    lowest = min(g.p_post for g in found)
    series = [g for g in found if g.p_post == lowest]
    grew = [g for g in series if g.grew]
    each = "; ".join(
        f"N = {count_label(g.n)}: {g.deltas[0]:.3g} at D/N {g.ratios[0]:.3g}, {g.deltas[1]:.3g} at D/N "
        f"{g.ratios[1]:.3g}"
        for g in series
    )
    how = "at every N" if len(grew) == len(series) else f"at {len(grew)} of {len(series)} N"
    verb = "grew" if grew else "did not grow"
    return f"δ at {lowest:g} bits {verb} with D/N {how if grew else 'at any N'} ({each})."


def degradation_grows(evidence: Evidence) -> Finding:
    """F1 by γ_D of the fitted law of PTQ where it has an interval, and by the series of δ over D at each N and
    P_post.
    """
    claim = "PTQ costs more the longer a model was trained (δ grows with D/N); past D_crit more data makes it worse."
    found = growths(evidence.high_precision_deltas)
    if not found:
        return Finding("F1", claim, NOT_TESTABLE, "No N has rows after PTQ at two or more D.")
    rising = sum(g.grew for g in found)
    if sum(max(g.deltas) <= 0 for g in found) > len(found) / 2:
        return Finding("F1", claim, NOT_TESTABLE, "In most series PTQ adds nothing to the loss: no δ to follow.")
    slopes = [g.exponent for g in found if math.isfinite(g.exponent)]
    series = f"δ rises from least to most D in {rising} of {len(found)} series of one N and P_post"
    series += f" (median exponent of D {np.median(slopes):.2f})" if slopes else ""
    fit = evidence.fit_of("ptq")
    interval = _reported_interval(fit, "gamma_D")
    numbers = {"series": len(found), "rising": rising, "median_exponent": float(np.median(slopes)) if slopes else None}
    if interval is not None:
        verdict = SUPPORTED if interval[0] > 0 else REFUTED if interval[1] <= 0 else NOT_TESTABLE
        law = f"γ_D = {fit.params['gamma_D']:.3f} {interval_text(interval, '{:.3f}'.format)}"
        law += f", γ_N = {fit.params['gamma_N']:.3f}" if fit.params.get("gamma_N") is not None else ""
        numbers |= {"gamma_D": fit.params["gamma_D"], "gamma_D_ci": list(interval)}
        if verdict == NOT_TESTABLE:
            law += " (the interval holds zero)"
    else:
        p_value = float(stats.binomtest(rising, len(found)).pvalue)
        verdict = NOT_TESTABLE if p_value > 0.05 else SUPPORTED if rising > len(found) / 2 else REFUTED
        law = f"no interval of γ_D; sign test p = {p_value:.2g}"
    return Finding("F1", claim, verdict, f"{law}; {series}. {_turning(evidence)}", numbers)


def _turning(evidence: Evidence) -> str:
    """Whether the loss after PTQ was seen to rise with D, and where the fits put D_crit at the fewest bits."""
    deltas, worse, series = evidence.high_precision_deltas, 0, 0
    for n in set(deltas["N"]):
        for p_post in set(deltas["P_post"]):
            here = deltas.select((deltas["N"] == n) & (deltas["P_post"] == p_post))
            tokens = np.unique(here["D"])
            if len(tokens) > 1:
                series += 1
                means = [here["loss"][here["D"] == d].mean() for d in tokens]
                worse += means[-1] > min(means)
    seen = f"The quantized model was worse at the most D than at some lower D in {worse} of {series} series."
    ptq, base = evidence.fit_of("ptq"), evidence.fit_of("chinchilla", "precision")
    if ptq is None or base is None or {"gamma_D", "C_T", "gamma_post"} & set(ptq.refused) or "beta" in base.refused:
        return seen
    lowest, n = float(deltas["P_post"].min()), float(deltas["N"].min())
    turn = float(closed_forms.critical_tokens({**base.values, **ptq.values}, n, lowest))
    where = "never" if math.isinf(turn) else f"{turn / n:.3g} tokens per parameter"
    return f"{seen} By the fits D_crit at N = {count_label(n)} and {lowest:g} bits: {where}."


# --- F2 -------------------------------------------------------------------------------------------------------------


def effects_multiply(evidence: Evidence) -> Finding:
    """F2 by kappa of `N_eff = N (f_w f_a f_kv)^kappa` on the runs with several low parts, everything else from the runs
    with at most one (analysis/multiplicativity.py): kappa = 1 says that marginal fits predict joint runs.
    """
    claim = "The effects of weight, activation and KV precision multiply in N_eff: marginal fits predict joint runs."
    comparison = evidence.comparison
    test = None if comparison is None else comparison.multiplicativity
    if test is None:
        why = "the laws were not compared" if comparison is None else comparison.multiplicativity_skipped
        return Finding("F2", claim, NOT_TESTABLE, f"{why[0].upper()}{why[1:]}.")
    low, high = test.ci
    said = (
        f"κ = {test.kappa:.2f} {interval_text(test.ci, '{:.2f}'.format)} in N_eff = N (f_w f_a f_kv)^κ of "
        f"{test.joint_runs} joint runs, by fits to {test.marginal_runs} marginal ones, which miss the joint losses by "
        f"{100 * test.rms_log_error:.2f} % (rms; their own by {100 * test.rms_log_error_marginal:.2f} %)"
    )
    said += "" if test.r2_joint is None else f", R² {test.r2_joint:.3f}"
    numbers = {"kappa": test.kappa, "kappa_ci": list(test.ci), "joint_runs": test.joint_runs, "r2": test.r2_joint}
    if test.joint_runs < LEAST_JOINT_RUNS:
        few = f"{said}. {test.joint_runs} joint runs are too few to tell, want {LEAST_JOINT_RUNS}."
        return Finding("F2", claim, NOT_TESTABLE, few, numbers)
    if high - low > 4 * FEW_CROSS_TERMS:
        return Finding("F2", claim, NOT_TESTABLE, f"{said}. The interval is too wide to tell.", numbers)
    if low <= 1 <= high or abs(test.kappa - 1) <= FEW_CROSS_TERMS:
        return Finding("F2", claim, SUPPORTED, f"{said}.", numbers)
    how = "compound beyond the product" if test.kappa > 1 else "overlap, less than the product"
    return Finding("F2", claim, REFUTED, f"{said}. The effects {how}.", numbers)


def effective_share(fit: Fit, losses: Table) -> np.ndarray:
    """N_eff/N of every row before PTQ: the fitted law solved for N at the measured loss, over that of the 16-bit rows
    of equal N and D, so that the misfit of its Chinchilla part cancels. NaN where there is none or the loss is below
    the floor.
    """
    p = fit.values
    rest = losses["loss"] - p["B"] * losses["D"] ** -p["beta"] - p["E"]
    n_eff = np.where(rest > 0, (np.where(rest > 0, rest, 1.0) / p["A"]) ** (-1.0 / p["alpha"]), np.nan)
    share = np.full(len(losses), np.nan)
    high = losses.high_precision & np.isfinite(n_eff)
    for n, d in set(zip(losses["N"], losses["D"], strict=True)):
        here = (losses["N"] == n) & (losses["D"] == d)
        if (here & high).any():
            share[here] = n_eff[here] / np.exp(np.mean(np.log(n_eff[here & high])))
    return share


# --- F3 -------------------------------------------------------------------------------------------------------------


def optimal_precision(evidence: Evidence) -> Finding:
    """F3 by the cost-optimal precision of the fitted law, argmax f(P)/P, with its interval from the bootstrap
    samples.
    """
    claim = (
        "Cost-optimal training precision is about 7-8 bits at every budget; "
        "below 4 bits needs over 4 times the parameters."
    )
    fit = evidence.fit_of("precision", "unified")
    parts = surfaces.informed_parts(fit) if fit is not None else ()
    if not parts:
        return Finding("F3", claim, NOT_TESTABLE, "No fitted law says what training in low precision costs.")
    relative = CostModel().relative
    best = closed_forms.best_precision(surfaces.capacity(fit, parts), relative)
    factor = float(closed_forms.make_up_factor(surfaces.capacity(fit, parts), 4.0))
    drawn = [surfaces.capacity(surfaces.draw(fit, i), parts) for i in range(min(surfaces.draws(fit), 400))]
    named = ", ".join({"w": "weights", "a": "activations", "kv": "KV cache"}[x] for x in parts)
    said = f"P* of {named} = {best:.1f} bits"
    numbers: dict[str, object] = {"P_star": best, "parts": list(parts), "N_factor_at_4_bits": factor}
    interval = None
    if len(drawn) >= least_resamples(0.95):
        interval = np.percentile([closed_forms.best_precision(f, relative) for f in drawn], LEVEL)
        factors = np.percentile([float(closed_forms.make_up_factor(f, 4.0)) for f in drawn], LEVEL)
        numbers |= {"P_star_ci": interval.tolist(), "N_factor_at_4_bits_ci": factors.tolist()}
        said += f" {interval_text(interval, '{:.1f}'.format)}"
        said += f"; 4 bits need x {factor:.2f} {interval_text(factors, '{:.2f}'.format)} the parameters of 16 bits"
    else:
        said += f"; 4 bits need x {factor:.2f} the parameters of 16 bits; no bootstrap, no interval"
    clipped = [
        x for x in parts if fraction(4.0, fit.values[f"gamma_{x}"], fit.values.get(f"n_{x}", 0.0)) <= MIN_FRACTION
    ]
    said += " (f vanishes at 4 bits)" if clipped else ""
    lowest = min(float(evidence.losses[f"P_{x}"].min()) for x in parts)
    if best < lowest:
        said += f"; below the lowest precision measured ({lowest:g} bits)"
    if len(parts) < 3:
        return Finding(
            "F3",
            claim,
            NOT_TESTABLE,
            f"{said}. The claim is about all three parts; the table informs {named}.",
            numbers,
        )
    if interval is None:
        return Finding("F3", claim, NOT_TESTABLE, f"{said}.", numbers)
    if interval[0] > 8.5 or interval[1] < 6.5:
        return Finding("F3", claim, REFUTED, f"{said}. The interval lies outside 6.5-8.5.", numbers)
    if interval[0] >= 5.5 and interval[1] <= 9.5:
        return Finding("F3", claim, SUPPORTED, f"{said}.", numbers)
    return Finding("F3", claim, NOT_TESTABLE, f"{said}. The interval is too wide to tell.", numbers)


# --- F4 -------------------------------------------------------------------------------------------------------------


def low_precision_robust(evidence: Evidence) -> Finding:
    """F4 by pairs: δ of a model trained in low precision over δ of the 16-bit model of equal N, D and P_post."""
    claim = "One law predicts training and serving precision; models trained in low precision lose less under PTQ."
    deltas = evidence.deltas
    low = ~deltas.high_precision & (deltas["P_w"] > deltas["P_post"])  # from P_w on the law says that δ is 0
    if not low.any():
        return Finding(
            "F4", claim, NOT_TESTABLE, "No model trained below 16 bits was quantized to fewer bits than its weights."
        )
    base: dict[tuple, list[float]] = {}
    for i in np.flatnonzero(deltas.high_precision):
        base.setdefault((deltas["N"][i], deltas["D"][i], deltas["P_post"][i]), []).append(deltas["delta"][i])
    groups: dict[int, list[float]] = {}
    models = deltas.models
    for i in np.flatnonzero(low):
        at_16 = np.mean(base.get((deltas["N"][i], deltas["D"][i], deltas["P_post"][i]), [math.nan]))
        if at_16 > 0:
            groups.setdefault(models[i], []).append(float(deltas["delta"][i] / at_16))
    if len(groups) < LEAST_JOINT_RUNS:
        return Finding(
            "F4", claim, NOT_TESTABLE, f"{len(groups)} low-precision runs have a 16-bit run beside them after PTQ."
        )
    ratios = np.array([np.median(g) for g in groups.values()])
    less = int(np.sum(ratios < 1))
    p_value = float(stats.binomtest(less, len(ratios)).pvalue)
    said = f"δ is below that of the 16-bit model in {less} of {len(ratios)} runs"
    said += f" (median ratio {np.median(ratios):.2f}, sign test p = {p_value:.2g})"
    fit = evidence.fit_of("unified")
    said += f"; unified law R² = {fixed(fit.r2)}" if fit is not None else ""
    numbers = {"runs": len(ratios), "less": less, "median_ratio": float(np.median(ratios)), "p": p_value}
    verdict = NOT_TESTABLE if p_value > 0.05 else SUPPORTED if less > len(ratios) / 2 else REFUTED
    return Finding("F4", claim, verdict, f"{said}.", numbers)


# --- the challenge --------------------------------------------------------------------------------------------------


def schedule_or_data(evidence: Evidence) -> Finding:
    """The challenge of arXiv 2510.06213: δ at equal N, D and P_post between learning-rate schedules."""
    claim = "The growth of δ comes from the decay of the learning rate rather than from data (arXiv 2510.06213)."
    deltas = evidence.deltas_by_schedule
    if "schedule" not in deltas or len(set(deltas["schedule"]) - {""}) < 2:
        return Finding(
            "Challenge", claim, NOT_TESTABLE, "The table has no two learning-rate schedules with rows after PTQ."
        )
    exponents = {}
    for name in sorted(set(deltas["schedule"]) - {""}):
        slopes = [g.exponent for g in growths(deltas.select(deltas["schedule"] == name)) if math.isfinite(g.exponent)]
        if slopes:
            exponents[str(name)] = (float(np.median(slopes)), len(slopes))
    if len(exponents) < 2:
        return Finding("Challenge", claim, NOT_TESTABLE, "Fewer than two schedules have δ at two or more D of one N.")
    said = ", ".join(f"{name} {slope:.2f} ({count} series)" for name, (slope, count) in exponents.items())
    slopes = {name: slope for name, (slope, _) in exponents.items()}
    decayed = {name: s for name, s in slopes.items() if "const" not in name.lower()}
    constant = {name: s for name, s in slopes.items() if "const" in name.lower()}
    numbers = {"median_exponents": slopes}
    if not decayed or not constant:
        return Finding(
            "Challenge",
            claim,
            NOT_TESTABLE,
            f"Exponent of D in δ: {said}; no constant schedule to set against.",
            numbers,
        )
    gap = min(decayed.values())
    verdict = (
        SUPPORTED
        if max(constant.values()) < 0.25 * gap
        else REFUTED
        if min(constant.values()) > 0.75 * gap
        else NOT_TESTABLE
    )
    return Finding("Challenge", claim, verdict, f"Exponent of D in δ by schedule: {said}.", numbers)


def _reported_interval(fit: Fit | None, name: str) -> tuple[float, float] | None:
    if fit is None or name in fit.refused or fit.params.get(name) is None:
        return None
    interval = fit.ci.get(name)
    return None if interval is None or any(x is None for x in interval) else (float(interval[0]), float(interval[1]))
