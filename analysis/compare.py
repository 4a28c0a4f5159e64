"""Compares every law that a table allows: `python -m analysis.compare --runs=runs.csv --out=DIR`.

Laws of one kind (loss before PTQ, δ, both) are fitted to the same rows and judged by fit, information criteria and
held-out error; differences carry paired bootstrap intervals. Writes compare.csv and compare.json.
"""

import csv
import dataclasses
import functools
import io
import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from analysis import command, crossval, laws
from analysis import table as tables
from analysis.caveats import mixed_rows, shared_names
from analysis.fit import pairs
from analysis.identify import identify
from analysis.law import Law, LawError
from analysis.multiplicativity import Multiplicativity, multiplicativity
from analysis.optimize import residuals, stay_off_accelerators
from analysis.problem import FitError, Options, Setup, set_up
from analysis.reporting import r_squared
from analysis.search import LEAST_RUNS, search
from precision_scaling.results import atomic_write

FILES = ("compare.csv", "compare.json")
ROW = "row of the table"  # a column that tells which rows of two laws are the same
UNBIASED = "_unbiased"  # ends the name of a law whose biases n are 0
LARGEST_N = "largest_N"  # of the held-out errors by N, those of the largest size
HELD_OUT = {
    "N": "out N",
    "D": "out D",
    "P": "out P",
    "compute": "largest runs",
    LARGEST_N: "largest N",
}
KINDS = {"loss": "loss before PTQ", "delta": "delta of PTQ", "both": "loss before and after PTQ"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One law on the rows of its kind. Errors are root mean squares of log residuals, `held_out` by HELD_OUT;
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


def compare(
    table: tables.Table,
    names: tuple[str, ...] | None = None,
    options: Options | None = None,
    starts: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Fit and judge every law of `names` that the table allows; None: all, with and without biases.

    A law's name with UNBIASED after it is that law without biases. Raises FitError where the table allows none.
    """
    options = Options() if options is None else options
    table = table.one_schedule().in_order()
    table = dataclasses.replace(table, columns={**table.columns, ROW: np.arange(len(table))})
    low = not table.before_ptq().high_precision.all()
    fitted: list[tuple[Row, Setup, dict[str, crossval.HeldOut]]] = []
    skipped = {}
    for name in names or all_names():
        law, biased = named(name)
        form = dataclasses.replace(_options_for(law, options), biased=biased and options.biased)
        try:
            fitted.append(_judge(_on_all_rows(law, low), table, form, starts, seed, name))
        except (FitError, LawError) as err:
            skipped[name] = str(err)
    if not fitted:
        raise FitError(f"no law can be fitted to {table.source}: " + "; ".join(f"{k}: {v}" for k, v in skipped.items()))
    rows = []
    for kind in KINDS:
        group = [entry for entry in fitted if entry[0].kind == kind]
        rows += _with_differences(group, table.models, resamples, seed)
    test, why = None, None
    try:
        test = multiplicativity(table, starts=starts, seed=seed)
    except FitError as err:
        why = str(err)
    notes = []
    if low and any(row.law == "chinchilla" for row in rows):
        notes.append(
            "chinchilla is fitted to rows of every precision here, as the law in which precision has no effect"
        )
    if options.loss == "huber":
        notes.append("AIC and BIC take log residuals as Laplace distributed, which Huber's sum with a small delta fits")
    notes.append("AIC and BIC count rows as independent; rows after PTQ of one run are not")
    notes += dict.fromkeys(note for _, setup, _ in fitted for note in (*mixed_rows(setup), *shared_names(setup)))
    notes.append("mean |error| is over the held-out rows that every law of the kind can predict")
    return Comparison(tuple(rows), skipped, test, why, dict(table.left_out), tuple(notes))


def all_names() -> tuple[str, ...]:
    """Every law, and after it the same without its biases."""
    return tuple(n for name, law in laws.LAWS.items() for n in (name, *([name + UNBIASED] if law.biases else [])))


def named(name: str) -> tuple[Law, bool]:
    """The law that a comparison calls so, and whether with its biases. Raises LawError for an unknown name."""
    law = laws.get(name.removesuffix(UNBIASED))
    if name.endswith(UNBIASED) and not law.biases:
        raise LawError(f"{name}: {law.name} has no biases to leave out")
    return law, not name.endswith(UNBIASED)


def _options_for(law: Law, options: Options) -> Options:
    """The options that this law knows: constants and ties that it does not have are left out."""
    known = set(law.names)
    return dataclasses.replace(
        options,
        fixed={k: v for k, v in options.fixed.items() if k in known},
        tied={k: v for k, v in options.tied.items() if {k, v} <= known},
        stages="joint",
    )


def _on_all_rows(law: Law, low: bool) -> Law:
    """Chinchilla as the law without an effect of precision, where the other laws see rows of low precision."""
    return dataclasses.replace(law, high_precision_only=False) if low and law.name == "chinchilla" else law


def _kind(law: Law) -> str:
    if law.log_loss is None:
        return "delta"
    return "loss" if law.log_delta is None else "both"


def _judge(law: Law, table: tables.Table, options: Options, starts: int | None, seed: int, name: str):
    began = time.monotonic()
    setup = set_up(law, table, options)
    effects = [p.name for p in law.params[5:]] if law.log_delta is None and len(law.params) > 5 else []
    if effects and law.expand is None and all(name in setup.refused or name in setup.constants for name in effects):
        raise FitError("no parameter beyond those of chinchilla is informed: on this table it is chinchilla")
    if name.endswith(UNBIASED):
        with_biases = set_up(law, table, dataclasses.replace(options, biased=True))
        if set(law.biases) <= set(with_biases.refused):
            raise FitError("no bias is informed: on this table the form with biases has none either")
    best = search(setup, starts, seed)
    verdict = identify(setup, best.theta_F, profile=False)
    held = crossval.held_out(setup, best.theta_F, seed=seed)
    error_n = residuals(setup.problem, best.theta_F)
    n, k = len(error_n), len(setup.free)
    if options.loss == "huber":
        minus_two_log_likelihood = 2 * n * (1 + math.log(2 * max(float(np.mean(np.abs(error_n))), 1e-300)))
    else:
        minus_two_log_likelihood = n * (1 + math.log(2 * math.pi * max(float(np.mean(error_n**2)), 1e-300)))
    predicted = setup.predicted(best.theta_F)
    errors = {scheme: found.error_n for scheme, found in held.items()}
    if "N" in errors:
        errors[LARGEST_N] = np.where(setup.rows["N"] == setup.rows["N"].max(), errors["N"], np.nan)
    row = Row(
        law=name,
        kind=_kind(law),
        n=n,
        k=k,
        refused=tuple({**setup.refused, **verdict.refused}),
        r2=r_squared(setup.observed_n, predicted),
        mse=float(np.mean((setup.observed_n - predicted) ** 2)),
        objective=best.objective,
        aic=minus_two_log_likelihood + 2 * (k + 1),
        bic=minus_two_log_likelihood + math.log(n) * (k + 1),
        held_out={scheme: _rms(errors[scheme]) if scheme in errors else None for scheme in HELD_OUT},
        r2_held_out=_r2_held_out(setup, held),
        difference=None,
        starts_at_best=best.share,
        condition=min(verdict.condition, 1e300),
        seconds=round(time.monotonic() - began, 3),
        left_out=dict(setup.left_out),
    )
    return row, setup, held


def _rms(error_n: np.ndarray) -> float | None:
    known = error_n[np.isfinite(error_n)]
    return math.sqrt(float(np.mean(known**2))) if len(known) else None


def _r2_held_out(setup: Setup, held: Mapping[str, crossval.HeldOut]) -> float | None:
    """R² of log values predicted out of their fold, over all schemes; None where nothing could be predicted."""
    target = np.concatenate([setup.problem.target_n for _ in held]) if held else np.array([])
    error = np.concatenate([h.error_n for h in held.values()]) if held else np.array([])
    known = np.isfinite(error)
    return r_squared(target[known], (target + error)[known]) if known.any() else None


def _with_differences(group: list, model_n: np.ndarray, resamples: int, seed: int) -> list[Row]:
    """The rows of a kind, best held-out error first, with paired bootstrap intervals of the difference from the best.

    Errors pair by row of the table and scheme, over the held-out rows that every law of the kind could predict, so that
    no law gains by keeping silent; trained models are resampled, where there are enough of them.
    """
    scored = [(row, _by_row(setup, held)) for row, setup, held in group]
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
    *(f"held_out_{scheme}" for scheme in HELD_OUT),
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
    record = {**dataclasses.asdict(row), **{f"held_out_{scheme}": value for scheme, value in row.held_out.items()}}
    record |= {"difference": mid, "difference_low": low, "difference_high": high, "refused": " ".join(row.refused)}
    return {name: record[name] for name in COLUMNS}


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
        header = f"  {'law':<19} {'k':>3} {'R2':>8} {'AIC':>9} {'BIC':>9}"
        header += "".join(f" {name:>12}" for name in HELD_OUT.values())
        lines.append(header + "  mean |error| - best")
        for row in rows:
            held = " ".join(f"{'n/a' if v is None else f'{v:.4f}':>12}" for v in row.held_out.values())
            r2 = "n/a" if row.r2 is None else f"{row.r2:.4f}"
            gap = "best" if row is rows[0] else "n/a"
            if row.difference is not None:
                mean, low, high = row.difference
                gap = f"{mean:+.5f} " + (f"[{low:+.5f}, {high:+.5f}]" if low is not None else "(few runs)")
            lines.append(f"  {row.law:<19} {row.k:>3} {r2:>8} {row.aic:>9.1f} {row.bic:>9.1f} {held}  {gap}")
        lines += [f"  {tables.describe(rows[0].left_out)}", ""]
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


FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_text("runs", None, "Table of measured losses (runs.csv).")
_text("out", None, "Directory for compare.csv and compare.json.")
flags.DEFINE_list(
    "laws", [], f"Laws to compare (all that the table allows); NAME{UNBIASED}: without biases.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "where", [], "Keep rows with COLUMN=VALUE (or VALUE|VALUE); may be repeated.", flag_values=FLAGS
)
flags.DEFINE_list(
    "tied", [], "Parameters that follow another, in the laws that have both: beta=alpha,...", flag_values=FLAGS
)
_count = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_count("starts", None, "Starts of every search (512 by default).", lower_bound=1, upper_bound=command.MOST_REPEATS)
_count("seed", 0, "Seed of the starts and the bootstrap.", lower_bound=0)


def main() -> None:
    """Compare as the flags say, write the files and print the tables. Raises UserError."""
    for name in ("runs", "out"):
        if not FLAGS[name].value:
            raise FitError(f"--{name} is required")
    stay_off_accelerators()
    out = command.output("out", FLAGS.out, FILES, reads=[FLAGS.runs])
    for name in FLAGS.laws:
        named(name)
    if repeated := [name for name in FLAGS.laws if FLAGS.laws.count(name) > 1]:
        raise FitError(f"--laws={','.join(FLAGS.laws)}: {repeated[0]} stands there more than once")
    table = tables.load(FLAGS.runs).where(**pairs("where", FLAGS.where))
    options = Options(tied=pairs("tied", FLAGS.tied))
    result = compare(table, tuple(FLAGS.laws) or None, options, FLAGS.starts, seed=FLAGS.seed)
    print(summary(result))
    with command.writing("out", out, instead=lambda: to_csv(result)):
        atomic_write(out / "compare.csv", to_csv(result))
        atomic_write(out / "compare.json", to_json(result))
    print(f"written: {out / 'compare.csv'}, {out / 'compare.json'}")


if __name__ == "__main__":
    sys.exit(command.run(__doc__, FLAGS, main, sys.argv))
