"""Trains the one model that a config describes: a study of a single run, with the same files in its workdir.

python -m precision_scaling.train --config=configs/base.py --workdir=DIR [--config.model.size=100k ...]
"""

import contextlib
import functools
import sys

from absl import flags

from precision_scaling.config import command_line, experiment, options
from precision_scaling.errors import ConfigError
from precision_scaling.runtime import cli, hosts, paths, profiling, stopping
from precision_scaling.runtime.profiling import Profile
from precision_scaling.study import results, run_missing, topology
from precision_scaling.study.plan import plan_text
from precision_scaling.study.workspace import chosen, open_workspace
from precision_scaling.training import trackers
from precision_scaling.training.run import WHOLE

FLAGS = flags.FlagValues()
_CONFIG = command_line.define_config(FLAGS)
_WORKDIR = command_line.define_workdir(FLAGS, "Directory of the run: checkpoint, metrics and runs.csv.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the run (parameters, tokens, FLOPs) and stop.", flag_values=FLAGS)
topology.define_flag(FLAGS)
_TIME_LIMIT = stopping.define_flag(FLAGS)
_PROFILE = profiling.define_flag(FLAGS)
hosts.define_flags(FLAGS)


def main() -> None:
    """Train as the flags say and print where the row is. Raises UserError."""
    config, workdir = _CONFIG.value, _WORKDIR.value
    options.check(config)
    if config.study.grid:
        raise ConfigError("study.grid", list(config.study.grid), "empty; to train a grid use precision_scaling.study")
    target = topology.asked_for(FLAGS)
    if _DRY_RUN.value:
        if choice := chosen(config, workdir, target):
            config = choice.config
            print(choice)
        print(plan_text(experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))))
        if target:
            print(topology.report(config, target))
        return
    trackers.check(config.train.trackers)
    hosts.start(FLAGS)
    workspace = open_workspace(config, workdir)
    profile = Profile(workdir / paths.PROFILE, _PROFILE.value)
    with run_missing.at_work(workdir, WHOLE, _TIME_LIMIT.value) as stop, contextlib.closing(profile):
        run_missing.train_missing(workspace, stop=stop, profile=profile)
    if not hosts.primary():
        return
    results.gather(workdir)
    (run,) = workspace.experiment.runs
    print("".join(f"{line}\n" for line in profile.report()), end="")
    for model in workspace.experiment.models([run]):
        (row,) = results.read_rows(workspace.directory(model), "trained")
        outcome = f"validation loss {row['loss']:.4f} nats per token" if row["status"] == "ok" else "the run diverged"
        print(f"{model.id}: {outcome}; row in {workdir / paths.TABLE}, everything else in {workspace.directory(model)}")


command = functools.partial(cli.run, main, FLAGS, required=("config", "workdir"))

if __name__ == "__main__":
    sys.exit(command())
