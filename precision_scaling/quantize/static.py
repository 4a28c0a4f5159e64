"""The part of a precision that is compiled in. The formats themselves are grids: traced arrays, beside it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Format, Grid, Kind
from precision_scaling.numerics.rounding import RANDOM
from precision_scaling.quantize import layers
from precision_scaling.quantize.native import container_of
from precision_scaling.quantize.operands import BACKWARD, FORWARD, OPERANDS, OUTER, PRODUCTS, partner
from precision_scaling.quantize.precision import Precision

# By operand. Leaves are scalars, or inside the blocks arrays (L, P), layers and `layers.places`; in one block (P,).
Grids = Mapping[str, Grid]


@dataclasses.dataclass(frozen=True)
class StaticQuantizer:
    """How one operand is quantized, as far as it is compiled in.

    kind: of its formats. granularity: what shares a scale, see `operands.granularities`; block formats bring their own.
    container: dtype of the codes that the hardware multiplies ('int8', 'float8_e4m3fn', ...); None simulates.
    """

    kind: Kind
    granularity: str = "tensor"
    rounding: str = "nearest"
    container: str | None = None


@dataclasses.dataclass(frozen=True)
class StaticPrecision:
    """The quantized operands of a compiled model, as (name, StaticQuantizer) pairs; an absent operand is exact.

    exact: operands whose gradient is computed with the exact saved operand instead of the quantized one.
    wide: left operands of the products that are computed in float32 whatever the compute dtype.
    rotated: both operands of each projection are rotated along the contraction before they are quantized.
    gradient_rotations: (operand, width) where those of its gradient are, in Hadamard blocks of a width.
    """

    quantizers: tuple[tuple[str, StaticQuantizer], ...] = dataclasses.field(default=(), metadata={"digest": "operands"})
    exact: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    rotated: bool = False
    gradient_rotations: tuple[tuple[str, int], ...] = ()

    def get(self, name: str) -> StaticQuantizer | None:
        """The quantizer of an operand, None where it is exact."""
        return dict(self.quantizers).get(name)

    @property
    def stochastic(self) -> bool:
        """Whether anything rounds at random, so that products need a key."""
        return any(quantizer.rounding in RANDOM for _, quantizer in self.quantizers)

    @property
    def exact_attention(self) -> bool:
        """Whether attention computes with exact queries and probabilities, forward and backward, in the compute dtype.

        Keys and values may be rounded, before they are multiplied; their gradients are straight-through.
        """
        attention = {x for x in FORWARD + BACKWARD if x.removeprefix("g_").removeprefix("s_") in ("q", "k", "v", "p")}
        rounded = {name: quantizer for name, quantizer in self.quantizers if name in attention}
        simulated = all(quantizer.container is None for quantizer in rounded.values())
        return rounded.keys() <= {"k", "v"} and simulated and not {"q", "p"} & {*self.exact, *self.wide}

    def evaluation(self) -> "StaticPrecision":
        """The same forward pass, rounding to nearest, without what only training needs."""
        quantizers = tuple(
            (name, dataclasses.replace(quantizer, rounding="nearest"))
            for name, quantizer in self.quantizers
            if name not in BACKWARD
        )
        return StaticPrecision(quantizers, wide=self.wide, rotated=self.rotated)

    def simulated(self) -> "StaticPrecision":
        """The same with every product simulated, whose formats may pass through."""
        quantizers = tuple((name, dataclasses.replace(found, container=None)) for name, found in self.quantizers)
        return dataclasses.replace(self, quantizers=quantizers)

    def grids(self, precision: Precision, depth: int, **replaced: object) -> dict[str, Grid]:
        """The grids of a precision that this one serves, in a decoder of that depth: (L, P) inside the blocks.

        Of one that changes in training they are the last; `Precision.stages` are the others.
        replaced: other formats for some operands, in all layers.
        """
        found = {}
        for name, _ in self.quantizers:
            fmt = formats.parse(replaced.get(name, precision.format(name)))
            if name in OUTER:
                found[name] = fmt.grid()
                continue
            by_place = precision.by_place(name, depth)
            rows = [[fmt.grid() if name in replaced else one.grid() for one in row] for row in by_place]
            found[name] = Grid(*np.moveaxis(np.array(rows, np.float32), -1, 0))
        return found

    def describe(self) -> str:
        """All of it in one line: the quantized operands with the kind of their formats; "none" where there are none."""
        words = []
        for name, quantizer in self.quantizers:
            details = [quantizer.container or quantizer.kind.family]
            details += [] if quantizer.granularity == "tensor" else [quantizer.granularity]
            details += [] if quantizer.rounding == "nearest" else [quantizer.rounding]
            words.append(f"{name} ({', '.join(details)})")
        words += ["rotated"] * self.rotated
        words += [f"g_{name} rotated by {width}" for name, width in self.gradient_rotations]
        words += [f"float32 products of {', '.join(self.wide)}"] * bool(self.wide)
        return ", ".join(words) or "none"


UNQUANTIZED = StaticPrecision()


def by_layer(grids: Grids, depth: int) -> dict[str, Grid]:
    """The grids of the operands inside the blocks, with a leading axis of layers."""
    spread = lambda leaf: leaf if jnp.ndim(leaf) else jnp.broadcast_to(leaf, (depth,))
    return {name: jax.tree.map(spread, grid) for name, grid in grids.items() if name not in OUTER}


def of_layer(grids: Grids, layer: Any) -> dict[str, Grid]:
    """The grids in one layer, (P,) inside the blocks."""
    return {name: jax.tree.map(lambda leaf: leaf[layer] if jnp.ndim(leaf) else leaf, g) for name, g in grids.items()}


def of_place(grids: Grids, place: str) -> dict[str, Grid]:
    """The grids of one layer in one place of it, all of them scalars."""
    at = lambda name, leaf: leaf[layers.index(name, place)] if jnp.ndim(leaf) else leaf
    return {name: Grid(*(at(name, leaf) for leaf in grid)) for name, grid in grids.items()}


def is_wide(fmt: Format) -> bool:
    """Whether bf16, which has 8 significant bits, would spoil what the format keeps: integers from 9 bits on, and
    floats with 7 bits of mantissa or more."""
    return fmt.family in ("int", "float", "wide", "block") and fmt.mantissa_bits >= 7


def static_of_one(precision: Precision, dtype: str) -> StaticPrecision:
    """What is compiled for one precision. dtype: compute dtype of the model."""
    static = static_of([precision], dtype)
    assert static is not None, "one precision does not differ from itself"
    return static


def static_of(precisions: Iterable[Precision], dtype: str) -> StaticPrecision | None:
    """What one compiled step has to fix to serve all precisions through their grids; None where they differ in that.

    dtype: compute dtype of the model. A precision that leaves an operand unquantized passes it through, bit for bit.
    """
    precisions = tuple(precisions)
    stages = [stage for precision in precisions for stage in precision.stages]
    native = precisions[0].native
    if len({(precision.native, precision.rotated, _wide_products(precision, dtype)) for precision in precisions}) > 1:
        return None
    for name in OPERANDS:
        if len({_saved(stage, name) for stage in stages} - {None}) > 1:
            return None
    quantizers = []
    for name in FORWARD + BACKWARD:
        found = [stage.get(name) for stage in stages]
        quantized = [quantizer for quantizer in found if quantizer]
        if not quantized:
            continue
        possible = (fmt for stage in stages if stage.get(name) for fmt in stage.possible(name))
        kind = formats.shared_kind(possible)
        containers = {container_of(quantizer.format) if quantizer else None for quantizer in found}
        if kind is None or len({(quantizer.granularity, quantizer.rounding) for quantizer in quantized}) > 1:
            return None
        if native and len(containers) > 1:
            return None
        container = containers.pop() if native else None
        quantizers.append((name, StaticQuantizer(kind, quantized[0].granularity, quantized[0].rounding, container)))
    rotations: dict[str, int] = {}
    for name in OPERANDS:
        # What passes through is not rotated.
        rounded = [stage for stage in stages if stage.get(f"g_{name}") or stage.get(f"s_{name}")]
        widths = {dict(stage.gradient_rotations).get(name, 0) for stage in rounded}
        if len(widths) > 1:
            return None
        if width := max(widths, default=0):
            rotations[name] = width
    exact = tuple(name for name in OPERANDS if any(name in stage.exact for stage in stages))
    wide, rotated = _wide_products(precisions[0], dtype), precisions[0].rotated
    return StaticPrecision(tuple(quantizers), exact, wide, rotated, tuple(rotations.items()))


def _wide_products(precision: Precision, dtype: str) -> tuple[str, ...]:
    """Left operands of the products that need float32 operands."""
    if dtype == "float32":
        return ()

    def wide(pair: tuple[str, str]) -> bool:
        members = (name for x in pair for name in (x, f"g_{x}", f"s_{x}"))
        return any(is_wide(fmt) for name in members for fmt in precision.possible(name))

    return tuple(pair[0] for pair in PRODUCTS if wide(pair))


def _saved(precision: Precision, name: str) -> str | None:
    """Where the gradient of an operand takes the saved one from; None where every source is the same values."""
    if name in precision.exact:
        return "exact"
    if precision.get(f"s_{name}"):
        return "own"
    return "forward" if precision.get(partner(name)) else None
