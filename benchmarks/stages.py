"""Seconds of CPU and of the clock that each stage of a small study takes here, beside another checkout of the project.

    python -m benchmarks.stages --before=DIR [--rounds=3]

DIR: a checkout of another commit, e.g. by `git worktree add DIR COMMIT`. Every round runs all stages in the one and
then in the other; each stage is a process. What is printed is the least of the rounds, the medians in parentheses.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from absl import flags

from precision_scaling.errors import UserError
from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_BEFORE = flags.DEFINE_string("before", "", "Another checkout of the project.", flag_values=FLAGS)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Of all stages.", lower_bound=1, flag_values=FLAGS)

ROOT = Path(__file__).parent.parent
CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.compilation_cache = {cache!r}
    c.model.width, c.model.depth, c.model.heads, c.model.mlp_width, c.model.sequence_length = 16, 2, 2, 24, 16
    c.train.batch_size, c.train.steps_per_dispatch, c.train.checkpoint_seconds, c.study.lanes = 4, 10, 1e6, 2
    c.evaluate.sequences, c.evaluate.batch_size, c.ptq.methods = 8, 4, ()
    c.study.grid.all = base.grid(("25k",), (64 * 400, 64 * 200), ("bf16", "w4"), ptq=True)
    return c
"""


def stages(config: Path, directory: Path) -> dict[str, list[str]]:
    """The command of each stage. Of the two studies that train, the second writes a checkpoint after every dispatch."""
    study = ["-m", "precision_scaling.study", f"--config={config}"]
    trained = f"--workdir={directory / 'w'}"
    return {
        "start (--dry_run)": [*study, trained, "--dry_run"],
        "train": [*study, trained],
        "train, a checkpoint after each dispatch": [
            *study,
            f"--workdir={directory / 'often'}",
            "--config.train.checkpoint_seconds=0",
        ],
        "ptq": ["-m", "precision_scaling.ptq", trained, "--method=rtn", "--bits=3,4"],
        "gather (a call that finds all done)": [*study, trained],
    }


def measure(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """(seconds of CPU, seconds) of a command in a checkout. UserError where it fails."""
    started, before = time.monotonic(), os.times()
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        raise UserError(f"{checkout}: {' '.join(arguments)}: {done.stderr.splitlines()[-1]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.monotonic() - started


def main() -> None:
    """Run the stages in turn and print a table."""
    before = Path(_BEFORE.value).absolute()
    if not (before / "precision_scaling").is_dir():
        raise UserError(f"--before={_BEFORE.value}: allowed is a checkout of the project")
    found: dict[tuple[str, Path], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        for number in range(_ROUNDS.value + 1):  # the first one compiles and is left out
            for checkout in (before, ROOT):
                place = Path(directory, checkout.name)
                config = Path(directory, f"{checkout.name}.py")
                config.write_text(CONFIG.format(cache=str(place / "xla")))
                for stage, arguments in stages(config, place / str(number)).items():
                    measured = measure(checkout, arguments)
                    if number:
                        found[stage, checkout].append(measured)
    print("| stage | CPU before | CPU now | clock before | clock now |\n|---|---:|---:|---:|---:|")
    for stage in stages(Path(), Path()):
        cells = []
        for kind in (0, 1):
            for checkout in (before, ROOT):
                values = [measured[kind] for measured in found[stage, checkout]]
                cells.append(f"{min(values):.1f} ({statistics.median(values):.1f})")
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, required=("before",)))
