"""The precision of a run, whole: how every operand is quantized, forward and backward."""

import dataclasses
import functools

from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Format
from precision_scaling.quantize.layers import Rule, places
from precision_scaling.quantize.operands import FORWARD


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one operand is quantized. granularity: see `operands.granularities`; that of a block format is its own."""

    format: Format
    granularity: str
    rounding: str

    def __str__(self) -> str:
        return f"{self.format.name}/{self.granularity}/{self.rounding}"


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of one run, reduced to what has an effect: precisions that compute the same are equal.

    quantizers: of the operands that are quantized in any layer, as (name, Quantizer) pairs.
    exact: operands whose gradient is computed with the exact saved operand instead of the quantized one.
    rotated: both operands of each projection are rotated before they are quantized.
    native: products are computed on the codes themselves.
    layers: where operands have another format than their quantizer's; all else of it holds there, too.
    before: what it is in training before it is all this, (when it ends, precision) in order; see `switches`. All of
        them are rotated and native if the last is.
    gradient_rotations: (operand, width) where both operands of its gradient are rotated, in Hadamard blocks of a width.
    """

    quantizers: tuple[tuple[str, Quantizer], ...] = dataclasses.field(metadata={"digest": "settings"})
    exact: tuple[str, ...]
    rotated: bool
    native: bool
    layers: tuple[Rule, ...] = ()
    before: tuple[tuple[str, "Precision"], ...] = ()
    gradient_rotations: tuple[tuple[str, int], ...] = ()

    @property
    def stages(self) -> tuple["Precision", ...]:
        """What it is in training, one after the other."""
        if not self.before:
            return (self,)
        of_all = functools.partial(dataclasses.replace, rotated=self.rotated, native=self.native)
        return (*(of_all(stage) for _, stage in self.before), dataclasses.replace(self, before=()))

    def get(self, name: str) -> Quantizer | None:
        """The quantizer of an operand, None where it is not quantized."""
        return dict(self.quantizers).get(name)

    def format(self, name: str) -> Format:
        """The format of an operand where no rule of `layers` gives another; bf16 where it is not quantized."""
        quantizer = self.get(name)
        return quantizer.format if quantizer else formats.parse("bf16")

    def possible(self, name: str) -> tuple[Format, ...]:
        """All formats that an operand may have, by layer and in training."""
        rules = (fmt for stage in self.stages for rule in stage.layers for other, fmt in rule.formats if other == name)
        return (*(stage.format(name) for stage in self.stages), *rules)

    def by_place(self, name: str, depth: int) -> list[list[Format]]:
        """The format of an operand in each layer (L) and, within it, in each of `layers.places` (P)."""

        def found(layer: int, place: str) -> Format:
            said = (rule.format(name, layer, depth, place) for rule in self.layers)
            return next(filter(None, said), self.format(name))

        return [[found(layer, place) for place in places(name)] for layer in range(depth)]

    def bits(self, *operands: str) -> float:
        """Bits of an operand, rules by layer aside; of several, the fewest. Unquantized formats count as 16."""
        return min(min(self.format(name).bits, 16.0) for name in operands)

    def granularity(self, *operands: str) -> str:
        """What shares a scale in an operand, or in several where they differ; empty where none is quantized."""
        found = dict.fromkeys(quantizer.granularity for name, quantizer in self.quantizers if name in operands)
        return ",".join(found)

    def describe(self) -> str:
        """All of it in one line, e.g. "w=int4/channel/nearest a=int8/tensor/nearest"; "bf16" for full precision."""
        words = [f"{name}={quantizer}" for name, quantizer in self.quantizers]
        words += [f"s_{name}=exact" for name in self.exact]
        words += [f"g_{name}=rotated:{width}" for name, width in self.gradient_rotations]
        words += [f"layers={self.rules}"] * bool(self.layers)
        words = words + ["rotated"] * self.rotated + ["native"] * self.native or ["bf16"]
        return "; ".join([*(f"{stage.describe()} until {end}" for end, stage in self.before), " ".join(words)])

    @property
    def rules(self) -> str:
        """The rules of `layers` as an option holds them."""
        return ",".join(map(str, self.layers))

    @property
    def short(self) -> str:
        """For names of runs: the forward formats, and marks of what else is special; "bf16" for full precision."""
        words = [name.replace("_", "") + found.format.name for name, found in self.quantizers if name in FORWARD]
        gradients = dict.fromkeys(found.format.name for name, found in self.quantizers if name.startswith("g_"))
        words += [f"g{name}" for name in gradients] + ["grotated"] * bool(self.gradient_rotations)
        words += ["by.layer"] * bool(self.layers)
        words += ["rotated"] * self.rotated + ["native"] * self.native
        words = words or ["bf16"]
        return "_then_".join([*(f"{stage.short}_to{end}" for end, stage in self.before), "_".join(words)])
