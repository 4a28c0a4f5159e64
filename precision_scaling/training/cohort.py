"""Trains the runs of a cohort together: one compiled program, so many lanes, the next run in each lane that is free.

Takes runs from `experiment`, batches from `data`, steps from `step`; hands each finished run's parameters to the caller
(`study`) and keeps metrics and checkpoints on the way. What is in the other lanes never changes a run.

Runs that differ in their length alone, and whose rate is constant until they decay, are trained once up to there: the
longest is the trunk, and the others start from its state at their branch step.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from precision_scaling.data.loader import Loader
from precision_scaling.errors import UserError
from precision_scaling.runtime import files, hosts
from precision_scaling.runtime.profiling import Profile
from precision_scaling.runtime.sharding import Layout
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.training import checkpoint, metrics, metrics_log, rewind, trackers
from precision_scaling.training import run as run_lib
from precision_scaling.training import step as step_lib
from precision_scaling.training.checkpoint import CohortCheckpoints
from precision_scaling.training.compiled import compiled_cohort, lanes_that_fit, stacked
from precision_scaling.training.feed import Chunk, Prefetcher
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.run import Cohort, Run
from precision_scaling.training.step import RunInputs, StepConfig, TrainState

DISPATCH_SECONDS = 10.0  # that a dispatch should take at most: stops, saves and the progress bar wait for its end


@dataclasses.dataclass(frozen=True)
class Options:
    """How a cohort is run; of these, only the lanes touch its results, and only by rounding.

    lanes: runs that train at once, at most. Another number is another compiled program, whose sums round differently,
    and one value that is quantized the other way shows in the losses: a cohort must be resumed with the same number.
    rewinds: how often a run whose loss or gradient is not finite goes back to its last checkpoint, and on without that
    batch. trackers: of `trackers.PACKAGES`, for the metrics.
    """

    lanes: int
    log_every: int
    checkpoint_seconds: float
    steps_per_dispatch: int
    rewinds: int = 0
    trackers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has come to its end. diverged_step: the first step with a loss that is not finite, or None.

    left_out: how many batches it has gone back to leave out.
    """

    run: Run
    params: Any
    diverged_step: int | None
    left_out: int = 0


def train_cohort(
    cohort: Cohort,
    optimizer: OptimizerConfig,
    loader: Loader,
    layout: Layout,
    workdir: Path,
    worker: str,
    options: Options,
    on_finished: Callable[[Finished], Callable[[], None] | None],
    progress: tqdm,
    stop: Stop,
    profile: Profile | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Trains every run of the cohort and calls `on_finished` once for each, in the order in which they end; what that
    returns is called when the next steps are done, and whatever comes, so that files can be written beside training.

    cohort: its runs are those still to be trained. layout: the devices, over which lanes, batches and parameters are
    spread. worker: names the checkpoints of this process among those that share a study. profile: is told of every
    dispatch. between: is called between two dispatches, and after the last.
    A killed call resumes from its checkpoints with the same bits. A run whose loss is no longer finite ends there, when
    it has no rewinds left; the others go on. Raises Stopped, after a checkpoint, as soon as `stop` asks for it.
    """
    step_config = StepConfig(cohort.shape.model, cohort.static, optimizer, cohort.shape.microbatches)
    profile = profile or Profile(workdir, 0)
    feed = lambda lanes: Prefetcher(loader, layout, lanes, step_config.microbatches, options.steps_per_dispatch)
    lanes = lanes_that_fit(
        step_config, layout, options.lanes, lambda n: (_inputs(cohort, [None] * n), feed(n).abstract)
    )
    if lanes < options.lanes:
        size, asked = cohort.shape.size, options.lanes
        logging.warning("%s: %d runs at a time; the devices have too little memory for %d", size, lanes, asked)
    trainer = _Trainer(step_config, cohort, feed(lanes), layout, workdir, worker, options, progress, profile)
    to_end: list[Callable[[], None]] = []
    try:
        trainer.restore()
        while trainer.fill():
            ended = trainer.advance()
            _call_all(to_end)
            to_end += filter(None, map(on_finished, ended))
            trainer.branch()
            asked = hosts.largest(_STOP if stop.asked() else _SAVE if trainer.save_is_due() else _GO_ON)
            if asked != _GO_ON:  # one decision for all processes
                _call_all(to_end)  # first: a run that has left its lane is in no later checkpoint
                trainer.save()
            if asked == _STOP:
                raise Stopped(stop.reason)
            between()
        _call_all(to_end)
        trainer.checkpoints.clear()
        between()
    finally:
        trainer.feed.close()
        trainer.followers.close()
        _call_all(to_end)


def _call_all(calls: list[Callable[[], None]]) -> None:
    """Calls each once, and takes it from the list."""
    while calls:
        calls.pop(0)()


_GO_ON, _SAVE, _STOP = range(3)


@dataclasses.dataclass
class _Lane:
    """A run under way, how many of its steps are done, and the batches of its stream that it leaves out."""

    run: Run
    step: int
    left_out: tuple[int, ...] = ()

    @property
    def position(self) -> tuple[int, int]:
        """(seed, number of the next batch), which name its tokens."""
        return self.run.seed, rewind.batch_of(self.step, self.left_out)


def _inputs(cohort: Cohort, lanes: "Sequence[_Lane | None]") -> RunInputs:
    """The traced inputs of all lanes; a free lane idles at rate 0 on the first run's formats."""
    runs = [lane.run if lane else cohort.runs[0] for lane in lanes]
    tables = [cohort.static.grids(run.precision) for run in runs]
    idle = lambda schedule: schedule._replace(peak_lr=np.float32(0))
    schedules = [run.schedule if lane else idle(run.schedule) for run, lane in zip(runs, lanes, strict=True)]
    return RunInputs(
        grids=jax.tree.map(lambda *grids: np.stack(grids), *tables),
        schedule=jax.tree.map(lambda *lanes: np.stack(lanes), *schedules),
        seed=np.array([run.seed for run in runs], np.int32),
    )


def _leads_to(lane: _Lane | None, run: Run) -> bool:
    """Whether the run in a lane has the branch step of another before it, on the way they share."""
    return (
        lane is not None
        and 0 < run.branch_step <= lane.run.branch_step
        and lane.step <= run.branch_step
        and lane.run.trunk == run.trunk
    )


class _Trainer:
    """The state of a cohort under way: what is in which lane, and what still waits."""

    def __init__(
        self, step_config, cohort: Cohort, feed: Prefetcher, layout: Layout, workdir, worker, options, progress, profile
    ):
        self.static, self.cohort, self.layout = step_config, cohort, layout
        self.workdir, self.options, self.progress, self.profile = workdir, options, progress, profile
        self.followers = trackers.Followers(options.trackers if hosts.primary() else ())
        self._step_tokens = cohort.shape.tokens_per_step
        self.waiting: list[Run] = list(cohort.runs)
        self.lanes: list[_Lane | None] = [None] * feed.lanes
        self.feed = feed
        self.compiled = compiled_cohort(step_config, layout, feed.lanes)
        # One lane's state, repeated; `fill` replaces it.
        self.state: TrainState = self.compiled.spread(self.compiled.initialize(0))
        self.checkpoints = cohort_checkpoints(workdir, cohort, worker)
        self.saved_at = time.monotonic()
        self.most_steps = 1  # of a dispatch; the first one shows how long a step takes

    def restore(self) -> None:
        """Puts the runs of the newest checkpoint back into lanes."""
        one = self.compiled.one
        found = self.checkpoints.restore(lambda n: self.layout.abstract(stacked(one, n), lanes=True))
        if found is None:
            return
        saved, state = found
        wanted = {run.id: run for run in self.waiting}
        free = iter(range(len(self.lanes)))
        for i, entry in enumerate(saved):
            run = wanted.get(entry["run"])
            if run is None:
                continue
            left_out = rewind.left_out(run_directory(self.workdir, run))
            if not set(entry.get("left_out", ())) <= set(left_out):
                logging.warning("%s is lost for %s; training it from its first step", rewind.FILE, run.id)
                continue
            if (lane := next(free, None)) is None:
                continue
            self.state = self.compiled.put(self.state, lane, self.compiled.pick(state, i))
            self.lanes[lane] = _Lane(run, entry["step"], left_out)
            self.waiting.remove(run)
            self._truncate_metrics(run, entry["step"])
            self.progress.update(entry["step"] * self._step_tokens)

    def fill(self) -> bool:
        """Starts waiting runs in free lanes; False when there is nothing left to do."""
        for i, lane in enumerate(self.lanes):
            if lane is None and (run := self._next(self.lanes, self.waiting)) is not None:
                self.waiting.remove(run)
                step = self._begin(i, run)
                self.progress.total -= step * self._step_tokens
        return any(lane is not None for lane in self.lanes)

    def _next(self, lanes: "list[_Lane | None]", waiting: list[Run]) -> Run | None:
        """The first waiting run whose branch step is there already, or that no lane under way will bring to it."""
        awaited = lambda run: any(_leads_to(lane, run) for lane in lanes) and not self._branch_path(run).exists()
        return next((run for run in waiting if not awaited(run)), None)

    def _begin(self, i: int, run: Run, back: tuple[int, TrainState] | None = None) -> int:
        """Puts a run in a lane, at its start or where it goes back to; returns the step."""
        step, state = back or self._start(run)
        self.state = self.compiled.put(self.state, i, state)
        self.lanes[i] = _Lane(run, step, rewind.left_out(run_directory(self.workdir, run)))
        self._truncate_metrics(run, step)
        return step

    def _start(self, run: Run) -> tuple[int, TrainState]:
        """(step, state) a run starts with: that of its branch step where a trunk has left it."""
        path = self._branch_path(run)
        if path.exists():
            try:
                state = checkpoint.restore(path, self.layout.abstract(self.compiled.one))
                if int(state.step) != run.branch_step:
                    raise UserError(f"{path}: is at step {int(state.step)}, not {run.branch_step}")
                return run.branch_step, state
            except UserError as error:
                logging.warning("%s; training %s from its first step", error, run.id)
        return 0, self.compiled.initialize(run.seed)

    def branch(self) -> None:
        """Keeps the states that waiting runs start from, on disk, as the trunks under way pass them."""
        for i, lane in enumerate(self.lanes):
            for run in self.waiting if lane else ():
                if _leads_to(lane, run) and lane.step == run.branch_step and not self._branch_path(run).exists():
                    if hosts.primary():
                        self._copy_history(lane.run, run)
                    # Last: with it, the run has what it starts from.
                    checkpoint.save(self._branch_path(run), self.compiled.pick(self.state, i))

    def advance(self) -> list[Finished]:
        """Trains all lanes until the next one ends, or as far as one dispatch goes; returns the runs that ended."""
        active = [(i, lane) for i, lane in enumerate(self.lanes) if lane is not None]
        chunk = self._chunk(self.lanes)
        steps = chunk.steps
        with self.profile.dispatch():
            started, waited = time.monotonic(), self.feed.wait_seconds
            tokens = self.feed.take(chunk)
            if (expected := self._chunk(self._expected(steps))).steps:
                self.feed.read_ahead(expected)
            self.state, found = self.compiled.train(self.state, _inputs(self.cohort, self.lanes), tokens, steps)
            found = jax.tree.map(lambda x: np.asarray(x)[:, :steps], found)
            seconds, waited = time.monotonic() - started, self.feed.wait_seconds - waited
        self._set_most_steps(seconds / steps)
        speed = self._speed(len(active), steps, seconds, waited)
        ended, trained = [], 0
        for i, lane in active:
            if len(lane.left_out) < self.options.rewinds:
                finite = np.isfinite(found.loss[i]) & np.isfinite(found.grad_norm[i])
                if not finite.all():
                    self._rewind(i, lane.step + int(np.argmin(finite)))
                    continue
            finite = np.isfinite(found.loss[i])
            diverged = None if finite.all() else lane.step + int(np.argmin(finite))
            self._log(lane, jax.tree.map(lambda x, i=i: x[i], found), speed)
            lane.step += steps
            trained += steps
            if diverged is not None or lane.step == lane.run.steps:
                params = self.compiled.parameters(self.state.params, i)
                ended.append(Finished(lane.run, params, diverged, len(lane.left_out)))
                self.progress.total -= (lane.run.steps - lane.step) * self._step_tokens
                if hosts.primary():
                    shutil.rmtree(self._branch_path(lane.run), ignore_errors=True)
                self.followers.end(self._metrics_path(lane.run))
                self.lanes[i] = None
        self.progress.set_postfix(loss=f"{np.mean(found.loss[[i for i, _ in active], -1]):.3f}", refresh=False)
        self.progress.update(trained * self._step_tokens)
        return ended

    def _rewind(self, i: int, step: int) -> None:
        """Takes the run in a lane back to its newest checkpoint, or its start, to do this step without its batch."""
        lane, directory = self.lanes[i], run_directory(self.workdir, self.lanes[i].run)
        batch = rewind.batch_of(step, lane.left_out)
        if hosts.primary():
            rewind.leave_out(directory, step)
        hosts.wait_for_all("left out a batch")
        # Those before the step are good: they were made by finite gradients.
        back = self._saved(lane.run, step)
        self.followers.end(self._metrics_path(lane.run))
        begun = self._begin(i, lane.run, back)
        self.progress.update((begun - lane.step) * self._step_tokens)
        logging.warning(
            "%s: loss or gradient is not finite at step %d; back to step %d, and on without batch %d (rewind %d of %d)",
            *(lane.run.id, step + 1, begun, batch, len(lane.left_out) + 1, self.options.rewinds),
        )

    def _saved(self, run: Run, step: int) -> tuple[int, TrainState] | None:
        """(step, state) of a run in the newest checkpoint, where it is there and not after `step`."""
        found = self.checkpoints.restore(lambda n: self.layout.abstract(stacked(self.compiled.one, n), lanes=True))
        for i, entry in enumerate(found[0] if found else ()):
            if entry["run"] == run.id and entry["step"] <= step:
                return entry["step"], self.compiled.pick(found[1], i)
        return None

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return any(self.lanes) and time.monotonic() - self.saved_at > self.options.checkpoint_seconds

    def save(self) -> None:
        """Writes a checkpoint of all lanes; of none, where the cohort is at its end or between two runs."""
        if any(self.lanes):
            described = lambda lane: {"run": lane.run.id, "step": lane.step, "left_out": lane.left_out}
            lanes = [described(lane) if lane else {"run": None, "step": 0} for lane in self.lanes]
            self.checkpoints.save(lanes, self.state)
        self.saved_at = time.monotonic()

    def _chunk(self, lanes: list[_Lane | None]) -> Chunk:
        """What is trained on next: all lanes go on until the next one ends or is branched from, or as far as one
        dispatch goes."""
        ends = [lane.run.steps - lane.step for lane in lanes if lane is not None]
        branches = [run.branch_step - lane.step for lane in lanes for run in self.waiting if _leads_to(lane, run)]
        in_a_row = [rewind.steps_in_a_row(lane.step, lane.left_out) for lane in lanes if lane is not None]
        steps = min([*ends, *in_a_row, *(left for left in branches if left)], default=0)
        return Chunk(tuple(lane and lane.position for lane in lanes), min(self.most_steps, steps))

    def _set_most_steps(self, seconds: float) -> None:
        """So many that a dispatch keeps to DISPATCH_SECONDS at these seconds per step; the same for all processes."""
        # A power of two, which small changes of speed leave as it is: other batches would have to be read.
        steps = 2 ** int(math.log2(max(1.0, DISPATCH_SECONDS / seconds)))
        self.most_steps = -hosts.largest(-min(self.feed.max_steps, steps))

    def _expected(self, steps: int) -> list[_Lane | None]:
        """The lanes after these steps, unless a run diverges in them."""
        waiting, after = list(self.waiting), []
        for lane in self.lanes:
            goes_on = lane is not None and lane.step + steps < lane.run.steps
            after.append(dataclasses.replace(lane, step=lane.step + steps) if goes_on else None)
        for i, lane in enumerate(after):
            if lane is None and (run := self._next(after, waiting)) is not None:
                waiting.remove(run)
                after[i] = _Lane(run, run.branch_step if self._branch_path(run).exists() else 0)
        return after

    def _copy_history(self, trunk: Run, run: Run) -> None:
        """What is known of the steps that a run shares with its trunk."""
        there = run_directory(self.workdir, run)
        for path in (self._metrics_path(trunk), run_directory(self.workdir, trunk) / rewind.FILE):
            if path.exists():
                files.copy(path, there / path.name)

    def _branch_path(self, run: Run) -> Path:
        return run_directory(self.workdir, run) / "branch"

    def _metrics_path(self, run: Run) -> Path:
        return run_directory(self.workdir, run) / metrics_log.FILE

    def _speed(self, active: int, steps: int, seconds: float, waited: float) -> dict[str, float]:
        model, devices = self.cohort.shape.model, self.layout.mesh.devices
        return metrics.speed(model, devices, active, steps * self._step_tokens, seconds, waited)

    def _truncate_metrics(self, run: Run, step: int) -> None:
        if hosts.primary():
            metrics_log.truncate(self._metrics_path(run), step)

    def _log(self, lane: _Lane, found: step_lib.StepMetrics, speed: dict[str, float]) -> None:
        """Writes the steps that a run has done to its metrics.jsonl, and passes them on."""
        if hosts.primary():
            path, every, tokens = self._metrics_path(lane.run), self.options.log_every, self._step_tokens
            metrics_log.append(path, found, lane.step + 1, lane.run.steps, every, tokens, speed)
            self.followers.follow(path)


def run_directory(workdir: Path, run: Run) -> Path:
    """Where everything about a run is kept."""
    return workdir / "runs" / run.id


def cohort_checkpoints(workdir: Path, cohort: Cohort, worker: str) -> CohortCheckpoints:
    """The checkpoints of a cohort under way; those of workers that share a study lie side by side."""
    return CohortCheckpoints(workdir / "cohorts" / f"{cohort_name(cohort)}-{worker}")


def cohort_name(cohort: Cohort) -> str:
    """Name of a cohort's checkpoints: the same for the same shape and static precision, whichever runs are left."""
    return f"{cohort.shape.size}-{run_lib.digest((cohort.shape, cohort.static))}"
