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
from analysis.fitting import caveats, fit_file, provenance
from analysis.fitting.checks import Checks
from analysis.fitting.identifiability import Identifiability, identify
from analysis.fitting.levenberg_marquardt import residuals
from analysis.fitting.multistart import LARGE_TABLE, bootstrap, least_resamples, search, too_few_runs
from analysis.fitting.options import FitError, Options
from analysis.fitting.setup import Setup, set_up
from analysis.fitting.statistics import finite_or_null, percentiles
from analysis.laws.law import Law, LawError
from analysis.table.expression import rows_where
from precision_scaling.runtime import files

__all__ = ["Checks", "Fit", "FitError", "Options", "fit", "load", "published"]

AT_BOUND = 1e-9
MOST_RESIDUALS = 512


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law. The first ten fields are the contract of fit.json, in its order.

    `params` holds None for a constant that the table does not identify: `unidentified` (`refused` in the file) says
    why, and `values` holds the value it was held at, so that predictions at the table's own settings remain right. An
    end of `ci` is None where the bootstrap runs into the bound of the parameter; `ci` is empty without a bootstrap.
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
    unidentified: Mapping[str, str] = dataclasses.field(default_factory=dict)  # parameter -> why it is not reported
    notes: tuple[str, ...] = ()  # weakly identified parameters, bounds reached, mixed rows: in words
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason -> rows
    starts_at_best: float | None = None  # share of the starts that ended at the best objective
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    identifiability: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reporting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # bootstrap draws of constants
    # log measurement - log prediction of rows "before" and "after" PTQ, spread by sqrt(n / (n - parameters))
    residuals: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    serve_bits: float | None = None  # the loss is that after PTQ to this many bits

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
        """The text of fit.json; a number that is not finite is null."""
        record = {fit_file.key_of(name): value for name, value in dataclasses.asdict(self).items()}
        return json.dumps(finite_or_null(record), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Fit":
        """Reads fit.json; also one written by hand with only `law` and `params`. Raises FitError on anything else."""
        return cls(**fit_file.read(text, [field.name for field in dataclasses.fields(cls)]))

    def save(self, path: str | Path) -> None:
        """Writes fit.json in one step, so that a reader never sees half a file."""
        files.atomic_write(files.place(path, "--out"), self.to_json())


def load(path: str | Path) -> Fit:
    """Reads fit.json. Raises FitError, in one line, where it is missing or not a fit."""
    try:
        return Fit.from_json(files.read(files.place(path, "--fit")).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise FitError(f"cannot read fit {path}: {getattr(error, 'strerror', None) or error}") from None
    except (FitError, LawError) as error:
        raise FitError(f"{path} is not a fit: {error}") from None


def published(name: str) -> Fit:
    """The law's published constants as a Fit without data. Raises FitError where some are not published."""
    law = laws.get(name)
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
    checks: Checks | None = None,
) -> Fit:
    """Fits `law` to `table`: best of `starts` starts (None: 512), `bootstrap_resamples` resamples of the runs for `ci`.

    profile: False skips the profile likelihoods, and with them the verdicts that need one. checks: their results go
    into `metrics`. The same arguments give the same fit. A table with too few trained models to resample gives no `ci`
    and a note. Raises FitError where the table does not allow the law, or where resamples are too few for `level`.
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
    unidentified = {**setup.unidentified, **verdict.unidentified}
    for follower, leader in setup.tied.items():
        if leader in unidentified:
            unidentified[follower] = unidentified[leader]
    samples = {name: tuple(float(f"{d[name]:.8g}") for d in draws) for name in setup.law.names} if draws else {}
    fitted = {*setup.free, *setup.tied}
    quality = provenance.metrics(setup, best.theta_F)
    quality |= checks.run(setup, best.theta_F, table, starts, seed)
    ci = {}
    for name in setup.law.names if draws else ():
        ci[name] = (
            _interval(setup, name, samples[name], level)
            if name in fitted and name not in unidentified
            else (None, None)
        )
    return Fit(
        law=setup.law.name,
        params={name: None if name in unidentified else value for name, value in values.items()},
        ci=ci,
        r2=quality["r2"],
        objective=best.objective,
        n=setup.problem.rows,
        starts=best.starts,
        seconds=round(time.monotonic() - began, 3),
        columns=setup.law.columns,
        values=values,
        unidentified=unidentified,
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
    """Percentile interval; None for an end at the bound of the parameter."""
    parameter = setup.law.parameter(name)
    low, high = percentiles(draws, level)
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
