"""The style of every figure: a palette safe for colour-blind readers, markers and line styles that distinguish series
in grey print, logarithmic axes, and png and svg files that are reproducible byte for byte.
"""

import contextlib
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from analysis.wording import count_label
from precision_scaling.runtime import files

# Okabe & Ito (2008), without its yellow, which vanishes on white paper.
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
PARTS = {
    "P_w": ("weights", "#0072B2", "o", "-"),
    "P_a": ("activations", "#D55E00", "s", "--"),
    "P_kv": ("KV cache", "#009E73", "^", "-."),
}
INK = "#222222"
WIDTH = 7.2  # inches: a text column of the report and of a printed page

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 100,
    "svg.fonttype": "path",
    "svg.hashsalt": "precision_scaling",
    "axes.titlelocation": "left",
    "mathtext.fontset": "dejavusans",
}


class Skipped(Exception):
    """A figure that needs columns or rows that the table lacks, with the reason."""


@contextlib.contextmanager
def house_style():
    """The style for figures made inside; Matplotlib's settings elsewhere stay."""
    with matplotlib.rc_context(STYLE):
        yield


def panels(rows: int, columns: int, height: float, width: float = WIDTH, **options) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` x `columns` axes (always a 2-D array); `height` is of one row, in inches."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def grid_of(count: int, per_row: int = 4) -> tuple[int, int]:
    """Rows and columns for `count` panels, filled evenly."""
    rows = math.ceil(count / per_row)
    return rows, math.ceil(count / rows)


def ramp(count: int) -> list:
    """Colours for `count` ordered values, from light to dark."""
    colormap = matplotlib.colormaps["viridis"]
    return [colormap(x) for x in np.linspace(0.82, 0.05, count)] if count > 1 else [colormap(0.25)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def line(index: int):
    return LINES[index % len(LINES)]


def log_axis(axes, which: str, values, counts: bool = False) -> None:
    """Logarithmic x or y with readable ticks also where the values span less than a decade; counts as 30M, 1.5B."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    decades = math.log10(values.max() / values.min()) if values.size else 3.0
    subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs, numticks=7))
    axis.set_minor_locator(ticker.NullLocator())
    if counts:
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: count_label(value)))
    elif decades < 2.2:
        axis.set_major_formatter(ticker.FuncFormatter(_plain))


def _plain(value: float, _) -> str:
    if 1e-3 < value < 1e5:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10**power)
    return f"$10^{{{power}}}$" if digit == 1 else rf"${digit}\cdot 10^{{{power}}}$"


def words(text: str) -> str:
    """Text of a table, verbatim: Matplotlib would read mathematics between two dollar signs."""
    return text.replace("$", r"\$")


def bits_axis(axis, values, most: int = 8) -> None:
    """Whole bits as ticks, about eight of them."""
    low, high = math.floor(np.min(values)), math.ceil(np.max(values))
    axis.set_major_locator(ticker.MultipleLocator(max(1, math.ceil((high - low) / most))))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def thin(values, most: int) -> list:
    """At most `most` of the sorted distinct values, first and last kept, spread evenly between."""
    values = sorted(set(values))
    if len(values) <= most:
        return values
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Writes `name`.png (160 dpi) and `name`.svg without dates, so that equal data gives equal files.

    The canvases are called directly, since `savefig` lays out and draws everything twice for each file.
    """
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    figure.set_dpi(160)
    with files.replacing(paths[0]) as file:
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    figure.set_layout_engine("none")  # keeps the layout of the first drawing
    with files.replacing(paths[1]) as file:
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return paths
