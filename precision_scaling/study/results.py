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
from precision_scaling.model import mixture
from precision_scaling.model.accounting import count_parameters, training_flops_per_token
from precision_scaling.ptq.registry import bits_post as bits_post_of
from precision_scaling.ptq.registry import planned
from precision_scaling.runtime import files, paths
from precision_scaling.runtime.files import atomic_write
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.run import Run

# {column: meaning}, in the order of the table. The contract's columns come first; readers ignore those they don't know.
COLUMNS = {
    "run": "id of the training run",
    "N": "non-embedding parameters",
    "D": "training tokens",
    "P_w": "bits of the weights in training, by the mean noise where layers differ; 16 is bf16, unquantized",
    "P_a": "bits of the activations in training",
    "P_kv": "bits of keys and values in training, the fewer of the two",
    "P_post": "bits after post-training quantization, by the mean noise where layers differ; empty before it",
    "loss": "nats per token on the held-out documents; empty where the run diverged",
    "status": "`ok` or `diverged`",
    "diverged_step": "the first step whose loss was not finite",
    "batches_left_out": "batches that `train.rewinds` left out",
    "method": "how it was quantized after training, with options that are not the default, e.g. `gptq-group32`",
    "fallback_layers": "kernels that were rounded to nearest, as their calibration was unusable",
    "seed": "of initialization, data order and stochastic rounding",
    "size": "name of the size",
    "epochs": "times the training text was seen",
    "training_flops": "FLOPs of training, as docs/metrics.md counts them",
    "width": "of the residual stream",
    "depth": "layers",
    "heads": "attention heads",
    "sequence_length": "tokens per sequence",
    "batch_size": "sequences per step",
    "peak_rate": "peak learning rate",
    "warmup_fraction": "share of the steps with a rising rate",
    "schedule": "of the learning rate",
    "average": "the average of the parameters that the row is of, `ema0.99`; empty for those at the end",
    "optimizer": "`adamw`, or `muon` for the blocks' kernels",
    "w_format": "number format of the weights in training; `int4:0.75+bf16:0.25` where layers differ",
    "a_format": "of the activations",
    "q_format": "of the queries",
    "k_format": "of the keys",
    "v_format": "of the values",
    "p_format": "of the attention probabilities",
    "w_granularity": "what shares a scale in the weights",
    "a_granularity": "in the activations",
    "attention_granularity": "in queries, keys, values and probabilities",
    "layers": "rules by layer of the training precision",
    "switches": "what the precision was before it was the one of the row",
    "switched_share": "share of the steps before it; empty where it never changed",
    "precision": "all of the training precision in one line",
    "ptq_granularity": "what shares a scale after training",
    "ptq_options": "other options of the quantization after training",
    "post_parts": "what it quantized: `w`, `wa` (activations, too) or `kv`",
    "post_format": "format of the weights after training, where it is not integers",
    "post_layers": "bits or formats by layer after training, where they differ: what `ptq.layers` would say",
    "stored_bits": "bits per weight on disk, scales and zero points included",
    "validation_tokens": "held-out tokens in the loss",
    "vocab_size": "of the tokenizer",
    "corpus": "hash of the token files",
    "within_documents": "`yes` where attention stays within documents, in training and evaluation",
    "device": "kind of device that measured the loss",
    "jax_version": "of JAX",
    "imported": "the model, where it was trained elsewhere",
}

_OF_TRAINING = ("batch_size", "peak_rate", "warmup_fraction", "schedule", "optimizer")


def write_rows(run_directory: Path, measurement: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records the rows of one measurement ("trained", "gptq", ...) of a run, with columns of COLUMNS alone."""
    rows = list(rows)
    for row in rows:
        _check_columns(row)
    files.write_sealed(paths.rows(run_directory, measurement), {"rows": rows})


def read_rows(run_directory: Path, measurement: str) -> list[dict[str, Any]]:
    """The rows of one measurement; none where it was not made. UserError for a file that is not what was written."""
    path = paths.rows(run_directory, measurement)
    try:
        return _parse(path, files.read(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def gather(workdir: Path) -> int:
    """Writes workdir/runs.csv from all rows found below workdir/runs; returns their number.

    Of workers that end at the same time, one may have looked before the other's last row, and write after it: so each
    looks again when it has written.
    """
    found = paths.all_rows(workdir)
    while True:
        contents = zip(found, files.read_all(found), strict=True)
        rows = [row for path, content in contents for row in _parse(path, content)]
        write_table(workdir / paths.TABLE, rows)
        before, found = found, paths.all_rows(workdir)
        if found == before:
            return len(rows)


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as a table, in an order that does not depend on theirs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (row["N"], row["D"], row["run"], row["method"], -(row["P_post"] or 99))):
        _check_columns(row)
        writer.writerow({name: cell(row.get(name)) for name in COLUMNS})
    atomic_write(path, text.getvalue())


def _parse(path: Path, content: bytes) -> list[dict[str, Any]]:
    try:
        rows = files.unsealed_list(content, path, "rows")
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise ValueError("no list of rows")
        measurement = paths.measurement(path)
        for row in rows:
            _check_columns(row)
            _check(row, path.parent.name, "" if measurement == "trained" else measurement)
        if len({row["P_post"] for row in rows}) < len(rows):
            raise ValueError("two rows of one measurement")
        return rows
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path}: not a file of rows ({reason}); delete it and run the study again to measure it anew"
        ) from None


def _check_columns(row: Mapping[str, Any]) -> None:
    """ValueError for a column that the table lacks: its values would be lost without a word."""
    if unknown := set(row) - set(COLUMNS):
        raise ValueError(f"no column of runs.csv: {', '.join(sorted(unknown))}")


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
        "average": run.average,
        "optimizer": config.optimizer.name,
        **{f"{name}_format": mixture.text(shares) for name, shares in run.formats},
        "w_granularity": run.precision.granularity("w"),
        "a_granularity": run.precision.granularity("a"),
        "attention_granularity": run.precision.granularity(*"qkvp"),
        "layers": run.precision.rules,
        "switches": "; ".join(f"{stage.short} until {end}" for end, stage in run.precision.before),
        "switched_share": round(run.switch_steps[-1] / run.steps, 4) if run.switch_steps else None,
        "precision": run.precision.describe(),
        "validation_tokens": config.evaluate.sequences * shape.model.sequence_length,
        "vocab_size": shape.model.vocab_size,
        "within_documents": "" if shape.model.document_token < 0 else "yes",
        "imported": run.imported,
        # How a model was trained elsewhere is not known here.
        **(dict.fromkeys(_OF_TRAINING) if run.imported else {}),
    }


def planned_rows(config, run: Run) -> Iterator[dict[str, Any]]:
    """The rows that a run will have, without what only a measurement can tell."""
    columns = setting_columns(config, run) | {"status": ""}
    yield columns
    for scheme, bits_post in planned(config.ptq) if run.ptq else ():
        for bits in bits_post:
            yield {**columns, **scheme.columns, "P_post": bits_post_of(scheme, bits, run.shape.model)}
