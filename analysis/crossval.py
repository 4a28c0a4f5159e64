"""Held-out error of a law: refits without a size, a token budget, a precision, or the largest runs, and predicts those.

All refits of a law are row weights of one problem, so they run through the same compiled program as its fit.
"""

import dataclasses

import numpy as np

from analysis.law import PRECISION_COLUMNS
from analysis.optimize import jacobian, residuals, solve
from analysis.problem import Setup
from analysis.search import start_grid

SCHEMES = ("N", "D", "P", "compute")
MOST_FOLDS = 8  # distinct values above this are cut into as many bins of equal count
LARGEST_SHARE = 0.2  # of the runs are the largest ones held out by the compute scheme
STARTS_PER_FOLD = 8
UNSEEN = 1e-7  # of the largest singular value: directions below it leave the kept rows as they are


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Log prediction minus log measurement of every row, predicted by a fit that never saw its fold; NaN where none is
    possible (a fold whose precision has a constant of its own, or too few rows left)."""

    scheme: str
    error_n: np.ndarray
    folds: int
    impossible: int  # folds that no refit can predict


def folds(setup: Setup, scheme: str) -> np.ndarray:
    """The fold of every row; -1 for rows that are never held out. Raises ValueError for an unknown scheme."""
    rows = setup.rows
    if scheme in ("N", "D"):
        return _bins(np.log(rows[scheme]))
    if scheme == "P":
        settings = np.stack([rows[c] for c in (*PRECISION_COLUMNS, "P_post")], axis=1)
        return np.unique(np.nan_to_num(settings), axis=0, return_inverse=True)[1].ravel()
    if scheme == "compute":
        cost_n = rows["N"] * rows["D"] * np.mean([rows[c] for c in PRECISION_COLUMNS], axis=0)
        cost_r = np.zeros(setup.run_n.max() + 1)
        cost_r[setup.run_n] = cost_n
        largest = np.argsort(-cost_r)[: max(round(LARGEST_SHARE * len(cost_r)), 1)]
        return np.where(np.isin(setup.run_n, largest), 0, -1)
    raise ValueError(f"scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")


def _bins(values: np.ndarray) -> np.ndarray:
    distinct, which = np.unique(np.round(values, 6), return_inverse=True)
    if len(distinct) <= MOST_FOLDS:
        return which.ravel()
    edges = np.quantile(distinct, np.linspace(0, 1, MOST_FOLDS + 1)[1:-1])
    return np.searchsorted(edges, values)


def held_out(setup: Setup, theta_F: np.ndarray, schemes=SCHEMES, seed: int = 0) -> dict[str, HeldOut]:
    """Out-of-fold errors by every scheme that leaves something to fit; theta is the optimum on all rows."""
    weights, owners = [], []
    fold_of = {scheme: folds(setup, scheme) for scheme in schemes}
    for scheme, fold_n in fold_of.items():
        distinct = [f for f in np.unique(fold_n) if f >= 0]
        for fold in distinct if len(distinct) > 1 or scheme == "compute" else ():
            weights.append((fold_n != fold).astype(float))
            owners.append((scheme, fold))
    if not owners:
        return {}
    # a fold starts from the optimum on all rows, which knows the answer only where the refit finds nothing better
    others = start_grid(setup, STARTS_PER_FOLD, seed)
    starts_KxF = np.vstack([theta_F, others])
    start_SxF = np.tile(starts_KxF, (len(owners), 1))
    which_S = np.repeat(np.arange(len(owners)), len(starts_KxF))
    found = solve(setup.problem, start_SxF, np.array(weights), which_S, tolerance=1e-9)
    objective = found.objective_S.reshape(len(owners), -1)
    theta = found.theta_SxF.reshape(len(owners), len(starts_KxF), -1)
    out = {}
    for scheme in schemes:
        error_n, impossible, count = np.full(setup.problem.rows, np.nan), 0, 0
        for at, (owner, fold) in enumerate(owners):
            if owner != scheme:
                continue
            count += 1
            kept, held = weights[at] > 0, fold_of[scheme] == fold
            best = theta[at, int(np.argmin(objective[at]))]
            if kept.sum() <= len(setup.free) or _unseen(setup, best, kept, held):
                impossible += 1
                continue
            error_n[held] = residuals(setup.problem, best)[held]
        if count:
            out[scheme] = HeldOut(scheme, error_n, count, impossible)
    return out


def _unseen(setup: Setup, theta_F: np.ndarray, kept: np.ndarray, held: np.ndarray) -> bool:
    """Whether held-out rows move along directions of theta that leave every kept row as it is: then they follow the
    start.
    """
    sensitivity = jacobian(setup.problem, theta_F) * setup.problem.scale_F
    size = np.maximum(np.abs(sensitivity).max(axis=0), 1e-300)
    _, singular, directions = np.linalg.svd(sensitivity[kept] / size, full_matrices=True)
    rank = int(np.sum(singular > UNSEEN * singular[0]))
    free_moves = (sensitivity[held] / size) @ directions[rank:].T
    return bool(np.any(np.abs(free_moves) > 1e-3))
