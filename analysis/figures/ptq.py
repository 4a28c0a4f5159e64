"""Figures of post-training quantization: how δ grows with data, where the quantized model turns worse, which method
loses least, and what training in low precision changes.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import closed_forms, laws
from analysis.evidence import Evidence
from analysis.figures.style import (
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
from analysis.law import HIGH_PRECISION_BITS
from analysis.table import Table
from analysis.wording import count_label

MOST_PANELS = 6  # sizes shown side by side; more are thinned evenly
MOST_SERIES = 6


def _sizes(table: Table) -> list[float]:
    return thin(table["N"], MOST_PANELS)


def _need_deltas(evidence: Evidence) -> Table:
    deltas = evidence.high_precision_deltas
    if not len(deltas):
        raise Skipped("no row after PTQ (P_post filled) of a model trained in 16 bits with its loss before PTQ")
    return deltas


def degradation(evidence: Evidence) -> Figure:
    """δ against D/N, one panel per N, one series per P_post, with the fitted law of PTQ."""
    deltas = _need_deltas(evidence)
    drawn = deltas.select(deltas["delta"] > 0)
    if not len(drawn):
        raise Skipped("no δ above zero")
    fit = evidence.fit_of("ptq")
    sizes, bits = _sizes(drawn), thin(drawn["P_post"], MOST_SERIES)
    rows, columns = grid_of(len(sizes), 3)
    figure, axes = panels(rows, columns, 2.7, sharey=True)
    colors = ramp(len(bits))
    ratio = drawn["D"] / drawn["N"]
    for index, axis in enumerate(axes.flat):
        if index >= len(sizes):
            axis.set_visible(False)
            continue
        n = sizes[index]
        here = drawn["N"] == n
        axis.set_title(f"N = {count_label(n)}")
        for series, p_post in enumerate(bits):
            mine = here & (drawn["P_post"] == p_post)
            axis.plot(ratio[mine], drawn["delta"][mine], marker(series), color=colors[series], mec=INK)
            if fit is not None:
                x = np.geomspace(ratio[here].min() * 0.9, ratio[here].max() * 1.1, 60)
                predicted = laws.predict("ptq", fit.values, N=n, D=x * n, P_post=p_post)
                axis.plot(x, predicted, color=colors[series], ls=line(series))
        log_axis(axis, "x", ratio)
        log_axis(axis, "y", drawn["delta"])
        axis.set_xlabel("tokens per parameter D/N")
    for axis in axes[:, 0]:
        axis.set_ylabel("δ, loss added by PTQ\n(nats per token)")
    handles = [
        Line2D([], [], marker=marker(i), mec=INK, color=colors[i], ls=line(i) if fit else "", label=f"{p:g} bits")
        for i, p in enumerate(bits)
    ]
    figure.legend(handles=handles, title="P_post", loc="outside right center")
    return figure


def after_ptq(evidence: Evidence) -> Figure:
    """Loss against D before and after PTQ, one panel per N; a fitted curve turns up at D_crit, which is marked."""
    deltas = _need_deltas(evidence)
    if len(set(deltas["D"])) < 2:
        raise Skipped("only one D among the models that were quantized")
    ptq, before = evidence.fit_of("ptq"), evidence.fit_of("chinchilla", "precision", "unified")
    both = ptq is not None and before is not None
    sizes, bits = _sizes(deltas), thin(deltas["P_post"], MOST_SERIES - 1)
    rows, columns = grid_of(len(sizes), 3)
    figure, axes = panels(rows, columns, 2.7)
    colors = ramp(len(bits))
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
            unquantized = laws.predict(before.law, before.values, N=n, D=x)
            axis.plot(x, unquantized, color=INK, lw=1.0)
        for series, p_post in enumerate(bits):
            mine = here & (deltas["P_post"] == p_post)
            axis.plot(deltas["D"][mine], deltas["loss"][mine], marker(series + 1), color=colors[series], mec=INK)
            if both:
                served = unquantized + laws.predict("ptq", ptq.values, N=n, D=x, P_post=p_post)
                axis.plot(x, served, color=colors[series], ls=line(series + 1))
                turn = float(closed_forms.critical_tokens({**before.values, **ptq.values}, n, p_post))
                if x[0] <= turn <= x[-1]:
                    marked = True
                    at_turn = float(np.interp(np.log(turn), np.log(x), served))
                    axis.plot(turn, at_turn, "|", color=colors[series], ms=13, mew=2.0)
        axis.set_title(f"N = {count_label(n)}")
        log_axis(axis, "x", d, counts=True)
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
        handles.append(Line2D([], [], marker="|", color=INK, ls="", ms=10, mew=2.0, label="D_crit"))
    figure.legend(handles=handles, title="P_post", loc="outside right center")
    return figure


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
    drawn = False
    for axis, other in zip(axes.flat, others, strict=True):
        pairs = [(key[2], m[reference], m[other]) for key, m in by_key.items() if reference in m and other in m]
        pairs = np.array([p for p in pairs if p[1] > 0 and p[2] > 0]).reshape(-1, 3)
        if not len(pairs):
            continue
        drawn = True
        for series, p_post in enumerate(bits):
            mine = pairs[pairs[:, 0] == p_post]
            axis.plot(mine[:, 1], mine[:, 2], marker(series), color=colors[series], mec=INK, label=f"{p_post:g} bits")
        span = [pairs[:, 1:].min() * 0.8, pairs[:, 1:].max() * 1.25]
        axis.plot(span, span, color="#888888", lw=1)
        better = np.mean(pairs[:, 2] < pairs[:, 1])
        axis.set_title(f"{words(other)} is below {words(reference)} in {better:.0%} of {len(pairs)}")
        log_axis(axis, "x", pairs[:, 1:])
        log_axis(axis, "y", pairs[:, 1:])
        axis.set_xlabel(f"δ by {words(reference)} (nats per token)")
        axis.set_ylabel(f"δ by {words(other)} (nats per token)")
    if not drawn:
        raise Skipped("no run was quantized to the same bits by two methods")
    axes[0, -1].legend(title="P_post", loc="lower right")
    return figure


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
                served = laws.predict("unified", fit.values, P_post=p_post, **at)
                axis.plot(
                    p_w, served - laws.predict("unified", fit.values, **at), color=colors[series], ls=line(series)
                )
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
    return figure


def schedules(evidence: Evidence) -> Figure:
    """δ against D/N by learning-rate schedule: whether δ grows with data or with the decay of the learning rate."""
    deltas = evidence.deltas_by_schedule
    if "schedule" not in deltas or not len(deltas):
        raise Skipped("no column schedule or no row after PTQ")
    names = sorted(set(deltas["schedule"]) - {""})
    if len(names) < 2:
        raise Skipped(f"only one learning-rate schedule in the table ({', '.join(names) or 'none named'})")
    bits = thin(deltas["P_post"][deltas["delta"] > 0], 4)
    figure, axes = panels(1, len(bits), 2.7)
    ratio = deltas["D"] / deltas["N"]
    for axis, p_post in zip(axes.flat, bits, strict=True):
        shown = (deltas["P_post"] == p_post) & (deltas["delta"] > 0)
        for series, name in enumerate(names):
            mine = shown & (deltas["schedule"] == name)
            points = {"color": CATEGORIES[series], "mec": INK, "label": words(name)}
            axis.plot(ratio[mine], deltas["delta"][mine], marker(series), **points)
        log_axis(axis, "x", ratio[shown])
        log_axis(axis, "y", deltas["delta"][shown])
        axis.set_title(f"P_post = {p_post:g}")
        axis.set_xlabel("D/N")
    axes[0, 0].set_ylabel("δ (nats per token)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), title="schedule", loc="outside right center")
    return figure
