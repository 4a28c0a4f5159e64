"""How sensitive a fit is to the choice of Huber's delta and to the few rows of largest residual."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.fitting.levenberg_marquardt import Problem, residuals, solve
from analysis.fitting.multistart import start_grid
from analysis.fitting.options import FitError
from analysis.fitting.setup import Setup
from analysis.fitting.statistics import rms

STARTS = 16  # of every refit, besides the optimum


def sweep(
    setup: Setup, theta_F: np.ndarray, huber_deltas: Sequence[float] = (), drop_worst: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Refits with each of Huber's deltas, then without the 1, 2, ... drop_worst rows of largest residual at theta.

    Each is a dict of huber_delta, dropped (run, P_post and residual of the rows left out), params, and rms_log_error
    over the rows that are left. Raises FitError where too few rows remain.
    """
    rows = setup.problem.rows
    if drop_worst and rows - drop_worst <= len(setup.free):
        raise FitError(
            f"drop_worst = {drop_worst}: {rows} rows, {len(setup.free)} free parameters; fewer must be dropped"
        )
    worst = np.argsort(-np.abs(residuals(setup.problem, theta_F)), kind="stable")
    cases = [(delta, 0) for delta in huber_deltas] + [(setup.problem.huber_delta, k + 1) for k in range(drop_worst)]
    out = []
    for delta, count in cases:
        problem = dataclasses.replace(setup.problem, huber_delta=float(delta))
        weight_n = np.ones(rows)
        weight_n[worst[:count]] = 0
        found_F = _refit(setup, problem, weight_n, theta_F, seed)
        error_n = setup.log_errors(found_F)[weight_n > 0]
        out.append(
            {
                "huber_delta": float(delta) if np.isfinite(delta) else None,
                "dropped": [_named(setup, theta_F, at) for at in worst[:count]],
                "params": setup.values(found_F),
                "rms_log_error": rms(error_n),
            }
        )
    return out


def _refit(setup: Setup, problem: Problem, weight_n: np.ndarray, theta_F: np.ndarray, seed: int) -> np.ndarray:
    """The best optimum of the weighted rows from theta and a few other starts, stage by stage."""
    starts_SxF = np.vstack([theta_F, start_grid(setup, STARTS, seed)])
    for stage in setup.stages:
        begin_SxF = np.where(stage.fits_F, starts_SxF, theta_F)
        frozen_SxF = np.broadcast_to(~stage.fits_F, begin_SxF.shape)
        found = solve(problem, begin_SxF, (weight_n * stage.rows_n)[None], None, frozen_SxF)
        theta_F = found.theta_SxF[int(np.argmin(found.objective_S))]
    return theta_F


def _named(setup: Setup, theta_F: np.ndarray, at: int) -> dict[str, Any]:
    post = float(setup.rows["P_post"][at])
    return {
        "run": str(setup.rows["run"][at]),
        "P_post": None if np.isnan(post) else post,
        "residual": float(residuals(setup.problem, theta_F)[at]),
    }


def in_words(found: Sequence[dict[str, Any]], fitted: Sequence[str]) -> list[str]:
    """A line for each refit: what was changed, the constants that were fitted, and the error."""
    lines = []
    for one in found:
        if one["dropped"]:
            last = one["dropped"][-1]
            bits = "" if last["P_post"] is None else f" at {last['P_post']:g} bits"
            what = f"without the {len(one['dropped'])} worst (last: {last['run']}{bits}, {last['residual']:+.3f})"
        else:
            what = f"huber_delta {'inf' if one['huber_delta'] is None else format(one['huber_delta'], 'g')}"
        constants = " ".join(f"{name} {one['params'][name]:.4g}" for name in fitted)
        lines.append(f"{what}: {constants}; rms log error {one['rms_log_error']:.4f}")
    return lines
