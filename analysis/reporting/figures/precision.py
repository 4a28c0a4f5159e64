"""Figures of training in low precision: loss and effective parameters by part and bits, and iso-loss contours over N
and P.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import laws
from analysis.fitting.fit import Fit
from analysis.laws.law import HIGH_PRECISION_BITS, fraction
from analysis.reporting.evidence import Evidence, informs
from analysis.reporting.figures.bands import band, band_words, say
from analysis.reporting.figures.style import (
    CATEGORIES,
    INK,
    PARTS,
    Skipped,
    bits_axis,
    line,
    log_axis,
    marker,
    panels,
    ramp,
    thin,
)
from analysis.table import PRECISIONS, Table
from analysis.wording import count_label

MOST_SERIES = 6
COST, PAPER = CATEGORIES[1], "white"  # lines of equal cost and their outline
SHOWN_BITS = 16.0  # where runs of 16 bits and more are drawn


def _varied_parts(evidence: Evidence) -> list[str]:
    """The parts trained at two or more precisions below or at 16 bits while the others stayed at 16."""
    return [part for part in PRECISIONS if len(set(evidence.part_alone(part)[part])) > 1]


def _need_varied_parts(evidence: Evidence) -> list[str]:
    parts = _varied_parts(evidence)
    if not parts:
        raise Skipped("no part was trained at two precisions while the others stayed at 16 bits")
    return parts


def _budgets(table: Table, part: str) -> list[tuple[float, float]]:
    """The (N, D) at which this part was trained in most precisions, in rising N and D."""
    bits: dict[tuple[float, float], set] = {}
    for n, d, p in zip(table["N"], table["D"], table[part], strict=True):
        bits.setdefault((n, d), set()).add(p)
    most = max((len(found) for found in bits.values()), default=0)
    return thin((key for key in bits if len(bits[key]) > max(1, most - 2)), MOST_SERIES)


def loss_by_bits(evidence: Evidence) -> Figure:
    """Loss against training precision, one panel per part, one series per N and D, with the fitted law."""
    parts = [part for part in _need_varied_parts(evidence) if _budgets(evidence.part_alone(part), part)]
    if not parts:
        raise Skipped("no N and D at which one part was trained at two precisions while the others stayed at 16 bits")
    fit = evidence.fit_of("precision", "unified")
    figure, axes = panels(1, len(parts), 3.0, sharey=True)
    every = sorted({key for part in parts for key in _budgets(evidence.part_alone(part), part)})
    colors = dict(zip(every, ramp(len(every)), strict=True))
    for axis, part in zip(axes.flat, parts, strict=True):
        table = evidence.part_alone(part)
        for key in _budgets(table, part):
            series = every.index(key)
            mine = (table["N"] == key[0]) & (table["D"] == key[1])
            order = np.argsort(table[part][mine])
            x, y = np.minimum(table[part][mine][order], SHOWN_BITS), table["loss"][mine][order]
            drawn = fit if fit is not None and informs(fit, part) else None
            axis.plot(x, y, marker(series), color=colors[key], mec=INK, ls="" if drawn else ":", lw=0.8)
            if drawn is not None:
                p = np.linspace(x.min(), SHOWN_BITS, 150)
                law = lambda fit, p=p, key=key, part=part: laws.predict(
                    fit.law, fit.values, N=key[0], D=key[1], **{part: p}
                )
                axis.plot(p, law(drawn), color=colors[key], ls=line(series))
                band(axis, p, law, [drawn], colors[key])
        axis.set_title(PARTS[part][0])
        axis.set_xlabel(f"{part}, training precision (bits)")
        bits_axis(axis.xaxis, np.append(table[part], SHOWN_BITS).clip(max=SHOWN_BITS))
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    handles = [
        Line2D(
            [],
            [],
            marker=marker(i),
            mec=INK,
            color=colors[key],
            ls=line(i) if fit else ":",
            label=f"{count_label(key[0])}, {count_label(key[1])}",
        )
        for i, key in enumerate(every)
    ]
    figure.legend(handles=handles, title="N, D", loc="outside right center")
    lines = f"Lines are the fitted law {fit.law}." if fit else "No law of training precision was fitted."
    noise = evidence.loss_noise
    seeds = f"Seeds differ by {noise.words}." if noise is not None else ""
    return say(figure, lines, band_words([fit]), seeds)


def effective_share(fit: Fit, losses: Table) -> np.ndarray:
    """N_eff/N of every row before PTQ: the fitted law solved for N at the measured loss, over that of the 16-bit rows
    of equal N and D, so that the misfit of its Chinchilla part cancels. NaN where there is none or the loss is below
    the floor.
    """
    p = fit.values
    rest = losses["loss"] - p["B"] * losses["D"] ** -p["beta"] - p["E"]
    n_eff = np.where(rest > 0, (np.where(rest > 0, rest, 1.0) / p["A"]) ** (-1.0 / p["alpha"]), np.nan)
    share = np.full(len(losses), np.nan)
    high = losses.high_precision & np.isfinite(n_eff)
    for n, d in set(zip(losses["N"], losses["D"], strict=True)):
        here = (losses["N"] == n) & (losses["D"] == d)
        if (here & high).any():
            share[here] = n_eff[here] / np.exp(np.mean(np.log(n_eff[here & high])))
    return share


def capacity_by_part(evidence: Evidence) -> Figure:
    """N_eff/N against training precision by part: measured runs and the fitted f."""
    parts = _need_varied_parts(evidence)
    solved = evidence.fit_of("precision", "unified", "chinchilla")
    if solved is None:
        raise Skipped("no fitted law with N_eff or N to solve for")
    fit = evidence.fit_of("precision", "unified")
    figure, axes = panels(1, 1, 3.3, width=5.6)
    axis = axes[0, 0]
    lowest, drawn = SHOWN_BITS, False
    for part in parts:
        label, color, mark, style = PARTS[part]
        table = evidence.part_alone(part)
        share = effective_share(solved, table)
        shown = np.isfinite(share) & (table[part] < HIGH_PRECISION_BITS)
        bits, share = table[part][shown], share[shown]
        if len(bits):
            offset = {"P_w": -0.08, "P_a": 0.0, "P_kv": 0.08}[part]  # bits; keeps points of equal P apart
            axis.plot(bits + offset, share, mark, color=color, mec=INK, alpha=0.8)
            lowest, drawn = min(lowest, bits.min()), True
        if fit is not None and informs(fit, part):
            x = np.linspace(table[part].min(), SHOWN_BITS, 200)
            name = part.removeprefix("P_")
            curve = lambda fit, x=x, name=name: fraction(
                x, fit.values[f"gamma_{name}"], fit.values.get(f"n_{name}", 0.0)
            )
            axis.plot(x, curve(fit), color=color, ls=style)
            band(axis, x, curve, [fit], color)
            drawn = True
        fitted = fit is not None and informs(fit, part)
        axis.plot([], [], mark, color=color, mec=INK, ls=style if fitted else "", label=label)
    if not drawn:
        raise Skipped("no measured loss lies above what the fit leaves for infinite N")
    axis.axhline(1, color="#888888", lw=0.8)
    axis.set_ylim(0, None)
    if axis.get_ylim()[1] > 3:
        axis.set_ylim(0, 3)
    axis.set_xlabel("training precision of the part (bits)")
    axis.set_ylabel("effective share of the parameters, N_eff/N")
    bits_axis(axis.xaxis, [lowest, SHOWN_BITS])
    axis.legend(title="part in low precision", loc="lower right")
    lines = "Lines are the fitted f(P) = 1 - exp(-P/γ + n)." if fit else ""
    return say(figure, f"Points solve the fitted law {solved.law} for N_eff.", lines, band_words([fit or solved]))


def _widest_plane(evidence: Evidence) -> tuple[str, float, Table]:
    """The part and D with most cells of N x P measured, and its rows."""
    best = None
    for part in _need_varied_parts(evidence):
        table = evidence.part_alone(part)
        for d in sorted(set(table["D"])):
            here = table.select(table["D"] == d)
            sizes, bits = len(set(here["N"])), len(set(here[part]))
            cells = len(set(zip(here["N"], here[part], strict=True)))
            if sizes >= 2 and bits >= 3 and cells >= 6 and (best is None or cells > best[0]):
                best = (cells, part, d, here)
    if best is None:
        raise Skipped("no D at which two or more N were each trained at three or more precisions of one part")
    return best[1:]


def iso_loss(evidence: Evidence) -> Figure:
    """Iso-loss contours over N and training precision at one D: measured on the left, by the fitted law on the
    right.
    """
    part, d, table = _widest_plane(evidence)
    fit = evidence.fit_of("precision", "unified")
    if fit is None or not informs(fit, part):
        raise Skipped(f"no fitted law of {part}")
    bits = np.minimum(table[part], SHOWN_BITS)
    predicted_n = np.geomspace(table["N"].min(), table["N"].max(), 60)
    predicted_p = np.linspace(bits.min(), SHOWN_BITS, 80)
    surface = laws.predict(fit.law, fit.values, N=predicted_n[None, :], D=d, **{part: predicted_p[:, None]})
    low, high = min(table["loss"].min(), surface.min()), max(table["loss"].max(), surface.max())
    typical = np.quantile(np.concatenate([table["loss"], surface.ravel()]), np.linspace(0.02, 0.98, 10))
    levels = np.unique(np.concatenate([[low - 1e-6], typical[1:-1], [high + 1e-6]]))
    figure, axes = panels(1, 2, 3.1, sharey=True)
    cells: dict[tuple[float, float], list[float]] = {}
    for n, p, loss in zip(table["N"], bits, table["loss"], strict=True):
        cells.setdefault((n, p), []).append(loss)
    grid_n, grid_p = sorted({k[0] for k in cells}), sorted({k[1] for k in cells})
    measured = np.array([[np.mean(cells.get((n, p), [np.nan])) for n in grid_n] for p in grid_p])
    left, right = axes[0]
    full = np.isfinite(measured).all()
    if full:
        left.contourf(grid_n, grid_p, measured, levels=levels, cmap="cividis_r", alpha=0.85)
        lines = left.contour(grid_n, grid_p, measured, levels=levels[1:-1], colors=INK, linewidths=0.7)
        left.clabel(lines, fmt="%.2f", fontsize=6.5)
    filled = right.contourf(predicted_n, predicted_p, surface, levels=levels, cmap="cividis_r", alpha=0.85)
    lines = right.contour(predicted_n, predicted_p, surface, levels=levels[1:-1], colors=INK, linewidths=0.7)
    right.clabel(lines, fmt="%.2f", fontsize=6.5)
    for axis, title in ((left, f"measured, D = {count_label(d)}"), (right, f"{fit.law} law")):
        shown = axis.scatter(
            table["N"],
            bits,
            c=table["loss"],
            cmap="cividis_r",
            vmin=low,
            vmax=high,
            edgecolors=INK,
            s=26,
            zorder=3,
            clip_on=False,
        )
        axis.set_title(title)
        log_axis(axis, "x", table["N"], counts=True)
        axis.set(xlabel="parameters N", xlim=(predicted_n[0], predicted_n[-1]), ylim=(predicted_p[0], SHOWN_BITS))
        axis.grid(False)
        _iso_cost(
            axis,
            predicted_n,
            predicted_p,
            None if axis is left else lambda n, p: laws.predict(fit.law, fit.values, N=n, D=d, **{part: p}),
        )
    left.set_ylabel(f"{part}, training precision of {PARTS[part][0]} (bits)")
    bits_axis(left.yaxis, bits)
    figure.colorbar(shown if not full else filled, ax=axes, label="loss (nats per token)", format="%.2f")
    left_words = (
        "Left from the measured grid, right from the fitted law"
        if full
        else "Left the measured runs, right the fitted law"
    )
    return say(figure, f"{left_words} ({fit.law}), which has no interval here; points carry the measured loss in both.")


def _iso_cost(axis, n, p, predict) -> None:
    """Lines of equal N·P through the panel; with the law, a star where its loss is least along each, if inside."""
    for at_16 in np.geomspace(n[0] * p[0] / SHOWN_BITS, n[-1], 6)[1:-1]:
        size = at_16 * SHOWN_BITS / p
        axis.plot(size, p, color=PAPER, lw=1.6)
        axis.plot(size, p, color=COST, ls="--", lw=1.0)
        if predict is None:
            continue
        best = int(np.argmin(predict(size, p)))
        if n[0] < size[best] < n[-1] and 0 < best < len(p) - 1:
            axis.plot(size[best], p[best], "*", color=COST, mec=INK, ms=9, zorder=4)
