"""AdamW or Muon, the last parameters or their average: what each does to the loss, before and after quantization.

    python -m precision_scaling.study --config=configs/study_optimizers.py --workdir=runs/adamw
    python -m precision_scaling.study --config=configs/study_optimizers.py --workdir=runs/muon \\
        --config.optimizer.name=muon --config.optimizer.peak_lr=3.2e-2

Each optimizer has its own best rate, a power of 2 (docs/recipes.md). Sizes, seeds and corpus are
those of `study_recipes`. Expected on two CPU cores: twenty minutes each.
"""

from configs import study_recipes
from precision_scaling.config import base

PRECISIONS = ("bf16", "w4_a4")


def get_config():
    """The study's config."""
    c = study_recipes.get_config()
    c.study.grid = {}
    c.ptq.methods = ("gptq", "rtn")
    c.ptq.bits = (3, 4)
    c.optimizer.ema = (0.99, 0.998)
    small, large = study_recipes.SIZES
    tokens = study_recipes.M, 4 * study_recipes.M
    c.study.grid.small = base.grid((small,), tokens, PRECISIONS, study_recipes.SEEDS, ptq=True)
    c.study.grid.large = base.grid((large,), tokens[:1], PRECISIONS, study_recipes.SEEDS, ptq=True)
    return c
