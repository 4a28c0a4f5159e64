"""The table of a study: its columns, an atomically written file of rows per measurement, and runs.csv made from them.

Workers on many machines write different files and never share one; `gather` can be repeated at any time.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from precision_scaling.errors import UserError

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
    *("ptq_granularity", "ptq_options", "post_parts", "stored_bits"),
    *("validation_tokens", "vocab_size", "corpus", "device", "jax_version", "imported"),
)
ROW_FILES = "rows-*.json"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place when the block ends well: a reader sees all of it or what
    was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield temporary
    os.replace(temporary, path)


def atomic_write(path: Path, text: str) -> None:
    """Writes a file so that a reader, now or after a crash, sees all of it or what was there before."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_rows(run_directory: Path, measurement: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records the rows of one measurement ("trained", "gptq", ...) of a run."""
    atomic_write(run_directory / f"rows-{measurement}.json", json.dumps(list(rows), indent=1) + "\n")


def read_rows(run_directory: Path, measurement: str) -> list[dict[str, Any]]:
    """The rows of one measurement; none where it was not made. UserError for a file that is not ours."""
    path = run_directory / f"rows-{measurement}.json"
    if not path.exists():
        return []
    return _load(path)


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


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not a file of rows; delete it and run the study again to measure it anew") from None


def cell(value: Any) -> str:
    """A value as the table has it."""
    if value is None:
        return ""
    # 16.0 bits is 16; losses keep every digit that tells two runs apart.
    return f"{value:.10g}" if isinstance(value, float) else str(value)
