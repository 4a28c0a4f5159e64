"""The record of a fit: its quality, and all that is needed to judge or repeat it."""

import importlib.metadata
import platform
from typing import Any

import numpy as np

from analysis.fitting.multistart import LARGE_TABLE, Best, few_runs
from analysis.fitting.setup import Setup
from analysis.fitting.statistics import r_squared
from analysis.table import Table
from analysis.table.columns import FORMAT_COLUMNS, HIGH_PRECISION_BITS, PRECISIONS, mixture
from precision_scaling.numerics import formats


def metrics(setup: Setup, theta_F: np.ndarray) -> dict[str, Any]:
    """R² on the target in nats (loss, or δ for a law of δ) and on its log, and errors."""
    observed, predicted = setup.observed_n, setup.predicted(theta_F)
    out = {"r2": r_squared(observed, predicted), "mae": float(np.mean(np.abs(observed - predicted)))}
    positive = (observed > 0) & (predicted > 0)
    out["r2_log"] = r_squared(np.log(observed[positive]), np.log(predicted[positive])) if positive.any() else None
    out["rmse"] = float(np.sqrt(np.mean((observed - predicted) ** 2)))
    if setup.law.target == "loss" and setup.law.log_delta is not None:
        after = setup.rows.quantized
        measured = (setup.rows["loss"] - setup.rows["loss_before"])[after]
        out["r2_delta"] = r_squared(measured, setup.predicted_delta(theta_F))
    return out


def _residuals_in_words(setup: Setup) -> list[str]:
    """What is compared before PTQ and after it, and the weights."""
    log = "log " if setup.options.residual == "log_loss" else ""
    words = []
    if setup.law.log_loss is not None:
        words.append(f"rows before PTQ: {log}L predicted - {log}L measured")
    if setup.law.log_delta is not None:
        words.append(
            {
                "log_delta": "rows after PTQ: log delta predicted - log delta measured",
                "floored": "rows after PTQ: asinh(delta / (2 f)) predicted - measured, f the noise of delta, "
                f"{setup.floor or 0:.3g} nats: log delta where delta is large; zero or negative delta count",
                "log_loss": f"rows after PTQ: {log}(measured loss of the run before PTQ + delta predicted) - {log}L "
                "measured: the noise of a run enters once, and zero or negative delta count",
            }[setup.delta_residual]
        )
    if setup.options.sigma_column:
        words.append(
            f"times the median standard deviation over that of the row, by column {setup.options.sigma_column}"
        )
    return words


def _ranges(rows: Table) -> dict[str, tuple[float, float]]:
    """Smallest and largest N, D, training cost C (6/16 N D P) and bits of the rows."""
    bits = np.mean([np.minimum(rows[name], HIGH_PRECISION_BITS) for name in PRECISIONS], axis=0)
    columns = {name: rows[name] for name in ("N", "D", *PRECISIONS, "P_post")}
    columns["C"] = 6 * rows["N"] * rows["D"] * bits / HIGH_PRECISION_BITS
    known = {name: column for name, column in columns.items() if not np.isnan(column).all()}
    return {name: (float(np.nanmin(column)), float(np.nanmax(column))) for name, column in known.items()}


def trained_formats(rows: Table) -> dict[str, list[str]]:
    """The number formats that each part was trained in, by the names of the registry where it has them; no entry for a
    part whose formats the table does not name.
    """
    found = {}
    for part, columns in FORMAT_COLUMNS.items():
        cells = {text for name in columns if name in rows for text in rows[name].astype(str)} - {"", "nan"}
        texts = {name for cell in cells for name, _ in mixture(cell)}
        if texts:
            found[part] = sorted({_canonical(text) for text in texts})
    return found


def _canonical(text: str) -> str:
    try:
        return formats.parse(text).name
    except formats.FormatError:
        return text


def record(setup: Setup, best: Best, table: Table, resamples: int, level: float, seed: int) -> dict[str, Any]:
    """How the fit was made, as `reporting` in fit.json holds it."""
    options, law = setup.options, setup.law
    if options.loss == "huber":
        loss = f"sum over rows of Huber's function with delta = {options.huber_delta:g}"
    else:
        loss = "half the sum of squares over rows"
    residual = _residuals_in_words(setup)
    if resamples == 0:
        intervals = "none (no bootstrap draws)"
    else:
        how = "exponential weights on runs (fewer than ten runs per parameter)" if few_runs(setup) else "resampled runs"
        how = "one Newton step per resample of runs" if setup.problem.rows > LARGE_TABLE else how
        intervals = (
            f"{level:.0%} percentiles of {resamples} bootstrap draws, {how}, spread by sqrt(1 + q parameters/(runs - "
            "parameters)), q the share of residuals within Huber's delta"
        )
    return {
        "formula": law.formula,
        "source": law.source,
        "form": "biased" if options.biased else "unbiased (biases 0)",
        "stages": options.stages,
        "free": setup.free,
        "fixed": {k: v for k, v in setup.constants.items() if k not in setup.unidentified},
        "tied": dict(setup.tied),
        "loss": loss,
        "residuals": residual,
        "optimizer": "iteratively reweighted Levenberg-Marquardt, float64, batched over starts; best start kept",
        "start_grid": {name: law.parameter(name).grid for name in setup.free},
        "starts_competed_on_rows": best.sampled_rows,
        "intervals": intervals,
        "level": level if resamples else None,
        "runs": int(setup.run_n.max()) + 1,
        "rows_before_ptq": int(np.count_nonzero(~setup.rows.quantized)),
        "rows_after_ptq": int(np.count_nonzero(setup.rows.quantized)),
        "N": "column N of the table (this project counts parameters without embeddings)",
        "C": "6/16 N D P FLOP-equivalents, P the mean training precision; not used by the fit",
        "checkpoints": "every row of the table, less those left out; one loss per run before PTQ",
        "bits": "bf16 and wider count as the P in the table, 16 or more, in the formula too",
        "ranges": _ranges(setup.rows),
        "formats": trained_formats(setup.rows),
        "ptq_method": setup.rows.main_method,
        "residual": options.residual,
        "delta_residual": setup.delta_residual if law.log_delta is not None else None,
        "delta_floor": setup.floor,
        "fit_where": options.fit_where,
        "table": table.source,
        "table_sha256": table.sha256,
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy", "scipy")},
        "python": platform.python_version(),
    }
