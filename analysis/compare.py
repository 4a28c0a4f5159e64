"""Compares every law that a table allows: `python -m analysis.compare --runs=runs.csv --out=DIR`.

Laws of one kind (loss before PTQ, δ, both) are fitted to the same rows and compared by fit, information criteria and
held-out error, laws of δ also by the loss after PTQ. Differences carry paired bootstrap intervals, nested laws a
likelihood-ratio test. Writes compare.csv and compare.json.
"""

import functools
import sys

from absl import flags

from analysis import table as tables
from analysis.fitting.comparison import compare
from analysis.fitting.comparison_text import FILES, summary, to_csv, to_json
from analysis.fitting.flags import MOST_REPEATS, define, pairs
from analysis.fitting.forms import OUTER, UNBIASED, named
from analysis.fitting.levenberg_marquardt import stay_off_accelerators
from analysis.fitting.options import FitError, Options
from precision_scaling.runtime import cli
from precision_scaling.runtime.files import atomic_write
from precision_scaling.runtime.outputs import output, writing

FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_text("runs", None, "Table of measured losses (runs.csv).")
_text("out", None, "Directory for compare.csv and compare.json.")
flags.DEFINE_list(
    "laws",
    [],
    f"Laws to compare (default: all that the table allows); NAME{UNBIASED}: without biases, NAME{OUTER}: with g free.",
    flag_values=FLAGS,
)
flags.DEFINE_multi_string(
    "where", [], "Keep rows with COLUMN=VALUE (or VALUE|VALUE); may be repeated.", flag_values=FLAGS
)
flags.DEFINE_list(
    "tied", [], "Parameters set equal to another, in the laws that have both: beta=alpha,...", flag_values=FLAGS
)
_text("fit_where", None, "A further hold-out: rows to fit, an expression on columns such as 'N < 3e5'.")
_text("test_where", None, "A further hold-out: rows to predict (default: those that --fit_where leaves).")
how_to_fit = define(FLAGS)
_count = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_count("starts", None, "Starts of each search (default: 512).", lower_bound=1, upper_bound=MOST_REPEATS)
_count("seed", 0, "Seed of the starts and the bootstrap.", lower_bound=0)


def main() -> None:
    """Compares the laws, writes the files and prints the tables. Raises UserError."""
    stay_off_accelerators()
    out = output("out", FLAGS.out, FILES, reads=[FLAGS.runs])
    for name in FLAGS.laws:
        named(name)
    if repeated := [name for name in FLAGS.laws if FLAGS.laws.count(name) > 1]:
        raise FitError(f"--laws={','.join(FLAGS.laws)}: {repeated[0]} is given more than once")
    table = tables.load(FLAGS.runs).where(**pairs("where", FLAGS.where))
    options = Options(tied=pairs("tied", FLAGS.tied), **how_to_fit())
    names = tuple(FLAGS.laws) or None
    result = compare(
        table, names, options, FLAGS.starts, seed=FLAGS.seed, fit_where=FLAGS.fit_where, test_where=FLAGS.test_where
    )
    print(summary(result))
    with writing("out", out, instead=lambda: to_csv(result)):
        atomic_write(out / "compare.csv", to_csv(result))
        atomic_write(out / "compare.json", to_json(result))
    print(f"written: {out / 'compare.csv'}, {out / 'compare.json'}")


command = functools.partial(cli.run, main, FLAGS, required=("runs", "out"))

if __name__ == "__main__":
    sys.exit(command())
