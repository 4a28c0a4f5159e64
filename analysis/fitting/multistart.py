"""Finds the best constants of a law from many starts, and the constants of every bootstrap resample of the runs.

Stands between setup.py, which defines the problem, and fit.py, which reports the result.
"""

import dataclasses
import itertools
import math

import numpy as np
from scipy.stats import qmc

from analysis.fitting.identifiability import score_and_curvature
from analysis.fitting.levenberg_marquardt import Problem, Solution, residuals, solve
from analysis.fitting.parameters import to_theta
from analysis.fitting.setup import Setup
from analysis.laws.law import MIN_FRACTION, fraction
from analysis.table.columns import HIGH_PRECISION_BITS

DEFAULT_STARTS = 512
LARGE_TABLE = 20_000  # rows; above it starts compete on a sample, and resamples take one step from the optimum
SEARCH_ROWS = 512
FINALISTS, FINALISTS_OF_LARGE = 64, 4
NO_INTERVALS = "no intervals"  # begins the note of a fit with a bootstrap that could not give any
LEAST_RUNS = 5  # trained models that a bootstrap can resample
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
    """The best optimum over all starts, stage by stage.

    Where the table is larger than SEARCH_ROWS, starts first run on a sample of its rows with every setting; the
    distinct ends of that race then run on all rows.
    """
    starts_SxF = start_grid(setup, count, seed)
    keep = _sample(setup, seed) if setup.problem.rows > 2 * SEARCH_ROWS else None
    theta_F, share = _neutral(setup, starts_SxF[0]), 1.0
    for stage in setup.stages:
        begin_SxF = np.where(stage.fits_F, starts_SxF, theta_F)
        frozen_F, weight_n = ~stage.fits_F, stage.rows_n.astype(float)
        label = f"{setup.law.name}: starts" if progress else None
        ends_SxF, members = begin_SxF, np.ones(len(begin_SxF))
        if keep is not None:
            ends_SxF, members = _race(
                setup.subset(keep), begin_SxF, frozen_F, weight_n[keep], setup.problem.rows, label
            )
        frozen_SxF = np.broadcast_to(frozen_F, ends_SxF.shape)
        found = solve(setup.problem, ends_SxF, weight_n[None], None, frozen_SxF, progress=label)
        least = found.objective_S.min()
        at_best = found.objective_S <= least * (1 + SAME_OPTIMUM) + 1e-13 * weight_n.sum()
        share = min(share, float(members[at_best].sum() / len(starts_SxF)))
        theta_F = plainest(setup, found, at_best)
    return Best(theta_F, setup.objective(theta_F), len(starts_SxF), share, None if keep is None else SEARCH_ROWS)


def plainest(setup: Setup, found: Solution, at_best: np.ndarray) -> np.ndarray:
    """theta_F of the best optimum: among starts that ended there, the fewest f_x at their floor, then the least
    objective.

    A part without effect has either f_x = 1 at every precision, or f_x at its floor at every precision and A or B
    scaled to match. The predictions are the same; only the first gives the constants their meaning.
    """

    def at_floor(theta_F: np.ndarray) -> int:
        values = setup.values(theta_F)
        left = [fraction(HIGH_PRECISION_BITS, values[gamma], values[n]) for gamma, n in setup.law.fractions]
        return int(np.sum(np.array(left) <= MIN_FRACTION))

    ends = np.flatnonzero(at_best)
    lowest_first = found.theta_SxF[ends[np.argsort(found.objective_S[ends], kind="stable")]]
    return min(lowest_first, key=at_floor)


def _neutral(setup: Setup, fallback_F: np.ndarray) -> np.ndarray:
    """theta_F with every free parameter where it has no effect, for the stages before its own."""
    held = [setup.law.parameter(name).held for name in setup.free]
    return np.array(
        [
            f if h is None else to_theta(setup.law.parameter(n), h)
            for n, h, f in zip(setup.free, held, fallback_F, strict=True)
        ]
    )


def _sample(setup: Setup, seed: int) -> np.ndarray:
    """Sorted indices of SEARCH_ROWS random rows that take turns among the settings (all columns of the law but N and
    D).
    """
    rng = np.random.default_rng(seed)
    names = [name for name in setup.law.columns if name not in ("N", "D")]
    order = rng.permutation(setup.problem.rows)
    settings = np.column_stack([np.nan_to_num(setup.rows[name]) for name in names] or [np.zeros(setup.problem.rows)])
    setting_n = np.unique(settings, axis=0, return_inverse=True)[1].ravel()[order]
    sorted_by_setting = np.argsort(setting_n, kind="stable")
    first = np.searchsorted(setting_n[sorted_by_setting], setting_n[sorted_by_setting])
    turn = np.empty(len(order), int)
    turn[sorted_by_setting] = np.arange(len(order)) - first
    return np.sort(order[np.argsort(turn, kind="stable")[:SEARCH_ROWS]])


def _race(problem: Problem, begin_SxF, frozen_F, weight_n, all_rows: int, label: str | None):
    """Distinct ends of all starts on a sample of the rows, best first, and how many starts came to each."""
    frozen_SxF = np.broadcast_to(frozen_F, begin_SxF.shape)
    found = solve(problem, begin_SxF, weight_n[None], None, frozen_SxF, iterations=200, tolerance=1e-8, progress=label)
    order = np.argsort(found.objective_S)
    rounded = np.round(found.theta_SxF[order] / problem.scale_F, 2)
    first, members = np.unique(rounded, axis=0, return_index=True, return_counts=True)[1:]
    best_first = np.argsort(first)[: FINALISTS if all_rows <= LARGE_TABLE else FINALISTS_OF_LARGE]
    return found.theta_SxF[order][first[best_first]], members[best_first]


def bootstrap(setup: Setup, theta_F: np.ndarray, resamples: int, seed: int = 0, progress: bool = False) -> np.ndarray:
    """(resamples, F) constants of tables made of the same number of runs drawn with replacement (all rows of a run
    together).

    Deviations from theta are multiplied by `spread`. Where runs are fewer than ten per parameter, runs get exponential
    weights instead (Rubin's Bayesian bootstrap), since drawing few runs with replacement can leave out whole sizes.
    Tables of more than LARGE_TABLE rows take one Newton step per draw.
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
                setup.problem,
                draws_RxF,
                weight_Rxn * stage.rows_n,
                np.arange(resamples),
                frozen,
                tolerance=1e-9,
                progress=label,
            ).theta_SxF
    widened = theta_F + spread(setup, theta_F) * (draws_RxF - theta_F)
    return np.clip(widened, setup.problem.lower_F, setup.problem.upper_F)


def least_resamples(level: float) -> int:
    """The draws that an interval of this level takes, so that one is expected beyond each of its ends."""
    return math.ceil(round(2 / (1 - level), 6))


def too_few_runs(setup: Setup) -> str | None:
    """Why the table's trained models are too few to be resampled, or None.

    With no more models than free parameters every draw is fitted exactly, and one model gives equal draws.
    """
    runs, least = int(setup.run_n.max()) + 1, max(len(setup.free) + 1, LEAST_RUNS)
    if runs >= least:
        return None
    names = sorted(set(setup.rows["run"]))
    named = f" ({'all' if len(names) == 1 else 'runs'} {', '.join(names[:5])})" if len(names) <= runs else ""
    return (
        f"{NO_INTERVALS}: a bootstrap resamples trained models, and the {len(setup.rows)} rows are of {runs}{named}; "
        f"{len(setup.free)} free parameters need at least {least}"
    )


def spread(setup: Setup, theta_F: np.ndarray) -> float:
    """sqrt(1 + q F / (runs - F)), q the share of residuals within Huber's delta.

    Residuals of least squares (q = 1) are smaller than the errors by sqrt(1 - F / runs). With absolute values (q = 0)
    the resampled optima, like resampled medians, already scatter too widely by about as much (docs/analysis.md has
    both).
    """
    runs, free = int(setup.run_n.max()) + 1, len(setup.free)
    quadratic = np.mean(np.abs(residuals(setup.problem, theta_F)) <= setup.problem.huber_delta)
    return math.sqrt(1 + quadratic * free / max(runs - free, 1))


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
        score_rxF, curvature_FxF, _ = score_and_curvature(setup, theta_F, stage)
        inverse = np.linalg.pinv(curvature_FxF[np.ix_(fits, fits)])
        runs = len(score_rxF)
        for i in range(resamples):
            counts = np.bincount(rng.integers(0, runs, runs), minlength=runs)
            draws_RxF[i, fits] -= inverse @ (counts @ score_rxF[:, fits])
    return draws_RxF
