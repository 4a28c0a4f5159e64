"""F3: does training below 4 bits need more than 4 times the parameters?"""

from collections.abc import Sequence

import numpy as np

from analysis.fitting.statistics import interval_of_enough
from analysis.laws.law import HIGH_PRECISION_BITS, PARTS
from analysis.planning.surface import build
from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.equal_cost import Factor, size_factors
from analysis.reporting.verdicts.finding import CONTRADICTED, SUPPORTED, UNDECIDED, Finding, undecided
from analysis.wording import count_label, interval_text

CLAIM = "Training below 4 bits needs more than 4 times the parameters."
LEAST_INFORMATIVE = 2  # models that bound the factor
FORM = "N_eff = N f(P) makes the factor f(16)/f(P) the same at every N and D; the rows need not."


def few_bits_cost_parameters(evidence: Evidence) -> Finding:
    """F3 on the size that compensates for few bits: the 16-bit model of equal loss and D, by interpolation in N."""
    found = size_factors(evidence)
    below = [f for f in found if f.p < 4]
    shown = below or found
    if not shown:
        why = "No model with all parts at 4 bits or fewer has two 16-bit models of its D beside it."
        return undecided("F3 few bits", CLAIM, FORM, why)
    more, less = sum(f.low > 4 for f in shown), sum(f.high < 4 for f in shown)
    what = "below 4 bits" if below else "at 4 bits (none was trained below, all parts together)"
    bounds = sum(np.isinf(f.value) for f in shown)
    said = (
        f"Read off the losses at equal D, without a law: of {len(shown)} models with all parts {what} {more} need more "
        f"than 4 times the parameters of 16 bits beyond the noise, {less} fewer"
    )
    said += f"; {bounds} are worse than the smallest 16-bit model, which gives a lower bound only." if bounds else "."
    said = f"{said} {_factor_by_fit(evidence)}".strip()
    informative = [f for f in shown if np.isfinite(f.value) or f.low > 4]  # a bound below 4 is no evidence
    verdict = UNDECIDED
    if below and len(informative) >= LEAST_INFORMATIVE:
        verdict = SUPPORTED if more == len(informative) else CONTRADICTED if less > len(informative) / 2 else UNDECIDED
    numbers = {"models": len(shown), "more_than_4": more, "less_than_4": less}
    return Finding("F3 few bits", CLAIM, verdict, FORM, said, numbers, _rows(found))


def _factor_by_fit(evidence: Evidence) -> str:
    fit = evidence.fit_of("precision")
    if fit is None or (surface := build([fit])).parts != PARTS:
        return ""
    factor = lambda surface: float(np.divide(*surface.share(np.array([HIGH_PRECISION_BITS, 4.0]))))
    drawn = [factor(surface.draw(i)) for i in range(surface.draws)]
    interval = interval_text(interval_of_enough(drawn), "{:.1f}".format)
    return f"The fitted law of precision says {factor(surface):.1f}{interval and ' '}{interval} at 4 bits."


def _rows(found: Sequence[Factor]) -> list[dict[str, object]]:
    return [
        {
            "P": f.p,
            "N": count_label(f.n),
            "D": count_label(f.d),
            "factor on N": f"above {f.low:.2g}" if np.isinf(f.value) else f"{f.value:.2g}",
            "within noise": f"{f.low:.2g} to {'open' if np.isinf(f.high) else f'{f.high:.2g}'}",
        }
        for f in found
    ]
