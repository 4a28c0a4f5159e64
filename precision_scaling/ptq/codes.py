"""A quantized kernel as integers and scales, and a decoder made of such kernels: what is evaluated and what is stored.

Between `apply`, which makes them, and `packed`, which keeps them on disk. `dequantize` is the one way from codes back
to a kernel, so a model that was stored and read again has the same kernels, bit for bit.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.numerics import bit_patterns, formats
from precision_scaling.numerics.formats import Format
from precision_scaling.ptq.scheme import Linear


class Codes(NamedTuple):
    """A kernel (in I, *features F) with a scale for each of G groups of adjacent inputs and each output.

    kernel = (codes - zeros) · scales · row_scales.
    """

    # (I, *F): levels in int8, or from 0 to 2^b - 1 in uint8 where there is a zero point; of formats in float32.
    codes: jax.Array
    scales: jax.Array  # (G, *F), float32
    zeros: jax.Array | None = None  # (G, *F), uint8; None where the grid is symmetric
    row_scales: jax.Array | None = None  # (I,), float32, AWQ's 1/s; None is 1
    group_size: jax.Array | None = None  # int32, where the last group has fewer inputs; None: all have as many


class QuantizedModel(NamedTuple):
    """A decoder at one bit-width: kernels of its blocks by module and name, layers on a leading axis, and the rest."""

    kernels: dict[str, dict[str, Codes]]
    rest: Any  # the parameters without these kernels: embedding, head, norms


def encode(
    code_IxO,
    scale_GxO,
    zero_GxO,
    symmetric: bool,
    shape: tuple[int, ...],
    row_scale_I=None,
    integers: bool = True,
    group_size: int = 0,
) -> Codes:
    """Codes of a kernel of that shape (in, *features), from a method's codes (level + zero) of it as a matrix.

    group_size: inputs that share a scale; 0: all of them.
    """
    dtype = jnp.float32 if not integers else jnp.int8 if symmetric else jnp.uint8

    def features(x):
        return x.reshape(x.shape[0], *shape[1:])

    zeros = None if symmetric else features(zero_GxO.astype(dtype))
    ragged = jnp.int32(group_size) if group_size and shape[0] % group_size else None
    return Codes(features(code_IxO.astype(dtype)), features(scale_GxO), zeros, row_scale_I, ragged)


def dequantize(codes: Codes) -> jax.Array:
    """The kernel (in, *features) in float32."""
    groups, *features = codes.scales.shape
    level, by_input = codes.codes.astype(jnp.float32), lambda x: x[:, None]
    if codes.group_size is None:
        level = level.reshape(groups, -1, *features)
    else:
        group_I = jnp.arange(len(level)) // codes.group_size
        by_input = lambda x: x[group_I]
    if codes.zeros is not None:
        level -= by_input(codes.zeros.astype(jnp.float32))
    kernel = (level * by_input(codes.scales)).reshape(codes.codes.shape)
    if codes.row_scales is None:
        return kernel
    return kernel * codes.row_scales.reshape(-1, *(1 for _ in features))


@jax.jit
def parameters(model: QuantizedModel) -> Any:
    """The decoder's parameters, every kernel dequantized."""
    block = jax.vmap(_with_kernels)(model.kernels, model.rest["layers"]["block"])
    return {**model.rest, "layers": {**model.rest["layers"], "block": block}}


@jax.jit
def block_parameters(kernels: dict[str, dict[str, Codes]], rest: Any) -> Any:
    """The same for one block, without the axis of layers."""
    return _with_kernels(kernels, rest)


def _with_kernels(kernels: dict[str, dict[str, Codes]], block: Any) -> Any:
    for module, names in kernels.items():
        found = {name: {"kernel": dequantize(codes)} for name, codes in names.items()}
        block = {**block, module: {**block.get(module, {}), **found}}
    return block


def each(kernels: Any) -> list[Codes]:
    """The codes in a tree of them."""
    return jax.tree.leaves(kernels, is_leaf=is_codes)


def named(kernels: dict[str, dict[str, Codes]]) -> list[tuple[str, str, Codes]]:
    """(module, name, codes) of each kernel."""
    return [(module, name, codes) for module, names in kernels.items() for name, codes in names.items()]


def is_codes(x: Any) -> bool:
    """Whether a node of a tree is a kernel's codes, of which `jax.tree` would make its arrays."""
    return isinstance(x, Codes)


def stored_bits(model: QuantizedModel, bits: object) -> float:
    """Bits per quantized weight that a packed checkpoint takes, codes, zeros and scales. bits: a width or a format."""
    wanted = {(module, name): formats.parse(bits) for module, name, _ in named(model.kernels)}
    layers = jax.tree.leaves(model.kernels)[0].shape[0]
    total, weights = stored_size(model.kernels, wanted, layers)
    return total / weights


def stored_size(kernels: Any, wanted: Mapping[Linear, Format], layers: int = 1) -> tuple[float, int]:
    """(bits that kernels in these formats take, their weights): codes and zeros as `bit_patterns.layout` has them, with
    scales of blocks in their own format and others in float32. What cannot be packed counts by the format's bits.

    layers: that the kernels have on a leading axis.
    """
    total, weights = 0.0, 0
    for linear, fmt in wanted.items():
        codes, layout = kernels[linear[0]][linear[1]], bit_patterns.layout(fmt)
        weights += codes.codes.size
        integers = codes.codes.size + (0 if codes.zeros is None else codes.zeros.size)
        rows = 0 if codes.row_scales is None else codes.row_scales.size
        if layout is not None:
            total += layout.bits * integers + layout.scale_bits * codes.scales.size + 32 * rows
            total += 32 * layers * layout.tensor_scale
        else:
            given = fmt.family in ("block", "wide")
            total += fmt.bits * integers + (0 if given else 32 * (codes.scales.size + rows))
    return total, weights
