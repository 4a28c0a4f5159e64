"""Finds the best constants of a law from many starts, and the constants of every bootstrap resample of the runs.

Stands between problem.py, which says what is fitted, and fit.py, which reports it.
"""

import dataclasses
import itertools
import math

import numpy as np
from scipy.stats import qmc

from analysis.identify import score_and_curvature
from analysis.optimize import solve
from analysis.problem import Setup, to_theta

DEFAULT_STARTS = 512
LARGE_TABLE = 20_000  # rows; above it starts compete on a sample, and resamples take one step from the optimum
SEARCH_ROWS = 4096
FINALISTS = 4
SAME_OPTIMUM = 1e-6  # relative difference in objective below which two starts ended at the same optimum


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of `starts` starts: theta_F, its objective, and the share of starts that ended there (least over
    stages).
    """

    theta_F: np.ndarray
    objective: float
    starts: int
    share: float
    sampled_rows: int | None  # rows that the starts competed on, where the table is large


def start_grid(setup: Setup, count: int | None = None, seed: int = 0) -> np.ndarray:
    """(S, F) starts: the whole grid of the free parameters where it has at most `count` points, else a Sobol sample
    of its box.

    A full set of published constants is one more start.
    """
    count = DEFAULT_STARTS if count is None else count
    params = [setup.law.parameter(name) for name in setup.free]
    axes = [[float(to_theta(p, v)) for v in p.grid] for p in params]
    if math.prod(len(axis) for axis in axes) <= count:
        grid = np.array(list(itertools.product(*axes)))
    else:
        low, high = (np.array([f(axis) for axis in axes]) for f in (min, max))
        sampler = qmc.Sobol(len(axes), scramble=True, rng=np.random.default_rng(seed))
        unit = sampler.random(2 ** math.ceil(math.log2(count)))[:count]
        grid = low + unit * (high - low)
    known = setup.law.published
    if all(name in known for name in setup.free):
        grid = np.vstack([grid, setup.theta(known)])
    return grid


def search(setup: Setup, count: int | None = None, seed: int = 0, progress: bool = False) -> Best:
    """The best optimum over all starts, stage by stage."""
    starts_SxF = start_grid(setup, count, seed)
    problem, stages = setup.problem, setup.stages
    large = problem.rows > LARGE_TABLE
    if large:
        keep = np.sort(np.random.default_rng(seed).choice(problem.rows, SEARCH_ROWS, replace=False))
        problem = setup.subset(keep)
    held_F = np.array(
        [to_theta(p, p.held) if p.held is not None else np.nan for p in map(setup.law.parameter, setup.free)]
    )
    theta_F, share = np.where(np.isnan(held_F), starts_SxF[0], held_F), 1.0
    for stage in stages:
        begin_SxF = np.where(stage.fits_F, starts_SxF, theta_F)
        frozen_SxF = np.broadcast_to(~stage.fits_F, begin_SxF.shape)
        weight_n = stage.rows_n.astype(float)
        label = f"{setup.law.name}: starts" if progress else None
        found = solve(
            problem, begin_SxF, (weight_n[keep] if large else weight_n)[None], None, frozen_SxF, progress=label
        )
        least = found.objective_S.min()
        share = min(share, float(np.mean(found.objective_S <= least * (1 + SAME_OPTIMUM) + 1e-13 * weight_n.sum())))
        order = np.argsort(found.objective_S)
        if large:
            found = solve(
                setup.problem, found.theta_SxF[order[:FINALISTS]], weight_n[None], None, frozen_SxF[:FINALISTS]
            )
            order = np.argsort(found.objective_S)
        theta_F = found.theta_SxF[order[0]]
    return Best(theta_F, setup.objective(theta_F), len(starts_SxF), share, SEARCH_ROWS if large else None)


def bootstrap(setup: Setup, theta_F: np.ndarray, resamples: int, seed: int = 0, progress: bool = False) -> np.ndarray:
    """(resamples, F) constants of tables made of the same number of runs drawn with replacement (all rows of a run
    together).

    Draws are spread around theta by sqrt(runs / (runs - F)): residuals of a fit are that much smaller than the
    errors. Where runs are fewer than ten per parameter, runs get exponential weights instead (Rubin's Bayesian
    bootstrap), since drawing few runs with replacement leaves out whole sizes. Tables of more than LARGE_TABLE rows
    take one Newton step per draw.
    """
    rng = np.random.default_rng(seed)
    runs = int(setup.run_n.max()) + 1
    if setup.problem.rows > LARGE_TABLE:
        draws_RxF = _one_step(setup, theta_F, resamples, rng)
    else:
        if few_runs(setup):
            weight_Rxr = rng.dirichlet(np.ones(runs), size=resamples) * runs
        else:
            weight_Rxr = rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples).astype(float)
        weight_Rxn = weight_Rxr[:, setup.run_n]
        draws_RxF = np.repeat(theta_F[None], resamples, axis=0)
        label = f"{setup.law.name}: bootstrap" if progress else None
        for stage in setup.stages:
            frozen = np.broadcast_to(~stage.fits_F, draws_RxF.shape)
            draws_RxF = solve(
                setup.problem, draws_RxF, weight_Rxn * stage.rows_n, np.arange(resamples), frozen, progress=label
            ).theta_SxF
    spread = math.sqrt(runs / max(runs - len(setup.free), 1))
    widened = theta_F + spread * (draws_RxF - theta_F)
    return np.clip(widened, setup.problem.lower_F, setup.problem.upper_F)


def few_runs(setup: Setup) -> bool:
    """Whether there are fewer than ten runs per free parameter."""
    return int(setup.run_n.max()) + 1 < 10 * len(setup.free)


def _one_step(setup: Setup, theta_F: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """theta - H⁻¹ Σ_runs count · score: the first Newton step of every resample (Hu and Kalbfleisch's
    estimating-function bootstrap).
    """
    draws_RxF = np.repeat(theta_F[None], resamples, axis=0)
    for stage in setup.stages:
        fits = np.flatnonzero(stage.fits_F)
        score_rxF, curvature_FxF = score_and_curvature(setup, theta_F, stage)
        inverse = np.linalg.pinv(curvature_FxF[np.ix_(fits, fits)])
        runs = len(score_rxF)
        for i in range(resamples):
            counts = np.bincount(rng.integers(0, runs, runs), minlength=runs)
            draws_RxF[i, fits] -= inverse @ (counts @ score_rxF[:, fits])
    return draws_RxF
