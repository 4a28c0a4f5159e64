"""Progress bars: what a terminal and a log file see of the same work."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from precision_scaling.runtime import progress
from precision_scaling.runtime.progress import LINE_SECONDS, progress_bar

ROOT = Path(__file__).parent.parent
WORK = """
import time
from precision_scaling.runtime import progress
progress.LINE_SECONDS = 0.25
with progress.progress_bar(total=100, desc="training", unit=" tokens") as bar:
    for _ in range(100):
        bar.update(1)
        time.sleep(0.01)
"""
LINE = r"training: +(\d+)% (\d+)/100 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ tokens/s\]"


def test_in_a_pipe_it_is_a_line_now_and_then_and_one_at_the_end():
    done = subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "\r" not in done.stderr and done.stderr.endswith("\n")
    lines = done.stderr.splitlines()
    shares = [int(re.fullmatch(LINE, line)[1]) for line in lines]
    assert len(shares) >= 3 and shares == sorted(set(shares)) and shares[-1] == 100
    assert not done.stdout


def test_on_a_terminal_it_moves():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", WORK], cwd=ROOT, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += part
        if not part:
            break
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert text.count("\r") > 5 and text.count("\n") == 1 and "100%|" in text


@pytest.fixture
def clock(monkeypatch, capsys):
    """Seconds that pass when the test says so; stderr is no terminal here."""

    class Clock:
        seconds = 0.0

        def lines(self) -> list[str]:
            """What stderr was given since the last look."""
            return capsys.readouterr().err.splitlines()

    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", lambda: clock.seconds)
    return clock


EAGER = {"mininterval": 0, "miniters": 1}  # every step is looked at, however fast the test is


def steps(clock, count: int, seconds: float, **options) -> list[str]:
    for _ in progress_bar(range(count), desc="quantizing", unit="run", **EAGER, **options):
        clock.seconds += seconds
    return [re.sub(r" \[.*", "", line) for line in clock.lines()]


def test_lines_are_at_least_so_far_apart(clock):
    assert LINE_SECONDS == 30
    assert steps(clock, 100, 5) == [f"quantizing: {n:3}% {n}/100" for n in [*range(6, 97, 6), 100]]


def test_slow_steps_have_a_line_each(clock):
    assert steps(clock, 3, 600) == ["quantizing:  33% 1/3", "quantizing:  67% 2/3", "quantizing: 100% 3/3"]


def test_short_work_has_its_last_line_alone_and_none_where_nothing_is_to_stay(clock):
    assert steps(clock, 10, 0.1) == ["quantizing: 100% 10/10"]
    assert steps(clock, 10, 0.1, leave=False) == []
    assert steps(clock, 100, 1, leave=False)[-1] == "quantizing: 100% 100/100"


def test_work_that_fails_says_how_far_it_came_and_a_hidden_bar_says_nothing(clock):
    with pytest.raises(KeyError), progress_bar(total=8, desc="training") as bar:
        bar.update(2)
        raise KeyError
    (line,) = clock.lines()
    assert line.startswith("training:  25% 2/8 [")
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2] and not clock.lines()


def test_the_description_and_what_is_shown_beside_may_change(clock):
    with progress_bar(total=4000, desc="training", unit=" tokens", unit_scale=True, **EAGER) as bar:
        bar.set_description("training 25k (3 runs)")
        bar.set_postfix(loss="3.210", refresh=False)
        clock.seconds += 31
        bar.update(2000)
        bar.set_description("training 55k (3 runs)")  # asks for a line that is not due
        bar.total -= 1000
    first, last = clock.lines()
    assert first.startswith("training 25k (3 runs):  50% 2.00k/4.00k [") and first.endswith("loss=3.210]")
    assert last.startswith("training 55k (3 runs):  67% 2.00k/3.00k [")


def test_no_bar_is_made_elsewhere():
    sources = [path for name in ("precision_scaling", "analysis", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    importing = {path.name for path in sources if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.MULTILINE)}
    assert importing == {"progress.py", "cohort.py"}  # the latter for the type of an argument
    assert "tqdm(" not in (ROOT / "precision_scaling" / "training" / "cohort.py").read_text()
