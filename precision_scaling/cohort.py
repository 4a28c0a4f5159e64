"""Trains the runs of a cohort together: one compiled program, so many lanes, the next run in each lane that is free.

Takes runs from `experiment`, batches from `data`, steps from `step`; hands each finished run's parameters to the caller
(`study`) and keeps metrics and checkpoints on the way. What is in the other lanes never changes a run.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from precision_scaling import compilation, experiment, results
from precision_scaling import step as step_lib
from precision_scaling.checkpoint import CohortCheckpoints
from precision_scaling.data.loader import Loader, gather_windows
from precision_scaling.experiment import Cohort, Run
from precision_scaling.optimizer import OptimizerConfig
from precision_scaling.step import RunInputs, Static, TrainState


@dataclasses.dataclass(frozen=True)
class Options:
    """How a cohort is run; of these, only the lanes touch its results, and only by rounding.

    lanes: runs that train at once. Another number of lanes is another compiled program, whose sums round differently,
    and one value that is quantized the other way shows in the losses: a cohort must be resumed with the same number.
    """

    lanes: int
    log_every: int
    checkpoint_seconds: float
    steps_per_dispatch: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has come to its end. diverged_step: the first step with a loss that is not finite, or None."""

    run: Run
    params: Any
    diverged_step: int | None


def table_of(run: Run, program, **replaced) -> dict[str, Any]:
    """The grids of a run's formats for the operands that the program quantizes; `replaced` gives other formats."""
    return run.precision.table(program, **replaced)


@functools.lru_cache(maxsize=8)
def _programs(static: Static, max_steps: int):
    """Compiled per shape and number of lanes: initialize, train, take a lane's parameters, put a state in a lane."""

    def train(state, inputs, corpus, windows_RxTxB, steps):
        def fetch(t):
            windows_RxB = jax.lax.dynamic_index_in_dim(windows_RxTxB, t, 1, keepdims=False)
            return gather_windows(corpus, windows_RxB, static.model.sequence_length)

        return step_lib.train_chunk(static, state, inputs, fetch, steps, max_steps)

    initialize = compilation.jit(functools.partial(step_lib.init_state, static), level=1)
    take = jax.jit(lambda params, lane: jax.tree.map(lambda x: x[lane], params))
    put = jax.jit(lambda state, lane, one: jax.tree.map(lambda x, y: x.at[lane].set(y), state, one), donate_argnums=0)
    return initialize, compilation.jit(train, donate_argnums=0), take, put


def train_cohort(
    cohort: Cohort,
    optimizer: OptimizerConfig,
    loader: Loader,
    corpus: jax.Array,
    workdir: Path,
    worker: str,
    options: Options,
    on_finished: Callable[[Finished], None],
    progress: tqdm,
) -> None:
    """Trains every run of the cohort and calls `on_finished` once for each, in the order in which they end.

    cohort: its runs are those still to be trained. corpus: the training tokens on the device. worker: names the
    checkpoints of this process among those that share a study.
    A killed call resumes from its checkpoints with the same bits. A run whose loss is no longer finite ends there; the
    others go on.
    """
    static = Static(cohort.shape.model, cohort.program, optimizer, cohort.shape.microbatches)
    trainer = _Trainer(static, cohort, loader, corpus, workdir, worker, options, progress)
    trainer.restore()
    while trainer.fill():
        for finished in trainer.advance():
            on_finished(finished)
        trainer.save_if_due()  # after the rows: a run that has left its lane is in no later checkpoint
    trainer.checkpoints.clear()


@dataclasses.dataclass
class _Lane:
    """A run under way and how many of its steps are done."""

    run: Run
    step: int


class _Trainer:
    """The state of a cohort under way: what is in which lane, and what still waits."""

    def __init__(self, static, cohort: Cohort, loader, corpus, workdir, worker, options: Options, progress):
        self.static, self.cohort, self.loader, self.corpus = static, cohort, loader, corpus
        self.workdir, self.options, self.progress = workdir, options, progress
        self.waiting: list[Run] = list(cohort.runs)
        self.lanes: list[_Lane | None] = [None] * options.lanes
        self.initialize, self.train, self.take, self.put = _programs(static, options.steps_per_dispatch)
        # One lane's state, repeated; `fill` replaces it.
        blank = self.initialize(0)
        self.state: TrainState = jax.tree.map(lambda x: jnp.repeat(x[None], len(self.lanes), axis=0), blank)
        self.checkpoints = cohort_checkpoints(workdir, cohort, worker)
        self.saved_at = time.monotonic()

    def restore(self) -> None:
        """Puts the runs of the newest checkpoint back into lanes."""
        one = jax.eval_shape(self.initialize, 0)
        stacked = lambda n: jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), one)
        found = self.checkpoints.restore(stacked)
        if found is None:
            return
        saved, state = found
        wanted = {run.id: run for run in self.waiting}
        free = iter(range(len(self.lanes)))
        for i, entry in enumerate(saved):
            run = wanted.get(entry["run"])
            if run is None or (lane := next(free, None)) is None:
                continue
            self.state = self.put(self.state, lane, jax.tree.map(lambda x, i=i: x[i], state))
            self.lanes[lane] = _Lane(run, entry["step"])
            self.waiting.remove(run)
            truncate_metrics(self._metrics_path(run), entry["step"])
            self.progress.update(entry["step"] * self.cohort.shape.tokens_per_step)

    def fill(self) -> bool:
        """Starts waiting runs in free lanes; False when there is nothing left to do."""
        for i, lane in enumerate(self.lanes):
            if lane is None and self.waiting:
                run = self.waiting.pop(0)
                self.state = self.put(self.state, i, self.initialize(run.seed))
                self.lanes[i] = _Lane(run, 0)
                truncate_metrics(self._metrics_path(run), 0)
        return any(lane is not None for lane in self.lanes)

    def advance(self) -> list[Finished]:
        """Trains all lanes until the next one ends, or as far as one dispatch goes; returns the runs that ended."""
        active = [(i, lane) for i, lane in enumerate(self.lanes) if lane is not None]
        steps = min(self.options.steps_per_dispatch, *(lane.run.steps - lane.step for _, lane in active))
        started = time.monotonic()
        self.state, metrics = self.train(self.state, self._inputs(), self.corpus, self._windows(steps), steps)
        metrics = jax.tree.map(lambda x: np.asarray(x)[:, :steps], metrics)
        rate = len(active) * steps * self.cohort.shape.tokens_per_step / (time.monotonic() - started)
        ended = []
        for i, lane in active:
            finite = np.isfinite(metrics.loss[i])
            diverged = None if finite.all() else lane.step + int(np.argmin(finite))
            self._log(lane, jax.tree.map(lambda x, i=i: x[i], metrics), rate / len(active))
            lane.step += steps
            if diverged is not None or lane.step == lane.run.steps:
                ended.append(Finished(lane.run, self.take(self.state.params, i), diverged))
                self.progress.total -= (lane.run.steps - lane.step) * self.cohort.shape.tokens_per_step
                self.lanes[i] = None
        self.progress.set_postfix(loss=f"{np.mean(metrics.loss[[i for i, _ in active], -1]):.3f}", refresh=False)
        self.progress.update(len(active) * steps * self.cohort.shape.tokens_per_step)
        return ended

    def save_if_due(self) -> None:
        """Writes a checkpoint of all lanes where the last one is old enough."""
        if not any(self.lanes) or time.monotonic() - self.saved_at <= self.options.checkpoint_seconds:
            return
        lanes = [{"run": lane.run.id, "step": lane.step} if lane else {"run": None, "step": 0} for lane in self.lanes]
        self.checkpoints.save(lanes, self.state)
        self.saved_at = time.monotonic()

    def _inputs(self) -> RunInputs:
        """The traced inputs of all lanes; a free lane idles at rate 0 on the first run's formats."""
        runs = [lane.run if lane else self.cohort.runs[0] for lane in self.lanes]
        tables = [table_of(run, self.cohort.program) for run in runs]
        return RunInputs(
            table=jax.tree.map(lambda *grids: np.stack(grids), *tables),
            peak_rate=np.array([lane.run.peak_rate if lane else 0.0 for lane in self.lanes], np.float32),
            total_steps=np.array([run.steps for run in runs], np.int32),
            warmup_steps=np.array([run.warmup_steps for run in runs], np.int32),
            seed=np.array([run.seed for run in runs], np.int32),
        )

    def _windows(self, steps: int) -> np.ndarray:
        """Windows of the next `steps` batches of every lane, (R, steps_per_dispatch, B), zeros past `steps`."""
        shape = (len(self.lanes), self.options.steps_per_dispatch, self.cohort.shape.batch_size)
        windows_RxTxB = np.zeros(shape, np.int32)
        for i, lane in enumerate(self.lanes):
            if lane is not None:
                windows_RxTxB[i, :steps] = self.loader.window_indices(lane.run.seed, lane.step, steps)
        return windows_RxTxB

    def _metrics_path(self, run: Run) -> Path:
        return run_directory(self.workdir, run) / "metrics.jsonl"

    def _log(self, lane: _Lane, metrics: step_lib.StepMetrics, tokens_per_second: float) -> None:
        """Appends a line for every log_every-th step (and the last) to the run's metrics.jsonl."""
        path = self._metrics_path(lane.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            for t, (loss, grad_norm, rate) in enumerate(zip(*metrics, strict=True)):
                step = lane.step + t + 1
                if step % self.options.log_every == 0 or step == lane.run.steps:
                    line = {
                        "step": step,
                        "tokens": step * self.cohort.shape.tokens_per_step,
                        "loss": float(loss) if math.isfinite(loss) else None,
                        "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,
                        "learning_rate": float(rate),
                        "tokens_per_second": round(tokens_per_second, 1),
                    }
                    file.write(json.dumps(line) + "\n")


def run_directory(workdir: Path, run: Run) -> Path:
    """Where everything about a run is kept."""
    return workdir / "runs" / run.id


def cohort_checkpoints(workdir: Path, cohort: Cohort, worker: str) -> CohortCheckpoints:
    """The checkpoints of a cohort under way; those of workers that share a study lie side by side."""
    return CohortCheckpoints(workdir / "cohorts" / f"{cohort_name(cohort)}-{worker}")


def cohort_name(cohort: Cohort) -> str:
    """Name of a cohort's checkpoints: the same for the same shape and program, whichever of its runs are left."""
    return f"{cohort.shape.size}-{experiment.digest((cohort.shape, cohort.program))}"


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which will be written again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line + "\n")
    results.atomic_write(path, "".join(kept))
