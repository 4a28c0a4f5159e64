"""Predicts rows that no fit has seen: `python -m analysis.predict --fit=fit.json[,fit2.json] --runs=other.csv
--out=predicted.csv`.

Rows may be planned (no loss) or measured. Every row gets the loss that the fits predict, an interval that covers the
uncertainty of the constants and the noise of a measurement, and the error where the table has a loss.
"""

import functools
import sys

import numpy as np
from absl import flags

from analysis import table as tables
from analysis.fitting import fit
from analysis.fitting.flags import pairs
from analysis.fitting.levenberg_marquardt import stay_off_accelerators
from analysis.fitting.options import FitError
from analysis.fitting.prediction import MEASURED, PREDICTED, predict
from analysis.fitting.prediction_text import summary, to_csv
from precision_scaling.runtime import cli
from precision_scaling.runtime.files import atomic_write
from precision_scaling.runtime.outputs import output, writing

FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
flags.DEFINE_list(
    "fit", [], "Fits (fit.json): of the loss, of delta, or of both; intervals need --bootstrap.", flag_values=FLAGS
)
_text("runs", None, "Table of rows to predict: measured, or planned without a loss.")
_text("out", None, "Where to write the table with predictions (CSV).")
flags.DEFINE_multi_string(
    "where", [], "Keep rows with COLUMN=VALUE (or VALUE|VALUE); may be repeated.", flag_values=FLAGS
)
flags.DEFINE_enum(
    "before",
    MEASURED,
    (MEASURED, PREDICTED),
    "Loss before PTQ to which delta is added: measured where the table has it, or predicted by the fit of the loss.",
    flag_values=FLAGS,
)
flags.DEFINE_float("level", 0.95, "Level of the intervals.", lower_bound=0.5, upper_bound=0.999, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the noise in the intervals.", lower_bound=0, flag_values=FLAGS)


def main() -> None:
    """Predicts the rows, writes the table and prints the errors. Raises UserError."""
    stay_off_accelerators()
    out = output("out", FLAGS.out, reads=[FLAGS.runs, *FLAGS.fit])
    given = [fit.load(path) for path in FLAGS.fit]
    table = tables.load(FLAGS.runs, measured=False).where(**pairs("where", FLAGS.where))
    found = predict(given, table, FLAGS.before, FLAGS.level, FLAGS.seed)
    if not np.isfinite(found.predicted).any():
        raise FitError(f"no row of {FLAGS.runs} can be predicted: {'; '.join(dict.fromkeys(found.note))}")
    print(summary(found))
    with writing("out", out, instead=lambda: to_csv(found)):
        atomic_write(out, to_csv(found))
    print(f"written: {out}")


command = functools.partial(cli.run, main, FLAGS, required=("fit", "runs", "out"))

if __name__ == "__main__":
    sys.exit(command())
