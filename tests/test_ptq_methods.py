"""SmoothQuant and KV-cache quantization: what they compute, and what of a model they touch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import apply, codes
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.ptq.smoothquant import smoothing_scales
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime.sharding import local_layout
from precision_scaling.training import step
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import StepConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, mlp_width=24, sequence_length=8, base_width=16, base_depth=2
)
OPTIMIZER = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)
BITS = (4, 8)
LOUD = 5  # the input channel that is much larger than the others, as in trained language models


def static_of(scheme):
    return StepConfig(MODEL, scheme.static(UNQUANTIZED), OPTIMIZER)


@pytest.fixture(scope="module")
def params():
    params = jax.jit(lambda: step.init_state(static_of(scheme_of("rtn")), 0).params)()
    block = params["layers"]["block"]
    for norm in ("attention_norm", "mlp_norm"):
        block[norm]["scale"] = block[norm]["scale"].at[:, LOUD].set(50.0)
    for module, name in (("attention", "qkv"), ("mlp", "gate_up")):
        block[module][name]["kernel"] = block[module][name]["kernel"].at[:, LOUD].divide(50.0)
    return params


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 31, (6, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def loss_of(tokens):
    @functools.cache
    def static(scheme):
        return jax.jit(functools.partial(step.validation_loss, static_of(scheme)))

    def loss(params, scheme, bits):
        return float(
            static(scheme)(params, {name: parse(bits).grid() for name in scheme.method.operands}, tokens[None])
        )

    return loss


def quantized(params, tokens, scheme):
    arguments = static_of(scheme), params, {}, tokens[:, :-1], BITS, 0.01
    return apply.quantize_model(*arguments, scheme=scheme, batch_size=6, layout=local_layout())


@pytest.fixture(scope="module")
def smoothed(params, tokens):
    return quantized(params, tokens, scheme_of("smoothquant"))


def test_smoothing_scales_by_hand():
    # Largest inputs 16, 1, 4 and largest weights 4, 1, 1: s = √(16/4), √(1/1), √(4/1).
    kernel = jnp.array([[4.0, -1], [0.5, -1], [1, 0]])
    s, unusable = smoothing_scales(jnp.array([16.0, 1, 4]), kernel, 0.5)
    np.testing.assert_allclose(s, [2, 1, 2], rtol=1e-6)
    assert not unusable
    s, _ = smoothing_scales(jnp.array([16.0, 1, 4]), kernel, 1.0)  # all of the range moves
    np.testing.assert_allclose(s, [16, 1, 4], rtol=1e-6)


def test_inputs_that_are_never_on_or_have_no_weight_keep_their_scale():
    kernel = jnp.array([[4.0], [1], [0]])
    np.testing.assert_array_equal(smoothing_scales(jnp.array([0.0, 4, 4]), kernel, 0.5)[0], [1, 2, 1])
    for largest in ([np.nan, 1, 1], [np.inf, 1, 1], [0, 0, 0]):
        s, unusable = smoothing_scales(jnp.array(largest, jnp.float32), kernel, 0.5)
        np.testing.assert_array_equal(s, 1)
        assert unusable


@pytest.mark.slow
def test_norms_take_what_kernels_give_and_the_function_stays(params, smoothed, loss_of):
    """At 8 bits and smoothed the model is nearly what it was, though gains and kernels are far from it."""
    models, report = smoothed
    found = codes.parameters(models[1])
    for norm, module, name in (("attention_norm", "attention", "qkv"), ("mlp_norm", "mlp", "gate_up")):
        before, after = params["layers"]["block"], found["layers"]["block"]
        factor_LxI = before[norm]["scale"] / after[norm]["scale"]
        assert np.max(factor_LxI) > 10 * np.min(factor_LxI)
        shape = (*factor_LxI.shape, *(1 for _ in before[module][name]["kernel"].shape[2:]))
        np.testing.assert_allclose(
            after[module][name]["kernel"], before[module][name]["kernel"] * factor_LxI.reshape(shape), atol=0.02
        )
    whole = loss_of(params, scheme_of("rtn"), 16)
    assert abs(loss_of(found, scheme_of("rtn"), 16) - whole) < 0.01
    assert not report.fell_back.any()


def test_smoothing_lowers_the_damage_where_an_input_is_loud(params, tokens, smoothed, loss_of):
    whole = loss_of(params, scheme_of("rtn"), 16)
    rough, _ = quantized(params, tokens, scheme_of("rtn"))

    def damage(model, bits):
        return abs(loss_of(codes.parameters(model), scheme_of("smoothquant"), bits) - whole)

    for smooth, rounded, bits in zip(smoothed[0], rough, BITS, strict=True):
        assert damage(smooth, bits) < 0.5 * damage(rounded, bits)


def test_keys_and_values_are_rounded_as_training_would_and_nothing_else(params, loss_of):
    scheme = scheme_of("kv_cache")
    static = scheme.static(UNQUANTIZED)
    assert {name for name, _ in static.quantizers} == {"k", "v"}
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 8, 2, 8)), jnp.float32) for _ in range(3))
    grids = {name: parse(4).grid() for name in "kv"}

    def on_grid(x):
        scale = np.abs(x).max() / 7
        return np.rint(x / scale) * scale

    scores = np.einsum("blhk,bmhk->bhlm", q, on_grid(np.asarray(k)))
    np.testing.assert_allclose(Products(static, grids).attention_scores(q, k), scores, atol=1e-4)
    p = jax.nn.softmax(jnp.asarray(scores, jnp.float32), axis=-1)
    values = np.einsum("bhlm,bmhk->blhk", p, on_grid(np.asarray(v)))
    np.testing.assert_allclose(Products(static, grids).attention_values(p, v), values, atol=1e-4)
    whole = loss_of(params, scheme_of("rtn"), 16)
    assert loss_of(params, scheme, 16) == whole
    assert 0 < abs(loss_of(params, scheme, 8) - whole) < abs(loss_of(params, scheme, 2) - whole)


@pytest.mark.slow
def test_a_token_of_its_own_scale_loses_less(params, loss_of):
    whole = loss_of(params, scheme_of("rtn"), 16)
    token, tensor = (loss_of(params, scheme_of("kv_cache", granularity=name), 4) for name in ("token", "tensor"))
    assert abs(token - whole) < abs(tensor - whole)
