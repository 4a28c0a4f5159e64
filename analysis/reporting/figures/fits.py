"""Figures of how well the laws fit: predicted against measured, residuals by variable, bootstrap of the constants."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from analysis import laws
from analysis.fitting.fit import Fit
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.reporting.evidence import Evidence
from analysis.reporting.figures.style import (
    CATEGORIES,
    INK,
    WIDTH,
    Skipped,
    bits_axis,
    log_axis,
    marker,
    panels,
    ramp,
    thin,
)
from analysis.table import PRECISIONS, Table
from analysis.wording import fixed

MOST_PARAMETERS = 8  # of a corner plot; amplitudes, then exponents make room for constants of precision
LEAST_OF_DENSITY = 50  # bootstrap samples worth a density


def rows_of(evidence: Evidence, fit: Fit) -> tuple[Table, np.ndarray]:
    """The rows that a law describes, and what was measured in them: δ for a law of δ, else the loss."""
    law = laws.resolve(fit.law, fit.values)
    if law.target == "delta":
        table = evidence.high_precision_deltas if law.high_precision_only else evidence.deltas
        table = table.select(table["delta"] > 0) if len(table) else table
        return table, table["delta"]
    table = evidence.table if law.log_delta is not None else evidence.losses
    if law.high_precision_only:
        table = table.select(table.high_precision)
    return table, table["loss"]


def predicted(fit: Fit, table: Table) -> np.ndarray:
    """The prediction of the fitted law for every row."""
    return laws.predict(fit.law, fit.values, **table.columns)


def _kinds(table: Table) -> tuple[list[str], np.ndarray]:
    """Which parts of each run were in low precision, in words, and the index of each row's kind."""
    low = [table[c] < HIGH_PRECISION_BITS for c in PRECISIONS]
    names = ("weights", "activations", "KV cache")
    words = np.array(["16 bits", *names, "several parts"])
    count = np.sum(low, axis=0)
    index = np.where(count > 1, 4, np.where(count == 0, 0, 1 + np.argmax(low, axis=0)))
    present = sorted(set(index))
    return [str(words[i]) for i in present], np.searchsorted(present, index)


def _groups(fit: Fit, table: Table) -> tuple[list[str], np.ndarray, Sequence]:
    """Labels of the series of a law's panel, the index of each row's series, and their colours."""
    if laws.get(fit.law).target == "delta":
        bits = thin(table["P_post"], 6)
        index = np.searchsorted(bits, table["P_post"]).clip(max=len(bits) - 1)
        return [f"{p:g} bits" for p in bits], index, ramp(len(bits))
    if fit.law == "unified":
        return ["before PTQ", "after PTQ"], table.quantized.astype(int), CATEGORIES
    return *_kinds(table), CATEGORIES


def predicted_against_measured(evidence: Evidence) -> Figure:
    """Predicted against measured for the law of PTQ, of training precision and of both."""
    shown: list[tuple[Fit, Table, np.ndarray]] = []
    for name in ("ptq", "precision", "unified", "chinchilla"):
        fit = evidence.fits.get(name)
        if fit is None or (name == "chinchilla" and len(shown) == 3):
            continue
        table, measured = rows_of(evidence, fit)
        if len(table):
            shown.append((fit, table, measured))
    if not shown:
        raise Skipped("no law was fitted")
    shown = shown[:3]
    figure, axes = panels(1, len(shown), 2.75)
    for axis, (fit, table, measured) in zip(axes.flat, shown, strict=True):
        values = predicted(fit, table)
        delta = laws.get(fit.law).target == "delta"
        labels, index, colors = _groups(fit, table)
        for series, label in enumerate(labels):
            mine = index == series
            axis.plot(measured[mine], values[mine], marker(series), color=colors[series], mec=INK, ms=3.8, label=label)
        both = np.concatenate([measured, values])
        span = np.array([both.min(), both.max()])
        axis.plot(span, span, color="#888888", lw=1, zorder=0)
        if delta:
            log_axis(axis, "x", both)
            log_axis(axis, "y", both)
        axis.set_title(f"{fit.law}: R² {fixed(fit.r2)}, {len(table)} rows")
        axis.set_xlabel("measured " + ("δ" if delta else "loss"))
        axis.set_ylabel("predicted " + ("δ" if delta else "loss"))
        axis.legend(fontsize=6.5, handletextpad=0.2, borderaxespad=0.2)
    return figure


def residuals(evidence: Evidence) -> Figure:
    """Residuals against each variable, of the law of loss and of the law of PTQ; the line is the mean at each value."""
    laws_shown = [
        fit for fit in (evidence.fit_of("precision", "chinchilla"), evidence.fit_of("ptq")) if fit is not None
    ]
    rows = []
    for fit in laws_shown:
        table, measured = rows_of(evidence, fit)
        if not len(table):
            continue
        variables = [c for c in (*laws.resolve(fit.law, fit.values).columns,) if len(set(table[c])) > 1]
        if variables:
            rows.append((fit, table, 100 * np.log(measured / predicted(fit, table)), variables))
    if not rows:
        raise Skipped("no law was fitted on rows in which a variable changes")
    width = max(len(variables) for *_, variables in rows)
    figure, axes = panels(len(rows), width, 2.1)
    for line_of_axes, (fit, table, residual, variables) in zip(axes, rows, strict=True):
        limit = 1.15 * np.max(np.abs(residual)) + 1e-9
        for axis, name in zip(line_of_axes, variables, strict=False):
            x = np.minimum(table[name], HIGH_PRECISION_BITS) if name.startswith("P_") else table[name]
            axis.plot(x, residual, "o", color=CATEGORIES[0], ms=2.8, alpha=0.6, mew=0)
            levels = np.unique(x)
            if len(levels) <= 24:
                axis.plot(
                    levels, [residual[x == v].mean() for v in levels], color=CATEGORIES[1], lw=1.2, marker="_", ms=7
                )
            axis.axhline(0, color="#888888", lw=0.8)
            axis.set_ylim(-limit, limit)
            axis.set_xlabel(name)
            if name.startswith("P_"):
                bits_axis(axis.xaxis, x, most=5)
            else:
                log_axis(axis, "x", x, counts=True)
                axis.tick_params(axis="x", rotation=35)
        for axis in line_of_axes[len(variables) :]:
            axis.set_visible(False)
        what = "δ" if laws.get(fit.law).target == "delta" else "loss"
        line_of_axes[0].set_ylabel(f"{fit.law}: residual of\nlog {what} (%)")
        for axis in line_of_axes[1:]:
            axis.tick_params(labelleft=False)
    return figure


def _corner(fit: Fit | None, name: str) -> Figure:
    if fit is None:
        raise Skipped(f"the law {name} was not fitted")
    names = [p for p in fit.samples if p not in fit.unidentified and np.ptp(fit.samples[p]) > 0]
    draws = min((len(fit.samples[p]) for p in names), default=0)
    if draws < LEAST_OF_DENSITY:
        raise Skipped(f"the fit of {name} carries {draws} bootstrap samples, want {LEAST_OF_DENSITY}")
    for spare in ("A", "B", "beta", "alpha", "E"):
        names = [p for p in names if p != spare] if len(names) > MOST_PARAMETERS else names
    names = names[:MOST_PARAMETERS]
    logs = {p for p in names if laws.resolve(fit.law, fit.values).parameter(p).log}
    values = {p: np.log10(fit.samples[p]) if p in logs else np.asarray(fit.samples[p]) for p in names}
    best = {p: np.log10(fit.values[p]) if p in logs else fit.values[p] for p in names}
    figure, axes = panels(len(names), len(names), WIDTH / len(names))
    few = len(names) < 6
    dots = {"color": CATEGORIES[0], "ms": 3.5 if few else 2.2, "alpha": 0.5, "mew": 0}
    spans = {p: np.quantile(values[p], [0.01, 0.99]) + np.array([-0.08, 0.08]) * np.ptp(values[p]) for p in names}
    for row, y in enumerate(names):
        for column, x in enumerate(names):
            axis = axes[row, column]
            if column > row:
                axis.set_visible(False)
                continue
            axis.set_xlim(*spans[x])
            if row == column:
                axis.hist(values[x], bins=24, range=tuple(spans[x]), color=CATEGORIES[4], edgecolor="white", lw=0.3)
                axis.set_yticks([])
            else:
                axis.plot(values[x], values[y], ".", **dots)
                axis.axhline(best[y], color=CATEGORIES[1], lw=0.9)
                axis.set_ylim(*spans[y])
            axis.axvline(best[x], color=CATEGORIES[1], lw=0.9)
            axis.grid(False)
            axis.locator_params(nbins=3)
            axis.tick_params(
                labelleft=column == 0 and row > 0, labelbottom=row == len(names) - 1, labelsize=6.5 if few else 5.5
            )
            axis.tick_params(axis="x", rotation=35)
            if row == len(names) - 1:
                axis.set_xlabel(f"log10 {x}" if x in logs else x, fontsize=8.5 if few else 6.5)
            if column == 0 and row > 0:
                axis.set_ylabel(f"log10 {y}" if y in logs else y, fontsize=8.5 if few else 6.5)
    figure.align_labels()
    return figure


def bootstrap_ptq(evidence: Evidence) -> Figure:
    """Bootstrap samples of the constants of the law of PTQ, pair by pair."""
    return _corner(evidence.fits.get("ptq"), "ptq")


def bootstrap_precision(evidence: Evidence) -> Figure:
    """Bootstrap samples of the constants of the law of training precision (else Chinchilla), pair by pair."""
    return _corner(evidence.fit_of("precision", "chinchilla"), "precision")
