"""The precision of a run, whole: how every operand is quantized, forward and backward."""

import dataclasses

from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Format
from precision_scaling.quantize.operands import FORWARD


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one operand is quantized. granularity: see `quantize.granularities`; that of a block format is its own."""

    format: Format
    granularity: str
    rounding: str

    def __str__(self) -> str:
        return f"{self.format.name}/{self.granularity}/{self.rounding}"


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of one run, without what has no effect.

    settings: of the operands that are quantized, by name.
    exact: operands whose gradient is made with the exact saved operand.
    """

    settings: tuple[tuple[str, Quantizer], ...]
    exact: tuple[str, ...]
    rotated: bool
    native: bool

    def get(self, name: str) -> Quantizer | None:
        """The setting of an operand, None where it is not quantized."""
        return dict(self.settings).get(name)

    def format(self, name: str) -> Format:
        """The format of an operand; bf16 where it is not quantized."""
        setting = self.get(name)
        return setting.format if setting else formats.parse("bf16")

    def bits(self, *operands: str) -> float:
        """Bits of an operand; of several, the fewest. Unquantized formats count as 16."""
        return min(min(self.format(name).bits, 16.0) for name in operands)

    def granularity(self, *operands: str) -> str:
        """What shares a scale in an operand, or in several where they differ; empty where none is quantized."""
        found = dict.fromkeys(setting.granularity for name, setting in self.settings if name in operands)
        return ",".join(found)

    def describe(self) -> str:
        """All of it in one line, e.g. "w=int4/channel/nearest a=int8/tensor/nearest"; "bf16" for full precision."""
        words = [f"{name}={setting}" for name, setting in self.settings] + [f"s_{name}=exact" for name in self.exact]
        return " ".join(words + ["rotated"] * self.rotated + ["native"] * self.native) or "bf16"

    @property
    def short(self) -> str:
        """For names of runs: the forward formats, and marks of what else is special; "bf16" for full precision."""
        words = [name.replace("_", "") + setting.format.name for name, setting in self.settings if name in FORWARD]
        gradients = dict.fromkeys(setting.format.name for name, setting in self.settings if name.startswith("g_"))
        words += [f"g{name}" for name in gradients]
        words += ["rotated"] * self.rotated + ["native"] * self.native
        return "_".join(words) or "bf16"
