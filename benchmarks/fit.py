"""How fast and how well laws are fitted, against the SciPy loop that the field uses: `python -m benchmarks.fit`.

Two cases: Chinchilla's five parameters from its authors' 4,500 starts on 245 rows with 1,000 bootstrap resamples,
beside the same starts through scipy.optimize in the same process; and all parameters of the unified law on 2,000
rows. Times include compilation. `--scipy_share=1` runs every start through SciPy (minutes); by default every 15th is,
and its time is scaled up.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags
from scipy import optimize

from analysis import laws
from analysis import table as tables
from analysis.fitting.identifiability import identify
from analysis.fitting.multistart import bootstrap, search, start_grid
from analysis.fitting.setup import set_up
from analysis.laws import synthetic
from precision_scaling.runtime import cli, files

FLAGS = flags.FlagValues()
_SHARE = flags.DEFINE_float(
    "scipy_share", 1 / 15, "Share of the starts that SciPy runs.", lower_bound=0.001, upper_bound=1, flag_values=FLAGS
)
_UNIFIED = flags.DEFINE_bool("unified", True, "Whether to time the unified law too.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "Where to write the numbers as JSON.", flag_values=FLAGS)
SAME = 1e-4  # relative difference in objective below which two optima count as the same


def chinchilla_table() -> tables.Table:
    """245 runs: 7 sizes by 35 token counts, 0.5 % noise, five of them 5 % outliers."""
    rng = np.random.default_rng(0)
    n, d = np.repeat(np.geomspace(3e7, 1e9, 7), 35), np.tile(np.geomspace(1.5e9, 2.6e10, 35), 7)
    loss = laws.predict("chinchilla", laws.published("chinchilla"), N=n, D=d) * np.exp(0.005 * rng.standard_normal(245))
    loss[rng.choice(245, 5, replace=False)] *= 1.05
    return tables.from_columns({"N": n, "D": d, "loss": loss})


def unified_table() -> tables.Table:
    """2,000 rows: 400 runs of the paper's grid before PTQ and after it at 3 to 6 bits, 0.5 % noise."""
    full = synthetic.table("unified", noise=0.005)
    runs = np.random.default_rng(0).permutation(np.unique(full["run"].astype(str)))[:400]
    return full.select(np.isin(full["run"].astype(str), runs))


def timed(function, *args):
    began = time.perf_counter()
    return function(*args), time.perf_counter() - began


def scipy_loop(table: tables.Table, starts: np.ndarray, gradient: bool) -> np.ndarray:
    """Objectives that L-BFGS-B with tight tolerances reaches, one start after the other."""
    log_n, log_d, log_l = np.log(table["N"]), np.log(table["D"]), np.log(table["loss"])

    def objective(theta):
        a, alpha, b, beta, e = theta
        terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        top = terms.max(axis=0)
        weights = np.exp(terms - top)
        total = weights.sum(axis=0)
        residual = top + np.log(total) - log_l
        size = np.abs(residual)
        value = np.sum(np.where(size <= 1e-3, residual**2 / 2, 1e-3 * (size - 5e-4)))
        if not gradient:
            return value
        share = weights / total * np.clip(residual, -1e-3, 1e-3)
        by_term = share.sum(axis=1)
        return value, np.array([by_term[0], -share[0] @ log_n, by_term[1], -share[1] @ log_d, by_term[2]])

    options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-12}
    return np.array(
        [optimize.minimize(objective, s, jac=gradient, method="L-BFGS-B", options=options).fun for s in starts]
    )


def chinchilla() -> dict:
    table = chinchilla_table()
    setup = set_up("chinchilla", table)
    best, searching = timed(search, setup, 4500)
    _, resampling = timed(bootstrap, setup, best.theta_F, 1000)
    starts = start_grid(setup, 4500)
    some = starts[:: max(round(1 / _SHARE.value), 1)]
    out = {
        "rows": len(table),
        "starts": best.starts,
        "search_s": searching,
        "bootstrap_1000_s": resampling,
        "total_s": searching + resampling,
        "objective": best.objective,
        "share_at_best": best.share,
    }
    for name, gradient in (("scipy_finite_differences", False), ("scipy_gradients", True)):
        found, seconds = timed(scipy_loop, table, some, gradient)
        scaled = seconds * len(starts) / len(some)
        out[name] = {
            "starts_run": len(some),
            "seconds_for_all_starts": scaled,
            "times_slower_than_search": scaled / searching,
            "objective": float(np.nanmin(found)),
            "share_at_best": float(np.mean(found <= min(np.nanmin(found), best.objective) * (1 + SAME))),
        }
    return out


def unified() -> dict:
    table = unified_table()
    setup = set_up("unified", table)
    best, searching = timed(search, setup, 500)
    verdict, identifying = timed(identify, setup, best.theta_F)
    _, resampling = timed(bootstrap, setup, best.theta_F, 200)
    return {
        "rows": len(table),
        "free_parameters": len(setup.free),
        "starts": best.starts,
        "search_s": searching,
        "profiles_s": identifying,
        "bootstrap_200_s": resampling,
        "total_s": searching + identifying + resampling,
        "objective": best.objective,
        "share_at_best": best.share,
        "refused": verdict.unidentified,
    }


def main() -> None:
    out = {"chinchilla": chinchilla()}
    if _UNIFIED.value:
        out["unified"] = unified()
    out["peak_memory_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(out, indent=1))
    if _OUT.value:
        files.atomic_write(Path(_OUT.value), json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
