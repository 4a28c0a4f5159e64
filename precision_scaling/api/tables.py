"""Fit, predict and plan from Python: the commands of `analysis` as functions of tables and fits."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from analysis import laws
from analysis import table as tables
from analysis.fitting import fit as fitting
from analysis.fitting import fit_text, prediction, prediction_text
from analysis.fitting.fit import Fit
from analysis.fitting.options import Options
from analysis.laws.law import Law
from analysis.planning import fitted, text
from analysis.planning import plan as planning
from analysis.planning.cost import bits_of_format, named_format
from analysis.planning.minimize import Budget
from analysis.planning.plan import Plan
from precision_scaling.errors import UserError

__all__ = ["fit", "plan", "predict", "register_law", "summary"]

Rows: TypeAlias = str | Path | Mapping[str, Any] | pd.DataFrame | tables.Table
Fits: TypeAlias = str | Path | Fit | Sequence[str | Path | Fit]


def register_law(law: Law) -> Law:
    """Gives a law of one's own its name everywhere, in this process. UserError where the name is taken."""
    if laws.LAWS.get(law.name, law) != law:
        raise UserError(f"law {law.name!r} is there already; allowed is another name")
    laws.LAWS[law.name] = law
    return law


def fit(law: str | Law, rows: Rows, bootstrap: int = 0, seed: int = 0, **options: Any) -> Fit:
    """Fits a law to measured losses; `params` has its constants, None where the rows do not identify one.

    rows: a runs.csv, or columns N, D, loss and whichever of P_w, P_a, P_kv, P_post, ... the law reads, as a DataFrame
    or a dict. bootstrap: resamples for 95 % intervals; 0: none. options: fields of `analysis.fitting.options.Options`.
    Raises UserError where the rows do not allow the law.
    """
    return fitting.fit(law, _table(rows), Options(**options), bootstrap_resamples=bootstrap, seed=seed)


def predict(fits: Fits, rows: Rows) -> pd.DataFrame:
    """The rows with the loss that fits predict, `predicted`, its interval `low` and `high` (with a bootstrap), and why
    a row has none, `note`.

    fits: one of the loss, one of δ after quantization, or both; fit.json files or what `fit` returns. rows: measured,
    or planned without a loss. Raises UserError.
    """
    found = prediction.predict(_fits(fits), _table(rows, measured=False))
    return pd.read_csv(io.StringIO(prediction_text.to_csv(found)), keep_default_na=False, na_values=[""])


def plan(
    fits: Fits = "paper",
    flops: float | None = None,
    params: float | None = None,
    tokens: float | None = None,
    precision: float | str | None = None,
    serve_bits: float | None = None,
    inference_tokens: float = 0.0,
    memory: float | None = None,
    columns: Mapping[str, float] | None = None,
) -> Plan:
    """The N, D and training precision of least predicted loss under a budget: `plan(...).best`.

    fits: "paper" for its published constants, else as in `predict`. flops: of training at 16 bits, and of serving
    `inference_tokens`. params, tokens, precision (bits or a format): fixed where they are given. serve_bits: of the
    weights after quantization. memory: bytes for the weights as served. columns: others that a law reads. Raises
    UserError for a budget that nothing meets.
    """
    fmt = None if precision is None else named_format(str(precision))
    bits = None if precision is None else bits_of_format(str(precision))
    budget = Budget(flops, params, tokens, bits, serve_bits, inference_tokens, memory)
    return planning.plan(_fits(fits), budget, columns=dict(columns or {}), fmt=fmt)


def summary(found: Fit | Plan) -> str:
    """What the commands print of a fit or a plan."""
    return fit_text.summary(found) if isinstance(found, Fit) else text.describe(found)


def _table(rows: Rows, measured: bool = True) -> tables.Table:
    if isinstance(rows, tables.Table):
        return rows
    if isinstance(rows, str | Path):
        return tables.load(rows, measured)
    return tables.from_columns({str(name): rows[name] for name in rows}, measured=measured)


def _fits(fits: Fits) -> list[Fit]:
    if isinstance(fits, str | Path | Fit):
        fits = [fits]
    return [one for each in fits for one in ([each] if isinstance(each, Fit) else fitted.load(str(each)))]
