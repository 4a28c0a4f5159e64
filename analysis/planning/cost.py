"""What a training or serving plan costs: FLOP-equivalents of 16 bits, from a cost linear in bits or from measured
speeds.

`analysis.plan` minimizes a law under these costs; the figures draw them as budgets.
"""

import dataclasses
import math
import re

import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Format
from precision_scaling.runtime.cli import finite

FLOPS_PER_PARAMETER_TOKEN = 6.0  # forward and backward of a dense model (Kaplan et al. 2020), as in law 5 of the paper
INFERENCE_FLOPS_PER_PARAMETER_TOKEN = 2.0  # the forward pass alone
BASE_BITS = 16.0  # budgets are counted in FLOPs of this precision
MAX_BITS = 32.0


class CostError(UserError):
    """A cost that cannot be computed: an unknown format, a speed that is not positive, a precision without a speed."""


USUAL_FLOATS = {"fp8": "e4m3fn", "fp6": "e2m3", "fp4": "e2m1"}  # what hardware means by these names


def named_format(name: str) -> Format | None:
    """The number format of that name; None for a bare number and for names that give only the bits."""
    text = name.strip().lower()
    try:
        return None if finite(text) is not None else formats.parse(USUAL_FLOATS.get(text, text))
    except formats.FormatError:
        return None


def bits_of_format(name: str) -> float:
    """Bits of a number format by its name, scales of blocks included: `bf16`, `fp8`, `mxfp4`, or a bare number."""
    if fmt := named_format(name):
        bits = float(fmt.bits)
    elif plain := re.fullmatch(r"(?:bf|fp|int|float)?(\d+(?:\.\d+)?)", name.strip().lower()):
        bits = float(plain[1])
    else:
        raise CostError(f"format {name!r}: want bf16, fp32, fp8, int8, e4m3, nvfp4, ... or a number of bits")
    if not 1 <= bits <= MAX_BITS:
        raise CostError(f"format {name!r}: has {bits:g} bits, want 1 to {MAX_BITS:g}")
    return bits


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Cost of one parameter on one token, relative to 16 bits.

    `speeds` empty: linear in bits, P/16 (the paper's `C = 6/16 N D P`). Otherwise the cost is 1/speed of the format,
    with speeds measured on one's own hardware relative to any one format given as 1 (usually bf16), and only the
    listed precisions can be planned for.
    """

    speeds: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "CostModel":
        """`"bf16:1,fp8:1.6"` to a cost model; an empty text is the linear one. Raises CostError."""
        if not text.strip():
            return cls()
        speeds: list[tuple[str, float]] = []
        seen: dict[float, str] = {}
        for entry in text.split(","):
            name, separator, value = entry.partition(":")
            try:
                speed = float(value)
            except ValueError:
                speed = math.nan
            if not separator or not 1e-6 <= speed <= 1e6:
                raise CostError(
                    f"--speeds={text}: {entry.strip()!r} is not FORMAT:SPEED, a speed of 1e-6 to 1e6 (bf16:1,fp8:1.6)"
                )
            try:
                bits = bits_of_format(name)
            except CostError as error:
                raise CostError(f"--speeds={text}: {error}") from None
            if bits in seen:
                raise CostError(
                    f"--speeds={text}: {name.strip()!r} and {seen[bits]!r} both have {bits:g} bits; laws distinguish "
                    "formats by bits alone, so give one of them"
                )
            seen[bits] = name.strip()
            speeds.append((name.strip(), speed))
        return cls(tuple(speeds))

    @property
    def linear(self) -> bool:
        return not self.speeds

    @property
    def precisions(self) -> tuple[float, ...]:
        """The precisions that have a measured speed, in rising bits; empty for the linear model, which has all."""
        return tuple(sorted(bits_of_format(name) for name, _ in self.speeds))

    def format_name(self, bits: float) -> str | None:
        """The name in the table of speeds of this precision; None for the linear model."""
        return next((name for name, _ in self.speeds if bits_of_format(name) == bits), None)

    def has(self, fmt: Format) -> bool:
        """Whether the cost of a format is known: always where it is linear in bits, else where a speed is given for its
        bits and kind (fp8 for every float of 8 bits, a bare 8 for all formats of 8).
        """
        named = [(name, named_format(name)) for name, _ in self.speeds if bits_of_format(name) == fmt.bits]
        return self.linear or any(given is None or given.family == fmt.family for _, given in named)

    def relative(self, precision):
        """Cost of a FLOP at `precision` bits over one at 16 bits; array in, array out. Raises CostError where no
        speed is known.
        """
        precision = np.asarray(precision, np.float64)
        if self.linear:
            return precision / BASE_BITS
        cost = np.full(precision.shape, np.nan)
        for name, speed in self.speeds:
            cost = np.where(precision == bits_of_format(name), 1.0 / speed, cost)
        if np.isnan(cost).any():
            unknown = float(precision[np.isnan(cost)].flat[0])
            raise CostError(f"no speed for {unknown:g} bits; --speeds has {', '.join(name for name, _ in self.speeds)}")
        return cost

    def training(self, n, d, precision):
        """FLOP-equivalents of training N parameters on D tokens at P bits: `6 N D P/16` (law 5), or 6 N D / speed."""
        return FLOPS_PER_PARAMETER_TOKEN * n * d * self.relative(precision)

    def inference(self, n, tokens, precision):
        """FLOP-equivalents of serving `tokens` tokens from N parameters held at P bits: `2 N tokens P/16`, or over
        speed.
        """
        return INFERENCE_FLOPS_PER_PARAMETER_TOKEN * n * tokens * self.relative(precision)
