"""Do the effects of weight, activation and KV precision multiply in N_eff? Fits of single parts predict joint runs.

The law of training precision is fitted to runs with at most one part below 16 bits. On the others, N_eff = N (f_w f_a
f_kv)^kappa is fitted with everything but kappa held: kappa = 1 where the effects multiply, above 1 where they
compound, below 1 where they overlap.
"""

import dataclasses

import numpy as np

from analysis.fitting.levenberg_marquardt import residuals
from analysis.fitting.multistart import bootstrap, search
from analysis.fitting.options import FitError, Options
from analysis.fitting.setup import Setup, Stage, set_up
from analysis.fitting.statistics import interval, r_squared, rms
from analysis.laws import paper
from analysis.laws.law import Parameter, log_power_law, log_sum
from analysis.table import Table
from analysis.table.columns import HIGH_PRECISION_BITS, PRECISIONS


@dataclasses.dataclass(frozen=True)
class Multiplicativity:
    """kappa with its bootstrap interval, and how the marginal fit predicts joint runs (log error, R² of the loss)."""

    kappa: float
    ci: tuple[float, float]
    mean_log_error: float
    rms_log_error: float | None
    rms_log_error_marginal: float | None
    r2_joint: float | None
    marginal_runs: int
    joint_runs: int
    in_words: str


def _joint(c, xp):
    low = 0
    for column in PRECISIONS:
        low = low + xp.where(c[column] < HIGH_PRECISION_BITS, 1, 0)
    return low >= 2


def _log_loss(p, c, xp):
    n_eff = paper.effective_parameters(p, c, xp)
    power = xp.where(_joint(c, xp), p["kappa"], 1.0)
    log_n = xp.log(c["N"]) + power * (xp.log(n_eff) - xp.log(c["N"]))
    size = xp.log(p["A"]) - p["alpha"] * log_n
    return log_sum(xp, size, log_power_law(p["B"], p["beta"], c["D"], xp), xp.log(p["E"]))


LAW = dataclasses.replace(
    paper.PRECISION,
    name="precision with kappa",
    formula="L = A N_eff^-alpha + B D^-beta + E, N_eff = N (f_w f_a f_kv)^kappa if two or more parts are low",
    params=(*paper.PRECISION.params, Parameter("kappa", 0.0, 10.0, (0.5, 1.0, 2.0), held=1.0)),
    log_loss=_log_loss,
)


def is_joint(table: Table) -> np.ndarray:
    """True for rows trained with two or more parts below 16 bits."""
    return np.asarray(_joint(table.columns, np))


def require_marginals(table: Table) -> None:
    """Raises FitError where the table has no joint runs, or lacks runs that vary each of their parts alone."""
    joint_n = is_joint(table)
    if not joint_n.any():
        raise FitError("no run was trained with two or more parts below 16 bits")
    for column in PRECISIONS:
        alone = (table[column] < HIGH_PRECISION_BITS) & ~joint_n
        if (table[column][joint_n] < HIGH_PRECISION_BITS).any() and not alone.any():
            raise FitError(f"joint runs lower {column}, but no run lowers {column} alone")


def multiplicativity(
    table: Table, options: Options | None = None, resamples: int = 200, starts: int | None = None, seed: int = 0
) -> Multiplicativity:
    """Raises FitError where the table has no joint runs, or lacks runs that vary each of their parts alone."""
    table = table.before_ptq()
    require_marginals(table)
    setup = _staged(set_up(LAW, table, options))
    best = search(setup, starts, seed)
    draws = bootstrap(setup, best.theta_F, resamples, seed)
    at = setup.free.index("kappa")
    kappa, span = float(best.theta_F[at]), interval(draws[:, at])
    plain = best.theta_F.copy()
    plain[at] = 1.0
    error_n = residuals(setup.problem, plain)
    joint_n = np.asarray(_joint(setup.rows.columns, np))
    observed = setup.observed_n[joint_n]
    return Multiplicativity(
        kappa,
        span,
        float(error_n[joint_n].mean()),
        rms(error_n[joint_n]),
        rms(error_n[~joint_n]),
        r_squared(observed, setup.predicted(plain)[joint_n]),
        int(np.sum(~joint_n)),
        int(np.sum(joint_n)),
        _words(kappa, *span),
    )


def _staged(setup: Setup) -> Setup:
    """The setup that fits everything but kappa to the marginal runs, then kappa to the joint ones."""
    joint_n = np.asarray(_joint(setup.rows.columns, np))
    is_kappa = np.array([name == "kappa" for name in setup.free])
    marginal = Stage(~joint_n, ~is_kappa)
    if marginal.rows_n.sum() <= marginal.fits_F.sum():
        raise FitError(
            f"{int(marginal.rows_n.sum())} runs with at most one part below 16 bits are too few for "
            f"{int(marginal.fits_F.sum())} parameters"
        )
    return dataclasses.replace(setup, stages=(marginal, Stage(joint_n, is_kappa)))


def _words(kappa: float, low: float, high: float) -> str:
    found = f"kappa {kappa:.3f} [{low:.3f}, {high:.3f}]"
    if low <= 1 <= high:
        return f"{found}: joint runs are as the marginal fits predict, the effects multiply"
    verdict = "compound beyond the product" if low > 1 else "overlap, less than the product"
    return f"{found}: the effects {verdict}"
