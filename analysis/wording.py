"""Numbers as text, for the plan, the figures and the report."""

from collections.abc import Iterable

PART_NAMES = {"w": "weights", "a": "activations", "kv": "KV cache"}


def parts_text(parts: Iterable[str]) -> str:
    """The names of parts of a model: weights, KV cache."""
    return ", ".join(PART_NAMES[part] for part in parts) or "nothing"


def count_label(value: float) -> str:
    """A count with its unit: 30M, 1.5B, 820k."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9995:
            scaled = value / unit
            return f"{scaled:.3g}{name}" if scaled < 999.5 else f"{scaled:.0f}{name}"
    return f"{value:.3g}"


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals, or `undefined`."""
    return "undefined" if value is None else f"{value:.{digits}f}"


def interval_text(span, show="{:.3g}".format) -> str:
    """`[low, high]`, or nothing where there is no interval."""
    if span is None or any(x is None for x in span):
        return ""
    return f"[{show(span[0])}, {show(span[1])}]"
