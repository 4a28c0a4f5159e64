"""What the analysis commands say to inputs that cannot be used: one line, exit status 2, nothing written, at once."""

import json
import os

import numpy as np
import pytest

from analysis import laws
from tests import bad_tables, forked

TRUTH = {"A": 30.0, "alpha": 0.3, "B": 200.0, "beta": 0.4, "E": 0.9}
DELTA = {"C_T": 0.01, "gamma_D": 0.4, "gamma_N": 0.3, "gamma_post": 0.7}


def good_table(sizes=4, budgets=4, posts=(3, 4)) -> str:
    """Losses before and after PTQ at every size and budget, with 1 % noise."""
    rng, lines = np.random.default_rng(0), ["run,N,D,P_w,P_a,P_kv,P_post,loss,seed"]
    for n in np.geomspace(1e5, 3e6, sizes).round():
        for d in np.geomspace(1e6, 6e7, budgets).round():
            loss = laws.predict("chinchilla", TRUTH, N=n, D=d) * np.exp(rng.normal(0, 0.01))
            deltas = [float(laws.predict("ptq", DELTA, N=n, D=d, P_post=p)) for p in posts]
            for post, delta in [("", 0.0), *zip(posts, deltas, strict=True)]:
                lines.append(f"{n:g}-{d:g},{n:.0f},{d:.0f},16,16,16,{post},{loss + delta:.9f},0")
    return "\n".join(lines) + "\n"


def good_fits() -> dict[str, str]:
    """Fits of the loss and of δ, as the commands write them, with some bootstrap draws."""
    names, rng = (
        {"loss.json": ("chinchilla", TRUTH), "delta.json": ("ptq", {**DELTA, "b": 0.0})},
        np.random.default_rng(1),
    )
    out = {}
    for file, (law, params) in names.items():
        draws = {
            name: [value * (1 + 0.01 * rng.standard_normal()) for _ in range(50)] for name, value in params.items()
        }
        ends = {name: np.quantile(drawn, [0.025, 0.975]).tolist() for name, drawn in draws.items()}
        reporting = {"rows_before_ptq": 16, "rows_after_ptq": 4, "level": 0.95}
        out[file] = json.dumps(
            {
                **{"law": law, "params": params, "values": params, "ci": ends, "r2": 0.98, "objective": 0.1, "n": 20},
                **{"starts": 4, "seconds": 1.0, "columns": list(laws.get(law).columns), "samples": draws},
                **{"metrics": {"r2": 0.98}, "residuals": {"before": [-0.01, 0.01]}},
                "reporting": {**reporting, "ranges": {"N": [1e5, 3e6], "D": [1e6, 6e7]}},
            }
        )
    return out


CASES = list(bad_tables.all_cases())
FILES = {"runs.csv": good_table(), **good_fits()}


def make(directory, changes) -> set[str]:
    """The good files, changed; and a named pipe, which is no file to write to."""
    for name, content in FILES.items():
        data = content.encode()
        (directory / name).write_bytes(changes[name](data) if name in changes else data)
    os.mkfifo(directory / "pipe")
    return {path.name for path in directory.iterdir()}


def _id(case) -> str:
    command, arguments, changes, words = case
    return f"{command} {' '.join(arguments)[:40]}{' '.join(changes)}: {words[-1][:40]}"


@pytest.mark.parametrize("case", CASES, ids=[_id(case) for case in CASES])
def test_bad_input_is_refused_in_one_line(case, tmp_path):
    command, arguments, changes, words = case
    before = make(tmp_path, changes)
    done = forked.run(f"analysis.{command}", [*bad_tables.GOOD[command], *arguments], tmp_path, timeout=20)
    line = forked.refusal(done)
    for word in words:
        assert word in line
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before
    assert done.seconds < 10


def test_there_are_more_than_a_hundred_cases_and_every_command_has_some():
    assert len(CASES) > 300
    for command in bad_tables.GOOD:
        assert sum(case[0] == command for case in CASES) >= 20


SLOW = ("compare", "report")  # they fit several laws


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in bad_tables.GOOD]
)
def test_the_good_files_are_taken(command, tmp_path):
    make(tmp_path, {})
    done = forked.run(f"analysis.{command}", bad_tables.GOOD[command], tmp_path, timeout=600)
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr
