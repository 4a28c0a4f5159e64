"""Trains the runs of a cohort together: one compiled program, so many lanes, the next run in each lane that is free.

Takes batches from `data` and steps from `step`; hands each finished run's parameters to the caller (`study`) and keeps
metrics and checkpoints on the way. What is in the other lanes never changes a run.

Runs that differ only in length, and whose rate is constant until they decay, share their prefix: the longest is the
trunk, and the others start from its state at their branch step. What comes next is decided in `lanes`.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from precision_scaling.data.loader import Loader
from precision_scaling.errors import UserError
from precision_scaling.runtime import files, hosts, paths
from precision_scaling.runtime.profiling import Profile
from precision_scaling.runtime.sharding import Layout
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.training import checkpoint, lanes, metrics, metrics_log, rewind, trackers
from precision_scaling.training import run as run_lib
from precision_scaling.training import step as step_lib
from precision_scaling.training.checkpoint import CohortCheckpoints
from precision_scaling.training.compiled import compiled_cohort, lanes_that_fit, stacked
from precision_scaling.training.feed import Prefetcher
from precision_scaling.training.lanes import Lane, Lanes
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.preemption import Preemption
from precision_scaling.training.run import Cohort, Run
from precision_scaling.training.step import RunInputs, StepConfig, TrainState


@dataclasses.dataclass(frozen=True)
class Options:
    """How a cohort is run; of these, only the lanes touch its results, and only by rounding.

    lanes: runs that train at once, at most. Another number is another compiled program, whose sums round differently,
    and one value that is quantized the other way shows in the losses: a cohort must be resumed with the same number.
    rewinds: how often a run whose loss or gradient is not finite goes back to its last checkpoint, and on without that
    batch. trackers: of `trackers.TRACKERS`, for the metrics.
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

    left_out: how many batches it has gone back to leave out. averages: of the parameters, one for each decay.
    """

    run: Run
    params: Any
    diverged_step: int | None
    left_out: int = 0
    averages: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Context:
    """What the cohorts of a study are trained with.

    layout: the devices, over which lanes, batches and parameters are sharded. workdir: of the study. worker: names the
    checkpoints of this process among those that share the study. profile: records the dispatches. between: is called
    between two dispatches, and after the last.
    """

    optimizer: OptimizerConfig
    layout: Layout
    workdir: Path
    worker: str
    options: Options
    progress: tqdm
    stop: Stop
    profile: Profile | None = None
    between: Callable[[], None] = lambda: None


def train_cohort(
    cohort: Cohort, loader: Loader, context: Context, on_finished: Callable[[Finished], Callable[[], None] | None]
) -> None:
    """Trains every run of the cohort and calls `on_finished` once for each, in the order in which they end.

    What that returns is called when the next steps are done, or in any case at the end, so that files can be written
    beside training. cohort: its runs are those still to be trained.
    A killed call resumes from its checkpoints with the same bits. A run whose loss is no longer finite ends there, when
    it has no rewinds left; the others go on. Raises Stopped, after a checkpoint, as soon as `stop` asks for it.
    """
    shape, options, stop = cohort.shape, context.options, context.stop
    step_config = StepConfig(shape.model, cohort.static, context.optimizer, shape.microbatches)
    feed = lambda n: Prefetcher(loader, context.layout, n, shape.microbatches, options.steps_per_dispatch)
    number = lanes_that_fit(
        step_config, context.layout, options.lanes, lambda n: (_inputs(cohort, [None] * n), feed(n).abstract)
    )
    if number < options.lanes:
        asked = options.lanes
        logging.warning("%s: %d runs at a time; the devices have too little memory for %d", shape.size, number, asked)
    trainer = _Trainer(step_config, cohort, feed(number), context)
    to_end: list[Callable[[], None]] = []
    try:
        trainer.restore()
        while trainer.fill():
            ended = trainer.advance()
            _call_all(to_end)
            trainer.end_save(wait=bool(ended))
            to_end += filter(None, map(on_finished, ended))
            trainer.branch()
            asked = hosts.largest(_STOP if stop.asked() else _SAVE if trainer.save_is_due() else _GO_ON)
            if asked != _GO_ON:  # one decision for all processes
                _call_all(to_end)  # first: a run that has left its lane is in no later checkpoint
                trainer.begin_save()
            if asked == _STOP:
                trainer.end_save()
                raise Stopped(stop.reason)
            context.between()
        _call_all(to_end)
        trainer.checkpoints.clear()
        context.between()
    finally:
        trainer.feed.close()
        trainer.followers.close()
        _call_all(to_end)  # first: what is measured is written, whatever becomes of a checkpoint
        trainer.end_save()


def _call_all(calls: list[Callable[[], None]]) -> None:
    """Calls each once, and takes it from the list."""
    while calls:
        calls.pop(0)()


_GO_ON, _SAVE, _STOP = range(3)


def _inputs(cohort: Cohort, held: Lanes) -> RunInputs:
    """The traced inputs of all lanes; a free lane idles at rate 0 on the first run's formats."""
    runs = [lane.run if lane else cohort.runs[0] for lane in held]
    now = [lane.run.precision_at(lane.step) if lane else cohort.runs[0].precision for lane in held]
    tables = [cohort.static.grids(precision, cohort.shape.model.depth) for precision in now]
    idle = lambda schedule: schedule._replace(peak_lr=np.float32(0))
    schedules = [run.schedule if lane else idle(run.schedule) for run, lane in zip(runs, held, strict=True)]
    return RunInputs(
        grids=jax.tree.map(lambda *leaves: np.stack(leaves), *tables),
        schedule=jax.tree.map(lambda *leaves: np.stack(leaves), *schedules),
        seed=np.array([run.seed for run in runs], np.int32),
    )


class _Trainer:
    """The state of a cohort under way: what is in which lane, and which runs still wait."""

    def __init__(self, step_config: StepConfig, cohort: Cohort, feed: Prefetcher, context: Context):
        self.cohort, self.layout, self.workdir = cohort, context.layout, context.workdir
        self.options, self.progress = context.options, context.progress
        self.profile = context.profile or Profile(context.workdir, 0)
        self.metrics_log = metrics_log.MetricsLog()
        self.followers = trackers.Followers(self.options.trackers if hosts.primary() else ())
        self._step_tokens = cohort.shape.tokens_per_step
        self.waiting: list[Run] = list(cohort.runs)
        self.lanes: list[Lane | None] = [None] * feed.lanes
        self.feed = feed
        self.compiled = compiled_cohort(step_config, self.layout, feed.lanes)
        # One lane's state, repeated; `fill` replaces it.
        self.state: TrainState = self.compiled.spread(self.compiled.initialize(0))
        self.checkpoints = cohort_checkpoints(self.workdir, cohort, context.worker)
        self.saved_at = time.monotonic()
        self._flushed = 0.0  # seconds of writing the metrics before the checkpoint under way
        self.preemption = Preemption()
        self.most_steps = 1  # of a dispatch; the first one shows how long a step takes

    def restore(self) -> None:
        """Puts the runs of the newest checkpoint back into lanes."""
        found = self._newest()
        if found is None:
            return
        saved, state = found
        wanted = {run.id: run for run in self.waiting}
        free = iter(range(len(self.lanes)))
        for i, entry in enumerate(saved):
            run = wanted.get(entry["run"])
            if run is None:
                continue
            left_out = rewind.left_out(self._directory(run))
            if not set(entry.get("left_out", ())) <= set(left_out):
                logging.warning("%s is lost for %s; training it from its first step", paths.REWINDS, run.id)
                continue
            if (lane := next(free, None)) is None:
                continue
            self.state = self.compiled.put(self.state, lane, self.compiled.pick(state, i))
            self.lanes[lane] = Lane(run, entry["step"], left_out)
            self.waiting.remove(run)
            self._truncate_metrics(run, entry["step"])
            self.progress.update(entry["step"] * self._step_tokens)

    def fill(self) -> bool:
        """Starts waiting runs in free lanes; False when there is nothing left to do."""
        for i, lane in enumerate(self.lanes):
            if lane is None and (run := lanes.next_run(self.lanes, self.waiting, self._has_branch)) is not None:
                self.waiting.remove(run)
                step = self._begin(i, run)
                self.progress.total -= step * self._step_tokens
        return any(lane is not None for lane in self.lanes)

    def _begin(self, i: int, run: Run, back: tuple[int, TrainState] | None = None) -> int:
        """Puts a run in a lane, at its start or where it goes back to; returns the step."""
        step, state = back or self._start(run)
        self.state = self.compiled.put(self.state, i, state)
        self.lanes[i] = Lane(run, step, rewind.left_out(self._directory(run)))
        self._truncate_metrics(run, step)
        return step

    def _start(self, run: Run) -> tuple[int, TrainState]:
        """(step, state) a run starts with: that of its branch step where a trunk has left it."""
        path = self._branch_path(run)
        if checkpoint.exists(path):
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
        for i, lane, run in lanes.branches(self.lanes, self.waiting, self._has_branch):
            self.end_save()
            if hosts.primary():
                self._copy_history(lane.run, run)
            # Last: with it, the run has what it starts from.
            checkpoint.save(self._branch_path(run), self.compiled.pick(self.state, i))

    def advance(self) -> list[Finished]:
        """Trains all lanes until the next one ends, or as far as one dispatch goes; returns the runs that ended."""
        steps, found, speed = self._dispatch()
        ended, trained, losses = [], 0, []
        for i, lane in enumerate(self.lanes):
            if lane is None:
                continue
            of_lane = jax.tree.map(lambda x, i=i: x[i], found)
            losses.append(of_lane.loss[-1])
            finite = np.isfinite(of_lane.loss)
            if len(lane.left_out) < self.options.rewinds:
                usable = finite & np.isfinite(of_lane.grad_norm)
                if not usable.all():
                    self._rewind(i, lane, lane.step + int(np.argmin(usable)))
                    continue
            diverged = None if finite.all() else lane.step + int(np.argmin(finite))
            self._log(lane, of_lane, speed)
            trained += steps
            self.lanes[i] = lane.after(steps) if diverged is None else None
            if self.lanes[i] is None:
                params, *averages = (
                    self.compiled.parameters(tree, i) for tree in (self.state.params, *self.state.averages)
                )
                ended.append(Finished(lane.run, params, diverged, len(lane.left_out), tuple(averages)))
                self.progress.total -= (lane.run.steps - lane.step - steps) * self._step_tokens
                if hosts.primary():
                    checkpoint.remove(self._branch_path(lane.run))
                    self.metrics_log.end(self._metrics_path(lane.run))
                self.followers.end(self._metrics_path(lane.run))
        self.progress.set_postfix(loss=f"{np.mean(losses):.3f}", refresh=False)
        self.progress.update(trained * self._step_tokens)
        return ended

    def _dispatch(self) -> tuple[int, step_lib.StepMetrics, dict[str, float]]:
        """Trains all lanes for some steps: (how many, metrics of each lane and step, speed)."""
        chunk = lanes.next_chunk(self.lanes, self.waiting, self.most_steps)
        steps = chunk.steps
        with self.profile.dispatch():
            started, waited = time.monotonic(), self.feed.wait_seconds
            tokens = self.feed.take(chunk)
            then = lanes.expected(self.lanes, self.waiting, steps, self._has_branch)
            if (ahead := lanes.next_chunk(then, self.waiting, self.most_steps)).steps:
                self.feed.read_ahead(ahead)
            self.state, found = self.compiled.train(self.state, _inputs(self.cohort, self.lanes), tokens, steps)
            found = jax.tree.map(lambda x: np.asarray(x)[:, :steps], found)
            seconds, waited = time.monotonic() - started, self.feed.wait_seconds - waited
        self.preemption.dispatched(seconds)
        # The same for all processes.
        self.most_steps = -hosts.largest(-lanes.steps_within(seconds / steps, self.feed.max_steps))
        model, devices = self.cohort.shape.model, self.layout.mesh.devices
        active = sum(lane is not None for lane in self.lanes)
        speed = metrics.speed(model, devices, active, steps * self._step_tokens, seconds, waited)
        return steps, found, speed | self.preemption.described()

    def _rewind(self, i: int, lane: Lane, step: int) -> None:
        """Takes the run in a lane back to its newest checkpoint, or its start, to do this step without its batch."""
        batch = rewind.batch_of(step, lane.left_out)
        if hosts.primary():
            rewind.leave_out(self._directory(lane.run), step)
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

    def _newest(self) -> tuple[list[dict[str, Any]], TrainState] | None:
        """(lanes, state) of the newest checkpoint."""
        self.end_save()
        return self.checkpoints.restore(lambda n: self.layout.abstract(stacked(self.compiled.one, n), lanes=True))

    def _saved(self, run: Run, step: int) -> tuple[int, TrainState] | None:
        """(step, state) of a run in the newest checkpoint, where it is there and not after `step`."""
        saved, state = self._newest() or ([], None)
        for i, entry in enumerate(saved):
            if entry["run"] == run.id and entry["step"] <= step:
                return entry["step"], self.compiled.pick(state, i)
        return None

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return any(self.lanes) and time.monotonic() - self.saved_at > self.options.checkpoint_seconds

    def begin_save(self) -> None:
        """Starts a checkpoint of all lanes; of none, where the cohort is at its end or between two runs."""
        self.end_save()
        started = time.monotonic()
        self.metrics_log.flush()  # first: a run goes on with the lines up to its checkpoint
        if any(self.lanes):
            described = lambda lane: {"run": lane.run.id, "step": lane.step, "left_out": lane.left_out}
            entries = [described(lane) if lane else {"run": None, "step": 0} for lane in self.lanes]
            self._flushed = time.monotonic() - started
            self.checkpoints.begin_save(entries, self.state)
        self.saved_at = time.monotonic()

    def end_save(self, wait: bool = True) -> None:
        """Takes note of the checkpoint under way when it counts. Nothing else is written beside it by Orbax, which
        numbers what all processes write."""
        if (seconds := self.checkpoints.end_save(wait)) is not None:
            self.preemption.saved(self._flushed + seconds)

    def _copy_history(self, trunk: Run, run: Run) -> None:
        """What is known of the steps that a run shares with its trunk."""
        self.metrics_log.copy(self._metrics_path(trunk), self._metrics_path(run))
        if files.exists(path := self._directory(trunk) / paths.REWINDS):
            files.copy(path, self._directory(run) / paths.REWINDS)

    def _directory(self, run: Run) -> Path:
        return paths.run(self.workdir, run.id)

    def _branch_path(self, run: Run) -> Path:
        return self._directory(run) / paths.BRANCH

    def _has_branch(self, run: Run) -> bool:
        return checkpoint.exists(self._branch_path(run))

    def _metrics_path(self, run: Run) -> Path:
        return self._directory(run) / paths.METRICS

    def _truncate_metrics(self, run: Run, step: int) -> None:
        if hosts.primary():
            self.metrics_log.truncate(self._metrics_path(run), step)

    def _log(self, lane: Lane, found: step_lib.StepMetrics, speed: dict[str, float]) -> None:
        """Writes the steps that a run has done to its metrics.jsonl, and passes them on."""
        if hosts.primary():
            path, every, tokens = self._metrics_path(lane.run), self.options.log_every, self._step_tokens
            self.metrics_log.append(path, found, lane.step + 1, lane.run.steps, every, tokens, speed)
            self.followers.follow(path)


def cohort_checkpoints(directory: Path, cohort: Cohort, worker: str) -> CohortCheckpoints:
    """The checkpoints of a cohort under way in a workdir.

    Their name is the same for the same shape and static precision, whichever runs are left.
    """
    name = f"{cohort.shape.size}-{run_lib.digest((cohort.shape, cohort.static))}"
    return CohortCheckpoints(paths.cohort(directory, name, worker))
