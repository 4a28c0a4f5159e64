"""What curves of fits have in common: bands of the bootstrap, shade beyond the table, sentences of a caption."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from analysis.fitting.fit import Fit
from analysis.fitting.statistics import LEAST_DRAWS, LEVEL, ends
from analysis.planning.surface import Surface

MOST_DRAWS = 100
BEYOND = {"color": "#E9E9E9", "zorder": -1, "lw": 0}


def band(axis, x, curve: Callable[..., np.ndarray], fits: Sequence[Fit | Surface], color) -> bool:
    """Fills the 95 % interval of `curve(*fits)` over bootstrap samples; False where these are too few."""
    count = min([fit.draws for fit in fits] or [0])
    if count < LEAST_DRAWS:
        return False
    with np.errstate(all="ignore"):
        drawn = np.array([curve(*(fit.draw(i) for fit in fits)) for i in range(min(count, MOST_DRAWS))])
        low, high = np.nanquantile(np.where(np.isfinite(drawn), drawn, np.nan), ends(LEVEL), axis=0)
    axis.fill_between(x, low, high, color=color, alpha=0.16, lw=0, zorder=1)
    return True


def beyond(axis, low: float, high: float, which: str = "x") -> None:
    """Shades what lies outside [low, high] of an axis whose limits are set."""
    span = axis.axvspan if which == "x" else axis.axhspan
    limits = axis.get_xlim() if which == "x" else axis.get_ylim()
    for start, end in ((limits[0], low), (high, limits[1])):
        if end > start:
            span(start, end, **BEYOND)
    axis.set(**{f"{which}lim": limits})


def say(figure: Figure, *sentences: str) -> Figure:
    """Adds to the caption what is true of this very figure."""
    words = " ".join(sentence for sentence in sentences if sentence)
    figure.set_label(f"{said(figure)} {words}".strip())
    return figure


def said(figure: Figure) -> str:
    """The sentences added; they are the figure's label."""
    return str(figure.get_label())


def band_words(fits: Sequence[Fit | None]) -> str:
    """The sentence on bands, with the share of starts that reached the best fit."""
    shown = [fit for fit in fits if fit is not None]
    if not shown:
        return ""
    words = (
        "Bands are 95 % over resampled runs."
        if min(fit.draws for fit in shown) >= LEAST_DRAWS
        else "Without a bootstrap the lines have no bands."
    )
    shares = [f"{fit.law} {fit.starts_at_best:.1%}" for fit in shown if fit.starts_at_best is not None]
    return words + (f" Starts that ended at the best fit: {', '.join(shares)}." if shares else "")


def at_the_edge(axis, x, y_edge: float, mark: str, color) -> int:
    """Hollow marks at the lower edge of a logarithmic axis for values of 0 or less; how many."""
    x = np.atleast_1d(x)
    if len(x):
        axis.plot(x, np.full(len(x), y_edge), mark, color="none", mec=color, mew=0.9, ms=4, clip_on=False, zorder=4)
    return len(x)


def edge_words(count: int, noun: str = "δ") -> str:
    """The sentence on hollow marks."""
    if not count:
        return f"No {noun} is 0 or less."
    return f"Hollow marks at the lower edge: {count} {noun} of 0 or less, which a logarithmic axis cannot place."
