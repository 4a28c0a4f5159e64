"""Functions that keep little: values and gradients of their plain forms, in float64 too, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model import lean

LENGTH = 7
CAUSAL = np.repeat(np.tril(np.ones((LENGTH, LENGTH), bool)), 2, axis=0)  # two queries share a key
EPSILON = 1e-5


def softmax(score, wide):
    masked = jnp.where(CAUSAL, score.astype(wide), -1e30)
    return jax.nn.softmax(masked, axis=-1).astype(score.dtype)


def swiglu(x, wide):
    return jax.nn.silu(x[:, :, 0]) * x[:, :, 1]


def rms(x, scale, wide):
    y = x.astype(wide)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + EPSILON)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def layer(x, wide):
    y = x.astype(wide)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + EPSILON)).astype(x.dtype)


# name: the function, its plain form, shapes of what it takes; the gains of a norm are parameters, never bfloat16.
CASES = {
    "softmax": (lambda s: lean.causal_softmax(s, CAUSAL, s.dtype.name), softmax, [(2, 3, 2 * LENGTH, LENGTH)]),
    "swiglu": (lean.swiglu, swiglu, [(2, 3, 2, 5)]),
    "rms": (lean.rms_norm(EPSILON), rms, [(2, 3, 8), (8,)]),
    "layer": (lean.layer_norm(EPSILON), layer, [(2, 3, 8)]),
}


def case(name, dtype):
    """The function, its plain form, and arguments with a gradient of the result."""
    function, plain, shapes = CASES[name]
    rng = np.random.default_rng(5)
    wide = jnp.promote_types(dtype, jnp.float32)
    args = [jnp.asarray(rng.normal(size=shape) * 2, dtype if len(shape) > 1 else wide) for shape in shapes]
    out = jax.eval_shape(function, *args)
    return function, lambda *args: plain(*args, wide), args, jnp.asarray(rng.normal(size=out.shape), out.dtype)


def value_and_gradients(function, args, g):
    value, pull = jax.vjp(function, *args)
    return value, *pull(g)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_plain_form(name, dtype):
    # Of what a bfloat16 probability was before it was rounded, the backward pass does not know.
    tolerance = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-2}[dtype]
    with jax.enable_x64(True):
        function, plain, args, g = case(name, dtype)
        found, expected = (jax.jit(value_and_gradients, static_argnums=0)(f, args, g) for f in (function, plain))
        np.testing.assert_array_equal(found[0], expected[0])
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert one.dtype == other.dtype
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_differences_of_values(name):
    """In float64, along a direction: independent of how JAX differentiates."""
    with jax.enable_x64(True):
        function, _, args, g = case(name, "float64")
        rng = np.random.default_rng(6)
        step = [1e-6 * rng.normal(size=x.shape) for x in args]
        along = lambda sign: jnp.sum(g * function(*(x + sign * d for x, d in zip(args, step, strict=True))))
        _, *gradients = value_and_gradients(function, args, g)
        expected = (along(1) - along(-1)) / 2
        found = sum(jnp.sum(gradient * d) for gradient, d in zip(gradients, step, strict=True))
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mapped_gradients_are_those_of_each_run(name):
    function, _, args, g = case(name, "float32")
    two = lambda x: jnp.stack([x, x[::-1]])
    found = jax.vmap(lambda args, g: value_and_gradients(function, args, g))([two(x) for x in args], two(g))
    expected = value_and_gradients(function, [x[::-1] for x in args], g[::-1])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[1], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_size_of_an_activation_is_kept_in_float32(name):
    function, plain, args, _ = case(name, "bfloat16")
    kept = lambda f: [x for x in jax.tree.leaves(jax.vjp(f, *args)[1]) if x.size > args[-1].shape[-1]]
    assert sum(x.nbytes for x in kept(function)) == args[0].nbytes
    assert sum(x.nbytes for x in kept(plain)) > args[0].nbytes  # else there is nothing to gain
