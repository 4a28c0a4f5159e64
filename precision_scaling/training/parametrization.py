"""How rate, weight decay and Adam's epsilon of each parameter depend on width and depth, so that those of a small model
serve a large one. The multipliers of branches and logits are in `model.config`; `optimizer` applies what is here.

depth_mup: Yang et al. 2023 (arXiv 2310.02244, table 1). completep: Dey et al. 2025 (arXiv 2505.01618, table 1, α = 1).
Both equal the standard parametrization at the base's width and depth.
"""

import re
from typing import NamedTuple

from precision_scaling.model.config import ModelConfig

IN_BLOCKS, KERNEL = "layers/", "kernel"
# The power of the width in a rate that undoes it: an Adam update of a kernel moves its layer's output by its width, an
# orthogonal one of the same root mean square by the root of that.
WIDTH_POWERS = {"adamw": -1.0, "muon": -0.5}


class Multipliers(NamedTuple):
    """Of a parameter: its rate, its weight decay (which acts times the rate), and Adam's epsilon."""

    rate: float
    decay: float
    epsilon: float


def multipliers(model: ModelConfig, optimizer: str, name: str) -> Multipliers:
    """Those of the parameter of that name, under "adamw" or "muon"."""
    width, depth = model.width / model.base_width, model.depth / model.base_depth
    in_blocks = re.search(IN_BLOCKS, name) is not None
    of_width = width ** WIDTH_POWERS[optimizer] if is_block_kernel(name) else 1.0
    if model.parametrization == "depth_mup":
        return Multipliers(of_width * depth**-0.5 if is_block_kernel(name) else 1.0, 1.0, 1.0)
    # Rate times decay is free of the width; gradients fall with it, and in the blocks with the depth, too.
    return Multipliers(of_width, 1 / of_width, 1 / width / (depth if in_blocks else 1.0))


def is_block_kernel(name: str) -> bool:
    """Whether a parameter is a kernel of the blocks: a matrix that grows with the width in both directions."""
    return re.search(f"{IN_BLOCKS}.*{KERNEL}", name) is not None
