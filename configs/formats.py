"""What a number format costs: one model at twelve formats, and each part alone at three and four bits.

    python -m precision_scaling.study --config=configs/formats.py --workdir=runs/formats
    python -m precision_scaling.study --config=configs/formats.py --workdir=runs/formats --dry_run

19 runs of 300 steps in three cohorts: formats of one family share a program. docs/precision.md has the table it gives.
Expected on two CPU cores: about half an hour, and losses that rise as bits fall, most where activations lose them.
"""

from precision_scaling.config import base

FORMATS = ("int8", "int6", "int4", "int3", "e4m3fn", "e5m2", "e3m2", "e2m1", "mxfp8", "mxfp4", "nvfp4")
SIZE = "1M"
STEPS = 300


def get_config():
    """The study's config."""
    c = base.get_config()
    # The size named 1M has a width of 144: blocks of 32 must divide the width, the head dimension and the MLP's width.
    c.model.width, c.model.depth, c.model.heads, c.model.mlp_width = 128, 5, 4, 352
    c.ptq.methods = ()
    tokens = (STEPS * c.train.batch_size * c.model.sequence_length,)
    tied = tuple(f"w{name}_a{name}_kv{name}" for name in FORMATS)
    parts = tuple(f"{part}{bits}" for part in ("w", "a", "kv") for bits in (3, 4))
    c.study.grid.tied = base.grid((SIZE,), tokens, ("bf16", *tied))
    c.study.grid.parts = base.grid((SIZE,), tokens, (*parts, "kv2"))
    return c
