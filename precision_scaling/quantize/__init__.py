"""Quantized products: the precision of a run, from the options to dot_generals.

`precision` is the whole precision as the user states it, `static` the part of it that is compiled, and the grids (a
mapping of traced arrays) the part that is data. `fake_quant` is a stable call.
"""

import jax

from precision_scaling.numerics import rounding as rounding_lib


def fake_quant(
    x: jax.Array,
    fmt: object,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    rounding: str = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    """x on the grid of a number format, scaled by its abs-max over `axis` (None: the whole tensor); a stable call.

    Same shape and dtype as x; gradients pass straight through. A NaN or an infinity makes all under its scale NaN.

    fmt: a format's name ("int4", "e4m3", "mxfp4"), a number of bits, or a `formats.Format`.
    group_size: splits `axis` (None is the last) into groups with a scale each, or several axes into tiles of that many
        along each; block formats bring their own.
    rounding: "nearest" (ties to even), "stochastic" (unbiased), or "eden" (blocks with float scales; unbiased for an x
        that was rotated at random); the last two need `key`, a JAX PRNG key.
    Raises FormatError, one line, for an unknown format, a group that does not divide, or one of them without a key.
    """
    return rounding_lib.fake_quant_array(x, fmt, axis, group_size, rounding, key)
