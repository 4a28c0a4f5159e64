"""The first study: three sizes, four token budgets, three parts of the precision, on two CPU cores in a few minutes.

    python -m precision_scaling.study --config=configs/study_cpu.py --workdir=runs/study_cpu

Its table shows the paper's first finding: the loss from 3-bit post-training quantization grows with D/N at every N.
"""

from precision_scaling.config import base

SIZES = ("14k", "25k", "55k")
TOKENS = (125_000, 250_000, 500_000, 1_000_000)


def get_config():
    """The study's config."""
    c = base.get_config()
    c.study.lanes = 2
    c.study.grid.full = base.grid(SIZES, TOKENS, ptq=True)
    c.study.grid.weights = base.grid(SIZES, (500_000,), ("w3", "w4"), ptq=True)
    c.study.grid.activations = base.grid(SIZES, (500_000,), ("a4", "a6"))
    c.study.grid.attention = base.grid(SIZES, (500_000,), ("kv3", "kv4"))
    c.study.grid.joint = base.grid(SIZES, (500_000,), ("w4_a6_kv4",))
    return c
