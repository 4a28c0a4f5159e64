"""Figure that compares laws: held-out error and information criteria."""

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from analysis.fitting.comparison import HELD_OUT, Row
from analysis.fitting.forms import KINDS
from analysis.reporting.evidence import Evidence
from analysis.reporting.figures.style import CATEGORIES, INK, Skipped, marker, panels

NARROWEST = 4.0  # ratio of the ends of an error axis, at least


def law_comparison(evidence: Evidence) -> Figure:
    """Held-out error by what was held out, and AIC and BIC above the best, one row of panels per kind of law."""
    if evidence.comparison is None:
        raise Skipped("laws were not compared")
    groups = {kind: [row for row in evidence.comparison.rows if row.kind == kind] for kind in KINDS}
    groups = {kind: rows for kind, rows in groups.items() if len(rows) > 1}
    if not groups:
        raise Skipped("fewer than two laws of a kind can be fitted to this table")
    heights = [0.75 + 0.24 * len(rows) for rows in groups.values()]
    figure, axes = panels(len(groups), 2, sum(heights) / len(groups) + 0.2, gridspec_kw={"height_ratios": heights})
    for (kind, rows), (left, right) in zip(groups.items(), axes, strict=True):
        _held_out(left, rows)
        _criteria(right, rows)
        left.set_title(f"{KINDS[kind]}: {rows[0].n} rows")
    axes[-1, 0].set_xlabel("held-out error, rms of log (%)")
    axes[-1, 1].set_xlabel("above the best law")
    shown = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    for axis in axes[1:, 0]:
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown, loc="outside upper left", ncols=len(shown))
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _names(axis, rows: list[Row], labels: bool) -> np.ndarray:
    """The laws as rows of the axis, best on top."""
    y = np.arange(len(rows))
    axis.set_yticks(y, [f"{row.law}, k = {row.k}" for row in rows])
    axis.tick_params(axis="y", length=0, labelleft=labels)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    return y


def _held_out(axis, rows: list[Row]) -> None:
    y = _names(axis, rows, labels=True)
    found = {scheme: np.array([row.held_out.get(scheme) for row in rows], float) * 100 for scheme in HELD_OUT}
    drawn = np.concatenate(list(found.values()))
    positive = drawn[np.isfinite(drawn) & (drawn > 0)]
    # A law that misses nothing stands at the left end: the axis has no zero.
    low, high = (positive.min() / 1.2, positive.max() * 1.2) if positive.size else (0.1, 1.0)
    half = max(np.log(high / low), np.log(NARROWEST)) / 2
    left, right = (np.sqrt(low * high) * np.exp(sign * half) for sign in (-1, 1))
    for series, (scheme, label) in enumerate(HELD_OUT.items()):
        error = found[scheme]
        if np.isfinite(error).any():
            shift = 0.13 * (series - (len(HELD_OUT) - 1) / 2)  # of a row; keeps marks of equal error apart
            place = np.where(error == 0, left, error)
            axis.plot(place, y + shift, marker(series), color=CATEGORIES[series], mec=INK, label=label, clip_on=False)
    axis.set_xscale("log")
    if np.isfinite(drawn).any():
        axis.set_xlim(left, right)
    axis.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=7))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _criteria(axis, rows: list[Row]) -> None:
    y = _names(axis, rows, labels=False)
    for series, name in enumerate(("aic", "bic")):
        values = np.array([getattr(row, name) for row in rows])
        above, mark = values - values.min(), len(HELD_OUT) + series
        axis.plot(above, y + 0.14 * (series - 0.5), marker(mark), color=CATEGORIES[mark], mec=INK, label=name.upper())
    axis.set_xscale("symlog", linthresh=10)
    axis.set_xlim(-1.5, None)
    axis.xaxis.set_major_locator(ticker.FixedLocator([0, 5, 10, 30, 100, 300, 1000, 3000, 10000, 30000]))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
