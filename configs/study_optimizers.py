"""AdamW or Muon, the last parameters or their average: what each does to the loss, before and after quantization.

    python -m precision_scaling.study --config=configs/study_optimizers.py --workdir=runs/adamw
    python -m precision_scaling.study --config=configs/study_optimizers.py --workdir=runs/muon \\
        --config.optimizer.name=muon --config.optimizer.peak_lr=3.2e-2

These are the best rates of short runs (docs/recipes.md); those of these runs are lower (results/recipes/README.md).
Sizes, seeds and corpus are those of `study_recipes`. Expected on two CPU cores: twenty minutes each.
"""

from precision_scaling.config import base

PRECISIONS = ("bf16", "w4_a4")
SEEDS = (0, 1, 2)
M = 1_000_000


def get_config():
    """The study's config."""
    c = base.get_config()
    c.data.root = "runs/decide_corpus"
    c.data.hash = "f152602cf19680ff"
    c.model.parametrization = "depth_mup"  # with which its table was measured
    c.model.base_size = "53k"
    c.optimizer.peak_lr = 1.6e-2
    c.optimizer.ema = (0.99, 0.998)
    c.study.lanes = 3
    c.ptq.methods = ("gptq", "rtn")
    c.ptq.bits = (3, 4)
    c.study.grid.small = base.grid(("53k",), (M, 4 * M), PRECISIONS, SEEDS, ptq=True)
    c.study.grid.large = base.grid(("213k",), (M,), PRECISIONS, SEEDS, ptq=True)
    return c
