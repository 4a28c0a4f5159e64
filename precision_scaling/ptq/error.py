"""How much a quantized kernel changes its layer's output: the error that the methods lower and the reports show."""

import jax.numpy as jnp
from jax import lax


def output_error(kernel, quantized, hessian):
    """‖X (W - Q)‖² of kernels (..., in, out) on the inputs X (tokens, in) with hessian = Xᵀ X (..., in, in)."""
    return quadratic(kernel - quantized, hessian)


def relative_output_error(kernel, quantized, hessian):
    """‖X (W - Q)‖² / ‖X W‖², a number without unit; 0 where the outputs are zero before and after."""
    error, size = output_error(kernel, quantized, hessian), quadratic(kernel, hessian)
    return jnp.where(error == 0, 0.0, error / size)


def quadratic(e, hessian):
    """tr(Eᵀ H E) over the last two axes."""
    he = jnp.matmul(hessian, e, precision=lax.Precision.HIGHEST)
    return jnp.sum(e * he, axis=(-2, -1))
