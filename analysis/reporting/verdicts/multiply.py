"""F2: do the effects of weight, activation and KV precision multiply in N_eff, so that runs with one low part predict
those with several?

Three tests. Laws fitted to runs with at most one low part predict the others: a bias there, not scatter, shows that
effects compound or overlap. kappa (fitting/multiplicativity.py) is the size of that bias in N_eff. And without any law:
shares of N that multiply cost at least the sum of what each costs alone, whatever alpha and f are.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from analysis import laws
from analysis.fitting import fit
from analysis.fitting.multiplicativity import is_joint, require_marginals
from analysis.fitting.options import FitError
from analysis.fitting.statistics import LEVEL, interval
from analysis.laws.law import HIGH_PRECISION_BITS, LawError
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.finding import CONTRADICTED, SUPPORTED, UNDECIDED, Finding, undecided
from analysis.table import PRECISIONS, Table
from analysis.table.seed_noise import Noise
from analysis.wording import interval_text

CLAIM = "The effects of weight, activation and KV precision multiply in N_eff: fits to single parts predict joint runs."
FORM = (
    "N_eff = N f_w f_a f_kv has no interaction of parts. It follows, whatever the constants, that parts lowered "
    "together cost at least the sum of what each costs alone."
)
PREDICTORS = ("precision", "noise")  # product of shares, and variances that add
LEAST_JOINT_RUNS = 3
CLOSE = 0.25  # kappa within this of 1: few cross terms
RESAMPLES, STARTS = 100, 64


@dataclasses.dataclass(frozen=True)
class Forecast:
    """How a law fitted to runs with at most one low part predicts the others: log error, predicted over measured.

    mean_ci: over resamples of the single-part runs (with refits) and of the joint ones.
    """

    law: str
    errors: np.ndarray
    mean_ci: tuple[float, float]
    rms_of_its_own: float
    starts_at_best: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.errors))

    @property
    def rms(self) -> float:
        return math.sqrt(float(np.mean(self.errors**2)))

    @property
    def above(self) -> int:
        """Joint runs whose loss the law puts too high."""
        return int(np.sum(self.errors > 0))

    @property
    def sign_p(self) -> float:
        return float(stats.binomtest(self.above, len(self.errors)).pvalue)

    @property
    def biased(self) -> bool:
        """Whether both the sign test and the interval of the mean reject zero."""
        return self.sign_p < 1 - LEVEL and not self.mean_ci[0] <= 0 <= self.mean_ci[1]

    @property
    def words(self) -> str:
        low, high = (100 * end for end in self.mean_ci)
        return (
            f"{self.law} puts {self.above} of {len(self.errors)} joint losses too high (sign test p = "
            f"{self.sign_p:.2g}), mean {100 * self.mean:+.2f} % [{low:+.2f}, {high:+.2f}] of {100 * self.rms:.2f} % "
            f"rms (on its own runs {100 * self.rms_of_its_own:.2f} %; {self.starts_at_best:.0%} of starts at its best "
            "fit)"
        )


def forecast(law: str, losses: Table, seed: int = 0) -> Forecast:
    """Fits `law` to the rows with at most one low part and predicts the rest. Raises FitError, LawError."""
    joint_n = is_joint(losses)
    single, joint = losses.select(~joint_n), losses.select(joint_n)
    fitted = fit.fit(law, single, starts=STARTS, bootstrap_resamples=RESAMPLES, profile=False, seed=seed)
    error = lambda values, rows: np.log(laws.predict(fitted.law, values, **rows.columns) / rows["loss"])
    rng, means = np.random.default_rng(seed), []
    for i in range(RESAMPLES):
        drawn = error({name: values[i] for name, values in fitted.samples.items()}, joint)
        means.append(np.mean(drawn[rng.integers(len(drawn), size=len(drawn))]))
    own = error(fitted.values, single)
    assert fitted.starts_at_best is not None  # only a fit that was read from a file can lack it
    return Forecast(
        law,
        error(fitted.values, joint),
        interval(means),
        math.sqrt(float(np.mean(own**2))),
        fitted.starts_at_best,
    )


def forecasts(losses: Table, seed: int = 0) -> dict[str, Forecast | str]:
    """The forecast of every law in PREDICTORS, or why it could not be made."""
    made: dict[str, Forecast | str] = {}
    for law in PREDICTORS:
        try:
            made[law] = forecast(law, losses, seed)
        except (FitError, LawError) as error:
            made[law] = str(error)
    return made


@dataclasses.dataclass(frozen=True)
class Sum:
    """What one joint setting costs over its 16-bit model, beside the sum of what its parts cost alone, in nats.

    weights: of every mean loss in alone - together, by setting (N, D, bits).
    """

    n: float
    d: float
    bits: tuple[float, ...]
    together: float
    alone: float
    weights: Mapping[tuple, float]

    @property
    def saved(self) -> float:
        return self.alone - self.together


@dataclasses.dataclass(frozen=True)
class Sums:
    """Every joint setting whose parts were each lowered alone to the same bits at equal N and D; runs counts the seeds
    of each setting.
    """

    found: tuple[Sum, ...]
    runs: Mapping[tuple, int]
    noise: Noise | None

    def limit(self, weights: Mapping[tuple, float]) -> float:
        """The noise (95 %) of this weighted sum of losses; settings that several sums share count once."""
        if self.noise is None:
            return 0.0
        return self.noise.t * math.sqrt(
            sum(w**2 / self.runs[key] * float(self.noise.at(N=key[0], D=key[1])) ** 2 for key, w in weights.items())
        )

    @property
    def resolved(self) -> tuple[int, int]:
        """How many cost less, and how many more, together than alone, by more than the noise."""
        less = sum(s.saved > self.limit(s.weights) for s in self.found)
        return less, sum(-s.saved > self.limit(s.weights) for s in self.found)

    @property
    def mean(self) -> tuple[float, float]:
        """Mean of what is saved by going together, and its noise."""
        weights: dict[tuple, float] = {}
        for s in self.found:
            for key, w in s.weights.items():
                weights[key] = weights.get(key, 0.0) + w / len(self.found)
        return float(np.mean([s.saved for s in self.found])), self.limit(weights)


def sums_of_parts(evidence: Evidence) -> Sums:
    """The joint settings of this table beside the sums of their parts; seeds averaged."""
    table = evidence.losses
    cells: dict[tuple, list[float]] = {}
    for n, d, *bits, loss in zip(*(table[name] for name in ("N", "D", *PRECISIONS, "loss")), strict=True):
        cells.setdefault((n, d, *(min(b, HIGH_PRECISION_BITS) for b in bits)), []).append(loss)
    mean = {key: float(np.mean(losses)) for key, losses in cells.items()}
    found = []
    for key in sorted(cells):
        n, d, *bits = key
        low = [i for i, b in enumerate(bits) if b < HIGH_PRECISION_BITS]
        base = (n, d, *[HIGH_PRECISION_BITS] * len(bits))
        alone = [(n, d, *(b if i == j else HIGH_PRECISION_BITS for i, b in enumerate(bits))) for j in low]
        if len(low) < 2 or any(other not in cells for other in (base, *alone)):
            continue
        weights = {key: -1.0, base: 1.0 - len(low), **dict.fromkeys(alone, 1.0)}
        together, total = mean[key] - mean[base], sum(mean[other] - mean[base] for other in alone)
        found.append(Sum(float(n), float(d), tuple(float(b) for b in bits), together, total, weights))
    return Sums(tuple(found), {key: len(losses) for key, losses in cells.items()}, evidence.loss_noise)


def effects_multiply(evidence: Evidence) -> Finding:
    """F2 by signed errors of the forecasts, kappa, and the sums of parts."""
    losses = evidence.losses
    try:
        require_marginals(losses)
    except FitError as error:
        return undecided("F2", CLAIM, FORM, f"{str(error)[0].upper()}{str(error)[1:]}.")
    joint_runs = int(np.sum(is_joint(losses)))
    if joint_runs < LEAST_JOINT_RUNS:
        return undecided("F2", CLAIM, FORM, f"{joint_runs} joint runs are too few, want at least {LEAST_JOINT_RUNS}.")
    made = forecasts(losses) if evidence.forecasts is None else evidence.forecasts
    fitted = {law: found for law, found in made.items() if isinstance(found, Forecast)}
    failed = {law: why for law, why in made.items() if law not in fitted}
    sums = sums_of_parts(evidence)
    said = [f"{f.words}." for f in fitted.values()]
    said += [f"{law} could not be fitted to runs with one low part: {why}." for law, why in failed.items()]
    said += [words for words in (_kappa_words(evidence), _sum_words(sums)) if words]
    verdict, why = _verdict(fitted.get("precision"), _kappa(evidence), sums)
    return Finding(
        "F2", CLAIM, verdict, FORM, "\n".join([*said, why]).strip(), _numbers(evidence, fitted, sums), _rows(fitted)
    )


def _verdict(product: Forecast | None, kappa, sums: Sums) -> tuple[str, str]:
    against = []
    if product is not None and product.biased:
        how = "overlap" if product.mean > 0 else "compound"
        inside = " although κ's interval contains 1" if kappa is not None and kappa.ci[0] <= 1 <= kappa.ci[1] else ""
        against.append(f"The product is biased{inside}: the effects {how}.")
    if sums.found and sums.mean[0] > sums.mean[1]:
        against.append("Together they cost less than the sum of their parts, which no product of shares allows.")
    if against:
        return CONTRADICTED, " ".join(against)
    if product is None or kappa is None:
        return UNDECIDED, ""
    if kappa.ci[0] >= 1 - CLOSE and kappa.ci[1] <= 1 + CLOSE:
        return SUPPORTED, "The product is not biased, and κ is near 1."
    return UNDECIDED, "The product shows no bias, but κ's interval is too wide to decide."


def _kappa(evidence: Evidence):
    return None if evidence.comparison is None else evidence.comparison.multiplicativity


def _kappa_words(evidence: Evidence) -> str:
    test = _kappa(evidence)
    if test is None:
        return ""
    interval = interval_text(test.ci, "{:.2f}".format)
    return f"κ = {test.kappa:.2f} {interval} in N_eff = N (f_w f_a f_kv)^κ of the {test.joint_runs} joint runs."


def _sum_words(sums: Sums) -> str:
    if not sums.found:
        return "No joint run has each of its parts lowered alone to the same bits at equal N and D beside it."
    less, more = sums.resolved
    mean, limit = sums.mean
    beyond = f" (noise: ±{limit:.2g}; beyond it one by one: {less} less, {more} more)" if sums.noise else ""
    return (
        f"Without a law: {sum(s.saved > 0 for s in sums.found)} of {len(sums.found)} joint settings whose parts were "
        f"also lowered alone cost less than the sum of their parts, by {mean:+.3f} nats on average{beyond}."
    )


def _numbers(evidence: Evidence, forecasts: dict[str, Forecast], sums: Sums) -> dict[str, object]:
    numbers: dict[str, object] = {
        law: {
            "joint_runs": len(f.errors),
            "too_high": f.above,
            "sign_p": f.sign_p,
            "mean_log_error": f.mean,
            "mean_log_error_ci": list(f.mean_ci),
            "rms_log_error": f.rms,
            "rms_of_its_own_runs": f.rms_of_its_own,
            "starts_at_best": f.starts_at_best,
        }
        for law, f in forecasts.items()
    }
    if (test := _kappa(evidence)) is not None:
        numbers |= {"kappa": test.kappa, "kappa_ci": list(test.ci)}
    if sums.found:
        numbers["sums"] = {"settings": len(sums.found), "saved": sums.mean[0], "noise": sums.mean[1]}
    return numbers


def _rows(forecasts: dict[str, Forecast]) -> list[dict[str, object]]:
    return [
        {
            "law, fitted to single parts": f.law,
            "joint runs": len(f.errors),
            "too high": f.above,
            "sign test p": f"{f.sign_p:.2g}",
            "mean %": f"{100 * f.mean:+.2f} [{100 * f.mean_ci[0]:+.2f}, {100 * f.mean_ci[1]:+.2f}]",
            "rms %": f"{100 * f.rms:.2f}",
            "rms % of its own runs": f"{100 * f.rms_of_its_own:.2f}",
            "starts at the best fit": f"{f.starts_at_best:.1%}",
        }
        for f in forecasts.values()
    ]
