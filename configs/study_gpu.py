"""The study on one GPU: more training runs than the paper's 465, on models of 0.1 to 10 million parameters.

    python -m precision_scaling.study --config=configs/study_gpu.py --workdir=runs/gpu --dry_run
    python -m precision_scaling.study --config=configs/study_gpu.py --workdir=runs/gpu --time_limit=55
    python -m analysis.report --runs=runs/gpu/runs.csv --out=runs/gpu/report

The second command may be repeated until nothing is missing. The corpus is the source code of everything installed;
D stays below MOST_TOKENS, and the column `epochs` says where that is more than the corpus has. Precision varies at
three sizes and three budgets each; the two largest are in bf16 alone, for the laws to be held to. Its time on a GPU has
not been measured yet; part of its first cohort has been run on a CPU (results/overnight_cpu/README.md).
"""

from precision_scaling.config import base
from precision_scaling.config.grids import PARTS, combinations, tied
from precision_scaling.model import sizes

SIZES = ("100k", "300k", "1M", "3M", "10M")
TOKENS_PER_PARAMETER = (10, 30, 100, 300, 1000)
MOST_TOKENS = 300_000_000
BITS = (3, 4, 5, 6, 8, 10, 12)


def tokens(size: str, *ratios: int) -> tuple[int, ...]:
    """Token budgets of a size, without those above MOST_TOKENS."""
    shape = sizes.named(size)
    parameters = shape.depth * (4 * shape.width**2 + 3 * shape.width * shape.mlp_width)
    return tuple(ratio * parameters for ratio in ratios if ratio * parameters <= MOST_TOKENS)


def get_config():
    """The study's config."""
    c = base.get_config()
    c.optimizer.peak_lr = 1.6e-2  # as in study_overnight_cpu, whose base size this has
    c.data.name = "python_stdlib/packages"
    c.model.sequence_length = 128
    c.train.batch_size = 64
    c.study.lanes = 32
    c.evaluate.sequences, c.evaluate.batch_size = 2048, 256
    c.ptq.methods = ("gptq", "rtn", "awq")
    c.ptq.bits = (2, 3, 4, 5, 6, 8)
    for size in SIZES:
        c.study.grid[f"full_{size}"] = base.grid((size,), tokens(size, *TOKENS_PER_PARAMETER), seeds=(0, 1), ptq=True)
    for size, ratios in (("100k", (30, 100, 300)), ("300k", (30, 100, 300)), ("1M", (10, 30, 100))):
        some = tokens(size, *ratios)
        parts = tuple(f"{part}{bits}" for part in PARTS for bits in BITS)
        c.study.grid[f"parts_{size}"] = base.grid((size,), some, parts)
        c.study.grid[f"tied_{size}"] = base.grid((size,), some, tied(tuple(map(str, BITS))), ptq=True)
        c.study.grid[f"held_out_{size}"] = base.grid((size,), some, combinations(BITS, 16, seed=0))
        c.study.grid[f"floats_{size}"] = base.grid((size,), some, tied(("e2m1", "e3m2", "e4m3fn")))
        c.study.grid[f"schedules_{size}"] = base.grid((size,), some, ptq=True, schedules=("constant", "wsd"))
    return c
