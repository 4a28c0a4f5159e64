"""The Hadamard rotation is orthonormal, invertible, leaves products alone and spreads outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from precision_scaling.numerics import hadamard


def matrix_of(width, key=0, block=None):
    signs = hadamard.random_signs(jax.random.key(key), width)
    return np.asarray(hadamard.rotate(jnp.eye(width), signs, axis=0, block=block)), np.asarray(signs)


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 32, 96, 100, 256])
def test_the_rotation_is_orthonormal(width):
    rotation, _ = matrix_of(width)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-6)


@pytest.mark.parametrize(("width", "block"), [(64, None), (512, None), (96, None), (96, 8), (128, 32)])
def test_it_is_signs_then_hadamard_matrices_in_blocks(width, block):
    rotation, signs = matrix_of(width, block=block)
    size = block or hadamard.block_width(width)
    blocks = np.kron(np.eye(width // size), linalg.hadamard(size) / np.sqrt(size))
    np.testing.assert_allclose(rotation, blocks * signs, atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((8, 96), -1), ((128, 5), 0), ((3, 64, 2), 1), ((4096,), 0)])
def test_unrotate_undoes_rotate(shape, axis):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    signs = hadamard.random_signs(jax.random.key(1), shape[axis])
    back = hadamard.unrotate(hadamard.rotate(x, signs, axis), signs, axis)
    np.testing.assert_allclose(back, x, atol=5e-6)


def test_a_product_of_two_rotated_operands_is_the_product():
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((7, 96)).astype(np.float32), rng.standard_normal((96, 5)).astype(np.float32)
    signs = hadamard.random_signs(jax.random.key(3), 96)
    product = np.asarray(hadamard.rotate(x, signs)) @ np.asarray(hadamard.rotate(w, signs, axis=0))
    np.testing.assert_allclose(product, x @ w, atol=1e-4)


def test_an_outlier_is_spread_over_its_block():
    x = np.zeros(64, np.float32)
    x[17] = 8.0
    rotated = hadamard.rotate(x, hadamard.random_signs(jax.random.key(0), 64))
    np.testing.assert_allclose(np.abs(rotated), 1.0, rtol=1e-6)


def test_signs_are_balanced_repeat_with_their_key_and_differ_with_another():
    signs = np.asarray(hadamard.random_signs(jax.random.key(0), 10_000))
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 4 / 100
    np.testing.assert_array_equal(signs, hadamard.random_signs(jax.random.key(0), 10_000))
    assert np.any(signs != np.asarray(hadamard.random_signs(jax.random.key(1), 10_000)))


def test_dtype_stays_and_gradients_are_rotated_back():
    signs = hadamard.random_signs(jax.random.key(0), 32)
    assert hadamard.rotate(jnp.ones((2, 32), jnp.bfloat16), signs).dtype == jnp.bfloat16
    c = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.vdot(hadamard.rotate(x, signs), c))(jnp.zeros(32))
    np.testing.assert_allclose(gradient, hadamard.unrotate(c, signs), atol=1e-6)


@pytest.mark.parametrize("block", [16, None])
def test_bfloat16_is_rotated_as_in_float32_and_rounded_once(block):
    x = jnp.asarray(np.random.default_rng(4).standard_normal((8, 256)), jnp.bfloat16)
    signs = hadamard.random_signs(jax.random.key(0), 256)
    for turn in (hadamard.rotate, hadamard.unrotate):
        exact = turn(x.astype(jnp.float32), signs, block=block)
        np.testing.assert_allclose(turn(x, signs, block=block).astype(jnp.float32), exact, rtol=2.0**-8, atol=1e-5)
        _, pull_back = jax.vjp(lambda x, turn=turn: turn(x, signs, block=block), x)
        undo = hadamard.unrotate if turn is hadamard.rotate else hadamard.rotate
        np.testing.assert_array_equal(pull_back(x)[0], undo(x, signs, block=block))


@pytest.mark.parametrize(("width", "block"), [(31, None), (1, None), (96, 64), (64, 3), (64, 1), (64, 0)])
def test_widths_and_blocks_that_do_not_fit_are_refused(width, block):
    with pytest.raises(ValueError, match="allowed") as error:
        hadamard.rotate(jnp.ones(width), jnp.ones(width), block=block)
    assert str(width) in str(error.value) and "\n" not in str(error.value)


def test_signs_of_another_width_are_refused():
    with pytest.raises(ValueError, match="signs"):
        hadamard.rotate(jnp.ones(64), jnp.ones(32))
