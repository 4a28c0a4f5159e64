"""Cross-entropy in chunks of positions: values and gradients of the plain form, in float64 too, and what is held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model import cross_entropy, decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Decoder
from precision_scaling.numerics import formats
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer

BATCH, POSITIONS, WIDTH, VOCABULARY = 3, 7, 8, 11
SCALE = 0.5
pytestmark = pytest.mark.usefixtures("quick_compile")
MODEL = ModelConfig(VOCABULARY, 8, 1, 2, 16, POSITIONS, 8, 1)


def arrays(dtype):
    rng = np.random.default_rng(3)
    h = jnp.asarray(rng.normal(size=(BATCH, POSITIONS, WIDTH)), dtype)
    kernel = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.promote_types(dtype, jnp.float32))
    return h, kernel, jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, POSITIONS)))


def plain(h, kernel, targets, z_loss):
    """By the definition: log of the sum of exponentials, minus the target's logit."""
    logits = ((h @ kernel.astype(h.dtype)) * SCALE).astype(kernel.dtype)
    log_z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    losses = log_z - jnp.sum(logits * jax.nn.one_hot(targets, VOCABULARY, dtype=logits.dtype), axis=-1)
    return jnp.mean(losses) + z_loss * jnp.mean(log_z**2)


def chunked(h, kernel, targets, z_loss, length):
    return cross_entropy.of_inputs(h, kernel, targets, cross_entropy.Head(SCALE, z_loss, length))[0]


@pytest.mark.parametrize(
    ("dtype", "z_loss", "length"),
    [("float64", 0.1, 3), ("float64", 0.0, 7), ("float32", 0.1, 1), ("float32", 0.0, 3), ("bfloat16", 0.1, 3)],
)
def test_values_and_gradients_are_those_of_the_plain_form(dtype, z_loss, length):
    tolerance = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 3e-2}[dtype]
    with jax.enable_x64(True):
        h, kernel, targets = arrays(dtype)
        of = lambda f: jax.jit(jax.value_and_grad(lambda h, kernel: 3 * f(h, kernel, targets, z_loss), (0, 1)))
        value, gradients = of(functools.partial(chunked, length=length))(h, kernel)
        expected, others = of(plain)(h, kernel)
        np.testing.assert_allclose(value, expected, rtol=tolerance)
        alone = 3 * chunked(h, kernel, targets, z_loss, length)  # without gradients
        np.testing.assert_allclose(alone, value, rtol=1e-6)
        for one, other in zip(gradients, others, strict=True):
            assert one.dtype == other.dtype
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def test_gradients_of_several_runs_at_once_are_those_of_each():
    h, kernel, targets = arrays("float32")
    gradients = jax.grad(lambda h, kernel, targets: chunked(h, kernel, targets, 0.1, 3), (0, 1))
    two = lambda x: jnp.stack([x, x[::-1]])
    found = jax.jit(jax.vmap(gradients))(two(h), two(kernel), two(targets))
    for one, other in zip(found, jax.jit(gradients)(h[::-1], kernel[::-1], targets[::-1]), strict=True):
        np.testing.assert_allclose(one[1], other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_has_the_same_loss_and_gradients_in_chunks(monkeypatch, tied):
    model = ModelConfig(**{**vars(MODEL), "tie_embeddings": tied})
    params = decoder.init(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (BATCH, POSITIONS + 1), 0, VOCABULARY)

    def loss(params):
        return Decoder(model).apply({"params": params}, tokens, {}, None, 1e-2, method=Decoder.losses)[0]

    expected = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * BATCH * 3)
    found = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("operand", ["", "head_w", "head_a"])
def test_no_array_has_all_logits_but_where_an_operand_of_the_head_is_quantized(monkeypatch, operand):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY * BATCH * 3)
    static = StaticPrecision(((operand, StaticQuantizer(formats.Kind("int"))),) if operand else ())
    params = jax.eval_shape(lambda: decoder.init(MODEL, jax.random.key(0)))
    tokens = jnp.zeros((BATCH, POSITIONS + 1), jnp.int32)
    grids = {operand: formats.parse("int4").grid()} if operand else {}
    loss = lambda params: Decoder(MODEL, static).apply({"params": params}, tokens, grids, method=Decoder.losses)[0]
    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert (f"tensor<{BATCH}x{POSITIONS}x{VOCABULARY}xf32>" in text) == bool(operand)


@pytest.mark.parametrize(("batch", "positions", "vocabulary"), [(8, 1024, 32768), (3, 1000, 50257), (1, 7, 2**26)])
def test_chunks_are_as_equal_as_they_can_be_and_keep_to_the_bytes(batch, positions, vocabulary):
    length = cross_entropy.chunk_length(batch, positions, vocabulary)
    number = -(-positions // length)
    assert length == 1 or 4 * batch * length * vocabulary <= cross_entropy.CHUNK_BYTES
    assert number * length - positions < number
    assert cross_entropy.chunk_length(16, 64, 257) == 64  # a study on a CPU has one
