"""Trains the one model that a config describes: a study of a single run, with the same files in its workdir.

python -m precision_scaling.train --config=configs/base.py --workdir=DIR [--config.model.size=100k ...]
"""

import contextlib

from absl import flags

from precision_scaling import bench as bench_lib
from precision_scaling import command_flags, errors, hosts, options, profiling, results, sinks, stopping, study
from precision_scaling.errors import ConfigError
from precision_scaling.experiment import WHOLE
from precision_scaling.profiling import Profile


def _main(argv) -> None:
    del argv
    config, workdir = _CONFIG.value, _WORKDIR.value
    options.check(config)
    if config.study.grid:
        raise ConfigError("study.grid", list(config.study.grid), "empty; to train a grid use precision_scaling.study")
    sinks.check(config.train.sinks)
    hosts.start()
    bench = bench_lib.open_bench(config, workdir)
    profile = Profile(workdir / "profile", _PROFILE.value)
    with study.at_work(workdir, WHOLE, _TIME_LIMIT.value) as stop, contextlib.closing(profile):
        study.train_missing(bench, stop=stop, profile=profile)
    if not hosts.primary():
        return
    results.gather(workdir)
    (run,) = bench.experiment.runs
    (row,) = results.read_rows(bench.directory(run), "trained")
    outcome = f"validation loss {row['loss']:.4f} nats per token" if row["status"] == "ok" else "the run diverged"
    print("".join(f"{line}\n" for line in profile.report()), end="")
    print(f"{run.id}: {outcome}; row in {workdir / 'runs.csv'}, everything else in {bench.directory(run)}")


if __name__ == "__main__":
    _CONFIG = command_flags.define_config()
    _WORKDIR = command_flags.define_workdir("Directory of the run: checkpoint, metrics and runs.csv.")
    _TIME_LIMIT = stopping.define_flag()
    _PROFILE = profiling.define_flag()
    hosts.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    errors.run(_main)
