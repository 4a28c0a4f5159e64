"""The study that decides between laws: 60-fold in N, all precisions from 2 to 12 bits, a corpus that anyone rebuilds.

    .venv/bin/pip install --target=runs/decide_corpus --no-deps --no-compile --only-binary=:all: --require-hashes \\
        --requirement=configs/study_decide_corpus.txt
    python -m precision_scaling.study --config=configs/study_decide.py --workdir=runs/decide --shard=0/2 &
    python -m precision_scaling.study --config=configs/study_decide.py --workdir=runs/decide --shard=1/2; wait
    python -m precision_scaling.study --config=configs/study_decide.py --workdir=runs/decide
    python -m analysis.report --runs=runs/decide/runs.csv --out=runs/decide/report

The laws were found on `study_overnight_cpu`; what they predict for every run of this study was committed before the
first one ended (results/decide/). The sizes form a ladder in width alone, like those of that study, so that one rate
serves all. D/N goes from 5 to 300, and no run sees a document twice. The grid says what each part of it is for.
`--rows=results/decide/runs.csv.gz` takes over the runs that are measured already, on any machine. Expected on two CPU
cores: about eight hours.
"""

from precision_scaling.config import base
from precision_scaling.config.grids import PARTS, combinations, tied

SIZES = ("27k", "106k", "400k", "1.6M")
PARAMETERS = {"27k": 26_624, "106k": 106_496, "400k": 401_408, "1.6M": 1_605_632}
BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
SOME_BITS = (2, 3, 4, 6, 8)
M = 1_000_000
FULL = {
    "27k": (125_000, 250_000, 500_000, M, 2 * M, 4 * M, 8 * M),
    "106k": (500_000, M, 2 * M, 4 * M, 8 * M, 16 * M, 32 * M),
    "400k": (2 * M, 4 * M, 8 * M, 16 * M, 32 * M),
    "1.6M": (4 * M, 8 * M, 16 * M),
}
FLOATS = ("e2m1", "e3m2", "e4m3fn")
BLOCKS = ("wmxfp4_amxfp4", "wnvfp4_anvfp4")  # their blocks do not divide the heads: weights and activations alone


def parts(bits: tuple[int, ...]) -> tuple[str, ...]:
    """Weights, activations or KV cache alone at each of these bits."""
    return tuple(f"{part}{b}" for part in PARTS for b in bits)


def weights(bits: tuple[int, ...]) -> tuple[str, ...]:
    """Weights alone at each of these bits."""
    return tuple(f"w{b}" for b in bits)


def others(bits: tuple[int, ...]) -> tuple[str, ...]:
    """Activations or KV cache alone at each of these bits."""
    return tuple(f"{part}{b}" for part in PARTS[1:] for b in bits)


def equal_cost(sizes: tuple[str, ...], product: float) -> dict[tuple[str, int], tuple[str, ...]]:
    """Runs of equal N·D·P, with all parts at P bits: {(size, D): precisions}. `product`: N·D at 16 bits."""
    runs = {}
    for size in sizes:
        for bits in (4, 5, 6, 7, 8, 10, 12, 16):
            tokens = round(product / PARAMETERS[size] * 16 / bits)
            runs[size, tokens] = ("bf16",) if bits == 16 else tied((str(bits),))
    return runs


def get_config():
    """The study's config."""
    c = base.get_config()
    c.data.root = "runs/decide_corpus"
    c.data.hash = "f152602cf19680ff"
    c.model.parametrization = "depth_mup"  # with which its table was measured
    c.model.base_size = "27k"
    c.optimizer.peak_lr = 1.6e-2
    c.study.lanes = 2
    c.ptq.methods = ("gptq", "rtn", "awq")
    c.ptq.bits = (2, 3, 4, 5, 6, 7, 8)
    grid = c.study.grid
    for size in SIZES:  # how L and δ depend on N and D
        grid[f"full_{size}".replace(".", "_")] = base.grid((size,), FULL[size], ptq=True)
    # How L depends on each part, at every precision; weights served at bits below and above those they were trained at.
    marginal = (("27k", (500_000, 4 * M), BITS), ("106k", (2 * M,), BITS), ("400k", (2 * M,), SOME_BITS))
    for size, tokens, bits in marginal:
        grid[f"weights_{size}"] = base.grid((size,), tokens, weights(bits), ptq=True)
        grid[f"parts_{size}"] = base.grid((size,), tokens, others(bits))
        grid[f"tied_{size}"] = base.grid((size,), tokens, tied(tuple(map(str, bits))), ptq=True)
    grid.largest = base.grid(("1.6M",), (4 * M,), ("w3", "a4", *tied(("6",))), ptq=True)
    # Do effects multiply, add up, or overlap? Random precisions of all parts at once.
    grid.joint_27k = base.grid(("27k",), (4 * M,), combinations(BITS[:7], 12, seed=1))
    grid.joint_106k = base.grid(("106k",), (2 * M,), combinations(BITS[:7], 12, seed=2))
    grid.joint_400k = base.grid(("400k",), (2 * M,), combinations(BITS[:7], 4, seed=3))
    for size in SIZES[:2]:  # one curve for integers, floats and blocks?
        grid[f"floats_{size}"] = base.grid((size,), (2 * M,), (*tied(FLOATS), *BLOCKS))
    # Which precision is best at equal cost, without any law: two budgets, two sizes each.
    for name, runs in (("small", equal_cost(SIZES[:2], 2.7e10)), ("large", equal_cost(SIZES[1:3], 2.1e11))):
        for (size, tokens), precisions in runs.items():
            grid[f"equal_cost_{name}_{size}_{tokens}"] = base.grid((size,), (tokens,), precisions)
    # D or the decay of the rate? Schedules at matched N, D and seed.
    for size, tokens in (("27k", (500_000, 2 * M, 8 * M)), ("106k", (2 * M, 8 * M))):
        grid[f"schedules_{size}"] = base.grid(
            (size,), tokens, seeds=(0, 1, 2), ptq=True, schedules=("cosine", "wsd", "constant")
        )
    # The noise of L and δ by N, D and P: three seeds.
    grid.seeds_27k = base.grid(("27k",), (500_000, 4 * M), ("w3", "a4", "kv3", *tied(("4", "8"))), (1, 2), ptq=True)
    grid.seeds_106k = base.grid(("106k",), (2 * M,), ("w3", "a4", *tied(("6",))), (1, 2), ptq=True)
    grid.seeds_400k = base.grid(("400k",), (2 * M,), ("bf16", *tied(("4",))), (1, 2), ptq=True)
    return c
