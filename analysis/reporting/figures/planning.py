"""Figures of optima by the fitted laws: precisions at equal cost, the best precision of a fixed model,
compute-optimal N, D and P, and the loss after training and serving in any two precisions.
"""

import numpy as np
from matplotlib.figure import Figure

from analysis.fitting.fit import Fit
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.planning import closed_forms
from analysis.planning.cost import CostModel
from analysis.planning.surface import Surface, build
from analysis.reporting.evidence import Evidence
from analysis.reporting.figures.bands import band, band_words, beyond, say
from analysis.reporting.figures.style import (
    CATEGORIES,
    INK,
    Skipped,
    bits_axis,
    line,
    log_axis,
    marker,
    panels,
    ramp,
    thin,
)
from analysis.reporting.verdicts.equal_cost import matches
from analysis.reporting.verdicts.optimum_by_law import Optimum, optima
from analysis.table import PRECISIONS
from analysis.wording import count_label, parts_text

BITS = np.linspace(3.0, 16.0, 261)
COARSE = np.linspace(2.0, 24.0, 221)  # of P* for each bootstrap sample


def _surface(fit: Fit) -> Surface:
    surface = build([fit])
    if not surface.parts:
        raise Skipped("the table does not identify the cost of low precision in any part")
    return surface


def _planning_surface(evidence: Evidence) -> Surface:
    fit = evidence.fit_of("precision", "unified")
    if fit is None:
        raise Skipped("no fitted law of training precision")
    surface = _surface(fit)
    if unknown := [name for name in ("alpha", "beta") if name in fit.unidentified]:
        raise Skipped(f"the table does not identify {' and '.join(unknown)} of the law {fit.law}")
    return surface


def cost_matched(evidence: Evidence) -> Figure:
    """Loss against precision at equal training cost: N falls as 1/P at one D; and measured runs with all parts tied."""
    surface = _planning_surface(evidence)
    losses, parts = evidence.losses, surface.parts
    d = float(np.exp(np.median(np.log(losses["D"]))))
    bases = np.geomspace(losses["N"].min(), losses["N"].max(), 3)
    figure, axes = panels(1, 2, 3.0)
    left, right = axes[0]
    colors = ramp(len(bases))
    for series, n in enumerate(bases):
        excess = lambda surface, n=n: _above_best(surface.loss(n * HIGH_PRECISION_BITS / BITS, d, BITS))
        values = excess(surface)
        left.plot(BITS, values, color=colors[series], ls=line(series), label=f"{count_label(n)} at 16 bits")
        left.plot(BITS[np.argmin(values)], 0, marker(series), color=colors[series], mec=INK)
        band(left, BITS, excess, [surface], colors[series])
    height = _visible(surface, bases, d)
    left.set_ylim(-0.01 * height, height)
    left.set_title(f"law at N·P fixed, D = {count_label(d)}")
    left.set_xlabel(f"precision of {parts_text(parts)} (bits)")
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
    form = surface.law.by_form
    words = f"By the form of {surface.name} {form}." if form else ""
    return say(figure, words, band_words([surface.of_loss.fit]))


def _above_best(loss: np.ndarray) -> np.ndarray:
    return loss - loss.min()


def _visible(surface: Surface, bases: np.ndarray, d: float) -> float:
    """Height that shows the basin of every curve and not the cliff where f vanishes."""
    excess = []
    for n in bases:
        loss = surface.loss(n * HIGH_PRECISION_BITS / BITS, np.full(BITS.shape, d), BITS)
        excess.append(loss[-1] - loss.min())
    return 2.0 * max(max(excess), 1e-3)


def fixed_size_precision(evidence: Evidence) -> Figure:
    """P* against D/N for models of a fixed N: it rises with the tokens."""
    surface = _planning_surface(evidence)
    losses, law = evidence.losses, surface.name
    figure, axes = panels(1, 1, 3.0, width=5.2)
    axis = axes[0, 0]
    sizes = thin(losses["N"], 4)
    grid = np.linspace(2.0, 24.0, 441)
    ratios = losses["D"] / losses["N"]
    wanted = np.geomspace(max(ratios.min() / 10, 0.1), ratios.max() * 10, 40)
    for series, (n, color) in enumerate(zip(sizes, ramp(len(sizes)), strict=True)):
        best = lambda surface, n=n: _best_at_ratios(surface, n, wanted, grid)
        values = best(surface)
        axis.plot(wanted, values, color=color, ls=line(series), label=count_label(n))
        band(axis, wanted, best, [surface], color)
    log_axis(axis, "x", wanted)
    axis.set_xlim(wanted[0], wanted[-1])
    axis.set_ylim(grid[0], None)
    beyond(axis, ratios.min(), ratios.max())
    axis.set_xlabel("tokens per parameter D/N")
    axis.set_ylabel("cost-optimal precision P* (bits)")
    axis.set_title(f"{law} law, {parts_text(surface.parts)} at P")
    axis.legend(title="fixed N")
    lowest = min(float(losses[f"P_{x}"].min()) for x in surface.parts)
    form = f"That P* rises with D/N follows from the form of {law}, not from runs of one N and cost."
    shade = f"Shaded: beyond the D/N of the table; precisions were measured from {lowest:g} bits on."
    return say(figure, form, shade, band_words([surface.of_loss.fit]))


def _best_at_ratios(surface: Surface, n: float, ratios: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """P* of a model of N parameters at each D/N: where the gain by bits balances that by the tokens they cost.

    Along `C = 6/16 N D P` at fixed N the optimum has `dL/dlog P = dL/dlog D`; NaN where it lies beyond `grid`.
    """
    values, share = surface.of_loss.values, surface.share(grid)
    alpha, beta = values["alpha"], values["beta"]
    gain = alpha * values["A"] * (share * n) ** -alpha * np.gradient(np.log(share), np.log(grid))
    falling = slice(int(np.argmax(gain)), None)  # below, f is at its floor
    tokens = beta * values["B"] * (ratios * n) ** -beta
    gain = np.maximum(gain[falling], 1e-300)
    return np.interp(-np.log(tokens), -np.log(gain), grid[falling], left=np.nan, right=np.nan)


def compute_optimal(evidence: Evidence) -> Figure:
    """N*, D* and P* against the budget C, with P free and with P held at 16 bits; P* by every law near the best."""
    surface = _planning_surface(evidence)
    cost, losses = CostModel(), evidence.losses
    spent = cost.training(losses["N"], losses["D"], np.mean([np.minimum(losses[c], 16.0) for c in PRECISIONS], axis=0))
    flops = np.geomspace(spent.min() / 3, spent.max() * 100, 60)
    figure, axes = panels(1, 3, 2.8)
    colors = ramp(2)
    for series, label in enumerate(("P free", "P = 16")):
        for which, axis in enumerate(axes.flat[:2]):
            curve = lambda surface, which=which, free=series == 0: _optimal(surface, flops, free)[which]
            axis.plot(flops, curve(surface), color=colors[1 - series], ls=line(series), label=label)
            band(axis, flops, curve, [surface], colors[1 - series])
    for axis, column, name in zip(axes.flat, ("N", "D"), ("parameters N*", "tokens D*"), strict=False):
        log_axis(axis, "y", axis.lines[0].get_ydata(), counts=True)
        axis.set_title(f"{name}, {surface.name}")
        _frame(axis, flops, spent)
        beyond(axis, losses[column].min(), losses[column].max(), "y")
    axes[0, 0].legend(loc="upper left")
    last = axes[0, 2]
    asked = _best_by_law(last, evidence, spent)
    last.set_title("precision P* (bits)")
    last.set_ylim(2, 17)
    _frame(last, flops, spent)
    if asked:
        last.legend(loc="upper left")
    forced = [optimum.law for optimum in asked if optimum.constant]
    form = f"One P* at every budget follows from the form of {', '.join(forced)}." if forced else ""
    return say(
        figure,
        form,
        "Shaded: beyond the budgets, N or D of the table.",
        band_words([evidence.fits[law] for law in dict.fromkeys((surface.name, *(optimum.law for optimum in asked)))]),
    )


def _optimal(surface: Surface, flops: np.ndarray, free: bool):
    """(N*, D*) by a fit, at its own best precision or at 16 bits."""
    cost = CostModel()
    p = closed_forms.best_precision(surface.share, cost.relative, COARSE) if free else HIGH_PRECISION_BITS
    return closed_forms.compute_optimal(surface.of_loss.values, flops, float(cost.relative(p)), float(surface.share(p)))


def _frame(axis, flops: np.ndarray, spent: np.ndarray) -> None:
    log_axis(axis, "x", flops)
    axis.set_xlim(flops[0], flops[-1])
    axis.set_xlabel("budget C (FLOP-equivalents)")
    beyond(axis, spent.min(), spent.max())


def _best_by_law(axis, evidence: Evidence, spent: np.ndarray) -> list[Optimum]:
    """P* with its interval at budgets within the table's, by every law of the finding F3, and the best of runs of equal
    cost; returns what the laws said.
    """
    found = optima(evidence)
    for series, optimum in enumerate(found):
        color, bits = CATEGORIES[series % len(CATEGORIES)], np.array(optimum.bits)
        axis.plot(
            optimum.budgets, bits, color=color, marker=marker(series), mec=INK, ls=line(series), label=optimum.law
        )
        spans = [optimum.interval(i) for i in range(len(bits))]
        if all(spans):
            axis.fill_between(optimum.budgets, *zip(*spans, strict=True), color=color, alpha=0.16, lw=0)
    for match in matches(evidence)[1]:
        axis.plot([match.cost] * 2, [min(match.good), max(match.good)], color=INK, lw=1)
        axis.plot(match.cost, match.best, "*", color="white", mec=INK, ms=8, label="_")
    return found


def unified_map(evidence: Evidence) -> Figure:
    """Predicted loss after PTQ and its δ over the precisions of training and serving, at the largest N and D of the
    table.
    """
    fit = evidence.fit_of("unified")
    if fit is None:
        raise Skipped("the unified law was not fitted")
    surface = _surface(fit)
    parts = surface.parts
    losses, deltas = evidence.losses, evidence.deltas
    lowest = float(np.min([losses[f"P_{x}"].min() for x in parts]))
    train = np.linspace(max(lowest, 3.0), HIGH_PRECISION_BITS, 120)
    post = np.linspace(deltas["P_post"].min(), deltas["P_post"].max(), 80)
    n = float(losses["N"].max())
    d = float(losses["D"][losses["N"] == n].max())
    delta = np.stack([surface.delta(np.full(train.shape, n), np.full(train.shape, d), train, bits) for bits in post])
    loss = surface.loss(np.full(train.shape, n), np.full(train.shape, d), train)[None, :] + delta
    figure, axes = panels(1, 2, 2.9, sharey=True)
    for axis, values, label in ((axes[0, 0], loss, "loss as served"), (axes[0, 1], delta, "δ of PTQ")):
        low, high = np.quantile(values, [0.0, 0.9])
        levels = np.unique(np.linspace(low, max(high, low + 1e-6), 12))
        filled = axis.contourf(train, post, values, levels=levels, cmap="cividis_r", extend="max")
        figure.colorbar(filled, ax=axis, format="%.2f", label="nats per token")
        axis.set_title(f"{label}, N = {count_label(n)}, D = {count_label(d)}")
        axis.set_xlabel(f"training precision of\n{parts_text(parts)} (bits)")
        bits_axis(axis.xaxis, train)
        axis.grid(False)
    best = train[np.argmin(loss, axis=1)]
    axes[0, 0].plot(best, post, color="white", lw=2.2)
    axes[0, 0].plot(best, post, color=INK, lw=1.0, ls="--", label="best training precision")
    axes[0, 0].legend(loc="upper right", frameon=True)
    axes[0, 0].set_ylabel("P_post (bits)")
    measured = {name: sorted(set(deltas[name])) for name in ("P_w", "P_post")}
    given = "; ".join(f"{name} {', '.join(f'{b:g}' for b in bits)}" for name, bits in measured.items())
    return say(figure, f"Between the measured bits ({given}) the map interpolates. It has no interval.")
