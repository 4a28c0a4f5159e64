"""Held-out error of a law: refits without a size, a token budget, a precision, the largest runs, the joint runs or
chosen rows, and predicts those.

Refits differ only in the row weights of one problem, so they run through the same compiled program as the fit.
"""

import dataclasses

import numpy as np

from analysis.fitting.levenberg_marquardt import jacobian, solve
from analysis.fitting.multistart import start_grid
from analysis.fitting.options import FitError
from analysis.fitting.setup import Setup
from analysis.table.columns import HIGH_PRECISION_BITS, PRECISIONS
from analysis.table.expression import rows_where

SCHEMES = ("N", "D", "P", "compute", "joint")
ONE_FOLD = ("compute", "joint")  # schemes that hold out one set of rows
CHOSEN = "chosen"  # the scheme of fit_where and test_where
MOST_FOLDS = 8  # distinct values above this are cut into as many bins of equal count
MOST_SETTINGS = 32  # folds by precision; with more settings some share a fold
LARGEST_SHARE = 0.2  # share of the runs, the largest, that the compute scheme holds out
STARTS_PER_FOLD = 8  # with 4, a law with many local optima may end at a worse one
UNSEEN = 1e-7  # of the largest singular value: directions below it leave the kept rows as they are


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Log prediction minus log measurement of every row, predicted by a fit that never saw its fold; NaN where none is
    possible (a fold whose precision has a constant of its own, or too few rows left).

    error_n: of the rows of the fit, δ for a law of δ. served_m: of every row after PTQ that the law describes, those
    included that its residual cannot hold, the loss as served (measured before PTQ plus δ); NaN before PTQ.
    """

    scheme: str
    error_n: np.ndarray
    served_m: np.ndarray
    folds: int
    impossible: int  # folds that no refit can predict


@dataclasses.dataclass(frozen=True)
class Split:
    """Masks of the rows that a refit sees and that it predicts, over `Setup.every_row`."""

    scheme: str
    kept_m: np.ndarray
    held_m: np.ndarray


def folds(setup: Setup, scheme: str) -> np.ndarray:
    """The fold of every row (`Setup.every_row`); -1 for rows that are never held out. Raises ValueError for an unknown
    scheme.
    """
    rows = setup.every_row
    if scheme in ("N", "D"):
        return _bins(np.log(rows[scheme]))
    if scheme == "P":
        settings = np.stack([rows[c] for c in (*PRECISIONS, "P_post")], axis=1)
        return np.unique(np.nan_to_num(settings), axis=0, return_inverse=True)[1].ravel() % MOST_SETTINGS
    if scheme == "joint":
        low = np.sum([rows[c] < HIGH_PRECISION_BITS for c in PRECISIONS], axis=0)
        return np.where(low > 1, 0, -1)
    if scheme == "compute":
        cost_m, run_m = rows["N"] * rows["D"] * np.mean([rows[c] for c in PRECISIONS], axis=0), rows.models
        cost_r = np.zeros(run_m.max() + 1)
        cost_r[run_m] = cost_m
        largest = np.argsort(-cost_r)[: max(round(LARGEST_SHARE * len(cost_r)), 1)]
        return np.where(np.isin(run_m, largest), 0, -1)
    raise ValueError(f"unknown scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")


def splits(setup: Setup, schemes=SCHEMES) -> list[Split]:
    """One split for every fold of the schemes; none where a scheme leaves nothing to fit or to predict."""
    out = []
    for scheme in schemes:
        fold_m = folds(setup, scheme)
        distinct = [f for f in np.unique(fold_m) if f >= 0]
        if len(distinct) > 1 or (scheme in ONE_FOLD and not np.all(fold_m == 0)):
            out += [Split(scheme, fold_m != f, fold_m == f) for f in distinct]
    return out


def chosen(setup: Setup, fit_where: str | None, test_where: str | None) -> Split:
    """The split by two expressions; where one is None, it stands for the rows that the other leaves.

    Raises FitError where they share rows or choose none.
    """
    rows = setup.every_row
    if fit_where is not None:
        kept = rows_where(fit_where, rows)
        held = ~kept if test_where is None else rows_where(test_where, rows)
    elif test_where is not None:
        held = rows_where(test_where, rows)
        kept = ~held
    else:
        raise FitError("give fit_where, test_where or both")
    both = int(np.sum(kept & held))
    if both:
        raise FitError(f"fit_where and test_where share {both} rows: a row that is fitted cannot test the fit")
    for mask, name in ((kept, "fit_where"), (held, "test_where")):
        if not mask.any():
            raise FitError(f"{name} leaves no row of {setup.law.name}")
    return Split(CHOSEN, kept, held)


def _bins(values: np.ndarray) -> np.ndarray:
    distinct, which = np.unique(np.round(values, 6), return_inverse=True)
    if len(distinct) <= MOST_FOLDS:
        return which.ravel()
    edges = np.quantile(distinct, np.linspace(0, 1, MOST_FOLDS + 1)[1:-1])
    return np.searchsorted(edges, values)


def held_out(
    setup: Setup, theta_F: np.ndarray, schemes=SCHEMES, seed: int = 0, more: tuple[Split, ...] = ()
) -> dict[str, HeldOut]:
    """Out-of-fold errors by every scheme that leaves something to fit, and by the splits of `more`; theta is the
    optimum on all rows.
    """
    every = [*splits(setup, schemes), *more]
    if not every:
        return {}
    rows_n = np.arange(setup.problem.rows)
    weight_Mxn = np.array([split.kept_m[rows_n] for split in every], float)
    # a fold starts from the optimum on all rows, too; it is kept only where no other start ends lower
    starts_KxF = np.vstack([theta_F, start_grid(setup, STARTS_PER_FOLD, seed)])
    start_SxF = np.tile(starts_KxF, (len(every), 1))
    which_S = np.repeat(np.arange(len(every)), len(starts_KxF))
    found = solve(setup.problem, start_SxF, weight_Mxn, which_S, tolerance=1e-9)
    objective = found.objective_S.reshape(len(every), -1)
    theta = found.theta_SxF.reshape(len(every), len(starts_KxF), -1)
    return {
        scheme: _errors(setup, scheme, [(every[i], theta[i, int(np.argmin(objective[i]))]) for i in at])
        for scheme, at in _grouped(every).items()
    }


def _grouped(every: list[Split]) -> dict[str, list[int]]:
    return {
        scheme: [i for i, s in enumerate(every) if s.scheme == scheme]
        for scheme in dict.fromkeys(split.scheme for split in every)
    }


def _errors(setup: Setup, scheme: str, refits: list[tuple[Split, np.ndarray]]) -> HeldOut:
    """The errors of a scheme's refits on the rows that each did not see."""
    rows, every = setup.problem.rows, setup.every_row
    error_n, served_m, impossible = np.full(rows, np.nan), np.full(len(every), np.nan), 0
    for split, theta_F in refits:
        kept_n, held_n = split.kept_m[:rows], split.held_m[:rows]
        if kept_n.sum() <= len(setup.free) or (held_n.any() and _unseen(setup, theta_F, kept_n, held_n)):
            impossible += 1
            continue
        error_n[held_n] = setup.log_errors(theta_F)[held_n]
        served_m[split.held_m] = setup.served_errors(theta_F, every.select(split.held_m))
    return HeldOut(scheme, error_n, served_m, len(refits), impossible)


def _unseen(setup: Setup, theta_F: np.ndarray, kept: np.ndarray, held: np.ndarray) -> bool:
    """Whether held-out rows move along directions of theta that leave every kept row unchanged.

    Their predictions would then depend on the start.
    """
    sensitivity = jacobian(setup.problem, theta_F) * setup.problem.scale_F
    size = np.maximum(np.abs(sensitivity).max(axis=0), 1e-300)
    _, singular, directions = np.linalg.svd(sensitivity[kept] / size, full_matrices=True)
    rank = int(np.sum(singular > UNSEEN * singular[0]))
    free_moves = (sensitivity[held] / size) @ directions[rank:].T
    return bool(np.any(np.abs(free_moves) > 1e-3))
