"""Writes the report of a table: fits, comparison, figures, findings and one self-contained page."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from analysis import table as tables
from analysis.fitting.comparison_text import to_csv
from analysis.fitting.multistart import least_resamples
from analysis.reporting.evidence import Evidence, main_rows
from analysis.reporting.figures.gallery import draw_all
from analysis.reporting.findings import all_findings
from analysis.reporting.laws import COMPARED, LAWS, make
from analysis.reporting.page import interval_of, notes_of, page
from analysis.reporting.verdicts.finding import Finding
from analysis.reporting.verdicts.growth import growth_sentence
from analysis.table import Table
from analysis.wording import fixed
from precision_scaling.errors import UserError
from precision_scaling.runtime import files
from precision_scaling.runtime.files import atomic_write

LEAST_RESAMPLES = least_resamples(0.95)
LAW_FILES = tuple(f"fit_{name}.json" for name in dict.fromkeys((*LAWS, *(n for group in COMPARED for n in group))))
PACKAGES = ("precision_scaling", "jax", "numpy", "scipy", "pandas", "matplotlib")


class ReportError(UserError):
    """A report that cannot be written."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of a report."""

    evidence: Evidence
    findings: Sequence[Finding]
    not_fitted: Mapping[str, str]
    sentence: str
    index: Path


def write(
    table: Table,
    out: Path,
    *,
    bootstrap: int = 200,
    seed: int = 0,
    names: Sequence[str] = LAWS,
    line: str = "",
    tell: Callable[[str], None] = lambda text: None,
    processes: int = 1,
) -> Report:
    """Writes the report of a table into `out` and returns it. `line` is the command, for the provenance.

    `tell` is called with the summary before anything is written. With two or more `processes` the main module of
    the caller is imported again in each. Raises ReportError where `out` cannot be written.
    """
    began = time.monotonic()
    main, method = main_rows(table)
    made = make(main, names, bootstrap, seed, processes)
    evidence = Evidence(main, made.fits, table, made.comparison, made.forecasts)
    report = Report(evidence, all_findings(evidence), made.not_fitted, growth_sentence(evidence), out / "index.html")
    tell(describe(report))
    provenance = {
        "command": line or "analysis.reporting.report.write",
        "table": table.source,
        "sha256 of the table": table.sha256 or "not from a file",
        "PTQ method of the fits": method or "not named in the table",
        "bootstrap resamples": str(bootstrap),
        "seed": str(seed),
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": f"{time.monotonic() - began:.1f}",
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, PACKAGES)]),
    }
    try:
        _write_files(report, provenance)
    except OSError as error:
        raise ReportError(f"--out={out} cannot be written: {error.strerror or error}") from None
    return report


def _write_files(report: Report, provenance: Mapping[str, str]) -> None:
    """Writes the fits, the comparison, the figures, the findings and the page, and removes earlier fits that this table
    does not give."""
    out, evidence = report.index.parent, report.evidence
    files.make_directory(out)
    for name in LAW_FILES:
        files.remove(out / name)
    for name, fit in evidence.fits.items():
        fit.save(out / f"fit_{name}.json")
    if evidence.comparison is None:
        files.remove(out / "compare.csv")
    else:
        atomic_write(out / "compare.csv", to_csv(evidence.comparison))
    drawn = draw_all(evidence, out / "figures")
    left_out = evidence.table.left_out
    text = page(
        evidence, drawn, report.findings, report.not_fitted, report.sentence, tables.describe(left_out), provenance
    )
    atomic_write(report.index, text)
    record = {
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "sentence": report.sentence,
        "not_fitted": report.not_fitted,
        "figures": {d.entry.name: d.skipped or [str(p.relative_to(out)) for p in d.paths] for d in drawn},
        "left_out": dict(left_out),
        "provenance": provenance,
    }
    atomic_write(out / "findings.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def describe(report: Report) -> str:
    """What the command prints: constants with R², the findings, and whether δ grew."""
    lines = [f"rows: {tables.describe(report.evidence.table.left_out)}"]
    for name, fit in report.evidence.fits.items():
        lines.append(f"{name}: R² {fixed(fit.r2, 4)} on {fit.n} rows")
        for parameter, value in fit.params.items():
            if value is None:
                lines.append(f"  {parameter:<10} not identified by this table: {fit.unidentified.get(parameter, '')}")
            elif parameter not in (fit.reporting.get("fixed") or {}):
                ends = interval_of(fit, parameter)
                interval = "" if not ends else " to ".join("open" if e is None else f"{e:.4g}" for e in ends)
                lines.append(f"  {parameter:<10} {value:<11.5g} {interval and f'[{interval}]'}".rstrip())
        lines += [f"  note: {note}" for note in notes_of(fit)]
    lines += [f"{name}: not fitted: {why}" for name, why in report.not_fitted.items()]
    lines += ["", *(f"{f.key}: {f.verdict}. {' '.join(f.by_table.split())}" for f in report.findings)]
    lines += ["", report.sentence]
    return "\n".join(lines)
