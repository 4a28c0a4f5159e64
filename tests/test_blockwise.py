"""Attention block by block: values and gradients of the plain form, in float64 too, and when it is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.config import base
from precision_scaling.errors import ConfigError
from precision_scaling.model import attention, blockwise, decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Decoder
from precision_scaling.numerics import formats
from precision_scaling.quantize import parsing
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer

pytestmark = pytest.mark.usefixtures("quick_compile")
BATCH, LENGTH, HEADS, WIDTH = 2, 11, 3, 4


def arrays(dtype, shared):
    """Queries, keys, values, and a gradient of the result."""
    rng = np.random.default_rng(7)
    lengths = LENGTH * shared, LENGTH, LENGTH, LENGTH * shared
    return [jnp.asarray(rng.normal(size=(BATCH, length, HEADS, WIDTH)), dtype) for length in lengths]


def plain(q, k, v):
    """By the definition, each head of queries beside the head of keys that it shares."""
    shared, wide = q.shape[1] // k.shape[1], jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    q = q.reshape(BATCH, LENGTH, shared, HEADS, WIDTH)
    scores = jnp.einsum("bsqgk,btgk->bgqst", q, k)
    weights = jnp.where(np.tril(np.ones((LENGTH, LENGTH), bool))[None, None, None], jnp.exp(scores), 0)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bgqst,btgk->bsqgk", weights, v).reshape(BATCH, -1, HEADS, WIDTH)


def value_and_gradients(function, q, k, v, g):
    value, pull = jax.vjp(function, q, k, v)
    return value, *pull(g.astype(value.dtype))


@pytest.mark.parametrize(
    ("dtype", "block", "shared"),
    [("float64", 4, 2), ("float64", 2, 1), ("float32", 4, 1), ("float32", 11, 2), ("bfloat16", 4, 1)],
)
def test_values_and_gradients_are_those_of_the_definition(monkeypatch, dtype, block, shared):
    monkeypatch.setattr(blockwise, "BLOCK", block)
    tolerance = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-2}[dtype]
    with jax.enable_x64(True):
        args = arrays(dtype, shared)
        of = lambda function: jax.jit(lambda *args: value_and_gradients(function, *args))(*args)
        for one, other in zip(of(blockwise.attend), of(plain), strict=True):
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def test_several_runs_at_once_are_each_of_them(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    args = arrays("float32", 2)
    two = [jnp.stack([x, x[::-1]]) for x in args]
    of = lambda *args: value_and_gradients(blockwise.attend, *args)
    for one, other in zip(jax.jit(jax.vmap(of))(*two), jax.jit(of)(*(x[::-1] for x in args)), strict=True):
        np.testing.assert_allclose(one[1], other, rtol=1e-5, atol=1e-6)


def static(**quantizers):
    return StaticPrecision(
        tuple((name, StaticQuantizer(formats.Kind("int"), *how)) for name, how in quantizers.items())
    )


def test_it_is_taken_where_queries_and_probabilities_are_exact_in_both_passes():
    assert StaticPrecision().exact_attention
    assert static(w=(), a=(), k=(), v=("token", "stochastic"), g_a=(), head_w=()).exact_attention
    for name in ("q", "p", "g_q", "s_q", "g_k", "s_v"):
        assert not static(k=(), **{name: ()}).exact_attention
    assert not static(k=("token", "nearest", "int8")).exact_attention  # native
    assert not StaticPrecision(exact=("q",)).exact_attention
    assert not StaticPrecision(wide=("p",)).exact_attention


@pytest.mark.slow
@pytest.mark.parametrize(("quantized", "kv_heads"), [(False, 0), (True, 1)])
def test_a_decoder_has_the_losses_and_gradients_that_the_whole_product_has(monkeypatch, quantized, kv_heads):
    model = ModelConfig(31, 16, 2, 4, 24, LENGTH, 16, 2, kv_heads=kv_heads)
    params = decoder.init(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, 31)
    rounds = static(k=("token",), v=("tensor", "stochastic")) if quantized else StaticPrecision()
    grids = {name: formats.parse("int4").grid() for name, _ in rounds.quantizers}
    key = jax.random.key(2) if quantized else None

    def losses():
        loss = lambda params: Decoder(model, rounds).apply({"params": params}, tokens, grids, key, method="losses")[0]
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = losses()
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(attention, "BLOCKS_FROM", LENGTH)
    taken = []
    attend = blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda *args: taken.append(args) or attend(*args))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), losses(), expected)
    assert taken


def test_no_array_has_all_scores(monkeypatch):
    length = 2048
    q, k, v, g = (jax.ShapeDtypeStruct((1, length, 2, 8), jnp.bfloat16) for _ in range(4))
    text = jax.jit(lambda *args: value_and_gradients(blockwise.attend, *args)).lower(q, k, v, g).as_text()
    assert "256x256x" in text and f"{length}x{length}x" not in text


def test_the_way_is_chosen_by_length_and_precision_and_told():
    short, long = (ModelConfig(31, 16, 2, 4, 24, length, 16, 2) for length in (512, 2048))
    assert attention.way(short, StaticPrecision(), 512) == "whole"
    assert attention.way(long, StaticPrecision(), 2048) == attention.way(long, static(k=(), w=()), 2048) == "blocks"
    assert attention.way(long, static(p=()), 2048) == "whole"
    assert attention.described(long, StaticPrecision()) == "attention block by block (length 2048)"
    assert "quantized queries or probabilities" in attention.described(long, static(q=()))
    forced = dataclasses.replace(short, attention="blocks")
    assert attention.described(forced, StaticPrecision()) == "attention block by block (model.attention=blocks)"


@pytest.mark.parametrize(
    ("options", "precision", "named"),
    [
        ({"attention": "blocks"}, "q8", "model.attention = 'blocks': allowed is auto or whole for"),
        ({"attention": "blocks", "dtype": "bfloat16"}, "kv12", "auto or whole"),
        ({"attention": "cudnn"}, "kv4", "cudnn with float32 and heads of 4"),
        ({"attention": "cudnn", "dtype": "bfloat16", "head_width": 256}, "bf16", "heads of 128"),
    ],
)
def test_a_way_that_cannot_be_is_one_line(options, precision, named):
    model = ModelConfig(31, 16, 2, 4, 24, LENGTH, 16, 2, **options)
    with pytest.raises(ConfigError) as error:
        attention.check(model, parsing.parse(precision, base.get_config().precision))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_cudnn_needs_a_gpu():
    model = ModelConfig(31, 16, 2, 4, 24, LENGTH, 16, 2, attention="cudnn", dtype="bfloat16", head_width=8)
    attention.check(model, parsing.parse("kv4", base.get_config().precision))
    with pytest.raises(ConfigError, match="auto, whole or blocks on cpu"):
        attention.check_device(model)
