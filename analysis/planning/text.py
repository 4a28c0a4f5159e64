"""A plan as text for a terminal."""

import math
from collections.abc import Iterable, Sequence

from analysis.planning import served, spread
from analysis.planning.memory import bytes_label
from analysis.planning.plan import Plan
from analysis.wording import count_label, interval_text, parts_text

OUTSIDE = "*"  # marks a number outside the range of the fit's table


def describe(plan: Plan) -> str:
    """The whole plan."""
    blocks = [_head(plan), _formats(plan), _serving(plan), _spread(plan)]
    blocks.append([f"Warning: {warning}" for warning in plan.warnings])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def advice(plan: Plan) -> str:
    """The line on how many tokens to train a model that is served in few bits."""
    best, turning, bits = plan.best, plan.critical_tokens, plan.chosen.budget.serve_bits
    if bits is None or turning is None:
        return "Served as trained: more tokens always reduce the loss."
    at = f"At N = {count_label(best.n)} trained in {best.p:.3g} bits and served in {bits:g}"
    if math.isinf(turning):
        return f"{at}, the loss never rises with data in this law: no D_crit."
    crit = f"D_crit = {count_label(turning)} tokens ({turning / best.n:.3g} per parameter)"
    if best.d > turning * 1.001:
        return f"DON'T TRAIN LONGER: {at}, loss rises past {crit}; this plan trains {best.d / turning:.3g} times that."
    if best.d > turning * 0.99:
        return f"DON'T TRAIN LONGER: {at}, loss rises past {crit}; the plan stops there and leaves budget unspent."
    return f"{at}, loss would rise past {crit}; the plan uses {best.d / turning:.2g} of that."


def _head(plan: Plan) -> list[str]:
    best, budget, spans = plan.best, plan.budget, plan.intervals
    far = {reach.name: OUTSIDE for reach in plan.reaches if reach.outside}
    mark = lambda name: far.get(name, "")
    legend = f" ({OUTSIDE} outside the fit's table)" if far else ""
    bits = plan.chosen.budget.serve_bits
    in_format = f", {plan.chosen.fmt.name}" if plan.chosen.fmt else ""
    delta = "" if bits is None else f", δ {best.delta:.4f} of it from PTQ to {bits:g} bits{mark('P_post')}"
    return [
        f"Plan by {' + '.join(plan.laws)}, precision of {parts_text(plan.parts)}{legend}",
        f"  N      {count_label(best.n)}{mark('N')} parameters ({best.n:.4g}){_beside(spans.get('N_ci'), count_label)}",
        f"  D      {count_label(best.d)}{mark('D')} tokens ({best.d:.4g}), {best.d / best.n:.3g} per parameter"
        + _beside(spans.get("D_ci"), count_label),
        f"  P      {best.p:.2f}{mark('P')} bits{in_format}{_beside(spans.get('P_ci'), '{:.2f}'.format)}",
        f"  loss   {best.loss:.4f} nats per token{_beside(plan.loss_ci, '{:.4f}'.format)}{delta}",
        f"  cost   {best.flops:.4g}{mark('budget')} FLOP-equivalents at 16 bits"
        + (f" of {budget.flops:.4g}" if budget.flops else ""),
        f"  memory {_memory(plan)}",
        advice(plan),
    ]


def _beside(span, show) -> str:
    return f"  {interval_text(span, show)}" if span else ""


def _memory(plan: Plan) -> str:
    found, serving = served.memory(plan.chosen), plan.chosen.budget.serving
    held = f"{bytes_label(found['total_bytes'])} served: weights {bytes_label(found['weights_bytes'])} in "
    held += f"{found['stored_bits']:.3g} bits with scales"
    if serving.context:
        layout = serving.layout
        heads = f"{layout.kv_heads} KV heads of {layout.head_width}" if layout else f"width {found['width']:.4g}"
        shape = f"{found['depth']:.3g} layers of {heads}"
        load = f"{serving.context:g} tokens x batch {serving.batch:g}, {found['kv_bits']:.3g} bits"
        held += f", KV cache {bytes_label(found['kv_cache_bytes'])} ({load}, {shape})"
    if serving.vocabulary:
        held += f", embeddings {bytes_label(found['embedding_bytes'])}"
    missing = [
        f"{what} (--{flag})"
        for what, flag, given in (("KV cache", "context", serving.context), ("embeddings", "vocab", serving.vocabulary))
        if not given
    ]
    limit = plan.budget.memory_bytes
    held += f", of {bytes_label(limit)}" if limit else ""
    return held + (f"; without {', '.join(missing)}" if missing else "")


def _formats(plan: Plan) -> list[str]:
    if not plan.formats:
        return []
    title = "at the same cost, each with its own best N and D" if plan.budget.flops else "at the same N and D"
    reads = "relative step or error of each" if plan.surface.reads_formats else "nominal bits alone"
    rows: list[tuple[str, ...]] = [
        ("format", "bits", "N", "D", "loss", "above the plan", "N for 16-bit loss", "memory", "")
    ]
    rows += [_format_row(row) for row in plan.formats]
    if any(row["seen"] is None for row in plan.formats):
        reads += "; the formats in the fit's table are not on record"
    return [f"Formats near P {title} (law {plan.surface.name} reads the {reads}):", *_table(rows)]


def _format_row(row: dict) -> tuple[str, ...]:
    mark = lambda name: OUTSIDE if name in row["outside"] else ""
    extra = f"{row['extra_loss']:+.4f}{_beside(row.get('extra_loss_ci'), '{:+.4f}'.format)}"
    notes = ["fills the memory"] * row["fills_memory"] + ["not in the fit's table"] * (row["seen"] is False)
    return (
        row["format"],
        f"{row['P']:.4g}{mark('P')}",
        f"{count_label(row['N'])}{mark('N')}",
        f"{count_label(row['D'])}{mark('D')}",
        f"{row['loss']:.4f}",
        extra,
        "-" if row["N_factor"] is None else f"x {row['N_factor']:.2f}",
        bytes_label(row["memory_bytes"]),
        ", ".join(notes),
    )


def _serving(plan: Plan) -> list[str]:
    limit = plan.budget.memory_bytes
    if limit is None or not plan.serving:
        return []
    best = min(plan.serving, key=lambda option: option.point.loss)
    rows = [("served in", "trained in", "N", "D", "loss", "of it δ", "weights", "KV cache", "")]
    for option in plan.serving:
        point, found, bits = option.point, served.memory(option), option.budget.serve_bits
        rows.append(
            (
                "as trained" if bits is None else f"{bits:g} bits",
                f"{point.p:.2f}",
                count_label(point.n),
                count_label(point.d),
                f"{point.loss:.4f}",
                f"{point.delta:.4f}",
                bytes_label(found["weights_bytes"]),
                bytes_label(found["kv_cache_bytes"]),
                "best" if option is best else "",
            )
        )
    free = ", P free" if plan.budget.p is None else ""
    return [f"Bits to serve in within {bytes_label(limit)}{free}:", *_table(rows)]


def _spread(plan: Plan) -> list[str]:
    if not plan.opinions:
        return []
    low, high = spread.losses(plan.chosen, plan.opinions)
    rows = [("law", "loss here", "", "its own P", "N", "D", "")]
    for opinion in plan.opinions:
        own = opinion.own
        fewer = "" if opinion.parts == plan.parts else f"of {parts_text(opinion.parts)} alone"
        rows.append(
            (
                opinion.law,
                "-" if opinion.loss is None else f"{opinion.loss:.4f}",
                interval_text(opinion.loss_ci, "{:.4f}".format),
                *(("-",) * 3 if own is None else (f"{own.p:.2f}", count_label(own.n), count_label(own.d))),
                opinion.why or fewer,
            )
        )
    return [f"Model spread: the laws given say {low:.4f} to {high:.4f} for this plan", *_table(rows)]


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: columns as wide as they need, right-aligned but for the first and the last."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join(["", first.ljust(widths[0]), *cells, last]).rstrip())
    return lines
