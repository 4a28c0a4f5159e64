"""The figures in the order of the report, and the loop that draws each or records why it cannot."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from analysis.reporting.evidence import Evidence
from analysis.reporting.figures import comparison, degradation, fits, planning, precision, ptq
from analysis.reporting.figures.bands import said
from analysis.reporting.figures.style import Skipped, house_style, save
from precision_scaling.runtime import files


@dataclasses.dataclass(frozen=True)
class Entry:
    """A figure of the gallery: file name, title, and caption, which is its alternative text, too."""

    name: str
    title: str
    caption: str
    draw: Callable[[Evidence], Figure]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """An entry with its files (png, svg) and caption, or with the reason why there are none."""

    entry: Entry
    paths: tuple[Path, ...] = ()
    skipped: str | None = None
    said: str = ""  # what the caption adds for this table

    @property
    def caption(self) -> str:
        return f"{self.entry.caption} {self.said}".strip()


GALLERY = (
    Entry(
        "delta_vs_tokens",
        "Loss added by PTQ against training length",
        "Loss added by post-training quantization (δ) against tokens per parameter, by model size and bits; points are "
        "measured.",
        degradation.degradation,
    ),
    Entry(
        "loss_after_ptq",
        "Loss after PTQ against training tokens",
        "Loss before (open circles) and after quantization.",
        degradation.after_ptq,
    ),
    Entry(
        "ptq_methods",
        "PTQ methods compared",
        "δ of the same model at the same bits under two methods; below the diagonal the method on the vertical "
        "axis wins.",
        ptq.methods,
    ),
    Entry(
        "loss_vs_precision",
        "Loss against training precision",
        "One part of the model in low precision at a time, the others in 16 bits; points are measured.",
        precision.loss_by_bits,
    ),
    Entry(
        "effective_parameters",
        "Effective parameters by part and bits",
        "N_eff/N against training precision, relative to the 16-bit runs of equal N and D.",
        precision.capacity_by_part,
    ),
    Entry(
        "iso_loss",
        "Iso-loss contours over size and precision",
        "Models on a contour have the same loss: fewer bits need more parameters. On a dashed line training costs the "
        "same (N·P at equal D); a star is the best precision for that cost by the law, where it lies inside.",
        precision.iso_loss,
    ),
    Entry(
        "predicted_vs_measured",
        "Predicted against measured",
        "Each fitted law at the rows it was fitted to; predictions on the diagonal are exact.",
        fits.predicted_against_measured,
    ),
    Entry(
        "cost_matched",
        "Precision at equal cost",
        "Left: loss at equal N·P by the law, above its own best precision. Right: measured runs with these parts tied, "
        "against their training cost.",
        planning.cost_matched,
    ),
    Entry(
        "fixed_size_precision",
        "Best precision of a model of fixed size",
        "With N fixed and D free, the cost-optimal training precision by the law against tokens per parameter.",
        planning.fixed_size_precision,
    ),
    Entry(
        "compute_optimal",
        "Compute-optimal size, tokens and precision",
        "Optima by the laws for a budget: N and D with precision free and held at 16 bits, and the best precision by "
        "every law that predicts held-out rows as well as the best, and by the paper's.",
        planning.compute_optimal,
    ),
    Entry(
        "training_precision_and_ptq",
        "PTQ of models trained in low precision",
        "δ against the precision the weights were trained in; points are measured.",
        ptq.training_precision,
    ),
    Entry(
        "unified_map",
        "Loss over training and serving precision",
        "Predicted by the unified law at the largest model of the table. The dashed line is the best training "
        "precision for each serving precision, at equal N and D.",
        planning.unified_map,
    ),
    Entry(
        "schedules",
        "δ by learning-rate schedule",
        "δ of runs matched in N, D, seed and bits: whether it grows with data, or with the decay of the learning rate.",
        degradation.schedules,
    ),
    Entry(
        "residuals",
        "Residuals by variable",
        "Log of measured over predicted. Points are rows, the line their mean at each value; a trend is an effect that "
        "the law lacks.",
        fits.residuals,
    ),
    Entry(
        "law_comparison",
        "Laws compared on held-out rows",
        "Left: error of each law on rows held out of its fit, best law on top; a law without a mark cannot predict "
        "those rows. Right: information criteria above the lowest (k parameters).",
        comparison.law_comparison,
    ),
    Entry(
        "bootstrap_ptq",
        "Uncertainty of the law of PTQ",
        "Refits on resampled runs; orange is the fit itself. Constants of a narrow diagonal band are not "
        "separately identified.",
        fits.bootstrap_ptq,
    ),
    Entry(
        "bootstrap_precision",
        "Uncertainty of the law of loss before PTQ",
        "Refits on resampled runs; orange is the fit itself. Where constants are many, those of precision are shown.",
        fits.bootstrap_precision,
    ),
)


def draw_all(evidence: Evidence, directory: Path, gallery: tuple[Entry, ...] = GALLERY) -> list[Drawn]:
    """Writes every figure that the table allows into `directory` (png and svg); the others come back with the
    reason.
    """
    files.make_directory(directory)
    drawn = []
    with house_style():
        for entry in gallery:
            try:
                figure = entry.draw(evidence)
                drawn.append(Drawn(entry, tuple(save(figure, directory, entry.name)), said=said(figure)))
            except Skipped as reason:
                for stale in (directory / f"{entry.name}.png", directory / f"{entry.name}.svg"):
                    files.remove(stale)
                drawn.append(Drawn(entry, skipped=str(reason)))
    return drawn
