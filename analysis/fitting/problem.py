"""From a law and a table to a regression: which rows, which parameters are free, and what is compared with what.

Sits between the table and the solver. What a table cannot tell by its design (one precision of the KV cache, say) is
settled here, before anything is fitted: such parameters are held where they have no effect, and are refused in the
report.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from analysis import laws
from analysis.fitting.levenberg_marquardt import Problem, huber, residuals
from analysis.fitting.residual import DELTA_RESIDUALS, RESIDUALS, compared, slope, transform
from analysis.laws import derived
from analysis.laws.law import AFTER_PTQ, Law, Need, Parameter
from analysis.table import Table, describe
from analysis.table.expression import rows_where
from analysis.table.seed_noise import noise_floor
from precision_scaling.errors import UserError

LOSSES = ("huber", "least_squares")
STAGES = ("joint", "staged")


class FitError(UserError):
    """A fit that cannot be made or read: too few rows, an unknown option, a file that is not a fit."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to fit. `fixed` gives constants, `tied` {follower: leader}; `biased` False sets the law's biases to 0.

    `serve_bits` gives a law of the loss before PTQ the losses after PTQ to that many bits instead, as of a law that is
    refitted for each precision.

    `freed` names parameters to fit that otherwise stay at their default (an outer exponent, say).

    `loss` is Huber (with `huber_delta`) or least squares. `residual` says what a row compares: log L or L.
    `delta_residual`, what a row after PTQ does: log δ; "floored", log δ that turns linear below the noise of δ
    (`delta_floor` in nats; None: told by repeats with other seeds); or the loss, of the run before PTQ plus δ (None:
    log δ for laws of δ alone, the loss for a law of both). The last two keep zero and negative δ. `sigma_column` names
    the column of standard deviations of the loss, in nats: a residual counts by the median of them over its own.
    `stages`: all parameters at once, or in the law's stages as in the paper. `fit_where`: an expression that the rows
    to fit satisfy (analysis/table/expression.py); δ is known before rows are chosen.
    """

    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    freed: tuple[str, ...] = ()
    serve_bits: float | None = None
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    biased: bool = True
    loss: str = "huber"
    huber_delta: float = 1e-3
    residual: str = "log_loss"
    delta_residual: str | None = None
    delta_floor: float | None = None
    sigma_column: str | None = None
    stages: str = "joint"
    fit_where: str | None = None

    def __post_init__(self):
        for key, value, allowed in (
            ("loss", self.loss, LOSSES),
            ("stages", self.stages, STAGES),
            ("residual", self.residual, RESIDUALS),
            ("delta_residual", self.delta_residual, (None, *DELTA_RESIDUALS)),
        ):
            if value not in allowed:
                raise FitError(f"{key} is {value!r}: choose one of {', '.join(str(a) for a in allowed if a)}")
        if not self.huber_delta > 0:
            raise FitError(f"huber_delta is {self.huber_delta}: it must be positive")
        if self.delta_floor is not None and not self.delta_floor > 0:
            raise FitError(f"delta_floor is {self.delta_floor}: it must be positive")


@dataclasses.dataclass(frozen=True)
class LogPrediction:
    """theta_F -> what the residuals compare of rows before PTQ, then of those after it (analysis/fitting/residual.py).

    Hashable, so shapes compile once.
    """

    law: Law
    free: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]
    residual: str = "log_loss"
    delta_residual: str = "log_delta"

    def __call__(self, theta_F, data):
        params = dict(data["constants"])
        for i, name in enumerate(self.free):
            params[name] = jnp.exp(theta_F[i]) if self.law.parameter(name).log else theta_F[i]
        for follower, leader in self.tied:
            params[follower] = params[leader]
        blocks = []
        if "loss" in data:
            blocks.append(transform(self.residual, self.law.log_loss(params, data["loss"], jnp), None, jnp))
        if "delta" in data:
            log_delta = self.law.log_delta(params, data["delta"], jnp)
            if self.delta_residual == "log_loss":
                log_served = jnp.log(data["before"] + jnp.exp(log_delta))
                blocks.append(transform(self.residual, log_served, None, jnp))
            else:
                blocks.append(transform(self.delta_residual, log_delta, data.get("floor"), jnp))
        return jnp.concatenate(blocks) * data["scale"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the fit: the rows it counts and the free parameters it fits."""

    rows_n: np.ndarray
    fits_F: np.ndarray
    name: str


@dataclasses.dataclass(frozen=True)
class Setup:
    """A law ready to be fitted to a table.

    Rows are those before PTQ, then those after it. `constants` are the parameters that are not free, `refused` those
    of them that the design of the table leaves open, with the reason.
    """

    law: Law
    options: Options
    problem: Problem
    free: tuple[str, ...]
    constants: Mapping[str, float]
    tied: Mapping[str, str]
    refused: Mapping[str, str]
    stages: tuple[Stage, ...]
    rows: Table  # the rows fitted, in the order of the problem
    observed_n: np.ndarray  # loss in nats per token, or δ for a law of δ alone
    delta_residual: str  # what rows after PTQ compare, one of DELTA_RESIDUALS
    run_n: np.ndarray  # index of the trained model of each row
    left_out: Mapping[str, int]
    floor: float | None = None  # noise of δ in nats, of "floored"
    unheld: Table | None = None  # rows after PTQ that log δ cannot hold, of which the law speaks all the same

    @property
    def delta_rows(self) -> int:
        """How many rows, the last ones, compare δ or the loss with δ added."""
        return len(next(iter(self.problem.data["delta"].values()))) if "delta" in self.problem.data else 0

    def values(self, theta_F: np.ndarray) -> dict[str, float]:
        """All constants of the law at theta."""
        out = dict(self.constants)
        for name, value in zip(self.free, theta_F, strict=True):
            out[name] = float(np.exp(value)) if self.law.parameter(name).log else float(value)
        for follower, leader in self.tied.items():
            out[follower] = out[leader]
        return {name: out[name] for name in self.law.names}

    def theta(self, values: Mapping[str, float]) -> np.ndarray:
        """theta_F of the given constants."""
        return np.array([to_theta(self.law.parameter(name), values[name]) for name in self.free])

    def objective(self, theta_F: np.ndarray) -> float:
        """The sum of Huber terms over all rows."""
        return float(np.sum(huber(residuals(self.problem, theta_F), self.problem.huber_delta)))

    def subset(self, keep: np.ndarray) -> Problem:
        """The problem of the rows at the (sorted) indices alone."""
        data = dict(self.problem.data)
        before = len(next(iter(data["loss"].values()))) if "loss" in data else 0
        for block, index in (("loss", keep[keep < before]), ("delta", keep[keep >= before] - before)):
            if block in data:
                data[block] = {name: column[index] for name, column in data[block].items()}
        if "before" in data:
            data["before"] = data["before"][keep[keep >= before] - before]
        data["scale"] = data["scale"][keep]
        return dataclasses.replace(self.problem, data=data, target_n=self.problem.target_n[keep])

    def predicted(self, theta_F: np.ndarray) -> np.ndarray:
        """Loss or δ of every row by the law alone, in nats per token."""
        return laws.predict(self.law, self.values(theta_F), **self.rows.columns)

    def predicted_delta(self, theta_F: np.ndarray) -> np.ndarray:
        """δ of the rows after PTQ, for a law of both losses."""
        before = {**self.rows.columns, **{name: np.full(len(self.rows), np.nan) for name in AFTER_PTQ}}
        without = laws.predict(self.law, self.values(theta_F), **before)
        return (self.predicted(theta_F) - without)[self.rows.quantized]

    @property
    def every_row(self) -> Table:
        """The rows, then those that the residual cannot hold."""
        return self.rows if self.unheld is None else concatenated(self.rows, self.unheld)

    def log_errors(self, theta_F: np.ndarray) -> np.ndarray:
        """Log prediction minus log measurement of every row, whatever the residual: of L, or of δ for a law of δ.

        Rows after PTQ of a law of both compare their run's measured loss before PTQ plus δ; δ that is not positive has
        no log (NaN).
        """
        found = []
        with np.errstate(divide="ignore", invalid="ignore"):
            if "loss" in self.problem.data:
                predicted = self._at(theta_F, self.problem.data["loss"], self.law.log_loss)
                found.append(predicted - np.log(self.observed_n[: len(predicted)]))
            if "delta" in self.problem.data:
                rows = self.rows.select(np.arange(len(self.rows)) >= len(self.rows) - self.delta_rows)
                if self.law.target == "loss":
                    found.append(self.served_errors(theta_F, rows))
                else:
                    log_delta = self._at(theta_F, self.problem.data["delta"], self.law.log_delta)
                    found.append(log_delta - np.log(np.where(rows["delta"] > 0, rows["delta"], np.nan)))
        return np.concatenate(found)

    def served_errors(self, theta_F: np.ndarray, rows: Table) -> np.ndarray:
        """Log of the loss as served, measured before PTQ plus δ of the law, minus its log measured; rows after PTQ with
        `loss_before`, NaN for others."""
        errors = np.full(len(rows), np.nan)
        after = rows.quantized
        if self.law.log_delta is not None and after.any():
            some = rows.select(after)
            delta = np.exp(self._at(theta_F, laws.complete_columns(self.law, some.columns), self.law.log_delta))
            errors[after] = np.log(some["loss_before"] + delta) - np.log(some["loss"])
        return errors

    def _at(self, theta_F: np.ndarray, columns: Mapping[str, np.ndarray], function) -> np.ndarray:
        with np.errstate(divide="ignore", over="ignore"):
            return np.asarray(function(self.values(theta_F), columns, np))

    def on(self, table: Table, where: str | None) -> "Setup":
        """The same law, constants and residuals on other rows of a table; only errors there mean something."""
        options = dataclasses.replace(self.options, fit_where=where)
        rows = _rows(self.law, with_derived(self.law, table).in_order(*self.law.columns), options)
        problem = _problem(self.law, self.free, self.constants, self.tied, rows, options, self.floor)
        return dataclasses.replace(
            self,
            options=options,
            problem=problem,
            rows=rows.joined,
            observed_n=rows.observed(self.law),
            run_n=rows.joined.models,
            left_out=rows.left_out,
            unheld=rows.unheld,
        )


def to_theta(parameter: Parameter, value) -> np.ndarray:
    """A parameter's value as it is fitted: its logarithm where positive, clipped to its bounds."""
    value = np.clip(value, parameter.lower, parameter.upper)
    return np.log(value) if parameter.log else value


def set_up(law: str | Law, table: Table, options: Options | None = None) -> Setup:
    """Raises FitError, in one line, where the table or the options do not allow this law to be fitted."""
    options = Options() if options is None else options
    law = laws.get(law)
    table = with_derived(law, table).in_order(*law.columns)
    chosen = _rows(law, table, options)
    rows, left_out = chosen.joined, chosen.left_out
    law = laws.resolve(law, columns=laws.complete_columns(law, rows.columns))
    if law.check is not None and (why := law.check(laws.complete_columns(law, rows.columns))):
        raise FitError(f"law {law.name}: {why} ({describe(left_out)})")

    constants, tied = _constants(law, options)
    refused = {}
    for name, why in _uninformed(law, tied, chosen.loss, chosen.delta).items():
        if name not in constants and name not in tied:
            constants[name], refused[name] = law.parameter(name).held, why
    free = tuple(name for name in law.names if name not in constants and name not in tied)
    for follower, leader in list(tied.items()):
        if leader in refused:
            refused[follower] = refused[leader]
        if leader in constants:
            constants[follower] = constants[leader]
            del tied[follower]
    if not free:
        raise FitError(
            f"law {law.name}: nothing is left to fit ({'; '.join(refused.values()) or 'everything is fixed'})"
        )
    if len(rows) <= len(free):
        raise FitError(
            f"law {law.name} has {len(free)} free parameters and the table {len(rows)} usable rows: too few"
            f" ({describe(left_out)})"
        )

    floor = None
    if chosen.delta is not None and _delta_residual(law, options) == "floored":
        floor = noise_floor(chosen.delta) if options.delta_floor is None else options.delta_floor
        if floor is None:
            raise FitError(
                "delta_residual = floored: no run is repeated with another seed, which would give the noise of delta; "
                "give delta_floor, a number of nats"
            )
    return Setup(
        law,
        options,
        _problem(law, free, constants, tied, chosen, options, floor),
        free,
        constants,
        tied,
        refused,
        _stages(law, options, free, rows, 0 if chosen.loss is None else len(chosen.loss)),
        rows,
        chosen.observed(law),
        _delta_residual(law, options),
        rows.models,
        left_out,
        floor,
        chosen.unheld,
    )


def _problem(law, free, constants, tied, chosen: "Chosen", options: Options, floor: float | None) -> Problem:
    """The regression of the chosen rows on the free parameters."""
    delta_residual = _delta_residual(law, options)
    kinds = (options.residual, options.residual if delta_residual == "log_loss" else delta_residual)
    data: dict[str, Any] = {"constants": {k: np.float64(v) for k, v in constants.items()}}
    target, noise = [], []
    for name, rows, kind in zip(("loss", "delta"), (chosen.loss, chosen.delta), kinds, strict=True):
        if rows is None:
            continue
        data[name] = laws.complete_columns(law, rows.columns)
        of_delta = kind in ("log_delta", "floored")
        value = rows["delta"] if of_delta else rows["loss"]
        target.append(compared(kind, value, floor))
        if options.sigma_column:
            noise.append(rows[options.sigma_column] * slope(kind, value, floor))
        if name == "delta" and not of_delta:
            data["before"] = rows["loss_before"]
    if floor is not None:
        data["floor"] = np.float64(floor)
    target_n = np.concatenate(target)
    noise_n = np.concatenate(noise) if noise else np.ones(len(target_n))
    data["scale"] = np.median(noise_n) / noise_n
    params = [law.parameter(name) for name in free]
    lower, upper = (np.array([to_theta(p, getattr(p, side)) for p in params]) for side in ("lower", "upper"))
    return Problem(
        LogPrediction(law, free, tuple(tied.items()), options.residual, delta_residual),
        data,
        target_n * data["scale"],
        lower,
        upper,
        np.array([1.0 if p.log else (p.upper - p.lower) / 30 for p in params]),
        np.inf if options.loss == "least_squares" else options.huber_delta,
    )


def with_derived(law: Law, table: Table) -> Table:
    """The table with the columns that the law reads and the table's formats determine. Raises FitError for others
    missing.
    """
    more = {name: derived.column(name, table.columns, strict=False) for name in law.columns if name not in table}
    missing = [name for name, column in more.items() if column is None]
    if missing:
        raise FitError(f"law {law.name} needs column {', '.join(missing)}, which {table.source} does not have")
    return dataclasses.replace(table, columns={**table.columns, **more})


def _delta_residual(law: Law, options: Options) -> str:
    return options.delta_residual or ("log_delta" if law.target == "delta" else "log_loss")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The rows before and after PTQ that a law is fitted to, the ones after PTQ that its residual cannot hold, and the
    counts of all rows left out."""

    loss: Table | None
    delta: Table | None
    unheld: Table | None
    left_out: Mapping[str, int]

    @property
    def joined(self) -> Table:
        if self.loss is None or self.delta is None:
            return self.delta if self.loss is None else self.loss
        return concatenated(self.loss, self.delta)

    def observed(self, law: Law) -> np.ndarray:
        """The loss of every row in nats per token, or δ for a law of δ alone."""
        return self.joined["delta" if law.target == "delta" else "loss"]


def _rows(law: Law, table: Table, options: Options) -> Chosen:
    """The rows that the law speaks of and the options choose. Raises FitError where none is left."""
    if law.high_precision_only:
        table = table.select(table.high_precision, f"trained below 16 bits, of which law {law.name} says nothing")
    if options.serve_bits is not None:
        table = _served(law, table, options.serve_bits)
    elif law.log_loss is not None and law.log_delta is None:
        table = table.select(~table.quantized, f"after PTQ, of which law {law.name} says nothing")
    table = _usable(law, table, options.sigma_column)
    if law.log_delta is not None:
        table = table.one_method()
    delta_rows = table.deltas() if law.log_delta is not None else None
    loss_rows = None
    if law.log_loss is not None:
        loss_rows = table if options.serve_bits is not None else table.before_ptq()
    left_out = dict(table.left_out if delta_rows is None else delta_rows.left_out)
    if options.fit_where is not None:
        loss_rows, delta_rows, dropped = _where(loss_rows, delta_rows, options.fit_where)
        left_out |= dropped
    unheld = None
    if delta_rows is not None and _delta_residual(law, options) == "log_delta":
        why = "delta is zero or negative, which log delta cannot hold"
        positive = delta_rows["delta"] > 0
        unheld, delta_rows = delta_rows.select(~positive), delta_rows.select(positive)
        left_out |= {why: len(unheld)} if len(unheld) else {}
    if delta_rows is not None and not len(delta_rows):
        raise FitError(
            f"law {law.name} needs losses after PTQ (P_post) with those of the same run before it; none usable"
            f" ({describe(left_out)})"
        )
    if loss_rows is not None and not len(loss_rows):
        raise FitError(
            f"law {law.name} needs losses {_which(options)}; none usable in {table.source} ({describe(left_out)})"
        )
    return Chosen(loss_rows, delta_rows, unheld, left_out)


def _usable(law: Law, table: Table, sigma_column: str | None) -> Table:
    """The rows whose columns hold what the law and its residuals read."""
    for name in law.columns:
        if name not in AFTER_PTQ:
            if table[name].dtype == object:
                seen = next((str(value) for value in table[name]), "")
                raise FitError(f"law {law.name} needs numbers in column {name}; it holds {seen[:30]!r}")
            table = table.usable(name)
        elif name != "P_post":
            known = ~table.quantized | np.isfinite(table[name])
            table = table.select(known, f"{name} is not known of its format")
    if sigma_column is None:
        return table
    if table[sigma_column].dtype == object:
        raise FitError(f"sigma_column = {sigma_column}: it holds {table[sigma_column][0]!r}, not numbers")
    known = np.isfinite(table[sigma_column]) & (table[sigma_column] > 0)
    return table.select(known, f"{sigma_column} is empty, zero or negative")


def _where(loss_rows: Table | None, delta_rows: Table | None, text: str):
    """The rows that satisfy the expression, before and after PTQ, and the count of the others."""
    kept, dropped = [], 0
    for rows in (loss_rows, delta_rows):
        mask = rows_where(text, rows) if rows is not None else None
        kept.append(None if rows is None else rows.select(mask))
        dropped += 0 if rows is None else int(np.sum(~mask))
    return (*kept, {f"outside of {text}": dropped} if dropped else {})


def concatenated(first: Table, second: Table) -> Table:
    """The rows of both, with the columns that both have, and `loss_before` where one has it."""
    joined = {name: np.concatenate([first[name], second[name]]) for name in first.columns if name in second}
    sides = [rows["loss_before"] if "loss_before" in rows else rows["loss"] for rows in (first, second)]
    return dataclasses.replace(first, columns={**joined, "loss_before": np.concatenate(sides)})


def _which(options: Options) -> str:
    bits = options.serve_bits
    return "before PTQ (P_post empty)" if bits is None else f"after PTQ to {bits:g} bits (P_post)"


def _served(law: Law, table: Table, bits: float) -> Table:
    """The rows after PTQ to that many bits by the main method. Raises FitError for a law that knows PTQ itself."""
    if law.log_delta is not None:
        raise FitError(f"serve_bits = {bits:g}: law {law.name} has P_post in it; allowed for laws of the loss alone")
    served = table.one_method()
    return served.select(served["P_post"] == bits, f"not after PTQ to {bits:g} bits")


def _constants(law: Law, options: Options) -> tuple[dict[str, float], dict[str, str]]:
    """Parameters given by the options: fixed values, biases of the unbiased form, redundant ones; and the ties."""
    for name in options.freed:
        law.parameter(name)
        if name in options.fixed or name in options.tied:
            raise FitError(f"freed {name}: it is fixed or tied, too")
    constants = {p.name: p.default for p in law.params if not p.fit and p.name not in options.freed}
    if not options.biased:
        constants.update(dict.fromkeys(law.biases, 0.0))
    for name, value in options.fixed.items():
        p = law.parameter(name)
        if not p.lower <= value <= p.upper:
            raise FitError(f"fixed {name} = {value}: law {law.name} allows {p.lower:g} to {p.upper:g}")
        constants[name] = float(value)
    tied = dict(options.tied)
    for follower, leader in tied.items():
        law.parameter(follower), law.parameter(leader)
        if leader in tied or follower in options.fixed or leader == follower:
            raise FitError(f"tied {follower} = {leader}: the left one follows a parameter that is itself free or fixed")
        if law.parameter(follower).log != law.parameter(leader).log:
            raise FitError(f"tied {follower} = {leader}: one is positive, the other is not")
    for follower in tied:
        constants.pop(follower, None)
    return constants, tied


def _uninformed(law: Law, tied: Mapping[str, str], loss_rows: Table | None, delta_rows: Table | None) -> dict[str, str]:
    """Parameters that the design of the table leaves open, with the reason. A tied group is informed by any of its
    members.
    """
    open_: dict[str, str] = {}
    for need in law.needs:
        values = _distinct(need, loss_rows, delta_rows)
        if len(values) < need.levels:
            column = " or ".join(need.columns)
            seen = f"only {column} = {', '.join(f'{v:g}' for v in values)}" if len(values) else f"no {column}"
            seen += " in training below 16 bits" * (need.rows == "low")
            for name in need.params:
                open_.setdefault(
                    name, f"the rows hold {seen}; {need.levels} different values are needed to tell {name}"
                )
    for leader in set(tied.values()):
        group = [leader, *(f for f, to in tied.items() if to == leader)]
        if any(name not in open_ for name in group):
            for name in group:
                open_.pop(name, None)
    return open_


def _distinct(need: Need, loss_rows: Table | None, delta_rows: Table | None) -> np.ndarray:
    """The different values of the need's column on its rows; of several columns those of the richest."""
    tables = []
    if loss_rows is not None and need.rows in ("loss", "low", "any"):
        tables.append(loss_rows.select(~loss_rows.high_precision) if need.rows == "low" else loss_rows)
    if delta_rows is not None and need.rows in ("delta", "any"):
        tables.append(delta_rows)
    found = [np.unique(np.concatenate([t[name] for t in tables])) if tables else np.array([]) for name in need.columns]
    return max(found, key=len)


def _stages(law: Law, options: Options, free: tuple[str, ...], rows: Table, before: int) -> tuple[Stage, ...]:
    everything = np.ones(len(rows), bool)
    if options.stages == "joint":
        return (Stage(everything, np.ones(len(free), bool), "all"),)
    if not law.stages:
        raise FitError(f"law {law.name} has no stages: fit it jointly")
    is_loss = np.arange(len(rows)) < before
    masks = {"high_precision": is_loss & rows.high_precision, "loss": is_loss, "delta": ~is_loss}
    out = []
    for stage in law.stages:
        fits = np.array([name in stage.params for name in free])
        count = int(masks[stage.rows].sum())
        if fits.any() and count <= fits.sum():
            raise FitError(
                f"law {law.name}, stage {stage.rows}: {int(fits.sum())} free parameters, {count} rows: too few"
            )
        if fits.any():
            out.append(Stage(masks[stage.rows], fits, stage.rows))
    return tuple(out)
