"""Fits a scaling law to a table of measured losses: `python -m analysis.fit --runs=runs.csv --law=NAME --out=fit.json`.

fit.json holds the constants, their intervals, which of them the table does not identify, and how to repeat the fit.
"""

import functools
import sys

from absl import flags

from analysis import laws
from analysis import table as tables
from analysis.fitting.checks import Checks
from analysis.fitting.fit import fit
from analysis.fitting.fit_text import summary
from analysis.fitting.flags import MOST_REPEATS, define, hubers, numbers, pairs
from analysis.fitting.levenberg_marquardt import stay_off_accelerators
from analysis.fitting.options import STAGES, Options
from precision_scaling.runtime import cli
from precision_scaling.runtime.outputs import output, writing

FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_many = functools.partial(flags.DEFINE_list, flag_values=FLAGS)
_choice = functools.partial(flags.DEFINE_enum, flag_values=FLAGS)
_count = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_number = functools.partial(flags.DEFINE_float, flag_values=FLAGS)
_switch = functools.partial(flags.DEFINE_bool, flag_values=FLAGS)

_text("runs", None, "Table of measured losses (runs.csv).")
_text("law", None, f"Law to fit: {', '.join(laws.LAWS)}.")
_text("out", None, "Where to write fit.json.")
_count("bootstrap", 0, "Bootstrap resamples of the runs for the intervals.", lower_bound=0, upper_bound=MOST_REPEATS)
_count("starts", None, "Starts of the search (default: 512).", lower_bound=1, upper_bound=MOST_REPEATS)
flags.DEFINE_multi_string(
    "where", [], "Keep rows with COLUMN=VALUE (or VALUE|VALUE); may be repeated.", flag_values=FLAGS
)
_many("fixed", [], "Parameters held at a value: name=value,...")
_many("tied", [], "Parameters set equal to another: beta=alpha,...")
_switch("biased", True, "The biased form, as the paper fits; --nobiased sets the n_x to 0.")
how_to_fit = define(FLAGS)
_text("fit_where", None, "Rows to fit: an expression on columns, such as 'N < 3e5 and P_w == 16'.")
_text("test_where", None, "Rows to test the fit on (default: those that --fit_where leaves).")
_many("test", [], "Constants held in a nested fit, for a likelihood-ratio test: name=value,...")
_many("sweep_huber", [], "Further values of --huber_delta (or inf) to refit with.")
_count(
    "drop_worst",
    0,
    "Refit without the 1, 2, ... up to this many rows of largest residual.",
    lower_bound=0,
    upper_bound=1000,
)
_choice("stages", "joint", STAGES, "All parameters at once, or the 16-bit rows first (the paper's way).")
_number("level", 0.95, "Level of the intervals.", lower_bound=0.5, upper_bound=0.999)
_switch("profile", True, "Profile likelihoods: intervals, and which constants are identified.")
_count("seed", 0, "Seed of the starts and the bootstrap.", lower_bound=0)


def main() -> None:
    """Fits the law, writes fit.json and prints the summary. Raises UserError."""
    stay_off_accelerators()
    out = output("out", FLAGS.out, reads=[FLAGS.runs])
    laws.get(FLAGS.law)
    options = Options(
        fixed=numbers("fixed", FLAGS.fixed),
        tied=pairs("tied", FLAGS.tied),
        biased=FLAGS.biased,
        stages=FLAGS.stages,
        fit_where=FLAGS.fit_where,
        **how_to_fit(),
    )
    table = tables.load(FLAGS.runs).where(**pairs("where", FLAGS.where))
    result = fit(
        FLAGS.law,
        table,
        options,
        starts=FLAGS.starts,
        bootstrap_resamples=FLAGS.bootstrap,
        level=FLAGS.level,
        profile=FLAGS.profile,
        seed=FLAGS.seed,
        progress=True,
        checks=Checks(FLAGS.test_where, numbers("test", FLAGS.test), hubers(FLAGS.sweep_huber), FLAGS.drop_worst),
    )
    print(summary(result))
    with writing("out", out, instead=result.to_json):
        result.save(out)
    print(f"written: {out}")


command = functools.partial(cli.run, main, FLAGS, required=("runs", "law", "out"))

if __name__ == "__main__":
    sys.exit(command())
