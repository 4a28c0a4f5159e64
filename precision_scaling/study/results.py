"""The table of a study: its columns, a sealed file of rows per measurement, and runs.csv made from them.

Workers on many machines write different files and never share one; `gather` can be repeated at any time.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from precision_scaling.errors import UserError
from precision_scaling.model.accounting import count_parameters, training_flops_per_token
from precision_scaling.ptq.registry import planned
from precision_scaling.runtime import files
from precision_scaling.runtime.files import atomic_write
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.run import Run

# The contract's columns first; readers ignore those they don't know.
COLUMNS = (
    *("run", "N", "D", "P_w", "P_a", "P_kv", "P_post", "loss"),
    *(
        "status",
        "diverged_step",
        "batches_left_out",
        "method",
        "fallback_layers",
        "seed",
        "size",
        "epochs",
        "training_flops",
    ),
    *("width", "depth", "heads", "sequence_length", "batch_size", "peak_rate", "warmup_fraction", "schedule"),
    *("w_format", "a_format", "q_format", "k_format", "v_format", "p_format"),
    *("w_granularity", "a_granularity", "attention_granularity", "precision"),
    *("ptq_granularity", "ptq_options", "post_parts", "post_format", "stored_bits"),
    *("validation_tokens", "vocab_size", "corpus", "device", "jax_version", "imported"),
)
ROW_FILES = "rows-*.json"


def write_rows(run_directory: Path, measurement: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records the rows of one measurement ("trained", "gptq", ...) of a run."""
    files.write_sealed(_path(run_directory, measurement), {"rows": list(rows)})


def read_rows(run_directory: Path, measurement: str) -> list[dict[str, Any]]:
    """The rows of one measurement; none where it was not made. UserError for a file that is not what was written."""
    path = _path(run_directory, measurement)
    return _load(path) if path.exists() else []


def gather(workdir: Path) -> int:
    """Writes workdir/runs.csv from all rows found below workdir/runs; returns their number."""
    rows = [row for path in sorted(workdir.glob(f"runs/*/{ROW_FILES}")) for row in _load(path)]
    write_table(workdir / "runs.csv", rows)
    return len(rows)


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as a table, in an order that does not depend on theirs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (row["N"], row["D"], row["run"], row["method"], -(row["P_post"] or 99))):
        writer.writerow({name: cell(row.get(name)) for name in COLUMNS})
    atomic_write(path, text.getvalue())


def _path(run_directory: Path, measurement: str) -> Path:
    return run_directory / f"rows-{measurement}.json"


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        rows = files.read_sealed_list(path, "rows")
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise ValueError("no list of rows")
        measurement = path.stem.removeprefix("rows-")
        for row in rows:
            _check(row, path.parent.name, "" if measurement == "trained" else measurement)
        if len({row["P_post"] for row in rows}) < len(rows):
            raise ValueError("two rows of one measurement")
        return rows
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path}: not a file of rows ({reason}); delete it and run the study again to measure it anew"
        ) from None


def _check(row: dict[str, Any], run: str, method: str) -> None:
    """Raises for what is no row of this run and method: the file's place says both, too."""
    for name, value in {"run": run, "method": method}.items():
        if row[name] != value:
            raise ValueError(f"{name} is {row[name]!r}, {value!r} where it lies")
    for name, may_lack in {"N": False, "D": False, "loss": True, "P_post": True}.items():
        value = row[name]
        if not (value is None and may_lack) and not (_is_number(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def cell(value: Any) -> str:
    """A value as the table has it."""
    if value is None:
        return ""
    # 16.0 bits is 16; losses keep every digit that tells two runs apart.
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def row(workspace: Workspace, run: Run, loss: float | None, **more: Any) -> dict[str, Any]:
    """One line of runs.csv: a run's columns with a measured loss; `more` adds or replaces columns."""
    shape = run.shape
    return {
        **setting_columns(workspace.experiment.config, run),
        "loss": loss,
        "epochs": None if run.imported else round(workspace.loader(shape).epochs(run.tokens), 4),
        "corpus": workspace.corpus.meta["hash"],
        "device": jax.devices()[0].device_kind,
        "jax_version": jax.__version__,
        **more,
    }


def setting_columns(config, run: Run) -> dict[str, Any]:
    """The columns of a run's rows that are known before it is trained."""
    shape = run.shape
    non_embedding, _ = count_parameters(shape.model)
    return {
        "run": run.id,
        "N": non_embedding,
        "D": run.tokens,
        "P_w": run.bits("w"),
        "P_a": run.bits("a"),
        "P_kv": run.bits("k", "v"),
        "P_post": None,
        "status": "ok",
        "method": "",
        "seed": run.seed,
        "size": shape.size,
        "training_flops": training_flops_per_token(shape.model) * run.tokens,
        "width": shape.model.width,
        "depth": shape.model.depth,
        "heads": shape.model.heads,
        "sequence_length": shape.model.sequence_length,
        "batch_size": shape.batch_size,
        "peak_rate": run.peak_lr,
        "warmup_fraction": round(run.warmup_steps / run.steps, 4),
        "schedule": run.schedule_name,
        **{f"{name}_format": fmt.name for name, fmt in run.formats},
        "w_granularity": run.precision.granularity("w"),
        "a_granularity": run.precision.granularity("a"),
        "attention_granularity": run.precision.granularity(*"qkvp"),
        "precision": run.precision.describe(),
        "validation_tokens": config.evaluate.sequences * shape.model.sequence_length,
        "vocab_size": shape.model.vocab_size,
        "imported": run.imported,
        # How a model was trained elsewhere is not known here.
        **(dict.fromkeys(("batch_size", "peak_rate", "warmup_fraction", "schedule")) if run.imported else {}),
    }


def planned_rows(config, run: Run) -> Iterator[dict[str, Any]]:
    """The rows that a run will have, without what only a measurement can tell."""
    columns = setting_columns(config, run) | {"status": ""}
    yield columns
    for scheme, bits_post in planned(config.ptq) if run.ptq else ():
        for bits in bits_post:
            yield {**columns, **scheme.columns, "P_post": bits}
