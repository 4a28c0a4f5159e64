"""Trains the runs of a cohort together: one compiled program, so many lanes, the next run in each lane that is free.

Takes runs from `experiment`, batches from `data`, steps from `step`; hands each finished run's parameters to the caller
(`study`) and keeps metrics and checkpoints on the way. What is in the other lanes never changes a run.

Runs that differ in their length alone, and whose rate is constant until they decay, are trained once up to there: the
longest is the trunk, and the others start from its state at their branch step.
"""

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from precision_scaling import checkpoint, compilation, experiment, hosts, metrics, results, rewind, sinks
from precision_scaling import step as step_lib
from precision_scaling.checkpoint import CohortCheckpoints
from precision_scaling.data.loader import Loader
from precision_scaling.errors import UserError
from precision_scaling.experiment import Cohort, Run
from precision_scaling.feed import Chunk, Feed
from precision_scaling.optimizer import OptimizerConfig
from precision_scaling.profiling import Profile
from precision_scaling.sharding import Layout, splitting
from precision_scaling.step import RunInputs, Static, TrainState
from precision_scaling.stopping import Stop, Stopped


@dataclasses.dataclass(frozen=True)
class Options:
    """How a cohort is run; of these, only the lanes touch its results, and only by rounding.

    lanes: runs that train at once. Another number of lanes is another compiled program, whose sums round differently,
    and one value that is quantized the other way shows in the losses: a cohort must be resumed with the same number.
    rewinds: how often a run whose loss or gradient is not finite goes back to its last checkpoint, and on without that
    batch. sinks: of `sinks.PACKAGES`, for the metrics.
    """

    lanes: int
    log_every: int
    checkpoint_seconds: float
    steps_per_dispatch: int
    rewinds: int = 0
    sinks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has come to its end. diverged_step: the first step with a loss that is not finite, or None.

    left_out: how many batches it has gone back to leave out.
    """

    run: Run
    params: Any
    diverged_step: int | None
    left_out: int = 0


def table_of(run: Run, program, **replaced) -> dict[str, Any]:
    """The grids of a run's formats for the operands that the program quantizes; `replaced` gives other formats."""
    return run.precision.table(program, **replaced)


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Compiled for a shape, a layout and a number of lanes; every result is made in its place on the mesh."""

    one: Any  # abstract state of a run
    initialize: Callable  # seed -> state of one run
    spread: Callable  # state of one run -> that state in all lanes
    train: Callable  # (state, inputs, tokens, steps) -> (state, metrics)
    parameters: Callable  # (parameters of all lanes, lane) -> those of one
    pick: Callable  # (state of any number of lanes, lane) -> that of one
    put: Callable  # (state, lane, state of one run) -> state


@functools.lru_cache(maxsize=8)
def _programs(static: Static, layout: Layout, lanes: int) -> _Programs:
    one = jax.eval_shape(functools.partial(step_lib.init_state, static), 0)
    single, stacked = layout.of_tree(one), layout.of_tree(_stacked(one, lanes), lanes=True)

    def train(state, inputs, tokens_TxRxMxBxS1, steps):
        def fetch(t):
            tokens = jax.lax.dynamic_index_in_dim(tokens_TxRxMxBxS1, t, 0, keepdims=False)
            return tokens.astype(jnp.int32)

        with splitting(layout):
            return step_lib.train_chunk(static, state, inputs, fetch, steps, tokens_TxRxMxBxS1.shape[0])

    take = lambda tree, lane: jax.tree.map(lambda x: x[lane], tree)
    put = lambda state, lane, one: jax.tree.map(lambda x, y: x.at[lane].set(y), state, one)
    spread = lambda one: jax.tree.map(lambda x: jnp.repeat(x[None], lanes, axis=0), one)
    return _Programs(
        one,
        initialize=compilation.jit(functools.partial(step_lib.init_state, static), level=1, out_shardings=single),
        spread=jax.jit(spread, out_shardings=stacked),
        train=compilation.jit(train, donate_argnums=0, out_shardings=(stacked, layout.place())),
        parameters=jax.jit(take, out_shardings=single.params),
        pick=jax.jit(take, out_shardings=single),
        put=jax.jit(put, donate_argnums=0, out_shardings=stacked),
    )


def _stacked(one: Any, lanes: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype), one)


def train_cohort(
    cohort: Cohort,
    optimizer: OptimizerConfig,
    loader: Loader,
    layout: Layout,
    workdir: Path,
    worker: str,
    options: Options,
    on_finished: Callable[[Finished], None],
    progress: tqdm,
    stop: Stop,
    profile: Profile | None = None,
) -> None:
    """Trains every run of the cohort and calls `on_finished` once for each, in the order in which they end.

    cohort: its runs are those still to be trained. layout: the devices, over which lanes, batches and parameters are
    spread. worker: names the checkpoints of this process among those that share a study. profile: is told of every
    dispatch.
    A killed call resumes from its checkpoints with the same bits. A run whose loss is no longer finite ends there, when
    it has no rewinds left; the others go on. Raises Stopped, after a checkpoint, as soon as `stop` asks for it.
    """
    static = Static(cohort.shape.model, cohort.program, optimizer, cohort.shape.microbatches)
    profile = profile or Profile(workdir, 0)
    trainer = _Trainer(static, cohort, loader, layout, workdir, worker, options, progress, profile)
    try:
        trainer.restore()
        while trainer.fill():
            for finished in trainer.advance():
                on_finished(finished)
            trainer.branch()
            # After the rows: a run that has left its lane is in no later checkpoint. One decision for all processes.
            asked = hosts.largest(_STOP if stop.asked() else _SAVE if trainer.save_is_due() else _GO_ON)
            if asked != _GO_ON:
                trainer.save()
            if asked == _STOP:
                raise Stopped(stop.reason)
        trainer.checkpoints.clear()
    finally:
        trainer.feed.close()
        trainer.followers.close()


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

    def __init__(self, static, cohort: Cohort, loader, layout: Layout, workdir, worker, options, progress, profile):
        self.static, self.cohort, self.layout = static, cohort, layout
        self.workdir, self.options, self.progress, self.profile = workdir, options, progress, profile
        self.followers = sinks.Followers(options.sinks if hosts.primary() else ())
        self.compiled = False
        self.waiting: list[Run] = list(cohort.runs)
        self.lanes: list[_Lane | None] = [None] * options.lanes
        self.feed = Feed(loader, layout, options.lanes, static.microbatches, options.steps_per_dispatch)
        self.programs = _programs(static, layout, options.lanes)
        # One lane's state, repeated; `fill` replaces it.
        self.state: TrainState = self.programs.spread(self.programs.initialize(0))
        self.checkpoints = cohort_checkpoints(workdir, cohort, worker)
        self.saved_at = time.monotonic()

    def restore(self) -> None:
        """Puts the runs of the newest checkpoint back into lanes."""
        one = self.programs.one
        found = self.checkpoints.restore(lambda n: self.layout.abstract(_stacked(one, n), lanes=True))
        if found is None:
            return
        saved, state = found
        wanted = {run.id: run for run in self.waiting}
        free = iter(range(len(self.lanes)))
        for i, entry in enumerate(saved):
            run = wanted.get(entry["run"])
            if run is None or (lane := next(free, None)) is None:
                continue
            self.state = self.programs.put(self.state, lane, self.programs.pick(state, i))
            self.lanes[lane] = _Lane(run, entry["step"], rewind.left_out(run_directory(self.workdir, run)))
            self.waiting.remove(run)
            truncate_metrics(self._metrics_path(run), entry["step"])
            self.progress.update(entry["step"] * self.cohort.shape.tokens_per_step)

    def fill(self) -> bool:
        """Starts waiting runs in free lanes; False when there is nothing left to do."""
        for i, lane in enumerate(self.lanes):
            if lane is None and (run := self._next(self.lanes, self.waiting)) is not None:
                self.waiting.remove(run)
                step = self._begin(i, run)
                self.progress.total -= step * self.cohort.shape.tokens_per_step
        return any(lane is not None for lane in self.lanes)

    def _next(self, lanes: "list[_Lane | None]", waiting: list[Run]) -> Run | None:
        """The first waiting run whose branch step is there already, or that no lane under way will bring to it."""
        awaited = lambda run: any(_leads_to(lane, run) for lane in lanes) and not self._branch_path(run).exists()
        return next((run for run in waiting if not awaited(run)), None)

    def _begin(self, i: int, run: Run, back: tuple[int, TrainState] | None = None) -> int:
        """Puts a run in a lane, at its start or where it goes back to; returns the step."""
        step, state = back or self._start(run)
        self.state = self.programs.put(self.state, i, state)
        self.lanes[i] = _Lane(run, step, rewind.left_out(run_directory(self.workdir, run)))
        truncate_metrics(self._metrics_path(run), step)
        return step

    def _start(self, run: Run) -> tuple[int, TrainState]:
        """(step, state) a run starts with: that of its branch step where a trunk has left it."""
        path = self._branch_path(run)
        if path.exists():
            try:
                return run.branch_step, checkpoint.restore(path, self.layout.abstract(self.programs.one))
            except UserError as error:
                logging.warning("%s; training %s from its first step", error, run.id)
        return 0, self.programs.initialize(run.seed)

    def branch(self) -> None:
        """Keeps the states that waiting runs start from, on disk, as the trunks under way pass them."""
        for i, lane in enumerate(self.lanes):
            for run in self.waiting if lane else ():
                if _leads_to(lane, run) and lane.step == run.branch_step and not self._branch_path(run).exists():
                    if hosts.primary():
                        self._copy_history(lane.run, run)
                    # Last: with it, the run has what it starts from.
                    checkpoint.save(self._branch_path(run), self.programs.pick(self.state, i))

    def advance(self) -> list[Finished]:
        """Trains all lanes until the next one ends, or as far as one dispatch goes; returns the runs that ended."""
        active = [(i, lane) for i, lane in enumerate(self.lanes) if lane is not None]
        chunk = self._chunk(self.lanes)
        steps = chunk.steps
        with self.profile.dispatch(compiles=not self.compiled):
            started, waited = time.monotonic(), self.feed.wait_seconds
            tokens = self.feed.take(chunk)
            if (expected := self._chunk(self._expected(steps))).steps:
                self.feed.read_ahead(expected)
            self.state, found = self.programs.train(self.state, self._inputs(), tokens, steps)
            found = jax.tree.map(lambda x: np.asarray(x)[:, :steps], found)
            seconds, waited = time.monotonic() - started, self.feed.wait_seconds - waited
        # The first dispatch compiles: its time says nothing.
        speed = self._speed(len(active), steps, seconds, waited) if self.compiled else {}
        self.compiled = True
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
                params = self.programs.parameters(self.state.params, i)
                ended.append(Finished(lane.run, params, diverged, len(lane.left_out)))
                self.progress.total -= (lane.run.steps - lane.step) * self.cohort.shape.tokens_per_step
                if hosts.primary():
                    shutil.rmtree(self._branch_path(lane.run), ignore_errors=True)
                self.followers.end(self._metrics_path(lane.run))
                self.lanes[i] = None
        self.progress.set_postfix(loss=f"{np.mean(found.loss[[i for i, _ in active], -1]):.3f}", refresh=False)
        self.progress.update(trained * self.cohort.shape.tokens_per_step)
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
        self.progress.update((begun - lane.step) * self.cohort.shape.tokens_per_step)
        logging.warning(
            "%s: loss or gradient is not finite at step %d; back to step %d, and on without batch %d (rewind %d of %d)",
            *(lane.run.id, step + 1, begun, batch, len(lane.left_out) + 1, self.options.rewinds),
        )

    def _saved(self, run: Run, step: int) -> tuple[int, TrainState] | None:
        """(step, state) of a run in the newest checkpoint, where it is there and not after `step`."""
        found = self.checkpoints.restore(lambda n: self.layout.abstract(_stacked(self.programs.one, n), lanes=True))
        for i, entry in enumerate(found[0] if found else ()):
            if entry["run"] == run.id and entry["step"] <= step:
                return entry["step"], self.programs.pick(found[1], i)
        return None

    def save_is_due(self) -> bool:
        """Whether the last checkpoint is old enough."""
        return any(self.lanes) and time.monotonic() - self.saved_at > self.options.checkpoint_seconds

    def save(self) -> None:
        """Writes a checkpoint of all lanes; of none, where the cohort is at its end or between two runs."""
        if any(self.lanes):
            lanes = [{"run": x.run.id, "step": x.step} if x else {"run": None, "step": 0} for x in self.lanes]
            self.checkpoints.save(lanes, self.state)
        self.saved_at = time.monotonic()

    def _inputs(self) -> RunInputs:
        """The traced inputs of all lanes; a free lane idles at rate 0 on the first run's formats."""
        runs = [lane.run if lane else self.cohort.runs[0] for lane in self.lanes]
        tables = [table_of(run, self.cohort.program) for run in runs]
        idle = lambda schedule: schedule._replace(peak_rate=np.float32(0))
        schedules = [run.schedule if lane else idle(run.schedule) for run, lane in zip(runs, self.lanes, strict=True)]
        return RunInputs(
            table=jax.tree.map(lambda *grids: np.stack(grids), *tables),
            schedule=jax.tree.map(lambda *lanes: np.stack(lanes), *schedules),
            seed=np.array([run.seed for run in runs], np.int32),
        )

    def _chunk(self, lanes: list[_Lane | None]) -> Chunk:
        """What is trained on next: all lanes go on until the next one ends or is branched from, or as far as one
        dispatch goes."""
        ends = [lane.run.steps - lane.step for lane in lanes if lane is not None]
        branches = [run.branch_step - lane.step for lane in lanes for run in self.waiting if _leads_to(lane, run)]
        in_a_row = [rewind.steps_in_a_row(lane.step, lane.left_out) for lane in lanes if lane is not None]
        steps = min([*ends, *in_a_row, *(left for left in branches if left)], default=0)
        return Chunk(tuple(lane and lane.position for lane in lanes), min(self.feed.max_steps, steps))

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
        there.mkdir(parents=True, exist_ok=True)
        for path in (self._metrics_path(trunk), run_directory(self.workdir, trunk) / rewind.FILE):
            if path.exists():
                shutil.copyfile(path, there / path.name)

    def _branch_path(self, run: Run) -> Path:
        return run_directory(self.workdir, run) / "branch"

    def _metrics_path(self, run: Run) -> Path:
        return run_directory(self.workdir, run) / "metrics.jsonl"

    def _speed(self, active: int, steps: int, seconds: float, waited: float) -> dict[str, float]:
        """How fast a dispatch went: tokens/s of each run, and of all runs together (as they share the devices) model
        FLOP/s, their share of the devices' peak where that is known, and the share of time spent waiting for tokens."""
        rate = steps * self.cohort.shape.tokens_per_step / seconds
        flops = metrics.model_flops_per_second(self.cohort.shape.model, active * rate)
        devices = self.layout.mesh.devices
        mfu = metrics.mfu(flops, devices.flat[0].device_kind, self.cohort.shape.model.dtype, devices.size)
        return {
            "tokens_per_second": round(rate, 1),
            "flops_per_second": float(f"{flops:.5g}"),
            **({} if mfu is None else {"mfu": float(f"{mfu:.4g}")}),
            "data_wait": round(waited / seconds, 4),
        }

    def _log(self, lane: _Lane, found: step_lib.StepMetrics, speed: dict[str, float]) -> None:
        """Appends a line for every log_every-th step (and the last) to the run's metrics.jsonl."""
        if not hosts.primary():
            return
        path = self._metrics_path(lane.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            for t, (loss, grad_norm, rate) in enumerate(zip(*found, strict=True)):
                step = lane.step + t + 1
                if step % self.options.log_every == 0 or step == lane.run.steps:
                    line = {
                        "step": step,
                        "tokens": step * self.cohort.shape.tokens_per_step,
                        "loss": float(loss) if math.isfinite(loss) else None,
                        "grad_norm": float(grad_norm) if math.isfinite(grad_norm) else None,
                        "learning_rate": float(rate),
                        **speed,
                    }
                    file.write(json.dumps(line) + "\n")
        self.followers.follow(path)


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
    if not hosts.primary() or not path.exists():
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
