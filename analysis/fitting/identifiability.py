"""Which parameters of a law a table identifies, from the curvature at the optimum and from profile likelihoods.

A parameter that no row identifies would keep its start value, so it is not reported; a weakly identified one gets a
note.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from analysis.fitting.levenberg_marquardt import huber, jacobian, residuals, solve
from analysis.fitting.parameters import to_theta
from analysis.fitting.setup import Setup, Stage

NOISE_FLOOR = 1e-8  # of a log loss: the precision to which tables are printed
USELESS = 1e3  # factor between estimate and end of its interval past which a positive parameter is unidentified
INFORMED = 1e-7  # share of the largest sensitivity of a log prediction below which no row identifies a parameter


@dataclasses.dataclass(frozen=True)
class Profile:
    """Profile-likelihood interval of one parameter; None where the objective stays low up to the bound on that side."""

    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Identifiability:
    """Verdicts on the free parameters: condition number of the scaled curvature, profiles, unidentified parameters
    and notes.
    """

    condition: float
    profile: dict[str, Profile]
    at_bound: tuple[str, ...]
    weak: tuple[str, ...]
    unidentified: dict[str, str]
    notes: tuple[str, ...]


def score_and_curvature(setup: Setup, theta_F: np.ndarray, stage: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient of the objective by run (runs, F), its expected second derivative (F, F), and the variance of the
    gradient (F, F) if rows were independent; on the stage's rows.

    Rows before and after PTQ scatter differently, so the moments of Huber's function are taken of each apart.
    """
    residual_n = residuals(setup.problem, theta_F)
    jacobian_nxF = jacobian(setup.problem, theta_F)
    delta = setup.problem.huber_delta
    psi_n = np.clip(residual_n, -delta, delta)
    score_rxF = np.zeros((setup.run_n.max() + 1, len(theta_F)))
    np.add.at(score_rxF, setup.run_n[stage.rows_n], (psi_n[:, None] * jacobian_nxF)[stage.rows_n])
    curvature_FxF, variance_FxF = np.zeros((2, len(theta_F), len(theta_F)))
    for kind in (setup.rows.quantized, ~setup.rows.quantized):
        rows_n = kind & stage.rows_n
        if rows_n.any():
            gram_FxF = jacobian_nxF[rows_n].T @ jacobian_nxF[rows_n]
            fitted = round(stage.fits_F.sum() * rows_n.sum() / stage.rows_n.sum())
            curvature_FxF += gram_FxF * mean_slope(residual_n[rows_n], delta, fitted)
            variance_FxF += gram_FxF * max(float(np.mean(psi_n[rows_n] ** 2)), NOISE_FLOOR**2)
    return score_rxF, curvature_FxF, variance_FxF


def mean_slope(residual_n: np.ndarray, delta: float, fitted: int) -> float:
    """Mean of the second derivative of Huber's function: the share of errors within delta.

    A robust fit passes close to as many rows as it has parameters, so the `fitted` smallest residuals carry no
    information on the errors and are set aside. Where delta is below the median few rows lie within, so the share is
    taken from the density up to the median.
    """
    size = np.sort(np.abs(residual_n))[min(fitted, len(residual_n) - 1) :]
    middle = float(np.median(size))
    return float(np.mean(size <= delta)) if middle <= delta else 0.5 * delta / middle


def identify(setup: Setup, theta_F: np.ndarray, profile: bool = True, level: float = 0.95) -> Identifiability:
    """Judges every free parameter at the optimum theta."""
    condition, intervals, unidentified, notes = 1.0, {}, {}, []
    for stage in setup.stages:
        fits = np.flatnonzero(stage.fits_F)
        sensitivity_nxF = jacobian(setup.problem, theta_F)[stage.rows_n][:, fits] * setup.problem.scale_F[fits]
        size_F = np.sqrt(np.sum(sensitivity_nxF**2, axis=0))
        dead = size_F <= INFORMED * size_F.max()
        for j in fits[dead]:
            unidentified[setup.free[j]] = "no row's prediction depends on it at the optimum"
        alive = fits[~dead]
        unit = sensitivity_nxF[:, ~dead] / size_F[~dead]
        _, singular, directions = np.linalg.svd(unit, full_matrices=False)
        stage_condition = float((singular[0] / max(singular[-1], 1e-300)) ** 2)
        condition = max(condition, stage_condition)
        if stage_condition > 1e6:
            mixed = [setup.free[alive[k]] for k in np.argsort(-np.abs(directions[-1])) if abs(directions[-1][k]) > 0.2]
            notes.append(
                f"{', '.join(mixed)} trade off almost freely (condition number {stage_condition:.1e}): "
                "judge them by predictions, not one by one"
            )
        if profile:
            intervals.update(_profiles(setup, theta_F, stage, alive, level))

    at_bound, weak = [], []
    for j, name in enumerate(setup.free):
        parameter = setup.law.parameter(name)
        ends = [
            side
            for side in ("lower", "upper")
            if abs(theta_F[j] - to_theta(parameter, getattr(parameter, side))) < 1e-6
        ]
        if ends and name not in unidentified:
            at_bound.append(name)
            notes.append(f"{name} ended at its {ends[0]} bound, {getattr(parameter, ends[0]):g}")
        span = intervals.get(name)
        if span is None or name in unidentified:
            continue
        if span.low is None and span.high is None:
            unidentified[name] = "the fit is as good with any value of it (profile flat from bound to bound)"
        elif parameter.log and (beyond := _far_ends(float(np.exp(theta_F[j])), span)):
            unidentified[name] = f"the fit is as good with {beyond} ({level:.0%} profile)"
        elif span.low is None or span.high is None:
            weak.append(name)
            known, end = ("below", span.high) if span.low is None else ("above", span.low)
            notes.append(
                f"{name} is weakly identified: the rows only show that it is {known} {end:.4g} ({level:.0%} profile)"
            )
        elif parameter.log and span.high / span.low > parameter.wide:
            weak.append(name)
            notes.append(
                f"{name} is weakly identified: {span.low:.4g} to {span.high:.4g} fit equally well ({level:.0%} profile)"
            )
    confounded = [name for name in unidentified if name in intervals]
    if len(confounded) > 1:
        notes.append(f"{', '.join(confounded)} are not separately identified by these rows: fix or tie some of them")
    return Identifiability(condition, intervals, tuple(at_bound), tuple(weak), unidentified, tuple(notes))


def _far_ends(value: float, span: Profile) -> str:
    """The ends of the interval that lie more than a factor USELESS from the estimate, in words."""
    far = [end for end in (span.low, span.high) if end is not None and not 1 / USELESS < end / value < USELESS]
    return " or ".join(f"{end:.1e}" for end in far)


def _profiles(setup: Setup, theta_F: np.ndarray, stage: Stage, which: np.ndarray, level: float) -> dict[str, Profile]:
    """The interval of every parameter in `which` within which the objective, minimized over the others, stays low."""
    problem = setup.problem
    rise_F, error_F, response_FxF, singular = _scales(setup, theta_F, stage, which, level)
    starts, frozen, points = [], [], []
    for k, j in enumerate(which):
        steps = error_F[k] * np.array([1, 1.5, 2, 2.5, 3, 5, 10, 30])
        if singular:
            steps = np.append(steps, problem.scale_F[j] * 3.0 ** np.arange(-3, 4))
        for sign, bound in ((-1, problem.lower_F[j]), (1, problem.upper_F[j])):
            values = np.clip(theta_F[j] + sign * steps, problem.lower_F[j], problem.upper_F[j])
            for value in set(values.tolist()) | {bound}:
                if value == theta_F[j]:
                    continue
                moved = theta_F.copy()
                moved[which] += response_FxF[k] * (value - theta_F[j])
                plain = theta_F.copy()
                moved[j] = plain[j] = value
                for start in (moved, plain) if singular else (moved,):
                    starts.append(start)
                    frozen.append(~stage.fits_F | (np.arange(len(theta_F)) == j))
                    points.append((k, sign, value))
    weight_n = stage.rows_n.astype(float)
    found = solve(problem, np.array(starts), weight_n[None], None, np.array(frozen), iterations=100, tolerance=1e-8)
    least = float(np.sum(weight_n * huber(residuals(problem, theta_F), problem.huber_delta)))
    risen: dict[tuple[int, int], dict[float, float]] = {}
    for (k, sign, value), objective in zip(points, found.objective_S, strict=True):
        side = risen.setdefault((k, sign), {})
        side[value] = min(side.get(value, np.inf), float(objective) - least)
    out = {}
    for k, j in enumerate(which):
        parameter = setup.law.parameter(setup.free[j])
        ends = [_crossing(theta_F[j], risen.get((k, sign), {}), rise_F[k]) for sign in (-1, 1)]
        out[parameter.name] = Profile(
            *(None if end is None else float(np.exp(end) if parameter.log else end) for end in ends)
        )
    return out


def _scales(setup: Setup, theta_F: np.ndarray, stage: Stage, which: np.ndarray, level: float):
    """For the parameters in `which`: rise of the objective at the end of the interval, standard error, how the others
    follow one of them to first order (row by row), and whether the curvature is too ill-conditioned to trust those.

    Twice the rise of a profile is chi-square times sandwich over inverse curvature; the sandwich is the larger of
    that of independent rows and that of independent runs.
    """
    score_rxF, curvature_FxF, variance_FxF = score_and_curvature(setup, theta_F, stage)
    score_rxF = score_rxF[np.unique(setup.run_n[stage.rows_n])][:, which]
    curvature, variance = curvature_FxF[np.ix_(which, which)], variance_FxF[np.ix_(which, which)]
    unit = 1 / np.sqrt(np.maximum(np.diagonal(curvature), 1e-300))
    scaled = curvature * unit[:, None] * unit[None]
    inverse = np.linalg.pinv(scaled, rcond=1e-13) * unit[:, None] * unit[None]
    runs, rows, width = len(score_rxF), int(stage.rows_n.sum()), len(which)
    by_run = np.diagonal(inverse @ (score_rxF.T @ score_rxF) @ inverse) * runs / max(runs - width, 1)
    by_row = np.diagonal(inverse @ variance @ inverse) * rows / max(rows - width, 1)
    spread = np.maximum(by_run, by_row)
    diagonal = np.maximum(np.diagonal(inverse), 1e-300)
    rise_F = 0.5 * stats.f.ppf(level, 1, max(runs - width, 1)) * spread / diagonal
    return rise_F, np.sqrt(np.maximum(spread, 1e-24)), inverse / diagonal[:, None], np.linalg.cond(scaled) > 1e8


def _crossing(center: float, side: Mapping[float, float], rise: float) -> float | None:
    """Where the profile first exceeds `rise` on one side, its square root interpolated; None where it never does."""
    before, height = center, 0.0
    for value in sorted(side, key=lambda v: abs(v - center)):
        root = math.sqrt(max(side[value], 0.0))
        if side[value] > rise:
            return before + (value - before) * (math.sqrt(rise) - height) / (root - height)
        before, height = value, root
    return None
