"""SmoothQuant (Xiao et al., arXiv 2211.10438): moves the range of large activations into the weights before rounding.

Input j of a projection is divided by s_j and row j of its kernel multiplied by it; the product stays what it was, and
both factors have ranges that few bits can cover. `apply` folds 1/s into the gain of the norm that makes the input.
"""

import jax.numpy as jnp

from precision_scaling.numerics import elements
from precision_scaling.ptq import rtn
from precision_scaling.ptq.scheme import Method, Scheme

SMALLEST_MAGNITUDE = 1e-5  # as the reference implementation has it: no scale of zero, and none that is infinite


def smoothing_scales(largest_input_I, kernel_IxO, alpha: float):
    """(s (I,), whether the statistics were unusable): s_j = max|x_j|^α / max|w_j|^(1-α), equation 4.

    largest_input_I: max |x| of each input over the calibration tokens. Where it is NaN, infinite or zero everywhere, s
    is 1: report it. An input that is zero always, or has no weight, is left alone.
    """
    weight_I = elements.abs_max(kernel_IxO, 1)
    usable = jnp.all(jnp.isfinite(largest_input_I)) & jnp.any(largest_input_I > 0)
    seen_I = usable & (largest_input_I > 0) & (weight_I > 0)
    s_I = jnp.maximum(largest_input_I, SMALLEST_MAGNITUDE) ** alpha
    s_I = s_I / jnp.maximum(weight_I, SMALLEST_MAGNITUDE) ** (1 - alpha)
    return jnp.where(seen_I, jnp.maximum(s_I, SMALLEST_MAGNITUDE), 1), ~usable


def _input_scales(largest_input_I, kernel_IxO, scheme: Scheme):
    return smoothing_scales(largest_input_I, kernel_IxO, scheme.smoothing)


METHOD = Method(
    "smoothquant",
    solve=rtn.solve,
    options=("group_size", "symmetric", "full_range", "clip", "smoothing", "granularity"),
    operands=("a",),
    calibrated=True,
    input_scales=_input_scales,
)
