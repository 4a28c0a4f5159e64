"""Recipes of low-precision training, one choice at a time: formats, the parts of NVFP4 training, layers, when to begin.

    .venv/bin/pip install --target=runs/decide_corpus --no-deps --no-compile --only-binary=:all: --require-hashes \\
        --requirement=configs/study_decide_corpus.txt
    python -m precision_scaling.study --config=configs/study_recipes.py --workdir=runs/recipes

Runs that are held against each other differ in the choice alone, and come in three seeds, so that differences are taken
seed by seed. Two sizes of four layers, so that there is a last layer to leave in bf16 and a trend with N to see; they
grow in width alone, and one rate serves both. The corpus is that of `study_decide`. `study_optimizers` has the
choices that are no precision. Expected on two CPU cores: an hour and a half.
"""

from precision_scaling.config import base

SIZES = ("53k", "213k")
SEEDS = (0, 1, 2)
M = 1_000_000

# The recipe with each of its parts left out, and with two that were proposed since.
PARTS = {
    "weights in groups, not tiles": "nvfp4_train weights_granularity=group:16 backward.activations_saved=nvfp4",
    "gradients to nearest": "nvfp4_train backward.gradient_rounding=nearest",
    "no rotation of the weight gradient": "nvfp4_train backward.weights_rotation=none",
    "no layer in bf16": "nvfp4_train none",
    "four over six": "nvfp4_train_wnvfp4_4over6_anvfp4_4over6",
    "MS-EDEN in both gradients": "nvfp4_train backward.gradient_rounding=eden backward.weights_rotation=hadamard:32 "
    "backward.activations_rotation=hadamard:32 backward.activations_saved=nvfp4",
}
NVFP4 = ("bf16", "nvfp4", "nvfp4_train", *PARTS.values())
# Integers or floats in the same blocks, of weights and activations in the forward pass, with a rotation and without.
BLOCKS = tuple(
    f"w{name}_a{name}{rotation}"
    for name in ("nvfp4", "nvint4", "mxfp8", "mxint8")
    for rotation in ("", " rotation=hadamard")
)
LAYERS = tuple(f"nvfp4 {rules}" for rules in ("first:1=bf16", "last:1=bf16", "first:1=bf16 last:1=bf16"))
# When quantization begins, at 5, 19 and 75 tokens per parameter; "decay" is at .8 of the steps.
BEGIN = ("bf16", "w4_a4", *(f"w4_a4 @{when}" for when in ("0.25", "0.5", "decay", "0.95")))


def get_config():
    """The study's config."""
    c = base.get_config()
    c.data.root = "runs/decide_corpus"
    c.data.hash = "f152602cf19680ff"
    c.model.parametrization = "depth_mup"  # with which its table was measured
    c.model.base_size = SIZES[0]
    c.optimizer.peak_lr = 1.6e-2
    c.study.lanes = 3
    c.ptq.methods = ()
    for size in SIZES:
        c.study.grid[f"nvfp4_{size}"] = base.grid((size,), (M,), NVFP4, SEEDS)
        c.study.grid[f"layers_{size}"] = base.grid((size,), (M,), LAYERS, SEEDS)
        c.study.grid[f"blocks_{size}"] = base.grid((size,), (M,), BLOCKS, SEEDS)
    c.study.grid.begin = base.grid(SIZES[:1], (M // 4, M, 4 * M), BEGIN, SEEDS, schedules=("wsd",))
    return c
