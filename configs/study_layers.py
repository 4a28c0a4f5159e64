"""What a law of precision says of models whose layers differ: runs of mixed layers beside runs of one precision.

    python -m precision_scaling.study --config=configs/study_layers.py --workdir=runs/layers
    python -m analysis.predict --fit=results/overnight_cpu/fit_capacity_noise.json --runs=runs/layers/runs.csv \\
        --out=runs/layers/predicted.csv

One size and length of `study_overnight_cpu`, whose fit has seen no such run. All of them are one cohort: the formats of
layers and projections are data. About ten minutes on two CPU cores.
"""

from precision_scaling.config import base

UNIFORM = ("bf16", "w2", "a3", "w4_a4_kv4")
ONE_PART = (
    *(f"{part} {rule}=bf16" for part in ("w2", "a3") for rule in ("first:1", "last:1", "*.down", "*.qkv")),
    *(f"kv3 {rule}=bf16" for rule in ("first:1", "last:1")),
)
SEVERAL_PARTS = (
    "w4_a4_kv4 first:1=bf16",
    "w4_a4_kv4 last:1=w8_a8_kv8",
    "w3_a3_kv3 *.[gd]*=bf16",
    "w6_a3_kv6 *.out=a8 0.qkv=a6",
)


def get_config():
    """The study's config."""
    c = base.get_config()
    c.model.parametrization = "depth_mup"  # as in study_overnight_cpu
    c.optimizer.peak_lr = 1.6e-2  # as in study_overnight_cpu
    c.study.lanes = 2
    c.ptq.methods = ()
    c.study.grid.all = base.grid(("55k",), (1_000_000,), UNIFORM + ONE_PART + SEVERAL_PARTS)
    return c
