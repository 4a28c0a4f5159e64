"""Every path below a workdir: what train, study and ptq leave on disk. docs/workdir.md shows it as a tree.

A workdir holds a directory for each run, named by the run's id.
"""

from pathlib import Path

from precision_scaling.runtime import files

# Directly below the workdir
CONFIG = "config.json"  # the options, and the corpus's hash; sealed
TABLE = "runs.csv"  # gathered from the rows of all runs
LOCKS = "locks"  # a file for each shard that a process works on
PROFILE = "profile"  # traces of --profile
RUNS = "runs"
COHORTS = "cohorts"  # checkpoints of runs that train together, removed when all have ended

# Below a run's directory
CHECKPOINT = "checkpoint"  # parameters at its end
BRANCH = "branch"  # the state that it starts from, left by its trunk; removed at its end
METRICS = "metrics.jsonl"
METRICS_PARTS = "metrics"  # in a bucket: what is not in metrics.jsonl yet
REWINDS = "rewinds.json"  # batches that it left out; sealed
TENSORBOARD = "tensorboard"
QUANTIZED = "quantized"  # packed models, see `packed`

# Below the checkpoint of a model from elsewhere, which has a directory for each block
TOP = "top"  # the parameters outside of the blocks; written last

# Below a cohort's checkpoint and a packed model
STATE = "state"
LANES = "lanes.json"  # which run is in which lane, and at which step; sealed
ARRAYS = "arrays"
DESCRIPTION = "quantized.json"  # what the arrays are; sealed


def run(workdir: Path, run_id: str) -> Path:
    """Where everything about a run is kept."""
    return workdir / RUNS / run_id


def cohort(workdir: Path, name: str, worker: str) -> Path:
    """Checkpoints of a cohort under way; those of workers that share a study lie side by side."""
    return workdir / COHORTS / f"{name}-{worker}"


def rows(run_directory: Path, measurement: str) -> Path:
    """The rows of one measurement of a run: "trained", or the name of a scheme of quantization; sealed."""
    return run_directory / f"rows-{measurement}.json"


def measurement(rows_file: Path) -> str:
    """The one whose rows a file holds, by its name."""
    return rows_file.stem.removeprefix("rows-")


def all_rows(workdir: Path) -> list[Path]:
    """The files of rows of all runs, in a fixed order."""
    return files.matching(workdir, f"{RUNS}/*/rows-*.json")


def layer_errors(run_directory: Path, scheme: str) -> Path:
    """The error of each kernel under a scheme of quantization; sealed."""
    return run_directory / f"layers-{scheme}.json"


def sensitivity(run_directory: Path, scheme: str) -> Path:
    """The loss that each projection is expected to add at each width under a scheme; sealed."""
    return run_directory / f"sensitivity-{scheme}.json"


def layer_stats(run_directory: Path, precision: str = "") -> Path:
    """The table of `layer_stats`, for the run's own precision or another; its figure lies beside it, as .png."""
    return run_directory / f"layer-stats{precision and f'-{precision}'}.csv"


def layer_split(layer_stats_file: Path) -> Path:
    """The table of each layer's own and inherited error, beside that of its operands."""
    return layer_stats_file.with_name(layer_stats_file.name.replace("layer-stats", "layer-errors", 1))


def metrics_part(metrics: Path, step: int) -> Path:
    """The part of a metrics.jsonl whose first line is that of a step."""
    return metrics.with_name(METRICS_PARTS) / f"{step:012d}.jsonl"


def block(layer: int) -> str:
    """The directory of one block, beside `TOP`."""
    return f"{layer:04d}"


def parts(run_directory: Path, scheme: str, bits: float) -> Path:
    """What is done of a model that is being quantized, a file for each block; removed when its row is written."""
    return run_directory / QUANTIZED / f"{scheme}-{bits}.parts"


def packed(run_directory: Path, scheme: str, bits: float) -> Path:
    """The directory of a packed model."""
    return run_directory / QUANTIZED / f"{scheme}-{bits}"
