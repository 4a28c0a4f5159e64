"""Figures of how δ grows with data: by D/N, where the quantized model turns worse, and under other learning rates."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import laws
from analysis.fitting.fit import Fit
from analysis.planning import closed_forms
from analysis.reporting.evidence import Evidence
from analysis.reporting.figures.bands import at_the_edge, band, band_words, beyond, edge_words, say
from analysis.reporting.figures.style import (
    CATEGORIES,
    INK,
    Skipped,
    grid_of,
    line,
    log_axis,
    marker,
    panels,
    ramp,
    thin,
)
from analysis.reporting.verdicts.schedule import matched
from analysis.reporting.verdicts.series import TURNS, all_series
from analysis.table import Table
from analysis.wording import count_label

MOST_PANELS = 6  # sizes shown side by side; more are thinned evenly
MOST_SERIES = 6
STAR = "#D55E00"
CONSTANT = "constant"


def _sizes(table: Table) -> list[float]:
    return thin(table["N"], MOST_PANELS)


def _need_deltas(evidence: Evidence) -> Table:
    deltas = evidence.high_precision_deltas
    if not len(deltas):
        raise Skipped("no row after PTQ (P_post filled) of a model trained in 16 bits with its loss before PTQ")
    return deltas


def degradation(evidence: Evidence) -> Figure:
    """δ against D/N, one panel per N, one series per P_post, with the fitted law of PTQ and the noise between seeds."""
    deltas = _need_deltas(evidence)
    positive = deltas["delta"] > 0
    if not positive.any():
        raise Skipped("no δ above zero")
    fit = evidence.fit_of("ptq")
    sizes, bits = _sizes(deltas), thin(deltas["P_post"], MOST_SERIES)
    rows, columns = grid_of(len(sizes), 3)
    figure, axes = panels(rows, columns, 2.7, sharey=True)
    colors = ramp(len(bits))
    ratio, edge, hidden = deltas["D"] / deltas["N"], deltas["delta"][positive].min() / 2, 0
    noises = [evidence.noise_after_ptq(evidence.main_method, float(p)) for p in bits]
    for index, axis in enumerate(axes.flat):
        if index >= len(sizes):
            axis.set_visible(False)
            continue
        n = sizes[index]
        here = deltas["N"] == n
        axis.set_title(f"N = {count_label(n)}")
        x = np.geomspace(ratio[here].min(), ratio[here].max(), 60)
        for series, (p_post, noise) in enumerate(zip(bits, noises, strict=True)):
            mine = here & (deltas["P_post"] == p_post)
            shown, color = mine & positive, colors[series]
            axis.plot(ratio[shown], deltas["delta"][shown], marker(series), color=color, mec=INK)
            hidden += at_the_edge(axis, ratio[mine & ~positive], edge, marker(series), color)
            if noise is not None:
                axis.plot(x, noise.t * noise.at(N=n, D=x * n), color=color, ls=(0, (1, 2)), lw=0.8, zorder=0)
            if fit is not None:
                curve = lambda fit, p_post=p_post, x=x, n=n: laws.predict(
                    fit.law, fit.values, N=n, D=x * n, P_post=p_post
                )
                axis.plot(x, curve(fit), color=color, ls=line(series))
                band(axis, x, curve, [fit], color)
        log_axis(axis, "x", ratio)
        log_axis(axis, "y", deltas["delta"][positive])
        axis.set_ylim(edge, None)
        axis.set_xlabel("tokens per parameter D/N")
    for axis in axes[:, 0]:
        axis.set_ylabel("δ, loss added by PTQ\n(nats per token)")
    handles = [
        Line2D([], [], marker=marker(i), mec=INK, color=colors[i], ls=line(i) if fit else "", label=f"{p:g} bits")
        for i, p in enumerate(bits)
    ]
    if any(noise is not None for noise in noises):
        handles.append(Line2D([], [], color=INK, ls=(0, (1, 2)), lw=0.8, label="noise, 95 %"))
    figure.legend(handles=handles, title="P_post", loc="outside right center")
    law = "" if fit is None else "Lines are the fitted law δ = C_T D^γ_D / N^γ_N · exp(-P_post/γ_post)."
    dotted = "Dotted: what a δ must exceed to be distinguished from the noise between seeds." if any(noises) else ""
    return say(figure, law, band_words([fit]), dotted, edge_words(hidden))


def after_ptq(evidence: Evidence) -> Figure:
    """Loss against D before and after PTQ, one panel per N; a fitted curve turns up at D_crit, which is marked."""
    deltas = _need_deltas(evidence)
    if len(set(deltas["D"])) < 2:
        raise Skipped("only one D among the models that were quantized")
    ptq, before = evidence.fit_of("ptq"), evidence.fit_of("chinchilla", "precision", "unified")
    both = (before, ptq) if before is not None and ptq is not None else None
    sizes, bits = _sizes(deltas), thin(deltas["P_post"], MOST_SERIES - 1)
    rows, columns = grid_of(len(sizes), 3)
    figure, axes = panels(rows, columns, 2.7)
    colors = ramp(len(bits))
    turned = [s for s in all_series(evidence) if s.method == evidence.main_method and s.served == TURNS]
    marked = False
    for index, axis in enumerate(axes.flat):
        if index >= len(sizes):
            axis.set_visible(False)
            continue
        n = sizes[index]
        here = deltas["N"] == n
        d, x = deltas["D"][here], np.geomspace(deltas["D"][here].min() * 0.8, deltas["D"][here].max() * 1.6, 80)
        base, at = np.unique(d, return_index=True)
        axis.plot(base, deltas["loss_before"][here][at], "o", color="white", mec=INK, zorder=3)
        if before is not None:
            unquantized = lambda before, n=n, x=x: laws.predict(before.law, before.values, N=n, D=x)
            axis.plot(x, unquantized(before), color=INK, lw=1.0)
            band(axis, x, unquantized, [before], INK)
        for series, p_post in enumerate(bits):
            mine = here & (deltas["P_post"] == p_post)
            axis.plot(deltas["D"][mine], deltas["loss"][mine], marker(series + 1), color=colors[series], mec=INK)
            if both is not None:
                marked |= _served(axis, x, both, n, p_post, colors[series], line(series + 1))
        for turn in (s for s in turned if s.n == n and s.p_post in bits):
            axis.plot(turn.tokens[turn.lowest], turn.losses[turn.lowest], "*", color=STAR, mec=INK, ms=9, zorder=5)
        axis.set_title(f"N = {count_label(n)}")
        log_axis(axis, "x", d, counts=True)
        axis.set_xlim(x[0], x[-1])
        beyond(axis, d.min(), d.max())
        axis.set_xlabel("tokens D")
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss\n(nats per token)")
    handles = [
        Line2D([], [], marker="o", color=INK, mfc="white", mec=INK, ls="-" if before else "", label="before PTQ")
    ]
    handles += [
        Line2D(
            [], [], marker=marker(i + 1), mec=INK, color=colors[i], ls=line(i + 1) if both else "", label=f"{p:g} bits"
        )
        for i, p in enumerate(bits)
    ]
    if marked:
        handles.append(Line2D([], [], marker="|", color=INK, ls="", ms=10, mew=2.0, label="D_crit by fits"))
    if turned:
        handles.append(Line2D([], [], ls="", label="measured turn", marker="*", color=STAR, mec=INK, ms=9))
    figure.legend(handles=handles, title="P_post", loc="outside right center")
    where = ", ".join(f"{s.p_post:g} bits at N = {count_label(s.n)}" for s in turned)
    seen = (
        f"Stars: the measured loss falls to here and rises again, both beyond the noise between seeds ({where})."
        if turned
        else "No measured loss falls and rises again by more than the noise between seeds."
    )
    by_fit = "Where a curve turns up is D_crit by the fits. " if both else ""
    return say(figure, f"{by_fit}{seen}", "Shaded: beyond the D measured at that N.", band_words(both or [before]))


def _served(axis, x: np.ndarray, fits: tuple[Fit, Fit], n: float, p_post: float, color, style) -> bool:
    """Draws the fitted loss as served, by the fits before PTQ and of PTQ; whether D_crit lies on it, and is marked."""
    curve = lambda before, ptq: (
        laws.predict(before.law, before.values, N=n, D=x) + laws.predict("ptq", ptq.values, N=n, D=x, P_post=p_post)
    )
    loss = curve(*fits)
    axis.plot(x, loss, color=color, ls=style)
    band(axis, x, curve, fits, color)
    turn = float(closed_forms.critical_tokens({**fits[0].values, **fits[1].values}, n, p_post))
    if not x[0] <= turn <= x[-1]:
        return False
    axis.plot(turn, float(np.interp(np.log(turn), np.log(x), loss)), "|", color=color, ms=13, mew=2.0)
    return True


def schedules(evidence: Evidence) -> Figure:
    """δ against D/N at matched N, seed and bits under a decaying and a constant learning rate."""
    found = [m for m in matched(evidence) if m.method == evidence.main_method]
    if not found:
        raise Skipped("no constant schedule beside another at equal N, D, seed and bits with rows after PTQ")
    names = [*dict.fromkeys(m.decaying for m in found), CONSTANT]
    bits = thin([m.p_post for m in found if (np.concatenate([m.decayed, m.constant]) > 0).any()], 4)
    figure, axes = panels(1, len(bits), 2.7)
    hidden = 0
    for axis, p_post in zip(axes.flat, bits, strict=True):
        mine = [m for m in found if m.p_post == p_post]
        values = np.concatenate([np.concatenate([m.decayed, m.constant]) for m in mine])
        edge = values[values > 0].min() / 1.6
        drawn: set[tuple] = set()
        for m in mine:
            for name, deltas in ((m.decaying, m.decayed), (CONSTANT, m.constant)):
                if (name, m.unit) in drawn:
                    continue
                drawn.add((name, m.unit))
                series, above = names.index(name), deltas > 0
                look = {"color": CATEGORIES[series], "ls": line(series), "lw": 0.9, "marker": marker(series)}
                axis.plot(m.tokens[above] / m.n, deltas[above], mec=INK, **look)
                hidden += at_the_edge(axis, m.tokens[~above] / m.n, edge, marker(series), CATEGORIES[series])
        log_axis(axis, "x", np.concatenate([m.tokens / m.n for m in mine]))
        log_axis(axis, "y", values)
        axis.set_ylim(edge, None)
        axis.set_title(f"P_post = {p_post:g}")
        axis.set_xlabel("D/N")
    axes[0, 0].set_ylabel("δ (nats per token)")
    handles = [
        Line2D([], [], color=CATEGORIES[i], marker=marker(i), mec=INK, ls=line(i), lw=0.9, label=name)
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, title="schedule", loc="outside right center")
    units = sorted({m.unit for m in found})
    return say(figure, f"Each line is one N and seed, {len(units)} in all.", edge_words(hidden))
