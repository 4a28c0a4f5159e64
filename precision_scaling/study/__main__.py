"""A study: trains every run of a grid, quantizes and evaluates them, and leaves one row per measured loss in runs.csv.

python -m precision_scaling.study --config=configs/study_cpu.py --workdir=DIR [--config.key=value ... --shard=0/4]

The command of the data flow's middle: config in, workdir/runs.csv out. Safe to repeat: it does what is missing.
"""

import contextlib
import functools
import sys

from absl import flags

from precision_scaling.config import command_line, experiment, options
from precision_scaling.config.experiment import Experiment
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.runtime import cli, files, hosts, paths, patterns, profiling, stopping
from precision_scaling.runtime.profiling import Profile
from precision_scaling.study import automatic, measured, results, topology
from precision_scaling.study.plan import parse_shard, plan_text
from precision_scaling.study.run_missing import at_work, quantize_run, quantize_shard, train_missing
from precision_scaling.study.workspace import chosen, open_workspace
from precision_scaling.training import trackers
from precision_scaling.training.run import Shard

FLAGS = flags.FlagValues()
_CONFIG = command_line.define_config(FLAGS)
_WORKDIR = command_line.define_workdir(FLAGS, "Directory of the study: checkpoints, metrics and runs.csv.")
_SHARD = flags.DEFINE_string(
    "shard", "0/1", "i/n: do the i-th of n shards of the study, so that n workers can share it.", flag_values=FLAGS
)
_ONLY = flags.DEFINE_string(
    "only",
    "",
    "Do the runs whose id this regular expression finds, e.g. '^100k-' or '-s1-'; empty: all.",
    flag_values=FLAGS,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the plan (runs, cohorts, parameters, tokens, FLOPs) and stop.", flag_values=FLAGS
)
topology.define_flag(FLAGS)
_SETTINGS = flags.DEFINE_string(
    "settings",
    "",
    "With --dry_run: a table of every loss that would be measured, for analysis.predict.",
    flag_values=FLAGS,
)
_ROWS = flags.DEFINE_string(
    "rows",
    "",
    "A runs.csv or .csv.gz of this study: runs that are complete there are not done again.",
    flag_values=FLAGS,
)
_TIME_LIMIT = stopping.define_flag(FLAGS)
_PROFILE = profiling.define_flag(FLAGS)
hosts.define_flags(FLAGS)


def main() -> None:
    """Do what is missing in a study, or print its plan. Raises UserError."""
    config, workdir = _CONFIG.value, _WORKDIR.value
    options.check(config)
    if not config.study.grid:
        raise ConfigError("study.grid", "empty", "at least one part; to train one model use precision_scaling.train")
    shard = parse_shard(_SHARD.value, _ONLY.value)
    given = files.place(_ROWS.value, "--rows") if _ROWS.value else None
    settings = files.place(_SETTINGS.value, "--settings") if _SETTINGS.value else None
    target = topology.asked_for(FLAGS)
    if _DRY_RUN.value and (choice := chosen(config, workdir, target)):
        config = choice.config
        print(choice)
    if _DRY_RUN.value or (shard.only and not automatic.asked(config)):
        # Else the workspace resolves the config, with the corpus at hand.
        resolved = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
        _check_only(shard, resolved)
        if _DRY_RUN.value:
            print(plan_text(resolved, shard))
            if settings:
                rows = [
                    row for run in resolved.models(shard.of(resolved.runs)) for row in results.planned_rows(config, run)
                ]
                results.write_table(settings, rows)
                print(f"{len(rows)} losses to be measured in {_SETTINGS.value}")
            if target:
                print(topology.report(config, target))
            return
    trackers.check(config.train.trackers)
    hosts.start(FLAGS)
    workspace = open_workspace(config, workdir)
    config = workspace.experiment.config
    _check_only(shard, workspace.experiment)
    profile = Profile(workdir / paths.PROFILE, _PROFILE.value)
    warnings: list[str] = []
    with at_work(workdir, shard, _TIME_LIMIT.value) as stop:
        if given and hosts.primary():
            taken = measured.take_over(given, workspace)
            print(f"{taken} of {len(workspace.experiment.runs)} runs are measured in {_ROWS.value}", file=sys.stderr)
        hosts.wait_for_all("took over rows")
        try:
            # Each run is quantized as soon as it is trained: what is lost with a machine is then one run, not a study.
            # Processes that train a run together share the quantizing out, after the last one.
            quantize = (
                None if workspace.layout.spans_hosts else lambda run: warnings.extend(quantize_run(workspace, run))
            )
            with contextlib.closing(profile):
                train_missing(workspace, shard, stop, profile, quantize)
            warnings += quantize_shard(workspace, config.ptq.methods, config.ptq.bits, shard, stop)
        finally:
            measured_rows = results.gather(workdir) if hosts.primary() else 0
    if hosts.primary():
        print("\n".join([*profile.report(), *warnings, f"{measured_rows} measured losses in {workdir / paths.TABLE}"]))


def _check_only(shard: Shard, resolved: Experiment) -> None:
    """UserError for a --only that finds no run."""
    patterns.check("--only", shard.only, (run.id for run in resolved.runs))
    if not Shard(only=shard.only).of(resolved.runs):
        raise UserError(f"--only={shard.only}: finds none of {len(resolved.runs)} runs, e.g. {resolved.runs[0].id}")


command = functools.partial(cli.run, main, FLAGS, required=("config", "workdir"))

if __name__ == "__main__":
    sys.exit(command())
