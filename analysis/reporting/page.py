"""The report as one self-contained HTML file: figures and style inline, no script, printable."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from analysis import laws
from analysis.fitting.comparison import HELD_OUT, Comparison
from analysis.fitting.fit import Fit
from analysis.fitting.forms import KINDS
from analysis.reporting.evidence import Evidence
from analysis.reporting.figures.gallery import Drawn
from analysis.reporting.verdicts.finding import CONTRADICTED, FORCED, SUPPORTED, UNDECIDED, Finding
from analysis.wording import count_label, fixed
from precision_scaling.runtime import files

STYLE = """
:root { --ink: #1d2329; --soft: #59636e; --line: #d9dee3; --wash: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .4rem 0; max-width: 48rem; }
.soft { color: var(--soft); font-size: .9rem; }
.lead { font-size: 1.08rem; }
nav { margin: 1rem 0 0; font-size: .9rem; } nav a { margin-right: 1rem; } a { color: #0a5a9c; }
.finding { border: 1px solid var(--line); border-left-width: .45rem; border-radius: .3rem;
  padding: .6rem .9rem; margin: .7rem 0; break-inside: avoid; }
.finding p { margin: .25rem 0; }
.supported { border-left-color: #009e73; } 
.contradicted { border-left-color: #d55e00; } .forced { border-left-color: #cc79a7; }
.open { border-left-color: #8a929a; }
.verdict { font-weight: 700; font-size: .8rem; letter-spacing: .03em; text-transform: uppercase; margin-left: .5rem; }
.supported .verdict { color: #00714f; } .contradicted .verdict { color: #a94700; }
.forced .verdict { color: #8a3f68; } .open .verdict { color: #59636e; }
figure { margin: 1.4rem 0 2rem; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; max-width: 48rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem 1.1rem .22rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
.laws table { font-size: .78rem; } .laws th, .laws td { padding-right: .55rem; }
.laws th.number { white-space: normal; }
details table { font-size: .78rem; } details th, details td { padding-right: .6rem; }
details { font-size: .9rem; } summary { cursor: pointer; color: var(--soft); }
.symbols th { white-space: nowrap; } .symbols td { max-width: 40rem; }
td.name code { overflow-wrap: normal; white-space: nowrap; }
code { background: var(--wash); padding: .05rem .3rem; border-radius: .2rem; font-size: .88em;
  overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; margin: .3rem 0; } li { max-width: 48rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  h2, h3 { break-after: avoid; } tr { break-inside: avoid; } a { color: inherit; text-decoration: none; }
  .scroll { overflow: visible; } th, td { overflow-wrap: anywhere; } }
@page { margin: 16mm; }
"""
SYMBOLS = (
    ("N, D", "parameters without embeddings, and training tokens (counts); D/N is tokens per parameter"),
    ("P_w, P_a, P_kv", "bits in training of weights, activations and keys and values; 16 stands for 16 and more"),
    ("P_post", "bits of the weights after post-training quantization (PTQ)"),
    ("L", "validation loss, nats per token"),
    ("δ", "L after PTQ minus L of the same model before it; may be negative"),
    ("C", "training cost, 6/16 · N · D · P: FLOP-equivalents at 16 bits, linear in bits"),
    ("P*", "the P of all parts with the least loss for its cost, N and D being free"),
    ("f(P), N_eff", "effective share of N in training at P bits by a law, N_eff = N f_w f_a f_kv"),
    ("κ", "power of that product that fits runs with several low parts; 1: effects multiply"),
    ("D_crit", "D beyond which more data makes the quantized model worse"),
    ("rms, held out", "root mean square of log errors on rows that were left out of the fit"),
)
KIND = {SUPPORTED: "supported", CONTRADICTED: "contradicted", UNDECIDED: "open", FORCED: "forced"}


def page(
    evidence: Evidence,
    drawn: Sequence[Drawn],
    findings: Sequence[Finding],
    not_fitted: Mapping[str, str],
    sentence: str,
    left_out: str,
    provenance: Mapping[str, str],
) -> str:
    """The whole report as HTML text."""
    shown = [d for d in drawn if d.paths]
    sections = [
        ("Symbols", _symbols()),
        ("Noise", _noise(evidence)),
        ("Findings", _findings(findings)),
        ("Figures", "".join(map(_figure, shown)) or "<p>No figure could be drawn.</p>"),
        ("Fitted laws", _fits(evidence, not_fitted)),
        ("Laws compared", _comparison(evidence.comparison)),
        ("Left out", _missing([d for d in drawn if not d.paths], left_out)),
        ("Provenance", _pairs(provenance)),
    ]
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in sections)
    body = "".join(f'<section id="{_anchor(title)}"><h2>{title}</h2>{text}</section>' for title, text in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Precision scaling report</title><style>{STYLE}</style></head><body>"
        f'<h1>Precision scaling report</h1><p class="soft">{_escape(_summary(evidence))}</p>'
        f'<p class="lead">{_escape(sentence)}</p><nav>{links}</nav><main>{body}</main></body></html>\n'
    )


def _escape(text: object) -> str:
    return html.escape(str(text))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _summary(evidence: Evidence) -> str:
    """What was measured, in one sentence."""
    table = evidence.table
    runs = len(set(zip(table.models, table["D"], strict=True)))
    span = lambda name: f"{count_label(table[name].min())} to {count_label(table[name].max())}"
    quantized = int(table.quantized.sum())
    return (
        f"{len(table)} measured losses of {runs} training runs ({quantized} after PTQ), N {span('N')} parameters, "
        f"D {span('D')} tokens."
    )


def _symbols() -> str:
    rows = "".join(f"<tr><th>{_escape(symbol)}</th><td>{_escape(meaning)}</td></tr>" for symbol, meaning in SYMBOLS)
    return f'<table class="symbols"><tbody>{rows}</tbody></table>'


def _noise(evidence: Evidence) -> str:
    """The noise between seeds, before PTQ and after it by method and bits, and how many δ are not above 0."""
    if evidence.loss_noise is None:
        before = "No setting was run with enough seeds to estimate the noise of the loss; every difference counts."
    else:
        before = "Runs that differ in their seed alone have losses before PTQ that differ by "
        before += f"{evidence.loss_noise.words}, standard deviation."
    records = []
    for method, deltas in evidence.deltas_by_method.items():
        for p_post in sorted(set(deltas["P_post"])):
            here, noise = deltas["delta"][deltas["P_post"] == p_post], evidence.noise_after_ptq(method, float(p_post))
            noise_cells = (
                {} if noise is None else {"noise of δ (nats)": f"{noise.sd:.2g}", "degrees of freedom": noise.freedom}
            )
            beyond = None if noise is None else int(np.sum(np.abs(here) > noise.t * noise.sd))
            records.append(
                {
                    "PTQ": method or "not named",
                    "P_post": float(p_post),
                    "δ": len(here),
                    "0 or less": int(np.sum(here <= 0)),
                    **noise_cells,
                    "distinct from 0": beyond,
                }
            )
    rows = _records([{k: v for k, v in record.items() if v is not None} for record in records]) if records else ""
    return f"<p>{_escape(before)}</p>{rows}"


def _findings(findings: Iterable[Finding]) -> str:
    return (
        '<p class="soft">Claims of <em>Scaling Laws for Precision</em> (arXiv 2411.04330) tested on this table. '
        "By the form: what follows from the law whatever its constants, which no table can test. By the table: what "
        "the rows show. Undecided: the table supports neither side. Noise is the spread of runs that differ only in "
        "their seed; a difference below its 95 % limit counts as noise. Intervals are 95 %.</p>"
        + "".join(map(_finding, findings))
    )


def _finding(finding: Finding) -> str:
    rows, table = "", "".join(f"<li>{_escape(line)}</li>" for line in finding.by_table.splitlines() if line)
    if finding.rows:
        rows = f"<details><summary>The numbers</summary>{_records(finding.rows)}</details>"
    return (
        f'<div class="finding {KIND[finding.verdict]}"><p><strong>{_escape(finding.key)}</strong>'
        f'<span class="verdict">{_escape(finding.verdict)}</span></p><p>{_escape(finding.claim)}</p>'
        f'<p class="soft"><em>By the form:</em> {_escape(finding.by_form)}</p>'
        f'<p class="soft"><em>By the table:</em></p><ul class="soft">{table}</ul>{rows}</div>'
    )


def _records(records: Sequence[Mapping[str, object]]) -> str:
    """Records of the same or differing keys as one table, numbers to the right."""
    names = list(dict.fromkeys(name for record in records for name in record))
    cell = lambda value: (
        f'<td class="number">{value:g}</td>' if isinstance(value, int | float) else f"<td>{_escape(value or '')}</td>"
    )
    head = "".join(f"<th>{_escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(cell(record.get(name)) for name in names)}</tr>" for record in records)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(drawn: Drawn) -> str:
    svg = next(path for path in drawn.paths if path.suffix == ".svg")
    data = base64.b64encode(files.read(svg)).decode("ascii")
    entry = drawn.entry
    return (
        f'<figure id="{entry.name}"><h3>{_escape(entry.title)}</h3>'
        f'<img alt="{_escape(drawn.caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{_escape(drawn.caption)}</figcaption></figure>"
    )


def _fits(evidence: Evidence, not_fitted: Mapping[str, str]) -> str:
    parts = [_fit(fit) for fit in evidence.fits.values()]
    if not_fitted:
        items = "".join(f"<li><code>{_escape(law)}</code>: {_escape(why)}</li>" for law, why in not_fitted.items())
        parts.append(f"<h3>Not fitted</h3><ul>{items}</ul>")
    return "".join(parts)


def _fit(fit: Fit) -> str:
    law = laws.resolve(fit.law, fit.values)
    rows = []
    for name, value in fit.params.items():
        parameter = law.parameter(name)
        published = "" if parameter.published is None else f"{parameter.published:.5g}"
        if value is None:
            why = _escape(fit.unidentified.get(name, "not identified by this table"))
            rows.append(
                f'<tr><td><code>{name}</code></td><td colspan="2">{why}</td><td class="number">{published}</td></tr>'
            )
            continue
        rows.append(
            f'<tr><td><code>{name}</code></td><td class="number">{value:.5g}</td>'
            f'<td class="number">{_ends(fit, name)}</td><td class="number">{published}</td></tr>'
        )
    if {"C_T", "b"} <= set(fit.values) and fit.params.get("C_T") is not None:
        rows.append(_amplitude_row(fit))
    share = "" if not fit.starts_at_best else f", {fit.starts_at_best:.1%} of {fit.starts} starts at the best optimum"
    notes = "".join(f"<li>{_escape(note)}</li>" for note in notes_of(fit))
    return (
        f"<h3>{_escape(fit.law)}</h3><p><code>{_escape(law.formula)}</code></p>"
        f'<p class="soft">R² {fixed(fit.r2, 4)} on {fit.n} rows{share}. '
        f"Intervals: {_escape(_kind_of_interval(fit))}.</p>"
        '<div class="scroll"><table><thead><tr><th>constant</th><th class="number">fitted</th>'
        '<th class="number">95 % interval</th><th class="number">published</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>" + (f"<ul>{notes}</ul>" if notes else "")
    )


def _kind_of_interval(fit: Fit) -> str:
    if fit.ci or not fit.identifiability.get("profile"):
        return fit.reporting.get("intervals", "none")
    return "95 % profile likelihood"


def _amplitude_row(fit: Fit) -> str:
    """C_T e^b, the amplitude of δ that data identify: two fits compare by it, not by C_T and b."""
    amplitude = lambda values: values["C_T"] * math.exp(values.get("b", 0.0))
    ends = interval_of(fit, "C_T")
    scale = math.exp(fit.values["b"])
    interval = " to ".join("open" if end is None else f"{end * scale:.5g}" for end in ends) if ends else "none"
    return (
        f'<tr><td><code>C_T e^b</code></td><td class="number">{amplitude(fit.values):.5g}</td>'
        f'<td class="number">{interval}</td><td class="number">{amplitude(laws.published("ptq")):.5g}</td></tr>'
    )


def interval_of(fit: Fit, name: str) -> tuple[float | None, float | None] | None:
    """The interval of a constant that a report shows: of the bootstrap where there is one, else of its profile."""
    return fit.ci.get(name) if fit.ci else (fit.identifiability.get("profile") or {}).get(name)


def notes_of(fit: Fit) -> list[str]:
    """The notes of a fit; without those on profiles where the intervals shown are of the bootstrap."""
    return [note for note in fit.notes if not (fit.ci and "% profile)" in note)]


def _ends(fit: Fit, name: str) -> str:
    if name in (fit.reporting.get("fixed") or {}):
        return "fixed"
    interval = interval_of(fit, name)
    if not interval:
        return "none"
    return " to ".join("open" if end is None else f"{end:.5g}" for end in interval)


def _comparison(comparison: Comparison | None) -> str:
    """One table per kind of law, best held-out error first."""
    if comparison is None:
        return "<p>No law can be fitted to this table.</p>"
    parts = [
        '<p class="soft">Laws of one kind on the same rows, by increasing error on held-out rows. '
        "Held-out columns are rms errors of log values (%): a size, a token budget, a precision, the largest "
        "fifth of the runs, the joint runs or the largest size was left out of the fit; a dash means that the law "
        "cannot predict such rows. Last: mean absolute error (%) above that of the best law, with its paired bootstrap "
        "interval.</p>"
    ]
    head = ("k", "R²", "AIC", "BIC", *HELD_OUT.values(), "above the best")
    for kind, title in KINDS.items():
        rows = [row for row in comparison.rows if row.kind == kind]
        if not rows:
            continue
        body = []
        for row in rows:
            held = ["–" if v is None else f"{100 * v:.2f}" for v in map(row.held_out.get, HELD_OUT)]
            gap = "–" if row is not rows[0] else "best"
            if row.difference is not None:
                gap = f"{100 * row.difference.mean:+.2f} {row.difference.text('{:+.2f}')}"
            cells = [str(row.k), fixed(row.r2, 4), f"{row.aic:.1f}", f"{row.bic:.1f}", *held, gap]
            numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
            body.append(f'<tr><td class="name"><code>{_escape(row.law)}</code></td>{numbers}</tr>')
        names = "".join(f'<th class="number">{name}</th>' for name in head)
        parts.append(
            f"<h3>{_escape(title)}, {rows[0].n} rows</h3>"
            f'<div class="scroll laws"><table><thead><tr><th>law</th>{names}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )
    notes = [*(f"{law}: {why}" for law, why in comparison.skipped.items()), *comparison.notes]
    return "".join(parts) + f"<ul>{''.join(f'<li>{_escape(note)}</li>' for note in notes)}</ul>"


def _missing(skipped: Sequence[Drawn], left_out: str) -> str:
    items = "".join(f"<li>{_escape(d.entry.title)}: {_escape(d.skipped)}</li>" for d in skipped)
    return f"<p>Rows: {_escape(left_out)}.</p>" + (f"<p>Figures skipped:</p><ul>{items}</ul>" if items else "")


def _pairs(values: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{_escape(k)}</th><td><code>{_escape(v)}</code></td></tr>" for k, v in values.items())
    return f"<table><tbody>{rows}</tbody></table>"
