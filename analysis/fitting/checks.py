"""Checks of a fit: errors on rows that it did not see, a smaller fit beside it, and refits under other choices."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis import table as tables
from analysis.fitting import crossval, nested, sensitivity
from analysis.fitting.multistart import search
from analysis.fitting.setup import Setup, set_up
from analysis.fitting.statistics import rms


@dataclasses.dataclass(frozen=True)
class Checks:
    """What to check of a fit, for its `metrics`.

    test_where: an expression; errors on the rows that satisfy it, which fit_where must exclude (where one of the two is
    None, it stands for the rows that the other leaves). held: constants of a smaller fit, for a likelihood-ratio test.
    huber_deltas and drop_worst: refits with other values of Huber's delta and without the rows of largest residual.
    """

    test_where: str | None = None
    held: Mapping[str, float] = dataclasses.field(default_factory=dict)
    huber_deltas: tuple[float, ...] = ()
    drop_worst: int = 0

    def check(self, setup: Setup, table: tables.Table) -> None:
        """Raises FitError or LawError for a check that is not possible; called before the search."""
        if setup.options.fit_where is not None:
            crossval.chosen(setup.on(table, None), setup.options.fit_where, self.test_where)
        if self.held:
            _held(setup, table, self.held)

    def run(self, setup: Setup, theta_F: np.ndarray, table: tables.Table, starts, seed: int) -> dict[str, Any]:
        """The results by name, as `metrics` holds them."""
        out: dict[str, Any] = {}
        if setup.options.fit_where is not None:
            out["test"] = _test_errors(setup, theta_F, table, self.test_where)
        if self.held:
            out["likelihood_ratio"] = _ratio_test(setup, theta_F, table, self.held, starts, seed)
        if self.huber_deltas or self.drop_worst:
            out["sweep"] = sensitivity.sweep(setup, theta_F, self.huber_deltas, self.drop_worst, seed)
        return out


def _test_errors(setup: Setup, theta_F: np.ndarray, table: tables.Table, where: str | None) -> dict[str, Any]:
    """Errors on rows that the fit did not see: count, rms and mean log error, and rms of the loss as served."""
    split = crossval.chosen(setup.on(table, None), setup.options.fit_where, where)
    rows = where if where is not None else f"not ({setup.options.fit_where})"
    rest = setup.on(table, rows)
    error_n, served_m = rest.log_errors(theta_F), rest.served_errors(theta_F, rest.every_row)
    return {
        "where": rows,
        "rows": int(split.held_m.sum()),
        "rms_log_error": rms(error_n),
        "mean_log_error": float(np.nanmean(error_n)) if np.isfinite(error_n).any() else None,
        "rms_log_error_served": rms(served_m),
    }


def _held(setup: Setup, table: tables.Table, held: Mapping[str, float]) -> Setup:
    """The smaller fit, in which these constants are held."""
    kept = tuple(name for name in setup.options.freed if name not in held)
    options = dataclasses.replace(setup.options, fixed={**setup.options.fixed, **held}, freed=kept)
    return set_up(setup.law, table, options)


def _ratio_test(setup: Setup, theta_F: np.ndarray, table: tables.Table, held, starts, seed: int) -> dict[str, Any]:
    """The likelihood-ratio test of the fit against the one with these constants held."""
    small = _held(setup, table, held)
    names = (", ".join(f"{name} = {value:g}" for name, value in held.items()), setup.law.name)
    small_F = search(small, starts, seed).theta_F
    return dataclasses.asdict(nested.ratio_test(small, small_F, setup, theta_F, names))
