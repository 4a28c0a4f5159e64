"""Compares laws on the same rows: fit, information criteria, held-out error, and paired bootstrap differences."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis import laws
from analysis import table as tables
from analysis.fitting import crossval
from analysis.fitting.caveats import mixed_rows, shared_names
from analysis.fitting.identifiability import identify
from analysis.fitting.levenberg_marquardt import residuals
from analysis.fitting.multiplicativity import Multiplicativity, multiplicativity
from analysis.fitting.multistart import LEAST_RUNS, search
from analysis.fitting.nested import NestedTest, ratio_test
from analysis.fitting.problem import FitError, Options, Setup, set_up
from analysis.fitting.provenance import r_squared
from analysis.laws.law import Law, LawError
from analysis.table.expression import rows_where

FILES = ("compare.csv", "compare.json")
ROW = "row of the table"  # a column that tells which rows of two laws are the same
UNBIASED = "_unbiased"  # ends the name of a law whose biases n are 0
OUTER = "_outer"  # ends the name of a law whose outer exponent g is free
CHINCHILLA_NAMES = {"A", "alpha", "B", "beta", "E", "g"}
LARGEST_N = "largest_N"  # of the held-out errors by N, those of the largest size
HELD_OUT = {
    "N": "out N",
    "D": "out D",
    "P": "out P",
    "compute": "largest runs",
    "joint": "joint runs",
    LARGEST_N: "largest N",
}
KINDS = {
    "loss": "loss before PTQ",
    "high": "loss before PTQ of runs in 16 bits",
    "delta": "delta of PTQ",
    "both": "loss before and after PTQ",
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
    refused: tuple[str, ...]
    r2: float | None
    mse: float
    objective: float
    aic: float
    bic: float
    held_out: Mapping[str, float | None]
    r2_held_out: float | None
    difference: tuple[float, float | None, float | None] | None
    starts_at_best: float
    condition: float
    seconds: float
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason -> rows of the table not used
    served: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All laws, those left out with the reason, and the test whether effects of precision multiply (or why it cannot
    be made).
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
    """Fit and judge every law of `names` that the table allows; None: all, with and without biases.

    A law's name with UNBIASED after it is that law without biases, with OUTER the one with g free. Expressions
    fit_where and test_where add one more hold-out, of the rows of one's own choice. Raises FitError where the table
    allows none.
    """
    options = Options() if options is None else options
    table = table.one_schedule().in_order()
    table = dataclasses.replace(table, columns={**table.columns, ROW: np.arange(len(table))})
    low = not table.before_ptq().high_precision.all()
    for text in (fit_where, test_where):
        if text is not None:
            rows_where(text, table.deltas())
    names = names or all_names()
    high = low and sum(_of_high_precision(named(name).law) for name in names) > 1
    fitted: list[Judged] = []
    skipped = {}
    for name in names:
        form = named(name)
        of_law = dataclasses.replace(
            _options_for(form.law, options),
            biased=form.biased and options.biased,
            freed=tuple(dict.fromkeys((*form.freed, *_options_for(form.law, options).freed))),
        )
        for law, kind in _kinds(form.law, low, high):
            try:
                fitted.append(_judge(law, kind, table, of_law, starts, seed, name, (fit_where, test_where)))
            except (FitError, LawError) as error:
                skipped[name] = str(error)
    if not fitted:
        raise FitError(f"no law can be fitted to {table.source}: " + "; ".join(f"{k}: {v}" for k, v in skipped.items()))
    rows = []
    for kind in KINDS:
        group = [entry for entry in fitted if entry.row.kind == kind]
        rows += _with_differences(group, table.models, resamples, seed)
    test, why = None, None
    try:
        if any(entry.row.kind == "loss" for entry in fitted):
            test = multiplicativity(table, starts=starts, seed=seed)
        else:
            why = "no law of training precision was compared"
    except FitError as error:
        why = str(error)
    notes = []
    if low and any(row.law == "chinchilla" for row in rows):
        notes.append(
            "chinchilla is fitted to rows of every precision here, as the law in which precision has no effect"
        )
    if any(entry.row.kind == "high" for entry in fitted):
        notes.append("laws that know 16 bits alone are judged on those rows")
    if options.loss == "huber":
        notes.append("AIC and BIC take log residuals as Laplace distributed, which Huber's sum with a small delta fits")
    notes.append("AIC and BIC count rows as independent; rows after PTQ of one run are not")
    setups = [entry.setup for entry in fitted]
    notes += dict.fromkeys(note for setup in setups for note in (*mixed_rows(setup), *shared_names(setup)))
    notes.append("mean |error| is over the held-out rows that every law of the kind can predict")
    return Comparison(tuple(rows), skipped, test, why, dict(table.left_out), tuple(notes), _nested(fitted))


def all_names() -> tuple[str, ...]:
    """Every law, and after it the same without its biases."""
    return tuple(n for name, law in laws.LAWS.items() for n in (name, *([name + UNBIASED] if law.biases else [])))


@dataclasses.dataclass(frozen=True)
class Form:
    """A law as a comparison calls it: with or without its biases, and parameters freed."""

    law: Law
    biased: bool = True
    freed: tuple[str, ...] = ()


def named(name: str) -> Form:
    """The form that a comparison calls so. Raises LawError for an unknown name."""
    if name in laws.LAWS:
        return Form(laws.get(name))
    inner = name.removesuffix(OUTER)
    law = laws.get(inner.removesuffix(UNBIASED))
    if inner.endswith(UNBIASED) and not law.biases:
        raise LawError(f"{name}: {law.name} has no biases to leave out")
    if name.endswith(OUTER) and not any(p.name == "g" and not p.fit for p in law.params):
        raise LawError(f"{name}: {law.name} has no outer exponent g to free")
    return Form(law, not inner.endswith(UNBIASED), ("g",) if name.endswith(OUTER) else ())


def _options_for(law: Law, options: Options) -> Options:
    """The options that this law knows: constants and ties that it does not have are left out."""
    known = set(law.names)
    return dataclasses.replace(
        options,
        fixed={k: v for k, v in options.fixed.items() if k in known},
        tied={k: v for k, v in options.tied.items() if {k, v} <= known},
        freed=tuple(name for name in options.freed if name in known),
        stages="joint",
    )


def _of_high_precision(law: Law) -> bool:
    """Whether it is a law of the loss that knows 16 bits alone."""
    return law.high_precision_only and law.log_delta is None


def _kinds(law: Law, low: bool, high: bool) -> list[tuple[Law, str]]:
    """The kinds that a law is judged in. Of laws of 16 bits alone chinchilla stands among the others, too, as the law
    without an effect of precision, where these see rows of low precision; `high`: there are several to compare.
    """
    if law.log_delta is not None:
        return [(law, "delta" if law.log_loss is None else "both")]
    if not (low and _of_high_precision(law)):
        return [(law, "loss")]
    everywhere = [(dataclasses.replace(law, high_precision_only=False), "loss")] if law.name == "chinchilla" else []
    return [*everywhere, *([(law, "high")] if high or not everywhere else [])]


def _judge(
    law: Law,
    kind: str,
    table: tables.Table,
    options: Options,
    starts: int | None,
    seed: int,
    name: str,
    wheres: tuple[str | None, str | None],
) -> Judged:
    began = time.monotonic()
    setup = set_up(law, table, options)
    more = (crossval.chosen(setup, *wheres),) if any(wheres) else ()
    effects = (
        set(law.names) - CHINCHILLA_NAMES if law.log_delta is None and {*law.names, "g"} >= CHINCHILLA_NAMES else ()
    )
    if effects and law.family is None and all(name in setup.refused or name in setup.constants for name in effects):
        raise FitError("no parameter beyond those of chinchilla is informed: on this table it is chinchilla")
    if name.endswith(UNBIASED):
        with_biases = set_up(law, table, dataclasses.replace(options, biased=True))
        if set(law.biases) <= set(with_biases.refused):
            raise FitError("no bias is informed: on this table the form with biases has none either")
    best = search(setup, starts, seed)
    verdict = identify(setup, best.theta_F, profile=False)
    held = crossval.held_out(setup, best.theta_F, seed=seed, more=more)
    error_n = residuals(setup.problem, best.theta_F)
    n, k = len(error_n), len(setup.free)
    if options.loss == "huber":
        minus_two_log_likelihood = 2 * n * (1 + math.log(2 * max(float(np.mean(np.abs(error_n))), 1e-300)))
    else:
        minus_two_log_likelihood = n * (1 + math.log(2 * math.pi * max(float(np.mean(error_n**2)), 1e-300)))
    predicted = setup.predicted(best.theta_F)
    row = Row(
        law=name,
        kind=kind,
        n=n,
        k=k,
        refused=tuple({**setup.refused, **verdict.refused}),
        r2=r_squared(setup.observed_n, predicted),
        mse=float(np.mean((setup.observed_n - predicted) ** 2)),
        objective=best.objective,
        aic=minus_two_log_likelihood + 2 * (k + 1),
        bic=minus_two_log_likelihood + math.log(n) * (k + 1),
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


def _by_scheme(errors: dict[str, np.ndarray], size_n: np.ndarray) -> dict[str, float | None]:
    """Root mean squares by scheme; of the errors by N also those of the largest size."""
    if "N" in errors:
        errors = {**errors, LARGEST_N: np.where(size_n == size_n.max(), errors["N"], np.nan)}
    schemes = [*HELD_OUT, *([crossval.CHOSEN] if crossval.CHOSEN in errors else [])]
    return {scheme: _rms(errors[scheme]) if scheme in errors else None for scheme in schemes}


def _nested(fitted: list[Judged]) -> tuple[NestedTest, ...]:
    """Likelihood-ratio tests of every pair of one kind of which one holds the other on the same rows."""
    out = []
    for large in fitted:
        for small in fitted:
            if small.row.kind == large.row.kind and small.row.law in _held_by(large.row.law):
                with contextlib.suppress(FitError):  # nothing more is free on these rows
                    names = (small.row.law, large.row.law)
                    out.append(ratio_test(small.setup, small.theta_F, large.setup, large.theta_F, names))
    return tuple(out)


def _held_by(name: str) -> set[str]:
    """The names of the forms that a form becomes where some of its parameters are held."""
    form = named(name)
    plain = name.removesuffix(OUTER) if form.freed else name
    held = {plain} if form.freed else set()
    if form.law.biases and form.biased:
        held.add(plain + UNBIASED + (OUTER if form.freed else ""))
    return held | (set(form.law.holds) if plain == name and form.biased else set())


def _rms(error_n: np.ndarray) -> float | None:
    known = error_n[np.isfinite(error_n)]
    return math.sqrt(float(np.mean(known**2))) if len(known) else None


def _r2_held_out(setup: Setup, held: Mapping[str, crossval.HeldOut]) -> float | None:
    """R² of log values predicted out of their fold, over all schemes; None where nothing could be predicted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        target = np.concatenate([np.log(setup.observed_n) for _ in held]) if held else np.array([])
    error = np.concatenate([h.error_n for h in held.values()]) if held else np.array([])
    known = np.isfinite(error) & np.isfinite(target)
    return r_squared(target[known], (target + error)[known]) if known.any() else None


def _with_differences(group: list[Judged], model_n: np.ndarray, resamples: int, seed: int) -> list[Row]:
    """The rows of a kind, best held-out error first, with paired bootstrap intervals of the difference from the best.

    Errors pair by row of the table and scheme, over the held-out rows that every law of the kind could predict, so that
    no law gains by keeping silent; trained models are resampled, where there are enough of them.
    """
    scored = [(entry.row, _by_row(entry.setup, entry.held)) for entry in group]
    shared = set.intersection(*(set(errors) for _, errors in scored)) if scored else set()

    def score(errors):
        return float(np.mean([errors[key] for key in shared])) if shared else math.inf

    scored.sort(key=lambda entry: score(entry[1]))
    out = []
    for at, (row, errors) in enumerate(scored):
        difference = None
        if at and shared:
            gap = np.array([errors[key] - scored[0][1][key] for key in sorted(shared)])
            run = np.unique(model_n[[row for row, _ in sorted(shared)]], return_inverse=True)[1]
            difference = (float(gap.mean()), *_mean_interval(gap, run, resamples, seed))
        out.append(dataclasses.replace(row, difference=difference))
    return out


def _mean_interval(values: np.ndarray, run_n: np.ndarray, resamples: int, seed: int) -> tuple[float | None, ...]:
    """95 % interval of the mean under resampling of the runs; none of fewer than LEAST_RUNS."""
    total, count = np.bincount(run_n, values), np.bincount(run_n)
    if len(count) < LEAST_RUNS:
        return None, None
    counts = np.random.default_rng(seed).multinomial(len(count), np.full(len(count), 1 / len(count)), size=resamples)
    draws = (counts @ total) / np.maximum(counts @ count, 1)
    return tuple(float(v) for v in np.quantile(draws, [0.025, 0.975]))


def _by_row(setup: Setup, held: Mapping[str, crossval.HeldOut]) -> dict[tuple[int, str], float]:
    """Absolute held-out log error by (row of the table, scheme)."""
    out = {}
    for scheme, result in held.items():
        for i in np.flatnonzero(np.isfinite(result.error_n)):
            out[(int(setup.rows[ROW][i]), scheme)] = abs(float(result.error_n[i]))
    return out


COLUMNS = (
    *("kind", "law", "n", "k", "r2", "mse", "objective", "aic", "bic"),
    *(f"{how}_{scheme}" for how in ("held_out", "served") for scheme in (*HELD_OUT, crossval.CHOSEN)),
    *(
        "r2_held_out",
        "difference",
        "difference_low",
        "difference_high",
        "starts_at_best",
        "condition",
        "refused",
        "seconds",
    ),
)


def as_record(row: Row) -> dict[str, Any]:
    """The row as one line of compare.csv."""
    low, mid, high = (
        (None, None, None) if row.difference is None else (row.difference[1], row.difference[0], row.difference[2])
    )
    record = dataclasses.asdict(row)
    record |= {f"held_out_{scheme}": value for scheme, value in row.held_out.items()}
    record |= {f"served_{scheme}": value for scheme, value in row.served.items()}
    record |= {"difference": mid, "difference_low": low, "difference_high": high, "refused": " ".join(row.refused)}
    return {name: record.get(name) for name in COLUMNS}


def to_csv(comparison: Comparison) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in as_record(row).items()} for row in comparison.rows)
    return text.getvalue()


def to_json(comparison: Comparison) -> str:
    """The comparison as compare.json; what is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(dataclasses.asdict(comparison)), indent=1, allow_nan=False) + "\n"


def summary(comparison: Comparison) -> str:
    """The comparison as text: one table per kind, best held-out error first."""
    lines = []
    for kind, title in KINDS.items():
        rows = [row for row in comparison.rows if row.kind == kind]
        if not rows:
            continue
        lines += [f"{title}: {rows[0].n} rows; held-out columns are rms log errors, n/a where a law cannot predict"]
        titles = [HELD_OUT.get(scheme, "chosen rows") for scheme in rows[0].held_out]
        header = f"  {'law':<19} {'k':>3} {'R2':>8} {'AIC':>9} {'BIC':>9}"
        lines.append(header + _line(titles) + "  mean |error| - best")
        for row in rows:
            held = _line(row.held_out.values()).removeprefix(" ")
            r2 = "n/a" if row.r2 is None else f"{row.r2:.4f}"
            gap = "best" if row is rows[0] else "n/a"
            if row.difference is not None:
                mean, low, high = row.difference
                gap = f"{mean:+.5f} " + (f"[{low:+.5f}, {high:+.5f}]" if low is not None else "(few runs)")
            lines.append(f"  {row.law:<19} {row.k:>3} {r2:>8} {row.aic:>9.1f} {row.bic:>9.1f} {held}  {gap}")
        if kind in ("delta", "both"):
            lines.append(f"  {'the loss as served':<44}{_line(titles)}")
            lines += [f"  {row.law:<44}{_line(row.served.values())}" for row in rows]
        lines += [f"  {tables.describe(rows[0].left_out)}", ""]
    lines += [f"likelihood ratio: {test.in_words}" for test in comparison.nested]
    test = comparison.multiplicativity
    if test is None:
        lines.append(f"multiplicativity not testable: {comparison.multiplicativity_skipped}")
    else:
        lines.append(
            f"multiplicativity: {test.in_words} ({test.marginal_runs} marginal runs, {test.joint_runs} joint runs)"
        )
    lines += [f"skipped {name}: {why}" for name, why in comparison.skipped.items()]
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join(lines)


def _line(cells) -> str:
    shown = ["n/a" if v is None else v if isinstance(v, str) else f"{v:.4f}" for v in cells]
    return "".join(f" {cell:>12}" for cell in shown)
