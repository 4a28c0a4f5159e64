"""Figures of post-training quantization: how δ grows with data, where the quantized model turns worse, which method
loses least, and what training in low precision changes.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import laws
from analysis.laws.law import HIGH_PRECISION_BITS
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
    words,
)
from analysis.reporting.verdicts.schedule import matched
from analysis.reporting.verdicts.series import TURNS, all_series
from analysis.table import Table
from analysis.wording import count_label

MOST_PANELS = 6  # sizes shown side by side; more are thinned evenly
MOST_SERIES = 6
STAR: dict[str, Any] = {"color": "#D55E00", "mec": INK, "ms": 9, "zorder": 5}
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
    dotted = "Dotted: what a δ must exceed to be distinguished from the noise between seeds."
    return say(figure, law, band_words([fit]), dotted if any(noises) else "", edge_words(hidden))


def after_ptq(evidence: Evidence) -> Figure:
    """Loss against D before and after PTQ, one panel per N; a fitted curve turns up at D_crit, which is marked."""
    deltas = _need_deltas(evidence)
    if len(set(deltas["D"])) < 2:
        raise Skipped("only one D among the models that were quantized")
    ptq, before = evidence.fit_of("ptq"), evidence.fit_of("chinchilla", "precision", "unified")
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
            if before is not None and ptq is not None:
                curve = lambda before, ptq, n=n, x=x, p=p_post, base=unquantized: (
                    base(before) + laws.predict("ptq", ptq.values, N=n, D=x, P_post=p)
                )
                served = curve(before, ptq)
                axis.plot(x, served, color=colors[series], ls=line(series + 1))
                band(axis, x, curve, [before, ptq], colors[series])
                turn = float(closed_forms.critical_tokens({**before.values, **ptq.values}, n, p_post))
                if x[0] <= turn <= x[-1]:
                    marked = True
                    at_turn = float(np.interp(np.log(turn), np.log(x), served))
                    axis.plot(turn, at_turn, "|", color=colors[series], ms=13, mew=2.0)
        for one in (s for s in turned if s.n == n and s.p_post in bits):
            axis.plot(one.tokens[one.lowest], one.losses[one.lowest], "*", **STAR)
        axis.set_title(f"N = {count_label(n)}")
        log_axis(axis, "x", d, counts=True)
        axis.set_xlim(x[0], x[-1])
        beyond(axis, d.min(), d.max())
        axis.set_xlabel("tokens D")
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss\n(nats per token)")
    both = ptq is not None and before is not None
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
        handles.append(Line2D([], [], ls="", label="measured turn", marker="*", **STAR))
    figure.legend(handles=handles, title="P_post", loc="outside right center")
    where = ", ".join(f"{s.p_post:g} bits at N = {count_label(s.n)}" for s in turned)
    seen = (
        f"Stars: the measured loss falls to here and rises again, both beyond the noise between seeds ({where})."
        if turned
        else "No measured loss falls and rises again by more than the noise between seeds."
    )
    fits = [before, ptq] if both else [before]
    by_fit = "Where a curve turns up is D_crit by the fits. " if both else ""
    return say(figure, f"{by_fit}{seen}", "Shaded: beyond the D measured at that N.", band_words(fits))


def methods(evidence: Evidence) -> Figure:
    """δ of one PTQ method of weights against that of another on the same model and bits."""
    table = (evidence.table if evidence.whole is None else evidence.whole).one_schedule().ptq_of_weights()
    deltas = table.deltas()
    if deltas.methods is None or not len(deltas):
        raise Skipped("no column that names the PTQ method, or no row after PTQ of the weights alone")
    names = sorted(set(deltas.methods) - {""})
    if len(names) < 2:
        raise Skipped(f"only one PTQ method of weights in the table ({', '.join(names) or 'none named'})")
    by_key: dict[tuple, dict[str, float]] = {}
    columns = zip(deltas.models, deltas["D"], deltas["P_post"], deltas.methods, deltas["delta"], strict=True)
    for model, d, p_post, method, delta in columns:
        by_key.setdefault((model, d, p_post), {})[method] = delta
    reference = "rtn" if "rtn" in names else names[0]
    others = [name for name in names if name != reference]
    figure, axes = panels(1, len(others), 3.2, width=3.4 * len(others) + 0.8)
    bits = thin(deltas["P_post"], MOST_SERIES)
    colors = ramp(len(bits))
    drawn, hidden = False, 0
    for axis, other in zip(axes.flat, others, strict=True):
        measured = [(key[2], m[reference], m[other]) for key, m in by_key.items() if reference in m and other in m]
        pairs = np.array(measured).reshape(-1, 3)
        better, every = np.mean(pairs[:, 2] < pairs[:, 1]) if len(pairs) else 0.0, len(pairs)
        pairs = pairs[(pairs[:, 1:] > 0).all(axis=1)]
        hidden += every - len(pairs)
        if not len(pairs):
            continue
        drawn = True
        for series, p_post in enumerate(bits):
            mine = pairs[pairs[:, 0] == p_post]
            axis.plot(mine[:, 1], mine[:, 2], marker(series), color=colors[series], mec=INK, label=f"{p_post:g} bits")
        span = [pairs[:, 1:].min() * 0.8, pairs[:, 1:].max() * 1.25]
        axis.plot(span, span, color="#888888", lw=1)
        axis.set_title(f"{words(other)} is below {words(reference)} in {better:.0%} of {every}")
        log_axis(axis, "x", pairs[:, 1:])
        log_axis(axis, "y", pairs[:, 1:])
        axis.set_xlabel(f"δ by {words(reference)} (nats per token)")
        axis.set_ylabel(f"δ by {words(other)} (nats per token)")
    if not drawn:
        raise Skipped("no run was quantized to the same bits by two methods")
    axes[0, -1].legend(title="P_post", loc="lower right")
    left = f"{hidden} pairs with a δ of 0 or less are counted in the titles, but have no place here." if hidden else ""
    return say(figure, left)


def training_precision(evidence: Evidence) -> Figure:
    """δ against the precision the weights were trained in: what training in low precision saves under PTQ."""
    deltas = evidence.deltas
    low = deltas["P_w"] < HIGH_PRECISION_BITS
    if not low.any():
        raise Skipped("no row after PTQ of a model whose weights were trained below 16 bits")
    keys = list(zip(deltas["N"], deltas["D"], deltas["P_a"], deltas["P_kv"], strict=True))
    groups: dict[tuple, set] = {}
    for key, p_w in zip(keys, deltas["P_w"], strict=True):
        groups.setdefault(key, set()).add(p_w)
    chosen = sorted(groups, key=lambda k: (-len(groups[k]), -min(k[2:]), -k[0], -k[1]))
    chosen = [k for k in chosen if len(groups[k]) > 1][:3]
    if not chosen:
        raise Skipped("no N and D at which the weights were trained in more than one precision and then quantized")
    fit = evidence.fit_of("unified")
    bits = thin(deltas["P_post"], MOST_SERIES)
    colors = ramp(len(bits))
    figure, axes = panels(1, len(chosen), 2.7, sharey=True)
    for axis, key in zip(axes.flat, chosen, strict=True):
        here = np.array([k == key for k in keys])
        for series, p_post in enumerate(bits):
            mine = here & (deltas["P_post"] == p_post)
            order = np.argsort(deltas["P_w"][mine])
            x, y = deltas["P_w"][mine][order], deltas["delta"][mine][order]
            axis.plot(x, y, marker=marker(series), color=colors[series], mec=INK, ls="" if fit else ":", lw=0.8)
            if fit is not None:
                p_w = np.linspace(deltas["P_w"][here].min(), HIGH_PRECISION_BITS, 120)
                at = {"N": key[0], "D": key[1], "P_w": p_w, "P_a": key[2], "P_kv": key[3]}
                curve = lambda fit, at=at, p=p_post: (
                    laws.predict("unified", fit.values, P_post=p, **at) - laws.predict("unified", fit.values, **at)
                )
                axis.plot(p_w, curve(fit), color=colors[series], ls=line(series))
                band(axis, p_w, curve, [fit], colors[series])
        axis.axhline(0, color="#888888", lw=0.8)
        axis.set_title(f"N = {count_label(key[0])}, D = {count_label(key[1])}")
        axis.set_xlabel("P_w in training (bits)")
    spread = np.quantile(np.abs(deltas["delta"]), 0.5)
    if np.max(deltas["delta"]) > 30 * max(spread, 1e-12):
        axes[0, 0].set_yscale("symlog", linthresh=max(spread, 1e-4))
        axes[0, 0].set_ylim(min(0.0, 1.1 * np.min(deltas["delta"])), None)
    axes[0, 0].set_ylabel("δ, loss added by PTQ\n(nats per token)")
    handles = [
        Line2D([], [], marker=marker(i), mec=INK, color=colors[i], ls=line(i) if fit else ":", label=f"{p:g} bits")
        for i, p in enumerate(bits)
    ]
    figure.legend(handles=handles, title="P_post", loc="outside right center")
    law = "" if fit is None else "Lines are law 4, which makes δ zero from P_post = P_w on whatever its constants."
    noises = [evidence.noise_after_ptq(evidence.main_method, float(p)) for p in bits]
    limits = [f"{noise.t * noise.sd:.2g} at {p:g} bits" for p, noise in zip(bits, noises, strict=True) if noise]
    noise = f"A δ below these is noise between seeds: {', '.join(limits)}." if limits else ""
    return say(figure, law, band_words([fit]) if fit else "", noise)


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
