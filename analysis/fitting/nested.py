"""Likelihood-ratio test of a law that is nested in a larger one."""

import dataclasses

import numpy as np
from scipy import stats

from analysis.fitting.identifiability import mean_slope, score_and_curvature
from analysis.fitting.levenberg_marquardt import residuals
from analysis.fitting.options import FitError
from analysis.fitting.setup import Setup, Stage


@dataclasses.dataclass(frozen=True)
class NestedTest:
    """`within` has `freedom` more free parameters than `law`; p: probability of such a gain by noise alone."""

    law: str
    within: str
    statistic: float
    freedom: int
    p: float

    @property
    def in_words(self) -> str:
        verdict = "no better than" if self.p > 0.05 else "better than"
        return f"{self.within} is {verdict} {self.law}: {self.statistic:.2f} on {self.freedom} (p = {self.p:.2g})"


def ratio_test(small: Setup, small_F: np.ndarray, large: Setup, large_F: np.ndarray, names=None) -> NestedTest:
    """Of two fits to the same rows, the smaller one the larger with some parameters held; small_F, large_F: optima.

    Twice the difference of the objectives over the scale of the scores is chi-square under any distribution of errors
    (the tau test of robust regression). The scale counts rows of one trained model as dependent, and the statistic over
    its freedom is compared with F(freedom, models - parameters). names: of the two laws. Raises FitError where the rows
    or the parameters do not nest.
    """
    freedom = len(large.free) - len(small.free)
    if freedom < 1 or small.problem.rows != large.problem.rows:
        raise FitError(f"{small.law.name} is not nested in {large.law.name} as fitted to these rows")
    gain = max(small.objective(small_F) - large.objective(large_F), 0.0)
    statistic = 2 * gain / max(_scale(large, large_F), 1e-300)
    models = int(large.run_n.max()) + 1
    p = float(stats.f.sf(statistic / freedom, freedom, max(models - len(large.free), 1)))
    law, within = names or (small.law.name, large.law.name)
    return NestedTest(law, within, float(statistic), freedom, p)


def _scale(setup: Setup, theta_F: np.ndarray) -> float:
    """Mean square of Huber's derivative over the mean of its second one, times how far rows of a model add up."""
    residual_n, delta = residuals(setup.problem, theta_F), setup.problem.huber_delta
    square = float(np.mean(np.clip(residual_n, -delta, delta) ** 2))
    plain = square * len(residual_n) / (len(residual_n) - len(theta_F)) / mean_slope(residual_n, delta, len(theta_F))
    everything = Stage(np.ones(len(residual_n), bool), np.ones(len(theta_F), bool))
    score_rxF, curvature_FxF, variance_FxF = score_and_curvature(setup, theta_F, everything)
    inverse = np.linalg.pinv(curvature_FxF)
    by_model, by_row = np.trace(inverse @ score_rxF.T @ score_rxF), np.trace(inverse @ variance_FxF)
    return plain * max(by_model / max(by_row, 1e-300), 1.0)
