"""Runs per hour of a study against the same runs one by one: `python -m benchmarks.cohorts [--size=25k --lanes=8]`.

Every way does all that a study does for a run (training, evaluation, checkpoint, row), in this process, on an empty
workdir and without a cache of compiled programs:

    cohort        one program, `lanes` runs at a time
    shared        one program, one run at a time
    one by one    a program for each run, as a command for each run has it

Runs are those of one size at --tokens times --precisions. Prints seconds, runs per hour, ratios to the last way,
how far the losses of the three lie apart, and the devices' peak memory where they tell it.
"""

import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from precision_scaling.config import base
from precision_scaling.model.accounting import training_flops_per_token
from precision_scaling.runtime import cli
from precision_scaling.study import evaluate, results, run_missing
from precision_scaling.study.workspace import open_workspace
from precision_scaling.training.compiled import compiled_cohort

FLAGS = flags.FlagValues()
_SIZE = flags.DEFINE_string("size", "25k", "Size of the models.", flag_values=FLAGS)
_TOKENS = flags.DEFINE_list("tokens", ["100000", "200000"], "Token budgets.", flag_values=FLAGS)
_PRECISIONS = flags.DEFINE_list(
    "precisions", ["bf16", "w3", "w4", "a4", "a6", "kv4", "w4_a6_kv4"], "Precisions.", flag_values=FLAGS
)
_LANES = flags.DEFINE_integer("lanes", 8, "Runs at a time.", lower_bound=1, flag_values=FLAGS)
_CORPUS = flags.DEFINE_string("corpus", base.get_config().data.name, "Corpus.", flag_values=FLAGS)
_SEQUENCE = flags.DEFINE_integer("sequence_length", 64, "Tokens per sequence.", flag_values=FLAGS)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Sequences per step.", flag_values=FLAGS)


def config(tokens, precisions, lanes: int):
    """The study of these runs."""
    c = base.get_config()
    c.data.name = _CORPUS.value
    c.model.sequence_length, c.train.batch_size, c.study.lanes = _SEQUENCE.value, _BATCH.value, lanes
    c.compilation_cache = "none"
    c.study.grid.all = base.grid((_SIZE.value,), tuple(tokens), tuple(precisions))
    return c


def measure(studies: list, clear: bool) -> tuple[float, dict[str, float]]:
    """(seconds, loss of every run) of studies done one after the other; clear: each compiles anew."""
    losses, seconds = {}, 0.0
    jax.clear_caches()
    with tempfile.TemporaryDirectory() as directory:
        for i, one in enumerate(studies):
            if clear:
                jax.clear_caches()
                compiled_cohort.cache_clear()
                evaluate._validation_loss.cache_clear()
            start = time.perf_counter()
            workspace = open_workspace(one, Path(directory) / str(i))
            run_missing.train_missing(workspace)
            seconds += time.perf_counter() - start
            for run in workspace.experiment.runs:
                (row,) = results.read_rows(workspace.directory(run), "trained")
                losses[run.id] = row["loss"]
    return seconds, losses


def main() -> None:
    tokens, precisions = [int(float(text)) for text in _TOKENS.value], _PRECISIONS.value
    single = [(t, p) for p in precisions for t in tokens]
    whole = config(tokens, precisions, _LANES.value)
    workspace = open_workspace(whole, Path(tempfile.mkdtemp()))  # the corpus is made before anything is timed
    shape = workspace.experiment.runs[0].shape
    flops = training_flops_per_token(shape.model) * sum(run.tokens for run in workspace.experiment.runs)
    print(f"{len(single)} runs of {_SIZE.value}, {flops:.2e} FLOPs, on {jax.devices()[0].device_kind}", flush=True)
    ways = {
        "cohort": ([whole], True),
        "shared": ([config(tokens, precisions, 1)], True),
        "one by one": ([config([t], [p], 1) for t, p in single], True),
    }
    found = {}
    for name, (studies, clear) in ways.items():
        found[name] = measure(studies, clear)
        seconds = found[name][0]
        print(
            f"{name:12} {seconds:8.1f} s  {3600 * len(single) / seconds:8.0f} runs/h  {flops / seconds:.2e} FLOP/s",
            flush=True,
        )
    slowest = found["one by one"][0]
    print("  ".join(f"{name} {slowest / seconds:.1f}x" for name, (seconds, _) in found.items()))
    for name in ("cohort", "shared"):
        apart = [abs(found[name][1][run] / loss - 1) for run, loss in found["one by one"][1].items()]
        print(
            f"losses of {name} and one by one: {np.max(apart):.1e} apart at most, {np.median(apart):.1e} in the middle"
        )
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        print(f"peak memory of the device {stats['peak_bytes_in_use'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
