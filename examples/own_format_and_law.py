"""A number format and a scaling law of one's own: a model trained in the one, a table fitted by the other.

python examples/own_format_and_law.py [WORKDIR]     # a quarter of a minute on two CPU cores
"""

import sys
from pathlib import Path

import numpy as np

import precision_scaling as ps
from analysis.laws.law import Law, Need, Parameter, log_power_law, log_sum
from precision_scaling.numerics.formats import level_set

RUNS = Path(__file__).parent.parent / "results" / "overnight_cpu" / "runs.csv"

# A format by its values. From here on it has a name wherever a format may be named.
FIBONACCI = ps.register_format(level_set("fibonacci", (-8, -5, -3, -2, -1, 0, 1, 2, 3, 5, 8)))


def log_loss(p, c, xp):
    """log L for parameters p and columns c; xp is numpy or jax.numpy."""
    size, data = (log_power_law(p[name], p["alpha"], c[column], xp) for name, column in (("A", "N"), ("B", "D")))
    return log_sum(xp, size, data, xp.log(p["E"]))


SCALE = (1.0, 100.0, 10_000.0)  # where searches start
ONE_EXPONENT = ps.register_law(
    Law(
        "shared_exponent",
        "L = A N^-alpha + B D^-alpha + E",
        "this example",
        (
            Parameter("A", 1e-6, 1e30, SCALE, log=True, held=1e-6),
            Parameter("alpha", 0.0, 3.0, (0.1, 0.3, 0.6), held=0.3),
            Parameter("B", 1e-6, 1e30, SCALE, log=True, held=1e-6),
            Parameter("E", 1e-6, 100.0, (0.5, 1.5), log=True, held=1e-6),
        ),
        ("N", "D"),
        log_loss,
        needs=(Need("N", 2, ("A",)), Need("D", 2, ("B",))),
        high_precision_only=True,
    )
)


def main(workdir: str = "runs/example_fibonacci") -> None:
    print(ps.fake_quant(np.array([0.1, 0.45, -0.7, 1.0], np.float32), "fibonacci"))  # the largest is 8
    options = {"model.size": "25k", "train.tokens": 200_000, "precision.weights": "fibonacci"}
    row = ps.train_model(ps.load_config(options={**options, "evaluate.sequences": 128}), workdir)
    print(f"trained with weights of {FIBONACCI.bits:.2f} bits: loss {row['loss']:.3f}")
    print(ps.summary(ps.fit("shared_exponent", RUNS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
