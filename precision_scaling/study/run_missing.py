"""Trains and quantizes the runs of a study that have no rows yet."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from precision_scaling.errors import ConfigError
from precision_scaling.model import attention
from precision_scaling.quantize.static import StaticPrecision
from precision_scaling.runtime import files, hosts, paths, sharding
from precision_scaling.runtime.profiling import Profile
from precision_scaling.runtime.progress import progress_bar
from precision_scaling.runtime.stopping import Stop
from precision_scaling.study import evaluate as evaluate_lib
from precision_scaling.study import locks, results
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import Workspace
from precision_scaling.training import checkpoint, cohort
from precision_scaling.training.cohort import Finished
from precision_scaling.training.run import WHOLE, Cohort, Run, Shard


def train_missing(
    workspace: Workspace,
    shard: Shard = WHOLE,
    stop: Stop | None = None,
    profile: Profile | None = None,
    on_row: Callable[[Run], None] | None = None,
) -> None:
    """Trains this shard's runs that have no row yet; evaluates each and writes its checkpoint and row as it ends.

    on_row: is called with each run, between two steps of the others, once its checkpoint and row are on disk; not
    after `stop` has asked. Raises Stopped, with everything on disk, soon after `stop` asks for it.
    """
    config, stop = workspace.experiment.config, stop or Stop()
    written: list[Run] = []

    def between() -> None:
        while on_row and written and not stop.asked():
            on_row(written.pop(0))

    options = cohort.Options(
        lanes=config.study.lanes,
        log_every=config.train.log_every,
        checkpoint_seconds=config.train.checkpoint_seconds,
        steps_per_dispatch=config.train.steps_per_dispatch,
        rewinds=config.train.rewinds,
        trackers=tuple(config.train.trackers),
    )
    todo: list[tuple[Cohort, int]] = []
    for group in workspace.experiment.cohorts:
        missing = tuple(
            run for run in shard.of(group.runs) if not results.read_rows(workspace.directory(run), "trained")
        )
        if missing:
            if missing[0].imported:
                raise ConfigError("model.imported", missing[0].imported, "empty for a model that is to be trained here")
            # By the whole cohort's runs, whichever are left or in this shard: the lanes must not depend on that.
            spread = workspace.layout.sizes["run"]
            # Runs of one trunk follow each other.
            trunks = len({run.trunk for run in group.runs})
            lanes = min(config.study.lanes, -(-trunks // spread) * spread)
            todo.append((dataclasses.replace(group, runs=missing), lanes))
        else:  # of a process that was killed between the last row and this
            cohort.cohort_checkpoints(workspace.workdir, group, shard.name).clear()
    total = sum(run.tokens for group, _ in todo for run in group.runs)
    if not todo:
        return
    with progress_bar(
        total=total, disable=not hosts.primary(), unit=" tokens", unit_scale=True, desc="training", smoothing=0.05
    ) as progress:
        context = cohort.Context(
            workspace.experiment.optimizer,
            workspace.layout,
            workspace.workdir,
            shard.name,
            options,
            progress,
            stop,
            profile,
            between,
        )
        for group, lanes in todo:
            how = attention.described(group.shape.model, group.static)
            progress.set_description(f"training {group.shape.size} ({len(group.runs)} runs; {how})")
            static = group.static.evaluation()
            evaluate = evaluate_lib.evaluator(workspace, group.shape, static)
            record = functools.partial(_record, workspace, static, evaluate, written)
            with_lanes = dataclasses.replace(context, options=dataclasses.replace(options, lanes=lanes))
            cohort.train_cohort(group, workspace.loader(group.shape), with_lanes, record)
            if hosts.primary() and not files.is_remote(workspace.workdir):  # there only at the end: it reads all rows
                results.gather(workspace.workdir)


def _record(
    workspace: Workspace, static: StaticPrecision, evaluate: Callable, written: list[Run], finished: Finished
) -> Callable[[], None]:
    """Evaluates a run that has ended, and the averages of its parameters, and begins to write their checkpoints.

    Returns what ends that, writes the rows and adds the runs to `written`.
    """
    more: dict[str, Any] = {"batches_left_out": finished.left_out}
    if finished.diverged_step is not None:
        more |= {"status": "diverged", "diverged_step": finished.diverged_step}
    measured: list[tuple[Run, dict[str, Any], Callable[[], None]]] = []
    models = workspace.experiment.models([finished.run])
    for run, params in zip(models, (finished.params, *finished.averages), strict=True):
        if finished.diverged_step is not None:
            measured.append((run, results.row(workspace, run, None, **more), lambda: None))
            continue
        loss = evaluate(params, static.grids(run.precision, run.shape.model.depth))
        finite = math.isfinite(loss)
        row = results.row(workspace, run, loss if finite else None, status="ok" if finite else "diverged", **more)
        measured.append((run, row, checkpoint.begin_save(workspace.directory(run) / paths.CHECKPOINT, params)))

    def end() -> None:
        for run, row, end_save in reversed(measured):  # the run itself last: with its row, nothing of it is missing
            end_save()
            if hosts.primary():
                results.write_rows(workspace.directory(run), "trained", [row])
        written.extend(run for run, _, _ in measured)

    return end


def quantize_run(workspace: Workspace, run: Run) -> list[str]:
    """`quantize_missing` for one run, as the config has it."""
    ptq = workspace.experiment.config.ptq
    only = Shard(only=f"^{re.escape(run.id)}$")
    return quantize_missing(workspace, ptq.methods, ptq.bits, only, progress=False, formats=ptq.formats)


def quantize_shard(workspace: Workspace, methods, bits, shard: Shard, stop: Stop) -> list[str]:
    """`quantize_missing` for this shard. Of several processes, each takes every so many runs, on its own devices."""
    hosts.wait_for_all("trained")
    if workspace.layout.spans_hosts:
        workspace = dataclasses.replace(workspace, layout=sharding.local_layout())
        index = shard.index + shard.count * jax.process_index()
        shard = dataclasses.replace(shard, index=index, count=shard.count * jax.process_count())
    formats = workspace.experiment.config.ptq.formats
    warnings = quantize_missing(workspace, methods, bits, shard, stop=stop, formats=formats)
    hosts.wait_for_all("quantized")
    return warnings


@contextlib.contextmanager
def at_work(workdir: Path, shard: Shard, minutes: float) -> Iterator[Stop]:
    """Holds a shard of the workdir, and gives what says when to stop."""
    own = locks.hold(workdir, (shard.index, shard.count)) if hosts.primary() else contextlib.nullcontext()
    with hosts.together(), own, Stop(minutes) as stop:
        yield stop
