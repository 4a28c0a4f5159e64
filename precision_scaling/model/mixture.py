"""What a precision that differs by layer is on the mean: the share of each format, and the bits of an equal noise."""

import math
from collections import defaultdict
from collections.abc import Iterable

from precision_scaling.model.accounting import projection_parameters
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics.formats import Format
from precision_scaling.quantize.layers import PROJECTIONS
from precision_scaling.quantize.precision import Precision

HIGH = 16.0  # bits from which a format rounds nothing
_FEWEST_LEVELS = 2.0**-10  # where one bit would have none: the noise of the whole is that of this format

Shares = tuple[tuple[Format, float], ...]


def shares(precision: Precision, name: str, model: ModelConfig) -> Shares:
    """(format, share) of an operand over the decoder, largest share first.

    Projections count by their parameters, which are the multiplications of a token, too; other places count alike.
    """
    if not precision.layers:
        return ((precision.format(name), 1.0),)
    weights = _parameters(model) if name.removeprefix("g_").removeprefix("s_") in ("a", "w") else (1,)
    rows = precision.by_place(name, model.depth)
    return of_weights((fmt, weight) for row in rows for fmt, weight in zip(row, weights, strict=True))


def of_weights(weighted: Iterable[tuple[Format, int]]) -> Shares:
    """(format, share) of what has these formats, each with its weight; largest share first."""
    found: dict[Format, int] = defaultdict(int)
    for fmt, weight in weighted:
        found[fmt] += weight
    shares = ((fmt, weight / sum(found.values())) for fmt, weight in found.items())
    return tuple(sorted(shares, key=lambda item: (-round(item[1], 9), item[0].name)))


def bits(mixture: Shares) -> float:
    """Bits of the symmetric integers with the mean noise of a mixture; of a single format its own bits, at most 16.

    The noise of P bits is the square of the relative step, 1/(2^(P-1) - 1), and nothing from 16 bits on: the variances
    of independent roundings add, so that one layer of few bits counts for more than its share of a mean of bits.
    """
    different = {min(fmt.bits, HIGH) for fmt, _ in mixture}
    if len(different) == 1:
        return different.pop()
    levels = lambda fmt: max(2.0 ** (fmt.bits - 1) - 1, _FEWEST_LEVELS)
    noise = sum(share * levels(fmt) ** -2 for fmt, share in mixture if fmt.bits < HIGH)
    return min(HIGH, round(1 + math.log2(1 + noise**-0.5), 6))


def text(mixture: Shares) -> str:
    """As the table has it: "int4", or "int4:0.75+bf16:0.25"."""
    if len(mixture) == 1:
        return mixture[0][0].name
    return "+".join(f"{fmt.name}:{share:.4g}" for fmt, share in mixture)


def _parameters(model: ModelConfig) -> tuple[int, ...]:
    """Of the projections of a block, in the order of `PROJECTIONS`."""
    by_name = projection_parameters(model)
    return tuple(by_name[name] for name in PROJECTIONS)
