"""Counts the requests of a study whose workdir is in a bucket, against a server on this machine.

    python -m benchmarks.buckets [--latency=0.05] [--failing=0.05]

Prints what a study, a run, its rows, a checkpoint, a call that finds nothing to do and a minute of holding a shard cost
in requests: a study is run as it is and with more runs, rows and checkpoints, and the difference divided. Needs the
extra `dev`.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks import object_store
from precision_scaling.errors import UserError
from precision_scaling.runtime import cli, lease

FLAGS = flags.FlagValues()
_LATENCY = flags.DEFINE_float("latency", 0.0, "Seconds before every answer.", 0.0, 10.0, flag_values=FLAGS)
_FAILING = flags.DEFINE_float("failing", 0.0, "Share of the requests that fail.", 0.0, 0.5, flag_values=FLAGS)

CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.compilation_cache = {cache!r}
    c.model.width, c.model.depth, c.model.heads, c.model.mlp_width, c.model.sequence_length = 16, 2, 2, 24, 16
    c.train.batch_size, c.train.steps_per_dispatch, c.study.lanes = 4, 10, 2
    c.train.checkpoint_seconds, c.ptq.methods, c.ptq.bits = 1e6, (), (4,)
    c.evaluate.sequences, c.evaluate.batch_size = 8, 4
    c.study.grid.all = base.grid(("25k",), (64 * 200,), ("bf16",), ptq=True)
    return c
"""


class Study:
    """Runs a small study in a bucket and counts."""

    def __init__(self, store: object_store.Store, directory: Path):
        self.store, self.config, self.number = store, directory / "study.py", 0
        self.config.write_text(CONFIG.format(cache=str(directory / "xla")))

    def requests(self, *options: str, again: bool = False) -> tuple[int, float]:
        """(requests, seconds) of the study with these options, in a new workdir or again in the last one."""
        self.number += not again
        self.store.requests.clear()
        started = time.monotonic()
        command = [sys.executable, "-m", "precision_scaling.study", f"--config={self.config}"]
        done = subprocess.run(
            [*command, f"--workdir={self.store.url}/{self.number}", *options],
            env={**os.environ, **self.store.environment},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"the study failed: {done.stderr.splitlines()[-1]}")
        return len(self.store.requests), time.monotonic() - started


def main() -> None:
    """Run the studies and print the counts."""
    if not object_store.is_installed():
        raise UserError("the server is missing; allowed is pip install -e '.[dev]' first")
    seeds = lambda n: f"--config.study.grid.all.seeds={tuple(range(n))}"
    with tempfile.TemporaryDirectory() as directory, object_store.bucket() as store:
        store.latency, store.share = _LATENCY.value, _FAILING.value
        study = Study(store, Path(directory))
        study.requests()  # compiles, tokenizes
        one, seconds = study.requests()
        again, _ = study.requests(again=True)
        five, _ = study.requests(seeds(5))
        idle, _ = study.requests(seeds(5), again=True)
        rows, _ = study.requests("--config.ptq.methods=rtn")
        often, _ = study.requests("--config.train.checkpoint_seconds=0", "--config.train.tokens=12800")
        saved = sum(line.startswith("DELETE") and "lanes.json" in line for line in store.requests)
        print(f"a study of one run, {seconds:.1f} s: {one} requests; called again, with nothing to do: {again}")
        print(
            f"each further run, trained: {(five - one) / 4:.1f}; each run that is found done: {(idle - again) / 4:.1f}"
        )
        print(f"quantizing a run by one method, and its rows: {rows - one}")
        print(f"a checkpoint under way: {(often - one) / max(1, saved):.1f} ({saved} of them)")
        print(f"holding a shard: {2 * 60 / lease.SECONDS * 4:.0f} a minute; a step: none; metrics: 1 a minute and run")
        print(f"faults: {dict(store.faults)}")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
