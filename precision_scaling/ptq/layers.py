"""What quantization did to each layer of a run: a file beside the run's rows, and a figure of error by layer.

`study.ptq` writes the file from what `apply` reports; the command draws it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.ptq.projection import Report
from precision_scaling.ptq.scheme import LINEARS
from precision_scaling.runtime import files, paths

_ALWAYS = set(Report._fields) - {"inherited_error", "total_error"}  # older files lack these
PROJECTIONS = tuple("/".join(linear) for linear in LINEARS)


def write(run_directory: Path, name: str, bits: Sequence[float], report: Report) -> None:
    """Adds the reports at these bit-widths to a run's file, in place of older ones at the same.

    The file: {"projections": [name], "bits": {"4": {"error": [layer][projection], ...}}} with the fields of
    `projection.Report`, null where there is no number.
    """
    path = paths.layer_errors(run_directory, name)
    found = _read(path)["bits"] if files.exists(path) else {}
    for k, b in enumerate(bits):
        found[str(b)] = {field: _plain(getattr(report, field)[k]) for field in Report._fields}
    ordered = dict(sorted(found.items(), key=lambda item: float(item[0])))
    files.write_sealed(path, {"projections": PROJECTIONS, "bits": ordered}, indent=None)


def draw(run_directory: Path, name: str) -> Path | None:
    """Draws a run's file as a PNG beside it, unless that is there and newer; its path, None where there is no file.

    A panel for each projection: relative output error by layer, a colour for each bit-width, rounding to nearest on the
    same inputs dashed. Layers that fell back to it are crossed.
    """
    path = paths.layer_errors(run_directory, name)
    if not files.exists(path):
        return None
    figure = path.with_suffix(".png")
    if not files.is_remote(figure) and figure.exists() and figure.stat().st_mtime >= path.stat().st_mtime:
        return figure
    drawing = _figure(_read(path), name)
    with files.replacing(figure) as file:
        drawing.savefig(file, format="png", dpi=120)
    return figure


def _figure(found: dict[str, Any], name: str):
    from matplotlib.figure import Figure  # a second to import: only where something is drawn

    drawing = Figure(figsize=(3.2 * len(found["projections"]) + 1.5, 3.4), layout="constrained")
    panels = drawing.subplots(1, len(found["projections"]), sharey=True)
    for j, (panel, projection) in enumerate(zip(panels, found["projections"], strict=True)):
        for i, (bits, values) in enumerate(found["bits"].items()):
            error_L, rtn_L, fell_L = (
                np.array(values[field], float)[:, j] for field in ("error", "rtn_error", "fell_back")
            )
            layers, colour = np.arange(len(error_L)), f"C{i}"
            panel.plot(layers, error_L, "o-", color=colour, markersize=4, label=f"{bits} bits")
            panel.plot(layers, rtn_L, "--", color=colour, linewidth=1)
            panel.plot(layers[fell_L > 0], error_L[fell_L > 0], "x", color="black", markersize=9)
        panel.set(yscale="log", title=projection, xlabel="layer", xticks=_ticks(len(layers)))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("‖X(W − Q)‖² / ‖XW‖²")
    panels[-1].plot([], [], "--", color="grey", linewidth=1, label="rounded to nearest")
    drawing.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    drawing.suptitle(f"Relative output error of each projection: {name}", parse_math=False)
    return drawing


def _ticks(layers: int) -> list[int]:
    return list(range(0, layers, max(1, math.ceil(layers / 8))))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = files.read_sealed(path, older=lambda found: set(found) == {"projections", "bits"})
        _check(found)
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a file of errors by layer ({error}); delete it and its rows to measure them anew"
        ) from None


def _check(found: dict[str, Any]) -> None:
    """Raises where a report has not a number, or null, for every layer and projection at its bits."""
    shapes = set()
    for bits, report in found["bits"].items():
        float(bits)
        if not _ALWAYS <= set(report) <= set(Report._fields):
            raise ValueError(f"fields {sorted(report)} at {bits} bits")
        shapes |= {np.array(values, float).shape for values in report.values()}
    if len(shapes) > 1 or any(shape[1:] != (len(found["projections"]),) for shape in shapes):
        raise ValueError(f"shapes {sorted(shapes)} of {len(found['projections'])} projections")


def _plain(array_LxP: np.ndarray) -> list[list[Any]]:
    """Nested lists; NaN is null, which JSON has."""
    values = np.asarray(array_LxP)
    if values.dtype == bool:
        return values.tolist()
    # Seven digits are all that a float32 has.
    return [[float(f"{x:.7g}") if math.isfinite(x) else None for x in row] for row in values.tolist()]
