"""Figures of PTQ methods: which of them loses least, and what training in low precision changes."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import laws
from analysis.laws.law import HIGH_PRECISION_BITS
from analysis.reporting.evidence import Evidence
from analysis.reporting.figures.bands import band, band_words, say
from analysis.reporting.figures.style import INK, Skipped, line, log_axis, marker, panels, ramp, thin, words
from analysis.wording import count_label

MOST_SERIES = 6


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
        both = [(key[2], m[reference], m[other]) for key, m in by_key.items() if reference in m and other in m]
        pairs = np.array(both).reshape(-1, 3)
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
    left = f"{hidden} pairs with a δ of 0 or less are counted in the titles but not shown." if hidden else ""
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
    seeds = f"A δ below these is noise between seeds: {', '.join(limits)}." if limits else ""
    return say(figure, law, band_words([fit]) if fit else "", seeds)
