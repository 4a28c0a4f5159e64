"""Predicts rows that no fit has seen; the intervals cover the uncertainty of the constants and the noise of a row."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import laws
from analysis.fitting.fit import Fit
from analysis.fitting.options import FitError
from analysis.fitting.residual import OF_DELTA, measurement
from analysis.fitting.rows import with_derived
from analysis.fitting.statistics import percentiles
from analysis.laws.law import AFTER_PTQ
from analysis.table import Table

MEASURED, PREDICTED = "measured", "predicted"
BLOCK = 1000  # rows whose draws are held in memory at once
MOST_DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One entry per row of `table`; losses in nats per token, NaN where unknown; `note` says why one has no prediction.

    predicted, low, high: the loss (after PTQ the loss as served) and its interval. measured, error: the table's, and
    predicted - measured. delta: predicted δ of rows after PTQ by a law of δ, whose loss before PTQ is `before`, taken
    from `before_from`: "measured", or the name of the law that predicts it. outside: columns in which the row lies
    beyond the rows of its fit.
    """

    table: Table
    law: np.ndarray
    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    delta: np.ndarray
    before: np.ndarray
    before_from: np.ndarray
    outside: np.ndarray
    note: np.ndarray
    notes: tuple[str, ...]
    level: float

    @classmethod
    def empty(cls, table: Table, notes: tuple[str, ...], level: float) -> "Predictions":
        """Predictions of no row yet, to be filled in."""
        numbers = {name: np.full(len(table), np.nan) for name in ("predicted", "low", "high", "delta", "before")}
        texts = {name: np.full(len(table), "", object) for name in ("law", "before_from", "outside", "note")}
        return cls(table=table, notes=notes, level=level, **numbers, **texts)

    @property
    def measured(self) -> np.ndarray:
        return self.table["loss"]

    @property
    def error(self) -> np.ndarray:
        return self.predicted - self.measured


def predict(
    given: Sequence[Fit], table: Table, before: str = MEASURED, level: float = 0.95, seed: int = 0
) -> Predictions:
    """Predicts every row of `table` by the fit that describes it.

    given: at most one fit of the loss before PTQ, at most one with a law of δ (a law of both is both), and fits of
        losses after PTQ to one number of bits (`--serve_bits`). before: where the loss that δ is added to comes from:
        "measured" where the table has it and else from the fit of the loss, or "predicted", always from the fit.
    Intervals need fits with a bootstrap. Raises FitError where the fits contradict each other or read a column that the
    table does not have.
    """
    if before not in (MEASURED, PREDICTED):
        raise FitError(f"before is {before!r}: choose {MEASURED} or {PREDICTED}")
    loss_fit, delta_fit, served = _roles(given)
    columns = {**table.columns, "_at": np.arange(len(table))}
    table = dataclasses.replace(table, columns=columns)
    out = Predictions.empty(table, _notes(given, table), level)
    rng = np.random.default_rng(seed)
    post = table["P_post"]
    if loss_fit is not None:
        _losses(out, loss_fit, table.select(np.isnan(post)), rng)
    for bits, fit in served.items():
        _losses(out, fit, table.select(post == bits), rng)
    rest = table.select(~np.isnan(post) & ~np.isin(post, list(served)))
    if delta_fit is not None:
        _served_losses(out, delta_fit, loss_fit, rest, before, rng)
    unknown = (out.law == "") & (out.note == "")
    out.note[unknown & np.isnan(post)] = "no fit given of the loss before PTQ"
    out.note[unknown & ~np.isnan(post)] = "no fit given of the loss after PTQ"
    return dataclasses.replace(out, table=dataclasses.replace(table, columns=_without(columns, "_at")))


def _roles(given: Sequence[Fit]) -> tuple[Fit | None, Fit | None, dict[float, Fit]]:
    """The fit of the loss before PTQ, the one with a law of δ, and those of losses after PTQ by their bits."""
    served: dict[float, Fit] = {}
    losses, deltas = [], []
    for fit in given:
        law = laws.get(fit.law)
        if fit.serve_bits is not None:
            if fit.serve_bits in served:
                raise FitError(f"two fits of the loss after PTQ to {fit.serve_bits:g} bits: give one")
            served[fit.serve_bits] = fit
            continue
        losses += [fit] * (law.log_loss is not None)
        deltas += [fit] * (law.log_delta is not None)
    for found, what in ((losses, "the loss before PTQ"), (deltas, "delta of PTQ")):
        if len(found) > 1:
            raise FitError(f"{len(found)} fits of {what} ({', '.join(fit.law for fit in found)}): give one")
    return losses[0] if losses else None, deltas[0] if deltas else None, served


def _losses(out: Predictions, fit: Fit, rows: Table, rng: np.random.Generator) -> None:
    """Fills in the rows whose loss the fit predicts by itself."""
    rows = _described(out, fit, rows)
    for block in _blocks(rows):
        point, draws_Rxn = _evaluate(fit, block, "loss")
        _fill(out, fit, block, point, _measured(fit, "before", draws_Rxn, rng))


def _served_losses(
    out: Predictions, fit: Fit, loss_fit: Fit | None, rows: Table, before: str, rng: np.random.Generator
) -> None:
    """Fills in the rows after PTQ by a law of δ: the loss before PTQ, measured or predicted, plus δ."""
    rows = _described(out, fit, rows)
    known = np.full(len(out.law), np.nan)
    if before == MEASURED:
        paired = out.table.deltas()
        known[paired["_at"].astype(int)] = paired["loss_before"]
    known_n = known[rows["_at"].astype(int)]
    _with_before(out, fit, rows.select(~np.isnan(known_n)), known_n[~np.isnan(known_n)], None, rng)
    unknown = rows.select(np.isnan(known_n))
    if loss_fit is None:
        out.note[unknown["_at"].astype(int)] = (
            "the loss before PTQ is not measured, and no fit is given that predicts it"
        )
    else:
        _with_before(out, fit, _described(out, loss_fit, unknown), None, loss_fit, rng)


def _with_before(out: Predictions, fit: Fit, rows: Table, known_n, loss_fit: Fit | None, rng) -> None:
    """Loss before PTQ (`known_n`, or predicted by `loss_fit`) plus δ, for rows that the fits describe."""
    of_delta = fit.reporting.get("delta_residual") in OF_DELTA
    for block, at in zip(_blocks(rows), _blocks_of(len(rows)), strict=True):
        delta_n, delta_Rxn = _evaluate(fit, block, "delta")
        if loss_fit is None:
            before_n, before_Rxn, origin = known_n[at], known_n[at][None], MEASURED
        else:
            before_n, before_Rxn = _evaluate(loss_fit, block, "loss")
            before_Rxn = _cycled(_measured(loss_fit, "before", before_Rxn, rng), len(delta_Rxn))
            delta_Rxn, origin = _cycled(delta_Rxn, len(before_Rxn)), loss_fit.law
        if of_delta:
            served_Rxn = before_Rxn + _measured(fit, "after", delta_Rxn, rng)
        else:
            served_Rxn = _measured(fit, "after", before_Rxn + delta_Rxn, rng)
        _fill(out, fit, block, before_n + delta_n, served_Rxn)
        index = block["_at"].astype(int)
        out.delta[index], out.before[index], out.before_from[index] = delta_n, before_n, origin


def _evaluate(fit: Fit, rows: Table, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss before PTQ or δ of every row at the fit's constants, and (R, n) at its bootstrap draws; R is 0 without."""
    law = laws.resolve(fit.law, fit.values)
    columns = laws.complete_columns(law, with_derived(law, rows).columns)
    function = law.log_loss if which == "loss" else law.log_delta
    assert function is not None  # _roles chose the fit by it

    def at(values: Mapping[str, float]) -> np.ndarray:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return np.exp(function(law.values(values), columns, np))

    draws = [at({name: fit.samples[name][i] for name in fit.samples}) for i in range(min(fit.draws, MOST_DRAWS))]
    return at(fit.values), np.reshape(draws, (len(draws), len(rows)))


def _cycled(a_Rxn: np.ndarray, count: int) -> np.ndarray:
    """At least `count` draws, repeated in their order; none stay none."""
    return a_Rxn if len(a_Rxn) >= count or not len(a_Rxn) else np.resize(a_Rxn, (count, a_Rxn.shape[1]))


def _measured(fit: Fit, rows: str, predicted_Rxn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Predictions with the noise of a measurement, drawn from the fit's residuals of rows "before" or "after" PTQ."""
    residuals, how = fit.residuals.get(rows, ()), fit.reporting
    if not residuals:
        return predicted_Rxn
    kind = how.get("residual") or "log_loss"
    if rows == "after" and how.get("delta_residual") in OF_DELTA:
        kind = how["delta_residual"]
    drawn = rng.choice(np.asarray(residuals), predicted_Rxn.shape)
    return measurement(kind, predicted_Rxn, drawn, how.get("delta_floor"))


def _fill(out: Predictions, fit: Fit, rows: Table, point_n: np.ndarray, draws_Rxn: np.ndarray) -> None:
    known = np.isfinite(point_n)
    index = rows["_at"].astype(int)
    out.note[index[~known]] = f"law {fit.law} has no constant for this precision"
    out.law[index[known]] = fit.law
    out.predicted[index[known]] = point_n[known]
    for at in index[known]:
        out.outside[at] = " ".join(_outside(fit, out.table, at))
    if len(draws_Rxn):
        out.low[index], out.high[index] = percentiles(draws_Rxn, out.level)


def _described(out: Predictions, fit: Fit, rows: Table) -> Table:
    """The rows that the law and the PTQ method of the fit describe; the others get a note."""
    law = laws.resolve(fit.law, fit.values)
    names = [name for name in law.columns if name not in AFTER_PTQ]
    if len(rows):
        rows = with_derived(law, rows)
    method = fit.reporting.get("ptq_method")
    reasons = []
    if law.high_precision_only:
        reasons.append((~rows.high_precision, f"trained below 16 bits, which law {law.name} does not describe"))
    if method and rows.methods is not None:
        other = rows.quantized & (rows.methods != method)
        reasons.append((other, f"PTQ by another method than {method}, the fit's"))
    reasons += [(~np.isfinite(rows[name].astype(float)), f"{name} is empty") for name in names if len(rows)]
    keep = np.ones(len(rows), bool)
    for bad, why in reasons:
        out.note[rows["_at"][bad & keep].astype(int)] = why
        keep &= ~bad
    return rows.select(keep)


def _outside(fit: Fit, table: Table, at: int) -> list[str]:
    """The columns in which a row lies beyond the rows of the fit."""
    ranges = fit.reporting.get("ranges", {})
    values = {name: float(table[name][at]) for name in ranges if name in table}
    beyond = lambda name, value: not ranges[name][0] * (1 - 1e-9) <= value <= ranges[name][1] * (1 + 1e-9)
    return [name for name, value in values.items() if not np.isnan(value) and beyond(name, value)]


def _blocks_of(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def _blocks(rows: Table) -> list[Table]:
    return [rows.select(np.isin(np.arange(len(rows)), np.r_[at])) for at in _blocks_of(len(rows))]


def _without(columns: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: column for key, column in columns.items() if key != name}


def _notes(given: Sequence[Fit], table: Table) -> tuple[str, ...]:
    notes = []
    for fit in given:
        if table.sha256 and fit.reporting.get("table_sha256") == table.sha256:
            notes.append(f"the fit of {fit.law} was made from rows of this table: their errors are in-sample")
        if not fit.samples:
            notes.append(f"the fit of {fit.law} has no bootstrap: its predictions have no intervals")
        elif not fit.residuals:
            notes.append(f"the fit of {fit.law} has no residuals: its intervals leave out the noise of a measurement")
    return tuple(notes)
