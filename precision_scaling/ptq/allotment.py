"""Bits allotted to projections: the least loss that a budget of bits buys.

Each projection has a cost, the loss that it is expected to add, at each bit-width. Minimized is the sum of costs plus λ
times the bits; λ is the price at which the budget is spent. For a given λ each projection takes the corner of the lower
convex hull of its (bits, cost) whose slopes enclose -λ, so raising every projection corner by corner, the best gain
per bit first, passes through the optimum of every λ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from precision_scaling.errors import UserError


class _Step(NamedTuple):
    gain_per_bit: float
    item: int
    width: int  # the index of the corner that it goes to
    bits: float


def allot(cost_IxK: np.ndarray, widths_K: Sequence[int], weights_I: Sequence[int], mean_bits: float) -> list[int]:
    """A width for each of I projections with these weights, at most `mean_bits` per weight over all of them.

    cost_IxK: at each of the widths, which ascend. UserError where the smallest width is above the mean.
    What is left of the budget, less than the next step takes, goes to the steps behind it that fit.
    """
    cost, widths, weights = np.asarray(cost_IxK, np.float64), np.asarray(widths_K), np.asarray(weights_I)
    if not np.all(np.isfinite(cost)):
        raise UserError("ptq.target_bits: a projection has no finite cost; allowed is a model and a text without NaN")
    left = (mean_bits - widths[0]) * float(weights.sum())
    if left < 0:
        raise UserError(f"ptq.target_bits = {mean_bits:g}: allowed is at least the smallest of ptq.bits, {widths[0]}")
    steps = [step for i, row in enumerate(cost) for step in _steps(i, row, widths, weights[i])]
    chosen, stopped = [0] * len(cost), set()
    # Along a hull gains fall, so a projection's steps come in their order.
    for step in sorted(steps, key=lambda step: (-step.gain_per_bit, step.item)):
        if step.item in stopped or step.bits > left:
            stopped.add(step.item)
            continue
        left -= step.bits
        chosen[step.item] = step.width
    return [int(widths[k]) for k in chosen]


def _steps(item: int, cost_K: np.ndarray, widths_K: np.ndarray, weights: int) -> list[_Step]:
    """From corner to corner of the lower convex hull, as long as cost falls."""
    steps, at = [], 0
    while at + 1 < len(widths_K):
        slope = (cost_K[at] - cost_K[at + 1 :]) / (widths_K[at + 1 :] - widths_K[at])
        best = int(np.argmax(slope))
        if slope[best] <= 0:
            break
        to = at + 1 + best
        steps.append(_Step(float(slope[best]) / weights, item, to, float(widths_K[to] - widths_K[at]) * weights))
        at = to
    return steps
