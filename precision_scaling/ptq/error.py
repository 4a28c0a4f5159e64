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


def split_errors(kernel, quantized, hessian, cross, moment):
    """(‖(X₀ - X) W‖², ‖X₀ W - X Q‖²) / ‖X W‖² of kernels (in, out): what the inputs X inherited where the model as it
    was would read X₀, and that with the kernel's own error, as X₀ W - X Q = (X₀ - X) W + X (W - Q).

    cross = Xᵀ (X₀ - X), moment = (X₀ - X)ᵀ (X₀ - X), both (in, in) like the hessian.
    """
    size, from_inputs, error = quadratic(kernel, hessian), quadratic(kernel, moment), kernel - quantized
    both = jnp.sum(error * jnp.matmul(cross, kernel, precision=lax.Precision.HIGHEST))
    return from_inputs / size, (from_inputs + 2 * both + quadratic(error, hessian)) / size
