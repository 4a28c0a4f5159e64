"""Figures of what the fitted laws advise: precisions at equal cost, the best precision of a fixed model,
compute-optimal N, D and P, and the loss left after training and serving in any two precisions.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis import closed_forms
from analysis import surface as surfaces
from analysis.cost import CostModel
from analysis.evidence import Evidence
from analysis.figures.style import INK, Skipped, bits_axis, line, log_axis, marker, panels, ramp, thin
from analysis.fit import Fit
from analysis.law import HIGH_PRECISION_BITS
from analysis.table import PRECISIONS
from analysis.wording import count_label

BITS = np.linspace(3.0, 16.0, 261)


def _planning_fit(evidence: Evidence) -> tuple[Fit, tuple[str, ...]]:
    fit = evidence.fit_of("precision", "unified")
    if fit is None:
        raise Skipped("no fitted law of training precision")
    parts = surfaces.informed_parts(fit)
    if not parts:
        raise Skipped("the table does not inform what low precision of any part costs")
    if unknown := [name for name in ("alpha", "beta") if name in fit.refused]:
        raise Skipped(f"the table does not tell {' and '.join(unknown)} of the law {fit.law}")
    return fit, parts


def _parts_text(parts: tuple[str, ...]) -> str:
    return ", ".join({"w": "weights", "a": "activations", "kv": "KV cache"}[x] for x in parts)


def cost_matched(evidence: Evidence) -> Figure:
    """Loss against precision at equal training cost: N falls as 1/P at one D; and measured runs with all parts tied."""
    fit, parts = _planning_fit(evidence)
    losses = evidence.losses
    d = float(np.exp(np.median(np.log(losses["D"]))))
    bases = np.geomspace(losses["N"].min(), losses["N"].max(), 3)
    figure, axes = panels(1, 2, 3.0)
    left, right = axes[0]
    colors = ramp(len(bases))
    ground = surfaces.build([fit], parts)
    for series, n in enumerate(bases):
        matched = n * HIGH_PRECISION_BITS / BITS
        loss = ground.loss(matched, np.full(BITS.shape, d), BITS)
        excess = loss - loss.min()
        left.plot(BITS, excess, color=colors[series], ls=line(series), label=f"{count_label(n)} at 16 bits")
        left.plot(BITS[np.argmin(loss)], 0, marker(series), color=colors[series], mec=INK)
    left.set_ylim(-0.01 * _visible(ground, bases, d), _visible(ground, bases, d))
    left.set_title(f"law at N·P fixed, D = {count_label(d)}")
    left.set_xlabel(f"precision of {_parts_text(parts)} (bits)")
    left.set_ylabel("loss above the best precision\n(nats per token)")
    bits_axis(left.xaxis, BITS)
    left.legend(title="same cost as")
    tied = np.all([losses[f"P_{x}"] == losses[f"P_{parts[0]}"] for x in parts], axis=0)
    tied &= np.all([losses[c] >= HIGH_PRECISION_BITS for c in PRECISIONS if c.removeprefix("P_") not in parts], axis=0)
    rows = losses.select(tied)
    bits = thin(np.minimum(rows[f"P_{parts[0]}"], HIGH_PRECISION_BITS), 7) if len(rows) else []
    shades = ramp(max(len(bits), 1))
    for series, p in enumerate(bits):
        mine = np.minimum(rows[f"P_{parts[0]}"], HIGH_PRECISION_BITS) == p
        cost = CostModel().training(rows["N"][mine], rows["D"][mine], p)
        right.plot(cost, rows["loss"][mine], marker(series), color=shades[series], mec=INK, label=f"{p:g} bits")
    if len(rows):
        log_axis(right, "x", CostModel().training(rows["N"], rows["D"], np.minimum(rows[f"P_{parts[0]}"], 16.0)))
        right.legend(ncols=1 if len(bits) < 6 else 2)
    right.set_title("measured" if len(bits) > 1 else "measured (no runs with all parts below 16 bits)")
    right.set_xlabel("training cost 6/16·N·D·P (FLOP-equivalents)")
    right.set_ylabel("validation loss (nats per token)")
    return figure


def _visible(ground, bases, d) -> float:
    """Height that shows the basin of every curve and not the cliff where f vanishes."""
    excess = []
    for n in bases:
        loss = ground.loss(n * HIGH_PRECISION_BITS / BITS, np.full(BITS.shape, d), BITS)
        excess.append(loss[-1] - loss.min())
    return 2.0 * max(max(excess), 1e-3)


def fixed_size_precision(evidence: Evidence) -> Figure:
    """P* against D/N for models of a fixed N: the more tokens, the more bits are worth their cost."""
    fit, parts = _planning_fit(evidence)
    capacity = surfaces.capacity(fit, parts)
    losses = evidence.losses
    figure, axes = panels(1, 1, 3.0, width=5.2)
    axis = axes[0, 0]
    sizes = thin(losses["N"], 4)
    grid = np.linspace(2.0, 24.0, 2201)
    for series, (n, color) in enumerate(zip(sizes, ramp(len(sizes)), strict=True)):
        ratio, best = [], []
        for flops in np.geomspace(6 * n * n * 0.5, 6 * n * n * 5e4, 80):
            p = closed_forms.fixed_size_precision(fit.values, capacity, n, flops, grid)
            ratio.append(flops * HIGH_PRECISION_BITS / (6 * n * p) / n)
            best.append(p)
        inside = np.array(best) < grid[-1]
        axis.plot(np.array(ratio)[inside], np.array(best)[inside], color=color, ls=line(series), label=count_label(n))
    ratios = losses["D"] / losses["N"]
    axis.axvspan(ratios.min(), ratios.max(), color="#EEEEEE", zorder=0, label="D/N in the table")
    log_axis(axis, "x", [0.5, 5e4])
    axis.set_xlabel("tokens per parameter D/N")
    axis.set_ylabel("cost-optimal precision P* (bits)")
    axis.set_title(f"{fit.law} law, {_parts_text(parts)} at P")
    axis.legend(title="fixed N")
    return figure


def compute_optimal(evidence: Evidence) -> Figure:
    """N*, D* and P* against the budget C, with P free and with P held at 16 bits."""
    fit, parts = _planning_fit(evidence)
    capacity, cost = surfaces.capacity(fit, parts), CostModel()
    losses = evidence.losses
    spent = cost.training(losses["N"], losses["D"], np.minimum(losses["P_w"], HIGH_PRECISION_BITS))
    flops = np.geomspace(spent.min() / 3, spent.max() * 1e3, 100)
    best = closed_forms.best_precision(capacity, cost.relative)
    figure, axes = panels(1, 3, 2.6)
    for series, (p, label) in enumerate(((best, f"P free: {best:.1f} bits"), (HIGH_PRECISION_BITS, "P = 16"))):
        n, d = closed_forms.compute_optimal(fit.values, flops, float(cost.relative(p)), float(capacity(p)))
        color = ramp(2)[1 - series]
        for axis, values in zip(axes.flat, (n, d, np.full(flops.shape, p)), strict=True):
            axis.plot(flops, values, color=color, ls=line(series), label=label)
    for axis, name in zip(axes.flat, ("parameters N*", "tokens D*", "precision P* (bits)"), strict=True):
        axis.axvspan(spent.min(), spent.max(), color="#EEEEEE", zorder=0)
        log_axis(axis, "x", flops)
        axis.set_xlabel("budget C (FLOP-equivalents)")
        axis.set_title(name)
    for axis in axes.flat[:2]:
        log_axis(axis, "y", axis.lines[0].get_ydata(), counts=True)
    axes[0, 2].set_ylim(0, 17)
    axes[0, 0].legend(loc="upper left")
    return figure


def unified_map(evidence: Evidence) -> Figure:
    """Predicted loss after PTQ and its δ over the precisions of training and serving, at the largest N and D of the
    table.
    """
    fit = evidence.fit_of("unified")
    if fit is None:
        raise Skipped("the unified law was not fitted")
    parts = surfaces.informed_parts(fit)
    if not parts:
        raise Skipped("the table does not inform what low precision of any part costs")
    losses, deltas = evidence.losses, evidence.deltas
    lowest = float(np.min([losses[f"P_{x}"].min() for x in parts]))
    train = np.linspace(max(lowest, 3.0), HIGH_PRECISION_BITS, 120)
    post = np.linspace(deltas["P_post"].min(), deltas["P_post"].max(), 80)
    n = float(losses["N"].max())
    d = float(losses["D"][losses["N"] == n].max())
    ground = surfaces.build([fit], parts)
    delta = np.stack([ground.delta(np.full(train.shape, n), np.full(train.shape, d), train, bits) for bits in post])
    loss = ground.loss(np.full(train.shape, n), np.full(train.shape, d), train)[None, :] + delta
    figure, axes = panels(1, 2, 2.9, sharey=True)
    for axis, values, label in ((axes[0, 0], loss, "loss as served"), (axes[0, 1], delta, "δ of PTQ")):
        low, high = np.quantile(values, [0.0, 0.9])
        levels = np.unique(np.linspace(low, max(high, low + 1e-6), 12))
        filled = axis.contourf(train, post, values, levels=levels, cmap="cividis_r", extend="max")
        figure.colorbar(filled, ax=axis, format="%.2f", label="nats per token")
        axis.set_title(f"{label}, N = {count_label(n)}, D = {count_label(d)}")
        axis.set_xlabel(f"training precision of\n{_parts_text(parts)} (bits)")
        bits_axis(axis.xaxis, train)
        axis.grid(False)
    best = train[np.argmin(loss, axis=1)]
    axes[0, 0].plot(best, post, color="white", lw=2.2)
    axes[0, 0].plot(best, post, color=INK, lw=1.0, ls="--", label="best training precision")
    axes[0, 0].legend(loc="upper right", frameon=True)
    axes[0, 0].set_ylabel("P_post (bits)")
    return figure
