"""From a law and a table to a regression that is ready to be solved.

Sits between the table and the solver. What a table cannot identify by its design (with one precision of the KV cache,
say) is settled here, before anything is fitted: such parameters are held where they have no effect, and are reported
as unidentified.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from analysis import laws
from analysis.fitting.levenberg_marquardt import Problem, huber, residuals
from analysis.fitting.options import FitError, Options
from analysis.fitting.parameters import given, to_theta, uninformed
from analysis.fitting.regression import problem_of
from analysis.fitting.rows import choose, concatenated, with_derived
from analysis.laws.law import AFTER_PTQ, Law, LawError
from analysis.table import Table, describe
from analysis.table.seed_noise import noise_floor


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the fit: masks of the rows that it counts and of the free parameters that it fits."""

    rows_n: np.ndarray
    fits_F: np.ndarray


@dataclasses.dataclass(frozen=True)
class Setup:
    """A law ready to be fitted to a table.

    Rows are those before PTQ, then those after it. `constants` are the parameters that are not free, `unidentified`
    those of them that the design of the table does not identify, with the reason.
    """

    law: Law
    options: Options
    problem: Problem
    free: tuple[str, ...]
    constants: Mapping[str, float]
    tied: Mapping[str, str]
    unidentified: Mapping[str, str]
    stages: tuple[Stage, ...]
    rows: Table  # the rows fitted, in the order of the problem
    observed_n: np.ndarray  # loss in nats per token, or δ for a law of δ alone
    delta_residual: str  # what rows after PTQ compare, one of DELTA_RESIDUALS
    run_n: np.ndarray  # index of the trained model of each row
    left_out: Mapping[str, int]
    floor: float | None = None  # noise of δ in nats, of "floored"
    unheld: Table | None = None  # rows after PTQ that the law describes but that have no log δ

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
        """theta_F of these constants."""
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
        """The rows fitted, then those that have no residual."""
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
        """Log of the loss as served (measured before PTQ plus δ of the law) minus its measured log, of rows after PTQ
        with `loss_before`; NaN for others.
        """
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
        rows = choose(self.law, with_derived(self.law, table).in_order(*self.law.columns), options)
        problem = problem_of(self.law, self.free, self.constants, self.tied, rows, options, self.floor)
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


def set_up(law: str | Law, table: Table, options: Options | None = None) -> Setup:
    """The law on the rows of the table. Raises FitError, in one line, where table or options do not allow the fit."""
    options = Options() if options is None else options
    law = laws.get(law)
    table = with_derived(law, table).in_order(*law.columns)
    chosen = choose(law, table, options)
    rows, left_out = chosen.joined, chosen.left_out
    law = laws.resolve(law, columns=laws.complete_columns(law, rows.columns))
    if law.check is not None and (why := law.check(laws.complete_columns(law, rows.columns))):
        raise FitError(f"law {law.name}: {why} ({describe(left_out)})")

    constants, tied = given(law, options)
    unidentified = {}
    for name, why in uninformed(law, tied, chosen.loss, chosen.delta).items():
        if name not in constants and name not in tied:
            held = law.parameter(name).held
            if held is None:
                raise LawError(f"parameter {name} of law {law.name} needs `held`: {why}")
            constants[name], unidentified[name] = held, why
    free = tuple(name for name in law.names if name not in constants and name not in tied)
    for follower, leader in list(tied.items()):
        if leader in unidentified:
            unidentified[follower] = unidentified[leader]
        if leader in constants:
            constants[follower] = constants[leader]
            del tied[follower]
    if not free:
        raise FitError(
            f"law {law.name}: nothing is left to fit ({'; '.join(unidentified.values()) or 'everything is fixed'})"
        )
    if len(rows) <= len(free):
        raise FitError(
            f"law {law.name} has {len(free)} free parameters and the table {len(rows)} usable rows: too few"
            f" ({describe(left_out)})"
        )

    floor = None
    if chosen.delta is not None and options.delta_residual_of(law) == "floored":
        floor = noise_floor(chosen.delta) if options.delta_floor is None else options.delta_floor
        if floor is None:
            raise FitError(
                "delta_residual = floored: no run is repeated with another seed, which would give the noise of delta; "
                "give delta_floor, a number of nats"
            )
    return Setup(
        law=law,
        options=options,
        problem=problem_of(law, free, constants, tied, chosen, options, floor),
        free=free,
        constants=constants,
        tied=tied,
        unidentified=unidentified,
        stages=_stages(law, options, free, rows, 0 if chosen.loss is None else len(chosen.loss)),
        rows=rows,
        observed_n=chosen.observed(law),
        delta_residual=options.delta_residual_of(law),
        run_n=rows.models,
        left_out=left_out,
        floor=floor,
        unheld=chosen.unheld,
    )


def _stages(law: Law, options: Options, free: tuple[str, ...], rows: Table, before: int) -> tuple[Stage, ...]:
    everything = np.ones(len(rows), bool)
    if options.stages == "joint":
        return (Stage(everything, np.ones(len(free), bool)),)
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
            out.append(Stage(masks[stage.rows], fits))
    return tuple(out)
