"""A fit in words, as `analysis.fit` prints it."""

from collections.abc import Sequence

from analysis import laws
from analysis import table as tables
from analysis.fitting import nested, sensitivity
from analysis.fitting.fit import Fit


def summary(fit: Fit) -> str:
    """The fit as text: every constant with its interval or the reason why it has none, quality, and rows left out."""
    lines = [f"{fit.law}: {fit.reporting['formula']}", ""]
    profile = fit.identifiability["profile"]
    width = max(len(name) for name in fit.params)
    for name, value in fit.params.items():
        low, high = fit.ci.get(name, (None, None))
        if name in fit.unidentified:
            lines.append(f"  {name:<{width}}  not identified by this table: {fit.unidentified[name]}")
            continue
        interval = ""
        if name in fit.reporting["fixed"]:
            interval = "fixed"
        elif name in fit.ci:
            interval = _span((low, high))
        if name in profile:
            interval = f"{interval:<24} profile {_span(profile[name])}".strip()
        tied = fit.reporting["tied"].get(name)
        lines.append(f"  {name:<{width}}  {value:<12.6g} {interval}{f'  (= {tied})' if tied else ''}".rstrip())
    target = "delta" if laws.get(fit.law).target == "delta" else "loss"
    quality = "R2 undefined (nothing varies)" if fit.r2 is None else f"R2 {fit.r2:.5f} of the {target}"
    runs, share = fit.reporting["runs"], fit.starts_at_best
    lines += [
        "",
        f"{quality}, objective {fit.objective:.6g}, {fit.n} rows of {runs} runs",
        f"{share:.1%} of {fit.starts} starts reached the best optimum; {fit.seconds:.1f} s",
        f"intervals: {fit.reporting['intervals']}",
        f"condition number of the scaled curvature: {fit.identifiability['condition']:.1e}",
        tables.describe(fit.left_out),
        *_checked(fit),
        *(f"note: {note}" for note in fit.notes),
    ]
    return "\n".join(lines)


def _checked(fit: Fit) -> list[str]:
    """What the checks found, in words."""
    lines = []
    if (test := fit.metrics.get("test")) is not None:
        shown = [("rms log error", test["rms_log_error"]), ("mean", test["mean_log_error"])]
        shown += [("rms of the loss as served", test["rms_log_error_served"])]
        words = ", ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)
        lines.append(f"test on {test['rows']} rows with {test['where']}: {words}")
    if (ratio := fit.metrics.get("likelihood_ratio")) is not None:
        lines.append(f"likelihood ratio: {nested.NestedTest(**ratio).in_words}")
    fitted = [name for name in fit.params if name in fit.reporting["free"]]
    return lines + sensitivity.in_words(fit.metrics.get("sweep", ()), fitted)


def _span(ends: Sequence[float | None]) -> str:
    low, high = ("open" if end is None else f"{end:.5g}" for end in ends)
    return f"[{low}, {high}]"
