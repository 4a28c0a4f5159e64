"""The part of a precision that is compiled in. The formats themselves are grids: traced arrays, beside it."""

import dataclasses
from collections.abc import Iterable, Mapping

from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Format, Grid, Kind
from precision_scaling.quantize import operands as operands_lib
from precision_scaling.quantize.native import container_of
from precision_scaling.quantize.operands import BACKWARD, FORWARD, OPERANDS, partner
from precision_scaling.quantize.spec import Precision

Grids = Mapping[str, Grid]


@dataclasses.dataclass(frozen=True)
class StaticQuantizer:
    """How one operand is quantized, as far as it is compiled in.

    kind: of its formats. granularity: what shares a scale, see `granularities`; block formats group by themselves.
    container: dtype of the codes that the hardware multiplies ('int8', 'float8_e4m3fn', ...); None simulates.
    """

    kind: Kind
    granularity: str = "tensor"
    rounding: str = "nearest"
    container: str | None = None


@dataclasses.dataclass(frozen=True)
class StaticPrecision:
    """The quantized operands of a compiled model, as (name, Operand) pairs; an operand that is absent is exact.

    exact: operands x whose gradient is made with the exact saved operand instead of the quantized one.
    wide: left operands of the products that are computed in float32 whatever the compute dtype.
    rotated: both operands of each projection are rotated along the contraction before they are quantized.
    """

    operands: tuple[tuple[str, StaticQuantizer], ...] = ()
    exact: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    rotated: bool = False

    def get(self, name: str) -> StaticQuantizer | None:
        return dict(self.operands).get(name)

    @property
    def stochastic(self) -> bool:
        """Whether anything rounds at random, so that products need a key."""
        return any(operand.rounding == "stochastic" for _, operand in self.operands)

    def evaluation(self) -> "StaticPrecision":
        """The same forward pass, rounding to nearest, without what only training needs."""
        operands = tuple(
            (name, dataclasses.replace(operand, rounding="nearest"))
            for name, operand in self.operands
            if name not in BACKWARD
        )
        return StaticPrecision(operands, wide=self.wide, rotated=self.rotated)

    def simulated(self) -> "StaticPrecision":
        """The same program with every product simulated, whose formats may pass through."""
        operands = tuple((name, dataclasses.replace(operand, container=None)) for name, operand in self.operands)
        return dataclasses.replace(self, operands=operands)

    def grids(self, precision: Precision, **replaced: object) -> dict[str, Grid]:
        """The grids of a precision that this one serves; `replaced` gives other formats for some operands."""
        chosen = {name: formats.parse(replaced.get(name, precision.format(name))) for name, _ in self.operands}
        return {name: fmt.grid() for name, fmt in chosen.items()}


UNQUANTIZED = StaticPrecision()


def is_wide(fmt: Format) -> bool:
    """Whether bf16, which has 8 significant bits, would spoil what the format keeps: integers from 9 bits on, and
    floats with 7 bits of mantissa or more."""
    return fmt.family in ("int", "float", "wide", "block") and fmt.mantissa_bits >= 7


def _wide_products(spec: Precision, dtype: str) -> tuple[str, ...]:
    """Left operands of the products that need float32 operands."""
    if dtype == "float32":
        return ()

    def members(pair):
        return (name for x in pair for name in (x, f"g_{x}", f"s_{x}"))

    return tuple(pair[0] for pair in operands_lib.PRODUCTS if any(is_wide(spec.format(name)) for name in members(pair)))


def _saved(spec: Precision, name: str) -> str | None:
    """Where the gradient of an operand takes the saved one from; None where every source is the same values."""
    if name in spec.exact:
        return "exact"
    if spec.get(f"s_{name}"):
        return "own"
    return "forward" if spec.get(partner(name)) else None


def static_of(specs: Iterable[Precision], dtype: str) -> StaticPrecision | None:
    """The program that serves all specs through their grids, or None where what is static about them differs.

    dtype: compute dtype of the model. A spec that leaves an operand unquantized passes it through, bit for bit.
    """
    specs = tuple(specs)
    if len({(spec.native, spec.rotated, _wide_products(spec, dtype)) for spec in specs}) > 1:
        return None
    for name in OPERANDS:
        if len({_saved(spec, name) for spec in specs} - {None}) > 1:
            return None
    operands = []
    for name in FORWARD + BACKWARD:
        settings = [spec.get(name) for spec in specs]
        quantized = [setting for setting in settings if setting]
        if not quantized:
            continue
        kind = formats.shared_kind(setting.format for setting in quantized)
        containers = {setting and container_of(setting.format) for setting in settings}
        if kind is None or len({(setting.granularity, setting.rounding) for setting in quantized}) > 1:
            return None
        if specs[0].native and len(containers) > 1:
            return None
        container = containers.pop() if specs[0].native else None
        operands.append((name, StaticQuantizer(kind, quantized[0].granularity, quantized[0].rounding, container)))
    exact = tuple(name for name in OPERANDS if any(name in spec.exact for spec in specs))
    return StaticPrecision(tuple(operands), exact, _wide_products(specs[0], dtype), specs[0].rotated)


def describe(program: StaticPrecision) -> str:
    """What is static about a cohort, in one line: the quantized operands with the kind of their formats."""
    words = []
    for name, operand in program.operands:
        details = [operand.container or operand.kind.family]
        details += [] if operand.granularity == "tensor" else [operand.granularity]
        details += [] if operand.rounding == "nearest" else [operand.rounding]
        words.append(f"{name} ({', '.join(details)})")
    words += ["rotated"] * program.rotated + [f"float32 products of {', '.join(program.wide)}"] * bool(program.wide)
    return ", ".join(words) or "none"


# Native products
