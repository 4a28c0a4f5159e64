"""The study at the size of a laptop: what precision costs, before and after training, on two CPU cores in a night.

    python -m precision_scaling.study --config=configs/study_overnight_cpu.py --workdir=runs/overnight --shard=0/2 &
    python -m precision_scaling.study --config=configs/study_overnight_cpu.py --workdir=runs/overnight --shard=1/2; wait
    python -m precision_scaling.study --config=configs/study_overnight_cpu.py --workdir=runs/overnight
    python -m analysis.report --runs=runs/overnight/runs.csv --out=runs/overnight/report

Each worker takes half of the runs of every size; the third call gathers the table. The design is that of `study_gpu`,
on smaller models and fewer of them; the largest size has low precision in one part at a time, so that the laws can
be held to it.
"""

from precision_scaling.config import base
from precision_scaling.config.grids import PARTS, combinations, tied

SIZES = ("14k", "25k", "55k", "100k")
TOKENS = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000)  # D/N from 2 to 600
MIDDLE = 1_000_000


def get_config():
    """The study's config."""
    c = base.get_config()
    c.model.parametrization = "depth_mup"  # with which its table was measured
    c.optimizer.peak_lr = 1.6e-2  # the best of 4e-3 to 3.2e-2 by factors of 2, see docs/recipes.md
    c.study.lanes = 2
    c.ptq.methods = ("gptq", "rtn", "awq")
    c.ptq.bits = (2, 3, 4, 5, 6, 8)
    c.study.grid.full = base.grid(SIZES, TOKENS, ptq=True)
    c.study.grid.seeds = base.grid(SIZES, (500_000, 2_000_000), seeds=(1,), ptq=True)
    c.study.grid.parts = base.grid(SIZES, (MIDDLE,), tuple(f"{part}{bits}" for part in PARTS for bits in (3, 4, 6)))
    # What F1's precision law and F4 need: weights of few bits at short and long D, and quantized after training.
    c.study.grid.weights = base.grid(SIZES[:3], (250_000, MIDDLE, 4_000_000), ("w2", "w3", "w4"), ptq=True)
    c.study.grid.tied = base.grid(SIZES[:3], (MIDDLE,), tied(("4", "6", "8")), ptq=True)
    c.study.grid.held_out = base.grid(SIZES[:3], (MIDDLE,), combinations((3, 4, 5, 6, 8), 6, seed=0))
    c.study.grid.floats = base.grid(SIZES[1:3], (MIDDLE,), tied(("e2m1", "e3m2", "e4m3fn")))
    # Is it D or the decay of the rate that drives δ?
    c.study.grid.schedules = base.grid(
        SIZES[1:3], (500_000, 2_000_000), seeds=(0,), ptq=True, schedules=("constant", "wsd")
    )
    return c
