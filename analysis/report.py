"""Writes the report of a table of losses: `python -m analysis.report --runs=runs.csv --out=DIR`.

Fits the laws (fit_LAW.json), compares them on held-out rows (compare.csv), draws the figures (figures/*.png, *.svg),
tests the paper's findings on the table (findings.json) and writes one self-contained index.html.
"""

import functools
import os
import shlex
import sys

from absl import flags

from analysis import table as tables
from analysis.fitting.flags import MOST_REPEATS, pairs
from analysis.reporting.laws import LAWS
from analysis.reporting.report import LAW_FILES, LEAST_RESAMPLES, ReportError, write
from precision_scaling.runtime import cli
from precision_scaling.runtime.outputs import output

FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_whole = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_RUNS = _text("runs", None, "table of measured losses (runs.csv)")
_OUT = _text("out", None, "folder for the report")
_BOOTSTRAP = _whole(
    *("bootstrap", 200, "bootstrap resamples of the runs for the intervals; 0 for none"),
    lower_bound=0,
    upper_bound=MOST_REPEATS,
)
_SEED = _whole("seed", 0, "seed of starts and bootstrap", lower_bound=0)
_PROCESSES = _whole("processes", 2, "processes that fit in parallel; at most one per CPU is used", lower_bound=1)
_LAWS = flags.DEFINE_list(
    "laws", list(LAWS), "laws to fit, in addition to those near the best on held-out rows", flag_values=FLAGS
)
_WHERE = flags.DEFINE_multi_string("where", [], "keep rows with COLUMN=VALUE; may be repeated", flag_values=FLAGS)


def main() -> None:
    if unknown := [name for name in _LAWS.value if name not in LAWS]:
        raise ReportError(f"--laws={','.join(_LAWS.value)}: {unknown[0]!r} is not one of {', '.join(LAWS)}")
    if 0 < _BOOTSTRAP.value < LEAST_RESAMPLES:
        raise ReportError(
            f"--bootstrap={_BOOTSTRAP.value}: allowed is {LEAST_RESAMPLES} or more, or 0 for no intervals"
        )
    files = (*LAW_FILES, "compare.csv", "findings.json", "index.html")
    out = output("out", _OUT.value, files, reads=[_RUNS.value])
    table = tables.load(_RUNS.value).where(**pairs("where", _WHERE.value))
    line = shlex.join(["python", "-m", "analysis.report", *sys.argv[1:]])
    processes = min(_PROCESSES.value, os.cpu_count() or 1)
    write(
        table,
        out,
        bootstrap=_BOOTSTRAP.value,
        seed=_SEED.value,
        names=_LAWS.value,
        line=line,
        tell=print,
        processes=processes,
    )
    print(f"report: {out / 'index.html'}")


command = functools.partial(cli.run, main, FLAGS, required=("runs", "out"))

if __name__ == "__main__":
    sys.exit(command())
