"""The paper's own grid (Kumar et al., arXiv 2411.04330): what it would take, and the real thing.

    python -m precision_scaling.study --config=configs/paper.py --workdir=runs/paper --dry_run

Sizes 30M to 220M, 1.5B to 26B tokens, one part of the precision varied at a time and all three together, every bf16 run
quantized after training. The paper names its sizes by N alone and publishes neither shapes nor tokenizer: ours are in
precision_scaling/model/sizes.py. Its corpus is Dolma v1.7 (--config.data.name=dolma, see docs/data.md, with
--config.data.tokenizer=file:gpt-neox/tokenizer.json); until one is named, the embedded one stands in. On one debugging
GPU or a CPU, start with --config.train.batch_size=2 --config.study.lanes=1. On accelerators,
--config.mesh=auto --config.train.microbatches=auto --config.model.remat=auto divide the work by what they hold.
"""

from precision_scaling.config import base

SIZES = ("30M", "60M", "110M", "220M")
TOKENS = (1_500_000_000, 3_000_000_000, 6_000_000_000, 13_000_000_000, 26_000_000_000)
BITS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


def get_config():
    """The paper's grid."""
    c = base.get_config()
    c.data.tokenizer = "bpe:32768"
    c.model.size = "30M"
    c.model.base_size = "30M"
    c.model.sequence_length = 1024
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.optimizer.peak_lr = 6e-4
    c.train.batch_size = 256
    c.train.microbatches = 16
    c.evaluate.sequences = 512
    c.evaluate.batch_size = 8
    c.ptq.methods = ("gptq", "awq", "rtn")
    c.study.lanes = 1
    budget = (1_500_000_000, 3_000_000_000, 6_000_000_000, 13_000_000_000)
    c.study.grid.full = base.grid(SIZES, TOKENS, ptq=True)
    c.study.grid.weights = base.grid(SIZES, budget, tuple(f"w{b}" for b in BITS), ptq=True)
    c.study.grid.activations = base.grid(SIZES, budget, tuple(f"a{b}" for b in BITS))
    c.study.grid.attention = base.grid(SIZES, budget, tuple(f"kv{b}" for b in BITS))
    c.study.grid.tied = base.grid(SIZES, budget[:2], tuple(f"w{b}_a{b}_kv{b}" for b in (4, 5, 6, 7, 8, 12)), ptq=True)
    return c
