"""A fit: the constants of a law, their intervals, what the table does not identify, and how to repeat it."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis import laws
from analysis import table as tables
from analysis.fitting import caveats, crossval, fit_file, nested, provenance, sensitivity
from analysis.fitting.identifiability import Identifiability, identify
from analysis.fitting.levenberg_marquardt import residuals
from analysis.fitting.multistart import LARGE_TABLE, bootstrap, least_resamples, search, too_few_runs
from analysis.fitting.problem import FitError, Options, Setup, set_up
from analysis.laws.law import Law, LawError
from analysis.table.expression import rows_where
from precision_scaling.runtime import files

__all__ = ["Fit", "FitError", "Options", "fit", "load", "published"]

AT_BOUND = 1e-9
MOST_RESIDUALS = 512


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law. The first ten fields are the contract of fit.json, in its order.

    `params` holds None for a constant that the table does not inform: `refused` says why, and `values` holds the number
    that stood in for it, so that predictions at the table's own settings remain right. An end of `ci` is None where the
    bootstrap runs into the bound of the parameter; `ci` is empty without a bootstrap. A file in which `params` and
    `values` differ is refused (fit_file.py).
    """

    law: str
    params: Mapping[str, float | None]
    ci: Mapping[str, tuple[float | None, float | None]]
    r2: float | None
    objective: float | None
    n: int
    starts: int
    seconds: float
    columns: tuple[str, ...]
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)  # parameter -> why it is not reported
    notes: tuple[str, ...] = ()  # weakly identified parameters, bounds reached, mixed rows: in words
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason -> rows
    starts_at_best: float | None = None  # share of the starts that ended at the best objective
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    identifiability: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reporting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, tuple[float, ...]] = dataclasses.field(
        default_factory=dict
    )  # bootstrap draws of all constants
    # log measurement - log prediction of rows "before" and "after" PTQ, spread by sqrt(n / (n - parameters))
    residuals: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    serve_bits: float | None = None  # the loss is that after PTQ to so many bits

    def predict(self, **columns) -> np.ndarray:
        """Loss (or δ) of the fitted law at the given columns."""
        return laws.predict(self.law, self.values, **columns)

    @property
    def draws(self) -> int:
        """Number of bootstrap samples of the constants."""
        return min((len(values) for values in self.samples.values()), default=0)

    def draw(self, index: int) -> "Fit":
        """The fit at one bootstrap sample of its constants; those that were not fitted stay."""
        sample = {name: values[index] for name, values in self.samples.items()}
        return dataclasses.replace(self, values={**self.values, **sample})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Fit":
        """Reads fit.json; also one written by hand with only `law` and `params`. Raises FitError on anything else."""
        return cls(**fit_file.read(text, [field.name for field in dataclasses.fields(cls)]))

    def save(self, path: str | Path) -> None:
        """Writes fit.json in one step, so that a reader never sees half a file."""
        files.atomic_write(Path(path), self.to_json())


def load(path: str | Path) -> Fit:
    """Read fit.json. Raises FitError in one line where it is missing or not a fit."""
    try:
        return Fit.from_json(files.read(Path(path).expanduser()).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise FitError(f"cannot read fit {path}: {getattr(error, 'strerror', None) or error}") from None
    except (FitError, LawError) as error:
        raise FitError(f"{path} is not a fit: {error}") from None


def published(law: str) -> Fit:
    """The law's published constants as a Fit without data. Raises FitError where some are not published."""
    law = laws.get(law)
    missing = [p.name for p in law.params if p.published is None and p.default is None]
    if missing:
        raise FitError(f"law {law.name}: no published value of {', '.join(missing)}")
    values = law.values(law.published)
    return Fit(law.name, values, {}, None, None, 0, 0, 0.0, law.columns, values, reporting={"source": law.source})


def fit(
    law: str | Law,
    table: tables.Table,
    options: Options | None = None,
    *,
    starts: int | None = None,
    bootstrap_resamples: int = 0,
    level: float = 0.95,
    profile: bool = True,
    seed: int = 0,
    progress: bool = False,
    checks: "Checks | None" = None,
) -> Fit:
    """Fit `law` to `table`: best of `starts` starts (None: 512), `bootstrap_resamples` resamples of the runs for `ci`.

    `profile` False skips the profile likelihoods, and with them the verdicts that need one. The same arguments give
    the same fit. Raises FitError where the table does not allow the law, or where resamples are too few for `level`.
    Trained models that are too few to be resampled give no `ci`, and a note. `checks` are put into `metrics`.
    """
    began = time.monotonic()
    if 0 < bootstrap_resamples < least_resamples(level):
        raise FitError(
            f"bootstrap is {bootstrap_resamples}: a {100 * level:g} % interval takes at least {least_resamples(level)} "
            "resamples, 0 is for none"
        )
    checks = checks or Checks()
    options = options or Options()
    if checks.test_where is not None and options.fit_where is None:
        if rows_where(checks.test_where, table).all():
            raise FitError(f"test_where={checks.test_where!r}: leaves no row of {laws.get(law).name} to fit")
        options = dataclasses.replace(options, fit_where=f"not ({checks.test_where})")
    setup = set_up(law, table, options)
    checks.check(setup, table)
    best = search(setup, starts, seed, progress)
    if not np.isfinite(best.objective):
        raise FitError(f"law {setup.law.name}: no constants give finite predictions for every row of {table.source}")
    verdict = identify(setup, best.theta_F, profile and setup.problem.rows <= LARGE_TABLE, level)
    draws: list[dict[str, float]] = []
    few = too_few_runs(setup) if bootstrap_resamples else None
    if bootstrap_resamples and few is None:
        draws = [
            setup.values(theta_F) for theta_F in bootstrap(setup, best.theta_F, bootstrap_resamples, seed, progress)
        ]
    values = setup.values(best.theta_F)
    refused = {**setup.refused, **verdict.refused}
    for follower, leader in setup.tied.items():
        if leader in refused:
            refused[follower] = refused[leader]
    samples = {name: tuple(float(f"{d[name]:.8g}") for d in draws) for name in setup.law.names} if draws else {}
    fitted = {*setup.free, *setup.tied}
    quality = provenance.metrics(setup, best.theta_F)
    quality |= checks.run(setup, best.theta_F, table, starts, seed)
    ci = {}
    for name in setup.law.names if draws else ():
        ci[name] = (
            _interval(setup, name, samples[name], level) if name in fitted and name not in refused else (None, None)
        )
    return Fit(
        law=setup.law.name,
        params={name: None if name in refused else value for name, value in values.items()},
        ci=ci,
        r2=quality["r2"],
        objective=best.objective,
        n=setup.problem.rows,
        starts=best.starts,
        seconds=round(time.monotonic() - began, 3),
        columns=setup.law.columns,
        values=values,
        refused=refused,
        notes=(*([few] if few else []), *verdict.notes, *caveats.about_the_rows(setup)),
        left_out=setup.left_out,
        starts_at_best=best.share,
        metrics=quality,
        identifiability=_identifiability(verdict),
        reporting=provenance.record(setup, best, table, len(draws), level, seed),
        samples=samples,
        residuals=_residuals(setup, best.theta_F),
        serve_bits=setup.options.serve_bits,
    )


@dataclasses.dataclass(frozen=True)
class Checks:
    """What else to try on a fit, for its `metrics`.

    test_where: an expression; errors on the rows that satisfy it, which fit_where must exclude (one of the two alone
    takes the rows that the other leaves). held: constants of a smaller fit, for a likelihood-ratio test. huber_deltas
    and drop_worst: refits with other values of Huber's delta and without the rows of largest residual.
    """

    test_where: str | None = None
    held: Mapping[str, float] = dataclasses.field(default_factory=dict)
    huber_deltas: tuple[float, ...] = ()
    drop_worst: int = 0

    def check(self, setup: Setup, table: tables.Table) -> None:
        """Raises FitError or LawError for what can't be checked, before the search."""
        if setup.options.fit_where is not None:
            crossval.chosen(setup.on(table, None), setup.options.fit_where, self.test_where)
        if self.held:
            _held(setup, table, self.held)

    def run(self, setup: Setup, theta_F: np.ndarray, table: tables.Table, starts, seed: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if setup.options.fit_where is not None:
            out["test"] = _test_errors(setup, theta_F, table, self.test_where)
        if self.held:
            out["likelihood_ratio"] = _ratio_test(setup, theta_F, table, self.held, starts, seed)
        if self.huber_deltas or self.drop_worst:
            out["sweep"] = sensitivity.sweep(setup, theta_F, self.huber_deltas, self.drop_worst, seed)
        return out


def _test_errors(setup: Setup, theta_F: np.ndarray, table: tables.Table, where: str | None) -> dict[str, Any]:
    """Errors on rows that the fit did not see: their count, rms and mean log error, and of rows after PTQ that of the
    loss as served."""
    split = crossval.chosen(setup.on(table, None), setup.options.fit_where, where)
    rest = setup.on(table, where if where is not None else f"not ({setup.options.fit_where})")
    error_n, served_m = rest.log_errors(theta_F), rest.served_errors(theta_F, rest.every_row)
    return {
        "where": where if where is not None else f"not ({setup.options.fit_where})",
        "rows": int(split.held_m.sum()),
        "rms_log_error": _rms(error_n),
        "mean_log_error": float(np.nanmean(error_n)) if np.isfinite(error_n).any() else None,
        "rms_log_error_served": _rms(served_m),
    }


def _rms(error_n: np.ndarray) -> float | None:
    return float(np.sqrt(np.nanmean(error_n**2))) if np.isfinite(error_n).any() else None


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


def _residuals(setup: Setup, theta_F: np.ndarray) -> dict[str, tuple[float, ...]]:
    """What prediction intervals need of the noise: residuals by kind of row, sorted; quantiles where there are many."""
    residual_n = -residuals(setup.problem, theta_F)
    rows, free = len(residual_n), len(setup.free)
    residual_n = residual_n * math.sqrt(rows / (rows - free))
    is_delta = np.arange(rows) >= rows - setup.delta_rows
    out = {}
    for kind, mask in (("before", ~is_delta), ("after", is_delta)):
        values = np.sort(residual_n[mask])
        if len(values) > MOST_RESIDUALS:
            values = np.quantile(values, (np.arange(MOST_RESIDUALS) + 0.5) / MOST_RESIDUALS)
        if len(values):
            out[kind] = tuple(float(f"{v:.6g}") for v in values)
    return out


def _interval(setup: Setup, name: str, draws: tuple[float, ...], level: float) -> tuple[float | None, float | None]:
    """Percentile interval; an end at the bound of the parameter is no end."""
    parameter = setup.law.parameter(name)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    open_low = low <= parameter.lower * (1 + AT_BOUND) + AT_BOUND * (parameter.lower == 0)
    return (None if open_low else float(low), None if high >= parameter.upper * (1 - AT_BOUND) else float(high))


def _identifiability(verdict: Identifiability) -> dict[str, Any]:
    profile = {name: (interval.low, interval.high) for name, interval in verdict.profile.items()}
    return {
        "condition": min(verdict.condition, 1e300),
        "profile": profile,
        "at_bound": verdict.at_bound,
        "weak": verdict.weak,
    }


def summary(fit: Fit) -> str:
    """The fit as text: every constant with its interval or the reason why it has none, quality, and rows left out."""
    lines = [f"{fit.law}: {fit.reporting['formula']}", ""]
    profile = fit.identifiability["profile"]
    width = max(len(name) for name in fit.params)
    for name, value in fit.params.items():
        low, high = fit.ci.get(name, (None, None))
        if name in fit.refused:
            lines.append(f"  {name:<{width}}  not told by this table: {fit.refused[name]}")
            continue
        interval = ""
        if name in fit.reporting["fixed"]:
            interval = "fixed"
        elif name in fit.ci:
            interval = _span((low, high))
        if name in profile:
            interval = f"{interval:<24} profile {_span(profile[name])}".strip()
        tied = fit.reporting["tied"].get(name)
        lines.append(f"  {name:<{width}}  {value:<12.6g} {interval}{f'  (= {tied})' if tied else ''}".rstrip())
    target = "delta" if laws.get(fit.law).target == "delta" else "loss"
    quality = "R2 undefined (nothing varies)" if fit.r2 is None else f"R2 {fit.r2:.5f} of the {target}"
    runs, share = fit.reporting["runs"], fit.starts_at_best
    lines += [
        "",
        f"{quality}, objective {fit.objective:.6g}, {fit.n} rows of {runs} runs",
        f"{share:.1%} of {fit.starts} starts reached the best optimum; {fit.seconds:.1f} s",
        f"intervals: {fit.reporting['intervals']}",
        f"condition number of the scaled curvature: {fit.identifiability['condition']:.1e}",
        tables.describe(fit.left_out),
        *_checked(fit),
        *(f"note: {note}" for note in fit.notes),
    ]
    return "\n".join(lines)


def _checked(fit: Fit) -> list[str]:
    """What the checks found, in words."""
    lines = []
    if (test := fit.metrics.get("test")) is not None:
        shown = [("rms log error", test["rms_log_error"]), ("mean", test["mean_log_error"])]
        shown += [("rms of the loss as served", test["rms_log_error_served"])]
        words = ", ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)
        lines.append(f"test on {test['rows']} rows with {test['where']}: {words}")
    if (ratio := fit.metrics.get("likelihood_ratio")) is not None:
        lines.append(f"likelihood ratio: {nested.NestedTest(**ratio).in_words}")
    fitted = [name for name in fit.params if name in fit.reporting["free"]]
    return lines + sensitivity.in_words(fit.metrics.get("sweep", ()), fitted)


def _span(ends) -> str:
    low, high = ("open" if end is None else f"{end:.5g}" for end in ends)
    return f"[{low}, {high}]"
