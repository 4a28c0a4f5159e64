"""Rounding arithmetic: an array, a grid and a scale in, the same array on the scaled grid out.

Pure functions of JAX arrays that take the grid of `formats` as traced scalars; `elements` rounds each number.
`quantize` puts them inside the model's products; post-training quantization and the tests call them directly.
"""

import functools
import itertools
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from precision_scaling.numerics import elements
from precision_scaling.numerics.formats import FOUR_OVER_SIX, POWERS_OF_TWO, FormatError, Grid, Kind, parse

ROUNDINGS = ("nearest", "stochastic", "eden")
RANDOM = ("stochastic", "eden")  # those that need a key

SCALE = "scale"  # by which a policy of recomputation knows the abs-max of a whole tensor or channel
_FEW = 128  # elements or more that share a scale that is kept
_SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: XLA flushes what is below to zero
LARGEST_INVERTIBLE = 2.0**126  # the inverse of a scale above is flushed to zero


def fake_quant_array(
    x: jax.Array,
    fmt: object,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    rounding: str = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    """x on the grid of a format, with one scale per slice along `axis`; gradients pass straight through.

    Computed in float32 and returned in x's dtype. A NaN or an infinity makes everything under its scale NaN; what is
    finite stays so, and magnitudes below 2^-126, which XLA flushes, are zero.

    fmt: anything `formats.parse` takes.
    axis: the axes that share a scale; None is the whole tensor.
    group_size: splits `axis` (None is the last) into groups with a scale each; several axes into tiles of that many
        along each. Block formats do so by themselves, with their own size.
    rounding: 'nearest' (ties to even); 'stochastic', unbiased: scales that would saturate are then enlarged; or 'eden',
        for blocks with float scales of an x that was rotated at random, see `_eden`.
    key: PRNG key, for the last two.
    Raises FormatError with one line.
    """
    fmt = parse(fmt)
    return fake_quant_grid(x, fmt.grid(), fmt.kind, axis, group_size, rounding, key)


def fake_quant_grid(
    x: jax.Array,
    grid: Grid,
    kind: Kind,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    rounding: str = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    """As `fake_quant_array`, with a traced grid: any of the formats that share `kind` (see `formats.shared_kind`)."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):
        raise FormatError(f"x is a {type(x).__name__}; allowed are floating-point arrays") from None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise FormatError(f"x has dtype {x.dtype}; allowed are floating-point arrays")
    if rounding not in ROUNDINGS:
        raise FormatError(f"rounding {rounding!r} is not known; allowed: {', '.join(ROUNDINGS)}")
    if rounding in RANDOM and not _is_key(key):
        found = "without a key" if key is None else f"with a key that is {type(key).__name__}"
        raise FormatError(f"rounding {rounding!r} {found}; allowed: one JAX PRNG key, or rounding 'nearest'")
    if rounding == "eden" and (kind.block_scale is None or kind.block_scale in POWERS_OF_TWO):
        raise FormatError(f"rounding 'eden' of family {kind.family!r}; allowed: blocks with float scales, as in nvfp4")
    grouped_shape, axes = _grouping(x.shape, axis, _group_size(kind, group_size))
    if kind.family == "none" or x.size == 0:
        return x
    if key is not None and rounding == "eden":
        x_f32 = lax.stop_gradient(x).astype(jnp.float32).reshape(grouped_shape)
        x_q = _eden(x_f32, grid, kind, axes, key).reshape(x.shape)
    else:
        x_q = _fake_quantized(
            lax.stop_gradient(x), grouped_shape, grid, kind, axes, key if rounding == "stochastic" else None
        )
    return straight_through(x, jnp.where(grid.passthrough > 0, x, x_q.astype(x.dtype)))


def _fake_quantized(x: jax.Array, shape: tuple[int, ...], grid: Grid, kind: Kind, axes: tuple[int, ...], key):
    """x on its scaled grid, float32. shape: of x in groups, axes: of that shape, that share a scale."""
    scale = scale_of(x.reshape(shape), grid, kind, axes, unsaturated=key is not None)

    def grouped(x, scale):
        return (_levels(x.astype(jnp.float32).reshape(shape), scale, grid, kind, key) * scale).reshape(x.shape)

    def spread(x, scale):
        scale = jnp.broadcast_to(scale, shape).reshape(x.shape)
        return _levels(x.astype(jnp.float32), scale, grid, kind, key) * scale

    if shape == x.shape or not isinstance(x, jax.core.Tracer):
        return grouped(x, scale)
    # On TPUs groups are another layout of memory, and whatever has their shape an array of its own: only the scales.
    return lax.platform_dependent(x, scale, tpu=spread, default=grouped)


def _levels(x: jax.Array, scale: jax.Array, grid: Grid, kind: Kind, key) -> jax.Array:
    """x (float32) as levels of the grid: to nearest, or with a key at random."""
    noise = None if key is None else elements.rounding_noise(key, x.shape)
    # A scale from the abs-max leaves at most float32's rounding above the last level, which only noise can round up.
    saturate = kind.family == "block" or kind.scale != "absmax" or noise is not None
    return elements.rounded(_divided(x, scale), grid, kind, noise, saturate)


def block_codes(
    x: jax.Array,
    grid: Grid,
    kind: Kind,
    axis: int | tuple[int, ...],
    rounding: str = "nearest",
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `fake_quant_grid` makes of blocks, for products on their codes: (levels of x's shape, the scales of the
    blocks as they are stored, the scale of the tensor), all float32.

    Multiplied they are the array on the grid, but for float32's rounding. The scales have x's shape with each split
    axis divided by the block size. rounding: 'nearest' or 'stochastic'.
    """
    if kind.family != "block" or rounding not in ("nearest", "stochastic"):
        raise FormatError(
            f"codes of family {kind.family!r}, rounding {rounding!r}; allowed: block, nearest or stochastic"
        )
    grouped_shape, axes = _grouping(x.shape, axis, _group_size(kind, None))
    x_f32 = lax.stop_gradient(x).astype(jnp.float32).reshape(grouped_shape)
    key = key if rounding == "stochastic" else None
    scale = scale_of(x_f32, grid, kind, axes, unsaturated=key is not None)
    levels = _levels(x_f32, scale, grid, kind, key)
    unit = _tensor_scale(elements.abs_max(x_f32), grid, kind)
    return levels.reshape(x.shape), jnp.squeeze(scale / unit, axes), unit


def saturated(
    x: jax.Array,
    grid: Grid,
    kind: Kind,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> jax.Array:
    """Where `fake_quant_grid`, rounding to nearest, takes an element for the last level although it lies beyond it.

    Booleans of x's shape; float32's rounding of the scale does not count. With a scale from the abs-max there are none.
    """
    shape, axes = _grouping(x.shape, axis, _group_size(kind, group_size))
    if kind.family == "none" or x.size == 0:
        return jnp.zeros(x.shape, bool)
    x_f32 = x.astype(jnp.float32).reshape(shape)
    beyond = jnp.abs(x_f32) > (1 + 2.0**-20) * grid.max_value * scale_of(x_f32, grid, kind, axes)
    return (beyond & (grid.passthrough == 0)).reshape(x.shape)


def scale_ends(
    x: jax.Array,
    grid: Grid,
    kind: Kind,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """How many blocks are not all zero, and how many of them have the smallest scale that the scale's format has (or
    zero, to which it underflows) and the largest; None where scales are float32, which have room at both ends."""
    if kind.family != "block":
        return None
    shape, axes = _grouping(x.shape, axis, _group_size(kind, group_size))
    x_f32 = x.astype(jnp.float32).reshape(shape)
    largest = elements.abs_max(x_f32, axes, keepdims=True)
    scale = scale_of(x_f32, grid, kind, axes)
    assert kind.block_scale is not None
    if kind.block_scale in POWERS_OF_TWO:
        # The powers of two that `_power_of_two_scale` keeps.
        least, most = 2.0**-126, jnp.exp2(127 - jnp.floor(jnp.log2(grid.max_value)))
    else:
        scales = parse(kind.block_scale.removesuffix(FOUR_OVER_SIX)).grid()
        unit = _tensor_scale(jnp.max(largest), grid, kind)
        least, most = unit * 2.0 ** (scales.min_exponent - scales.mantissa_bits), unit * scales.max_value
    blocks = (largest > 0) & (grid.passthrough == 0)
    count = lambda where: jnp.sum(blocks & where, dtype=jnp.int32)
    # Neighbouring scales differ by a sixteenth or more, one that was multiplied by the tensor's by float32's rounding.
    return count(True), count(scale < least * 1.01), count(scale > most * 0.99)


def scale_of(
    x: jax.Array, grid: Grid, kind: Kind, axes: int | tuple[int, ...] | None, unsaturated: bool = False
) -> jax.Array:
    """The scale that a kind of format gives to slices of x along `axes`, as float32 with those axes of length 1.

    `unsaturated` asks for one under which no element exceeds the last level, as unbiased rounding needs.
    """
    if kind.scale == "absmean" and not unsaturated:
        mean, magnitudes = functools.partial(jnp.mean, axis=axes, keepdims=True), jnp.abs(x.astype(jnp.float32))
        # A sum can overflow where the mean does not.
        shrunk = mean(magnitudes * 2.0**-64) * 2.0**64
        return _fit(jnp.where(jnp.isinf(mean(magnitudes)), shrunk, mean(magnitudes)), grid.max_value)
    # The largest of bfloat16 values is one: no array in float32 is needed to find it.
    narrow = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    largest = _kept(elements.abs_max(narrow, axes, keepdims=True).astype(jnp.float32), x.size)
    if kind.family == "wide":
        return jnp.where(jnp.isfinite(largest), 1.0, jnp.nan)
    if kind.family != "block":
        return _fit(largest, grid.max_value)
    assert kind.block_scale is not None  # every block has one
    if kind.block_scale in POWERS_OF_TWO:
        return _power_of_two_scale(largest, grid.max_value, unsaturated or kind.block_scale == "e8m0_up")
    if kind.block_scale.endswith(FOUR_OVER_SIX):
        return _four_over_six(x.astype(jnp.float32), largest, grid, kind, axes, unsaturated)
    return _two_level_scale(largest, grid, kind, unsaturated)


def _kept(largest: jax.Array, size: int = 1) -> jax.Array:
    """The abs-max of a tensor of that size, or those of its channels, named `SCALE`: kept where the tensor is
    recomputed, devices agree on it once. Those of many small blocks are not, which would take memory."""
    few = largest.size == 1 or largest.size * _FEW <= size
    return checkpoint_name(largest, SCALE) if few else largest


@jax.custom_jvp
def straight_through(x: jax.Array, x_q: jax.Array) -> jax.Array:
    """x_q, with the derivative of x."""
    return x_q


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def _is_key(key: object) -> bool:
    """Whether something is one PRNG key, of the new style or, as unsigned integers, of the old."""
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == ()
    return key.dtype == jnp.uint32 and key.shape in ((2,), (4,))


def _group_size(kind: Kind, group_size: int | None) -> int | None:
    if kind.family != "block":
        return group_size
    if group_size not in (None, kind.block_size):
        raise FormatError(f"group_size {group_size!r} with a block format; allowed: none, or its own {kind.block_size}")
    return kind.block_size


def _grouping(
    shape: tuple[int, ...], axis: int | tuple[int, ...] | None, group_size: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape with `axis` split into groups, and the axes of that shape that share a scale."""
    axes = tuple(axis) if isinstance(axis, tuple | list) else range(len(shape)) if axis is None else (axis,)
    allowed = f"allowed for shape {shape}: {-len(shape)} to {len(shape) - 1}, or different ones of them"
    if any(isinstance(a, bool) or not isinstance(a, numbers.Integral) for a in axes):
        raise FormatError(f"axis {axis!r} is no whole number; {allowed}")
    if any(not -len(shape) <= a < len(shape) for a in axes):
        raise FormatError(f"axis {axis!r} is not in x; {allowed}")
    axes = tuple(int(a) % len(shape) for a in axes)
    if len(set(axes)) < len(axes):
        raise FormatError(f"axis {axis!r} names one twice; {allowed}")
    if group_size is None:
        return shape, axes
    if not shape:
        raise FormatError(f"axis {axis!r} of shape {shape} cannot be split into groups; allowed is an axis")
    split = sorted(axes) if axis is not None else [len(shape) - 1]
    whole = isinstance(group_size, numbers.Integral) and not isinstance(group_size, bool)
    for a in split:
        if not whole or group_size < 1 or shape[a] % group_size:
            raise FormatError(
                f"group_size {group_size!r} does not divide axis {a} of shape {shape}; allowed: divisors of {shape[a]}"
            )
    lengths = ((n // group_size, group_size) if a in split else (n,) for a, n in enumerate(shape))
    return tuple(itertools.chain(*lengths)), tuple(a + i + 1 for i, a in enumerate(split))


def _fit(magnitude: jax.Array, max_value: jax.Array) -> jax.Array:
    # Correct rounding is what gives a quantized tensor the very same scale again. The vanishing term keeps XLA from
    # replacing the division by a product with a rounded inverse, which it does for every broadcast divisor.
    scale = jnp.maximum(magnitude / (max_value + 0 * magnitude), _SMALLEST_SCALE)
    # Of the largest floats, a scale that was rounded up makes the last level an infinity.
    scale = jnp.where(jnp.isinf(scale * max_value), scale * (1 - 2.0**-22), scale)
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


def _divided(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale, by a product with the inverse. A scale of zero belongs to a block whose stored scale underflowed: the
    block is zero."""
    shrink = jnp.where(scale > LARGEST_INVERTIBLE, 0.25, 1.0)
    inverse = jnp.where(scale == 0, 0.0, 1 / (scale * shrink))
    return x * shrink * inverse


def _power_of_two_scale(largest: jax.Array, max_value: jax.Array, unsaturated: bool) -> jax.Array:
    """As OCP MX v1.0 has it: 2^(floor(log2 largest) - floor(log2 max_value)), so that mantissas above saturate.

    E8M0 goes from 2^-127 to 2^127; 2^-127 is a subnormal float32, and what it would keep beside 2^-126 is, too.
    """
    largest_bits = lax.bitcast_convert_type(largest, jnp.int32)
    max_bits = lax.bitcast_convert_type(jnp.asarray(max_value, jnp.float32), jnp.int32)
    exponent = (largest_bits >> 23) - (max_bits >> 23)
    if unsaturated:
        exponent += (largest_bits & 0x7FFFFF) > (max_bits & 0x7FFFFF)
    most = 254 - (max_bits >> 23)  # with any larger scale the last level is no float32
    scale = lax.bitcast_convert_type((jnp.clip(exponent, -126, most) + 127) << 23, jnp.float32)
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def _tensor_scale(largest: jax.Array, grid: Grid, kind: Kind) -> jax.Array:
    """The float32 scale above those of the blocks, which are stored relative to it, of a tensor with that abs-max.

    It maps the abs-max to the largest block scale times the largest element; with two candidates for each block to 256
    times that element, so that there is room for the larger. Scales that are powers of two have none above: 1.
    """
    assert kind.block_scale is not None
    if kind.block_scale in POWERS_OF_TWO:
        return jnp.ones_like(largest)
    room = 256.0 if kind.block_scale.endswith(FOUR_OVER_SIX) else parse(kind.block_scale).max_value
    return _fit(_kept(largest), grid.max_value * room)


def _two_level_scale(largest: jax.Array, grid: Grid, kind: Kind, unsaturated: bool) -> jax.Array:
    """As NVFP4 (arXiv 2509.25149) has it: each block's scale is stored relative to that of the tensor."""
    assert kind.block_scale is not None
    scale = largest / (grid.max_value + 0 * largest)
    return _stored(scale, _tensor_scale(jnp.max(largest), grid, kind), kind.block_scale, unsaturated)


def _four_over_six(x, largest, grid: Grid, kind: Kind, axes, unsaturated: bool) -> jax.Array:
    """Of two scales of each block, which map its largest element to the last level or to two thirds of it (of e2m1 to
    6 or 4), the one with the lower squared error (arXiv 2512.02010). Stored scales go to 256, and 384 is one, too."""
    assert kind.block_scale is not None
    stored = kind.block_scale.removesuffix(FOUR_OVER_SIX)
    tensor_scale = _tensor_scale(jnp.max(largest), grid, kind)

    def candidate(share: float):
        scale = _stored(largest / (grid.max_value * share + 0 * largest), tensor_scale, stored, unsaturated)
        error = elements.rounded(_divided(x, scale), grid, kind, None, saturate=True) * scale - x
        return scale, jnp.sum(jnp.square(error), axis=axes, keepdims=True)

    (six, error_of_six), (four, error_of_four) = candidate(1.0), candidate(2 / 3)
    return jnp.where(error_of_four < error_of_six, four, six)


def _eden(x, grid: Grid, kind: Kind, axes, key: jax.Array) -> jax.Array:
    """MS-EDEN (arXiv 2601.22813): elements to nearest, each block's scale then multiplied by <x, x> / <x, q>, which
    makes the estimate of a randomly rotated x unbiased (arXiv 2108.08842), and stored by rounding it at random.

    The tensor's scale leaves room for the factor: before it stored scales go to 256, of 448.
    """
    assert kind.block_scale is not None
    stored = kind.block_scale.removesuffix(FOUR_OVER_SIX)
    largest = elements.abs_max(x, axes, keepdims=True)
    tensor_scale = _fit(_kept(jnp.max(largest)), grid.max_value * 256.0)
    scale = _stored(largest / (grid.max_value + 0 * largest), tensor_scale, stored, unsaturated=False)
    codes = elements.rounded(_divided(x, scale), grid, kind, None, saturate=True)
    found = jnp.sum(x * codes, axis=axes, keepdims=True)
    exact = jnp.sum(jnp.square(x), axis=axes, keepdims=True) / jnp.where(found == 0, 1, found)
    fmt, noise = parse(stored), elements.rounding_noise(key, exact.shape)
    return codes * elements.rounded(exact / tensor_scale, fmt.grid(), fmt.kind, noise, saturate=True) * tensor_scale


def _stored(scale: jax.Array, tensor_scale: jax.Array, block_scale: str, unsaturated: bool) -> jax.Array:
    """Scales of blocks as they are kept: in `block_scale`, relative to that of the tensor."""
    scale_format, relative = parse(block_scale), scale / tensor_scale
    noise = jnp.zeros_like(relative) if unsaturated else None  # zero noise rounds up
    return elements.rounded(relative, scale_format.grid(), scale_format.kind, noise, saturate=True) * tensor_scale
