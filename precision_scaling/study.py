"""A study: trains every run of a grid, quantizes and evaluates them, and leaves one row per measured loss in runs.csv.

python -m precision_scaling.study --config=configs/study_cpu.py --workdir=DIR [--config.key=value ... --shard=0/4]

The command of the data flow's middle: config in, workdir/runs.csv out. Safe to repeat: it does what is missing.
"""

import contextlib
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import flags

from precision_scaling import bench as bench_lib
from precision_scaling import (
    checkpoint,
    cohort,
    command_flags,
    errors,
    experiment,
    files,
    hosts,
    locks,
    measured,
    model,
    options,
    patterns,
    precision,
    profiling,
    results,
    sharding,
    sinks,
    stopping,
)
from precision_scaling.bench import Bench
from precision_scaling.cohort import Finished, table_of
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.experiment import WHOLE, Cohort, Experiment, Run, Share
from precision_scaling.profiling import Profile
from precision_scaling.progress import progress_bar
from precision_scaling.ptq.runs import quantize_missing
from precision_scaling.quantize import Program
from precision_scaling.stopping import Stop


def train_missing(
    bench: Bench,
    share: Share = WHOLE,
    stop: Stop | None = None,
    profile: Profile | None = None,
    on_row: Callable[[Run], None] | None = None,
) -> None:
    """Trains this share's runs that have no row yet; evaluates each and writes its checkpoint and row as it ends.

    on_row: is called with each run, between two steps of the others, once its checkpoint and row are on disk; not
    after `stop` has asked. Raises Stopped, with everything on disk, soon after `stop` asks for it.
    """
    config, stop = bench.experiment.config, stop or Stop()
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
        sinks=tuple(config.train.sinks),
    )
    todo: list[tuple[Cohort, cohort.Options]] = []
    for group in bench.experiment.cohorts:
        missing = tuple(run for run in share.of(group.runs) if not results.read_rows(bench.directory(run), "trained"))
        if missing:
            if missing[0].imported:
                raise ConfigError("model.imported", missing[0].imported, "empty for a model that is to be trained here")
            # By the whole cohort's runs, whichever are left or in this share: the lanes must not depend on that.
            spread = bench.layout.sizes["run"]
            # Runs of one trunk follow each other.
            trunks = len({run.trunk for run in group.runs})
            lanes = min(config.study.lanes, -(-trunks // spread) * spread)
            todo.append((dataclasses.replace(group, runs=missing), dataclasses.replace(options, lanes=lanes)))
        else:  # of a process that was killed between the last row and this
            cohort.cohort_checkpoints(bench.workdir, group, share.name).clear()
    total = sum(run.tokens for group, _ in todo for run in group.runs)
    if not todo:
        return
    bar = {"unit": " tokens", "unit_scale": True, "desc": "training", "smoothing": 0.05}
    with progress_bar(total=total, disable=not hosts.primary(), **bar) as progress:
        for group, group_options in todo:
            progress.set_description(f"training {group.shape.size} ({len(group.runs)} runs)")
            program = group.program.evaluation()
            evaluate = bench_lib.evaluator(bench, group.shape, program)
            record = functools.partial(_record, bench, program, evaluate, written)
            cohort.train_cohort(
                group,
                bench.experiment.optimizer,
                bench.loader(group.shape),
                bench.layout,
                bench.workdir,
                share.name,
                group_options,
                record,
                progress,
                stop,
                profile,
                between,
            )
            if hosts.primary():
                results.gather(bench.workdir)


def _record(
    bench: Bench, program: Program, evaluate: Callable, written: list[Run], finished: Finished
) -> Callable[[], None]:
    """Evaluates a run that has ended and begins to write its checkpoint.

    Returns what ends that, writes the row and adds the run to `written`.
    """
    run, left_out = finished.run, {"batches_left_out": finished.left_out}
    if finished.diverged_step is not None:
        row = bench_lib.row(bench, run, None, status="diverged", diverged_step=finished.diverged_step, **left_out)
        end_save = lambda: None
    else:
        loss = evaluate(finished.params, table_of(run, program))
        end_save = checkpoint.begin_save(bench.directory(run) / "checkpoint", finished.params)
        finite = math.isfinite(loss)
        row = bench_lib.row(bench, run, loss if finite else None, status="ok" if finite else "diverged", **left_out)

    def end() -> None:
        end_save()
        if hosts.primary():
            results.write_rows(bench.directory(run), "trained", [row])
        written.append(run)

    return end


def quantize_run(bench: Bench, run: Run) -> list[str]:
    """`quantize_missing` for one run, as the config has it."""
    ptq = bench.experiment.config.ptq
    return quantize_missing(bench, ptq.methods, ptq.bits, Share(only=f"^{re.escape(run.id)}$"), progress=False)


def quantize_share(bench: Bench, methods, bits, share: Share, stop: Stop) -> list[str]:
    """`quantize_missing` for this share. Of several processes, each takes every so many runs, on its own devices."""
    hosts.wait_for_all("trained")
    if bench.layout.spans_hosts:
        bench = dataclasses.replace(bench, layout=sharding.local_layout())
        index = share.index + share.count * jax.process_index()
        share = share._replace(index=index, count=share.count * jax.process_count())
    warnings = quantize_missing(bench, methods, bits, share, stop=stop)
    hosts.wait_for_all("quantized")
    return warnings


@contextlib.contextmanager
def at_work(workdir: Path, share: Share, minutes: float) -> Iterator[Stop]:
    """Holds a share of the workdir, and gives what says when to stop."""
    own = locks.hold(workdir, (share.index, share.count)) if hosts.primary() else contextlib.nullcontext()
    with hosts.together(), own, Stop(minutes) as stop:
        yield stop


def plan_text(resolved: Experiment, share: Share = WHOLE) -> str:
    """What a study, or a share of it, would do: cohorts with their runs, parameters, tokens and FLOPs."""
    lines = [f"{'cohort':>8} {'runs':>5} {'N':>14} {'all params':>14} {'tokens':>18} {'FLOPs':>10}  quantized operands"]
    cohorts = [(group, runs) for group in resolved.cohorts if (runs := share.of(group.runs))]
    flops_total = 0
    for group, runs in cohorts:
        non_embedding, parameters = model.count_parameters(group.shape.model)
        tokens = sum(run.tokens for run in runs)
        flops = tokens * model.training_flops_per_token(group.shape.model)
        flops_total += flops
        lines.append(
            f"{group.shape.size:>8} {len(runs):>5} {non_embedding:>14,} {parameters:>14,} {tokens:>18,} "
            f"{flops:>10.2e}  {precision.describe_program(group.program)}"
        )
    chosen = [run for _, runs in cohorts for run in runs]
    lines.append(
        f"{len(chosen)} runs in {len(cohorts)} cohorts, {sum(run.tokens for run in chosen):,} tokens, "
        f"{flops_total:.2e} FLOPs; {sum(run.ptq for run in chosen)} runs are quantized after training"
    )
    return "\n".join(lines)


def parse_share(shard: str, only: str = "") -> Share:
    """The share that `--shard` ("i/n") and `--only` (a regex) describe. UserError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={shard}: allowed is i/n with 0 <= i < n")
    patterns.check("--only", only)
    return Share(int(match[1]), int(match[2]), only)


def _main(argv) -> None:
    del argv
    config, workdir = _CONFIG.value, _WORKDIR.value
    options.check(config)
    if not config.study.grid:
        raise ConfigError("study.grid", "empty", "at least one part; to train one model use precision_scaling.train")
    share = parse_share(_SHARD.value, _ONLY.value)
    if _DRY_RUN.value or share.only:  # else the bench resolves the config, with the corpus at hand
        resolved = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
        patterns.check("--only", share.only, (run.id for run in resolved.runs))
        if not Share(only=share.only).of(resolved.runs):
            raise UserError(f"--only={share.only}: finds none of {len(resolved.runs)} runs, e.g. {resolved.runs[0].id}")
        if _DRY_RUN.value:
            print(plan_text(resolved, share))
            if _SETTINGS.value:
                rows = [row for run in share.of(resolved.runs) for row in bench_lib.planned_rows(config, run)]
                results.write_table(files.expanded(_SETTINGS.value, "--settings"), rows)
                print(f"{len(rows)} losses to be measured in {_SETTINGS.value}")
            return
    sinks.check(config.train.sinks)
    hosts.start()
    bench = bench_lib.open_bench(config, workdir)
    profile = Profile(workdir / "profile", _PROFILE.value)
    warnings: list[str] = []
    with at_work(workdir, share, _TIME_LIMIT.value) as stop:
        if _ROWS.value and hosts.primary():
            taken = measured.take_over(files.expanded(_ROWS.value, "--rows"), bench)
            print(f"{taken} of {len(bench.experiment.runs)} runs are measured in {_ROWS.value}", file=sys.stderr)
        hosts.wait_for_all("took over rows")
        try:
            # Each run is quantized as soon as it is trained: what is lost with a machine is then one run, not a study.
            # Processes that train a run together share the quantizing out, after the last one.
            quantize = None if bench.layout.spans_hosts else lambda run: warnings.extend(quantize_run(bench, run))
            with contextlib.closing(profile):
                train_missing(bench, share, stop, profile, quantize)
            warnings += quantize_share(bench, config.ptq.methods, config.ptq.bits, share, stop)
        finally:
            rows = results.gather(workdir) if hosts.primary() else 0
    if hosts.primary():
        print("\n".join([*profile.report(), *warnings, f"{rows} measured losses in {workdir / 'runs.csv'}"]))


if __name__ == "__main__":
    _CONFIG = command_flags.define_config()
    _WORKDIR = command_flags.define_workdir("Directory of the study: checkpoints, metrics and runs.csv.")
    _SHARD = flags.DEFINE_string(
        "shard", "0/1", "i/n: do the i-th of n shares of the study, so that n workers can share it."
    )
    _ONLY = flags.DEFINE_string(
        "only", "", "Do the runs whose id this regular expression finds, e.g. '^100k-' or '-s1-'; empty: all."
    )
    _DRY_RUN = flags.DEFINE_bool(
        "dry_run", False, "Print the plan (runs, cohorts, parameters, tokens, FLOPs) and stop."
    )
    _SETTINGS = flags.DEFINE_string(
        "settings", "", "With --dry_run: a table of every loss that would be measured, for analysis.predict."
    )
    _ROWS = flags.DEFINE_string(
        "rows", "", "A runs.csv or .csv.gz of this study: runs that are complete there are not done again."
    )
    _TIME_LIMIT = stopping.define_flag()
    _PROFILE = profiling.define_flag()
    hosts.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    errors.run(_main)
