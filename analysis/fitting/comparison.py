"""Compares laws on the same rows: fit, information criteria, held-out error, and paired bootstrap differences."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import table as tables
from analysis.fitting import crossval
from analysis.fitting.caveats import mixed_rows, shared_names
from analysis.fitting.differences import Difference, Errors, order_and_differences
from analysis.fitting.forms import KINDS, Form, all_names, held_by, kinds_of, named, of_high_precision
from analysis.fitting.identifiability import identify
from analysis.fitting.levenberg_marquardt import residuals
from analysis.fitting.multiplicativity import Multiplicativity, multiplicativity
from analysis.fitting.multistart import search
from analysis.fitting.nested import NestedTest, ratio_test
from analysis.fitting.options import FitError, Options
from analysis.fitting.setup import Setup, set_up
from analysis.fitting.statistics import r_squared, rms
from analysis.laws.law import LawError
from analysis.table.expression import rows_where

ROW = "row of the table"  # a column that identifies a row of the table among the rows of every law
LARGEST_N = "largest_N"  # of the held-out errors by N, those of the largest size
HELD_OUT = {
    "N": "out N",
    "D": "out D",
    "P": "out P",
    "compute": "largest runs",
    "joint": "joint runs",
    LARGEST_N: "largest N",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One law on the rows of its kind. Errors are root mean squares of log errors, `held_out` by HELD_OUT and, where
    rows were chosen to test, "chosen"; `served` the same of the loss after PTQ, for laws that know δ;
    `difference` is the mean absolute held-out error minus that of the best law of the kind, with its interval (None
    for the best; ends None where runs are too few).
    """

    law: str
    kind: str
    n: int
    k: int
    unidentified: tuple[str, ...]
    r2: float | None
    mse: float
    objective: float
    aic: float
    bic: float
    held_out: Mapping[str, float | None]
    r2_held_out: float | None
    difference: Difference | None
    starts_at_best: float
    condition: float
    seconds: float
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason -> rows of the table not used
    served: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All laws, those left out with the reason, and the test whether effects of precision multiply (or why it is not
    possible).
    """

    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    multiplicativity: Multiplicativity | None
    multiplicativity_skipped: str | None
    left_out: Mapping[str, int]
    notes: tuple[str, ...]
    nested: tuple[NestedTest, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judged:
    """A law's line in the comparison and what it was made from."""

    row: Row
    setup: Setup
    theta_F: np.ndarray
    held: Mapping[str, crossval.HeldOut]


def compare(
    table: tables.Table,
    names: tuple[str, ...] | None = None,
    options: Options | None = None,
    starts: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
    fit_where: str | None = None,
    test_where: str | None = None,
) -> Comparison:
    """Fits and judges every law of `names` (forms.py) that the table allows; None: all, with and without biases.

    The expressions fit_where and test_where add one more hold-out, of chosen rows. Raises FitError where the table
    allows no law.
    """
    options = Options() if options is None else options
    table = table.one_schedule().one_precision().one_average().in_order()
    table = dataclasses.replace(table, columns={**table.columns, ROW: np.arange(len(table))})
    low = not table.before_ptq().high_precision.all()
    for text in (fit_where, test_where):
        if text is not None:
            rows_where(text, table.deltas())
    forms = [named(name) for name in names or all_names()]
    high = low and sum(of_high_precision(form.law) for form in forms) > 1
    fitted: list[Judged] = []
    skipped = {}
    for form in forms:
        for law, kind in kinds_of(form.law, low, high):
            judged = dataclasses.replace(form, law=law)
            try:
                fitted.append(_judge(judged, kind, table, options, starts, seed, (fit_where, test_where)))
            except (FitError, LawError) as error:
                skipped[form.name] = str(error)
    if not fitted:
        raise FitError(f"no law can be fitted to {table.source}: " + "; ".join(f"{k}: {v}" for k, v in skipped.items()))
    rows: list[Row] = []
    for kind in KINDS:
        group = [entry for entry in fitted if entry.row.kind == kind]
        errors = [_by_row(entry.setup, entry.held) for entry in group]
        for at, difference in order_and_differences(errors, table.models, resamples, seed):
            rows.append(dataclasses.replace(group[at].row, difference=difference))
    test, why = None, None
    try:
        if any(entry.row.kind == "loss" for entry in fitted):
            test = multiplicativity(table, starts=starts, seed=seed)
        else:
            why = "no law of training precision was compared"
    except FitError as error:
        why = str(error)
    notes = _notes(fitted, options, low)
    return Comparison(tuple(rows), skipped, test, why, dict(table.left_out), notes, _nested(fitted))


def _notes(fitted: Sequence[Judged], options: Options, low: bool) -> tuple[str, ...]:
    """Notes on the comparison; `low`: the table has rows of low precision."""
    notes = []
    setups = [entry.setup for entry in fitted]
    for name in dict.fromkeys(setup.law.name for setup in setups if setup.law.baseline and low):
        notes.append(f"{name} is fitted to rows of every precision here, as the law in which precision has no effect")
    if any(entry.row.kind == "high" for entry in fitted):
        notes.append("laws that describe 16 bits alone are judged on those rows")
    if options.loss == "huber":
        notes.append("AIC and BIC take log residuals as Laplace distributed, as Huber's loss with a small delta does")
    notes.append("AIC and BIC count rows as independent; rows after PTQ of one run are not")
    notes += dict.fromkeys(note for setup in setups for note in (*mixed_rows(setup), *shared_names(setup)))
    notes.append("mean |error| is over the held-out rows that every law of the kind can predict")
    return tuple(notes)


def _judge(
    form: Form,
    kind: str,
    table: tables.Table,
    options: Options,
    starts: int | None,
    seed: int,
    wheres: tuple[str | None, str | None],
) -> Judged:
    """Fits the form and predicts held-out rows. Raises FitError where on this table it equals a smaller form."""
    began = time.monotonic()
    law, of_form = form.law, form.options(options)
    setup = set_up(law, table, of_form)
    more = (crossval.chosen(setup, *wheres),) if any(wheres) else ()
    if law.effects and law.family is None and all(name in setup.constants for name in law.effects):
        raise FitError("no parameter beyond those of chinchilla is identified: on this table it is chinchilla")
    if not form.biased:
        with_biases = set_up(law, table, dataclasses.replace(of_form, biased=True))
        if set(law.biases) <= set(with_biases.unidentified):
            raise FitError("no bias is identified: on this table the form with biases has none either")
    best = search(setup, starts, seed)
    verdict = identify(setup, best.theta_F, profile=False)
    held = crossval.held_out(setup, best.theta_F, seed=seed, more=more)
    predicted = setup.predicted(best.theta_F)
    aic, bic = _information(residuals(setup.problem, best.theta_F), options.loss, len(setup.free))
    row = Row(
        law=form.name,
        kind=kind,
        n=setup.problem.rows,
        k=len(setup.free),
        unidentified=tuple({**setup.unidentified, **verdict.unidentified}),
        r2=r_squared(setup.observed_n, predicted),
        mse=float(np.mean((setup.observed_n - predicted) ** 2)),
        objective=best.objective,
        aic=aic,
        bic=bic,
        held_out=_by_scheme({scheme: found.error_n for scheme, found in held.items()}, setup.rows["N"]),
        served=_by_scheme({scheme: found.served_m for scheme, found in held.items()}, setup.every_row["N"]),
        r2_held_out=_r2_held_out(setup, held),
        difference=None,
        starts_at_best=best.share,
        condition=min(verdict.condition, 1e300),
        seconds=round(time.monotonic() - began, 3),
        left_out=dict(setup.left_out),
    )
    return Judged(row, setup, best.theta_F, held)


def _information(error_n: np.ndarray, loss: str, free: int) -> tuple[float, float]:
    """AIC and BIC of a fit with these residuals, Laplace distributed under Huber's loss, normal under least squares.

    The scale of the errors is one more parameter.
    """
    n, k = len(error_n), free + 1
    if loss == "huber":
        minus_two_log_likelihood = 2 * n * (1 + math.log(2 * max(float(np.mean(np.abs(error_n))), 1e-300)))
    else:
        minus_two_log_likelihood = n * (1 + math.log(2 * math.pi * max(float(np.mean(error_n**2)), 1e-300)))
    return minus_two_log_likelihood + 2 * k, minus_two_log_likelihood + math.log(n) * k


def _by_scheme(errors: dict[str, np.ndarray], size_n: np.ndarray) -> dict[str, float | None]:
    """Root mean squares by scheme; of the errors by N also those of the largest size."""
    if "N" in errors:
        errors = {**errors, LARGEST_N: np.where(size_n == size_n.max(), errors["N"], np.nan)}
    schemes = [*HELD_OUT, *([crossval.CHOSEN] if crossval.CHOSEN in errors else [])]
    return {scheme: rms(errors[scheme]) if scheme in errors else None for scheme in schemes}


def _nested(fitted: list[Judged]) -> tuple[NestedTest, ...]:
    """Likelihood-ratio tests of every pair of nested laws of one kind on the same rows."""
    out = []
    for large in fitted:
        for small in fitted:
            if small.row.kind == large.row.kind and small.row.law in held_by(large.row.law):
                with contextlib.suppress(FitError):  # nothing more is free on these rows
                    names = (small.row.law, large.row.law)
                    out.append(ratio_test(small.setup, small.theta_F, large.setup, large.theta_F, names))
    return tuple(out)


def _r2_held_out(setup: Setup, held: Mapping[str, crossval.HeldOut]) -> float | None:
    """R² of log values predicted out of their fold, over all schemes; None where nothing could be predicted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        target = np.concatenate([np.log(setup.observed_n) for _ in held]) if held else np.array([])
    error = np.concatenate([h.error_n for h in held.values()]) if held else np.array([])
    known = np.isfinite(error) & np.isfinite(target)
    return r_squared(target[known], (target + error)[known]) if known.any() else None


def _by_row(setup: Setup, held: Mapping[str, crossval.HeldOut]) -> Errors:
    """Absolute held-out log error by (row of the table, scheme), of the rows that the law can predict."""
    out = {}
    for scheme, result in held.items():
        for i in np.flatnonzero(np.isfinite(result.error_n)):
            out[(int(setup.rows[ROW][i]), scheme)] = abs(float(result.error_n[i]))
    return out
