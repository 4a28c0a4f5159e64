"""Functions of activations whose backward pass keeps little: what comes in, or what goes out, in the compute dtype.

Left to itself, differentiation keeps every intermediate array that a derivative needs, in float32 where the function
computes in float32. Each function here has the values of its plain form, and its gradients but for the rounding of what
is kept.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def causal_softmax(score_BxGxSQxS, visible, dtype: str):
    """Probabilities of the scores where `visible` is true, of that dtype; computed in float32 or wider.

    visible: (S·Q, S) or (B, 1, S·Q, S), see `documents`.

    The backward pass keeps the probabilities as they are returned, which the product with the values keeps already.
    """
    score_BxGxSQxS = score_BxGxSQxS.astype(jnp.promote_types(score_BxGxSQxS.dtype, jnp.float32))
    return jax.nn.softmax(jnp.where(visible, score_BxGxSQxS, -1e30), axis=-1).astype(dtype)


def _softmax_forward(score_BxGxSQxS, visible, dtype):
    p_BxGxSQxS = causal_softmax(score_BxGxSQxS, visible, dtype)
    # An array without elements carries the type of the scores.
    return p_BxGxSQxS, (p_BxGxSQxS, jnp.empty((0,), score_BxGxSQxS.dtype))


def _softmax_backward(dtype, kept, g_BxGxSQxS):
    p_BxGxSQxS, like_score = kept
    wide = jnp.promote_types(p_BxGxSQxS.dtype, jnp.float32)
    p_BxGxSQxS = p_BxGxSQxS.astype(wide)
    # Where the mask is false p is 0, and so is the gradient.
    weighted_BxGxSQxS = g_BxGxSQxS.astype(wide) * p_BxGxSQxS
    sums_BxGxSQx1 = jnp.sum(weighted_BxGxSQxS, axis=-1, keepdims=True)
    return (weighted_BxGxSQxS - p_BxGxSQxS * sums_BxGxSQx1).astype(like_score.dtype), None


causal_softmax.defvjp(_softmax_forward, _softmax_backward)


def _keeping_inputs(function):
    """`function` of arrays, its gradients computed anew from its inputs."""
    lean = jax.custom_vjp(function)
    lean.defvjp(lambda *args: (function(*args), args), lambda args, g: jax.vjp(function, *args)[1](g))
    return lean


@_keeping_inputs
def swiglu(gate_up_BxSx2xF):
    """silu(gate) * up: (B, S, F)."""
    return jax.nn.silu(gate_up_BxSx2xF[:, :, 0]) * gate_up_BxSx2xF[:, :, 1]


@functools.cache
def rms_norm(epsilon: float):
    """A function of x (..., D) and scale (D,): x / rms(x) times the gains, computed in float32 or wider."""

    @_keeping_inputs
    def normalized(x, scale):
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
        return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)

    return normalized


@functools.cache
def layer_norm(epsilon: float):
    """A function of x (..., D): (x - mean(x)) / deviation(x), computed in float32 or wider."""

    @_keeping_inputs
    def normalized(x):
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
        return y.astype(x.dtype)

    return normalized
