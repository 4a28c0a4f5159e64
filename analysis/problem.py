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

from analysis import derived, laws
from analysis.law import AFTER_PTQ, Law, Need, Parameter
from analysis.optimize import Problem, huber, residuals
from analysis.table import Table, describe
from precision_scaling.errors import UserError

DELTA_RESIDUALS = ("log_delta", "log_loss")
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

    `loss` is Huber (with `huber_delta`) or least squares, of log residuals. `delta_residual` says what a row after
    PTQ compares: log δ, or the log of the run's own loss before PTQ plus δ, which keeps zero and negative δ (None:
    log δ for laws of δ alone, log loss for a law of both). `stages`: all parameters at once, or in the law's stages
    as in the paper.
    """

    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    freed: tuple[str, ...] = ()
    serve_bits: float | None = None
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    biased: bool = True
    loss: str = "huber"
    huber_delta: float = 1e-3
    delta_residual: str | None = None
    stages: str = "joint"

    def __post_init__(self):
        for key, value, allowed in (
            ("loss", self.loss, LOSSES),
            ("stages", self.stages, STAGES),
            ("delta_residual", self.delta_residual, (None, *DELTA_RESIDUALS)),
        ):
            if value not in allowed:
                raise FitError(f"{key} is {value!r}: choose one of {', '.join(str(a) for a in allowed if a)}")
        if not self.huber_delta > 0:
            raise FitError(f"huber_delta is {self.huber_delta}: it must be positive")


@dataclasses.dataclass(frozen=True)
class LogPrediction:
    """theta_F -> log predictions of rows before PTQ, then of those after it. Hashable, so shapes compile once."""

    law: Law
    free: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]

    def __call__(self, theta_F, data):
        params = dict(data["constants"])
        for i, name in enumerate(self.free):
            params[name] = jnp.exp(theta_F[i]) if self.law.parameter(name).log else theta_F[i]
        for follower, leader in self.tied:
            params[follower] = params[leader]
        blocks = []
        if "loss" in data:
            blocks.append(self.law.log_loss(params, data["loss"], jnp))
        if "delta" in data:
            log_delta = self.law.log_delta(params, data["delta"], jnp)
            blocks.append(log_delta if "before" not in data else jnp.log(data["before"] + jnp.exp(log_delta)))
        return jnp.concatenate(blocks)


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
        return dataclasses.replace(self.problem, data=data, target_n=self.problem.target_n[keep])

    def predicted(self, theta_F: np.ndarray) -> np.ndarray:
        """Loss or δ of every row by the law alone, in nats per token."""
        return laws.predict(self.law, self.values(theta_F), **self.rows.columns)

    def predicted_delta(self, theta_F: np.ndarray) -> np.ndarray:
        """δ of the rows after PTQ, for a law of both losses."""
        before = {**self.rows.columns, "P_post": np.full(len(self.rows), np.nan)}
        without = laws.predict(self.law, self.values(theta_F), **before)
        return (self.predicted(theta_F) - without)[self.rows.quantized]


def to_theta(parameter: Parameter, value) -> np.ndarray:
    """A parameter's value as it is fitted: its logarithm where positive, clipped to its bounds."""
    value = np.clip(value, parameter.lower, parameter.upper)
    return np.log(value) if parameter.log else value


def set_up(law: str | Law, table: Table, options: Options | None = None) -> Setup:
    """Raises FitError, in one line, where the table or the options do not allow this law to be fitted."""
    options = Options() if options is None else options
    law = laws.get(law)
    table = with_derived(law, table).in_order(*law.columns)
    loss_rows, delta_rows, left_out = _rows(law, table, options)
    rows = _join(loss_rows, delta_rows)
    law = laws.resolve(law, columns=laws.complete_columns(law, rows.columns))
    if law.check is not None and (why := law.check(laws.complete_columns(law, rows.columns))):
        raise FitError(f"law {law.name}: {why} ({describe(left_out)})")

    constants, tied = _constants(law, options)
    refused = {}
    for name, why in _uninformed(law, tied, loss_rows, delta_rows).items():
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

    data: dict[str, Any] = {"constants": {k: np.float64(v) for k, v in constants.items()}}
    target, observed = [], []
    if loss_rows is not None:
        data["loss"] = laws.complete_columns(law, loss_rows.columns)
        target.append(np.log(loss_rows["loss"]))
        observed.append(loss_rows["loss"])
    if delta_rows is not None:
        data["delta"] = laws.complete_columns(law, delta_rows.columns)
        if _delta_residual(law, options) == "log_loss":
            data["before"] = delta_rows["loss_before"]
            target.append(np.log(delta_rows["loss"]))
        else:
            target.append(np.log(delta_rows["delta"]))
        observed.append(delta_rows["delta"] if law.target == "delta" else delta_rows["loss"])
    params = [law.parameter(name) for name in free]
    lower, upper = (np.array([to_theta(p, getattr(p, side)) for p in params]) for side in ("lower", "upper"))
    problem = Problem(
        LogPrediction(law, free, tuple(tied.items())),
        data,
        np.concatenate(target),
        lower,
        upper,
        np.array([1.0 if p.log else (p.upper - p.lower) / 30 for p in params]),
        np.inf if options.loss == "least_squares" else options.huber_delta,
    )
    return Setup(
        law,
        options,
        problem,
        free,
        constants,
        tied,
        refused,
        _stages(law, options, free, rows, 0 if loss_rows is None else len(loss_rows)),
        rows,
        np.concatenate(observed),
        _delta_residual(law, options),
        rows.models,
        left_out,
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


def _rows(law: Law, table: Table, options: Options) -> tuple[Table | None, Table | None, dict[str, int]]:
    """The rows before and after PTQ that the law speaks of, and the counts of all rows left out."""
    if law.high_precision_only:
        table = table.select(table.high_precision, f"trained below 16 bits, of which law {law.name} says nothing")
    if options.serve_bits is not None:
        table = _served(law, table, options.serve_bits)
    elif law.log_loss is not None and law.log_delta is None:
        table = table.select(~table.quantized, f"after PTQ, of which law {law.name} says nothing")
    for name in law.columns:
        if name not in AFTER_PTQ:
            if table[name].dtype == object:
                seen = next((str(value) for value in table[name]), "")
                raise FitError(f"law {law.name} needs numbers in column {name}; it holds {seen[:30]!r}")
            table = table.usable(name)
        elif name != "P_post":
            known = ~table.quantized | np.isfinite(table[name])
            table = table.select(known, f"{name} is not known of its format")
    if law.log_delta is not None:
        table = table.one_method()
    loss_rows = None
    if law.log_loss is not None:
        loss_rows = table if options.serve_bits is not None else table.before_ptq()
    delta_rows = table.deltas() if law.log_delta is not None else None
    left_out = dict(table.left_out if delta_rows is None else delta_rows.left_out)
    if delta_rows is not None:
        if _delta_residual(law, options) == "log_delta":
            delta_rows = delta_rows.select(
                delta_rows["delta"] > 0, "delta is zero or negative, which log delta cannot hold"
            )
            left_out = dict(delta_rows.left_out)
        if not len(delta_rows):
            raise FitError(
                f"law {law.name} needs losses after PTQ (P_post) with those of the same run before it; none usable"
                f" ({describe(left_out)})"
            )
    if loss_rows is not None and not len(loss_rows):
        raise FitError(
            f"law {law.name} needs losses {_which(options)}; none usable in {table.source} ({describe(left_out)})"
        )
    return loss_rows, delta_rows, left_out


def _which(options: Options) -> str:
    bits = options.serve_bits
    return "before PTQ (P_post empty)" if bits is None else f"after PTQ to {bits:g} bits (P_post)"


def _served(law: Law, table: Table, bits: float) -> Table:
    """The rows after PTQ to that many bits by the main method. Raises FitError for a law that knows PTQ itself."""
    if law.log_delta is not None:
        raise FitError(f"serve_bits = {bits:g}: law {law.name} has P_post in it; allowed for laws of the loss alone")
    served = table.one_method()
    return served.select(served["P_post"] == bits, f"not after PTQ to {bits:g} bits")


def _join(loss_rows: Table | None, delta_rows: Table | None) -> Table:
    if loss_rows is None or delta_rows is None:
        return delta_rows if loss_rows is None else loss_rows
    names = loss_rows.columns
    joined = {name: np.concatenate([loss_rows[name], delta_rows[name]]) for name in names}
    joined["loss_before"] = np.concatenate([loss_rows["loss"], delta_rows["loss_before"]])
    return dataclasses.replace(loss_rows, columns=joined)


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
