"""Quantizing a whole decoder: each kernel by its method, each layer with the inputs that quantized layers make."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model import decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import apply, gptq, projection, rtn, statistics
from precision_scaling.ptq.activations import Stream
from precision_scaling.ptq.codes import dequantize, each, parameters
from precision_scaling.ptq.parts import Parts
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.quantize import operands
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer
from precision_scaling.runtime.sharding import local_layout
from precision_scaling.training import step
from precision_scaling.training.blocks import Stacked
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import StepConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, mlp_width=24, sequence_length=8, base_width=16, base_depth=2
)
PROGRAM = StaticPrecision(
    tuple((n, StaticQuantizer(parse("int4").kind, "channel" if n == "w" else "tensor")) for n in "wa")
)
STATIC = StepConfig(MODEL, PROGRAM, OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1))
BITS = (3, 8)
DAMPING = 0.01


def grids_of(w=16, a=16):
    return {"w": parse(w).grid(), "a": parse(a).grid()}


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: step.init_state(STATIC, 0).params)()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 31, (6, 8)).astype(np.int32)


@pytest.fixture(scope="module")
def quantized(params, tokens):
    @functools.cache
    def at(method, a=16):
        options = {"scheme": scheme_of(method), "batch_size": 3, "layout": local_layout()}
        return apply.quantize_model(STATIC, params, grids_of(a=a), tokens, BITS, DAMPING, **options)

    return at


def kernel_of(params, layer, module, name):
    kernel = np.asarray(params["layers"]["block"][module][name]["kernel"][layer])
    return kernel.reshape(kernel.shape[0], -1)


def at_bits(result, bits):
    models, _ = result
    return jax.tree.map(np.asarray, parameters(models[BITS.index(bits)]))


@pytest.mark.slow
def test_rounding_to_nearest_is_that_of_every_kernel_alone(params, quantized):
    result = quantized("rtn")
    for bits in BITS:
        found = at_bits(result, bits)
        for layer in range(2):
            for module, name in apply.LINEARS:
                alone = rtn.quantize_kernel(kernel_of(params, layer, module, name), bits)
                np.testing.assert_array_equal(kernel_of(found, layer, module, name), alone)
    assert not result[1].fell_back.any()


def test_kernels_lie_on_the_symmetric_grid_of_their_output_channel(params, quantized):
    found = at_bits(quantized("rtn"), 3)
    for layer in range(2):
        for module, name in apply.LINEARS:
            kernel, original = kernel_of(found, layer, module, name), kernel_of(params, layer, module, name)
            levels = kernel / (np.max(np.abs(original), axis=0) / 3)
            np.testing.assert_allclose(levels, np.rint(levels), atol=1e-5)
            assert np.max(np.abs(levels)) == pytest.approx(3, abs=1e-5)
            assert np.max(np.abs(levels - original / (np.max(np.abs(original), axis=0) / 3))) <= 0.5 + 1e-5


@pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_norms_embedding_and_head_stay_and_every_kernel_changes(params, quantized, method):
    result = quantized(method)
    for bits in BITS:
        found = at_bits(result, bits)
        jax.tree_util.tree_map_with_path(
            lambda path, before, after: (
                np.testing.assert_array_equal(before, after)
                if path[0].key != "layers" or path[-1].key == "scale"
                else np.testing.assert_equal(np.any(np.asarray(before) != after), True)
            ),
            params,
            found,
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_of_training_and_inference_being_equal_there_is_no_loss(params, tokens, dtype):
    step_config = dataclasses.replace(STATIC, model=dataclasses.replace(MODEL, dtype=dtype))
    loss = jax.jit(functools.partial(step.validation_loss, step_config))
    sequences = np.concatenate([tokens, tokens[:, :1]], axis=1).reshape(2, 3, 9)
    options = {"scheme": scheme_of("rtn"), "batch_size": 3, "layout": local_layout()}
    result = apply.quantize_model(step_config, params, grids_of(), tokens, BITS, DAMPING, **options)
    trained = loss(params, grids_of(w=3, a=8), sequences)
    after = loss(at_bits(result, 3), grids_of(a=8), sequences)
    assert float(trained) == float(after) != float(loss(params, grids_of(a=8), sequences))


def numpy_layer_inputs(block, x, a_bits):
    """Inputs of the four projections of a block, in float64, from the formulas (residual scale 1); and its output."""

    def on_grid(x):
        if a_bits >= 16:
            return x
        # Scales are per tensor, which is a calibration batch of three sequences.
        parts = []
        for part in np.split(x, 2):
            scale = np.max(np.abs(part)) / (2 ** (a_bits - 1) - 1)
            parts.append(np.rint(part / scale) * scale)
        return np.concatenate(parts)

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_epsilon) * gain

    kernel = lambda module, name: np.asarray(block[module][name]["kernel"], np.float64)
    inputs = {}
    h = inputs["qkv"] = on_grid(norm(x, np.asarray(block["attention_norm"]["scale"], np.float64)))
    qkv = np.split(np.einsum("bld,dnk->blnk", h, kernel("attention", "qkv")), 3, axis=2)
    angle = np.arange(8)[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    rotate = lambda x: np.concatenate(
        [x[..., :4] * cos - x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin], axis=-1
    )
    scores = np.einsum("blhk,bmhk->bhlm", rotate(qkv[0]), rotate(qkv[1])) / math.sqrt(8)
    scores = np.where(np.tril(np.ones((8, 8), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhlm,bmhk->blhk", p / p.sum(-1, keepdims=True), qkv[2]).reshape(*x.shape)
    h = inputs["out"] = on_grid(mixed)
    x = x + h @ kernel("attention", "out")
    h = inputs["gate_up"] = on_grid(norm(x, np.asarray(block["mlp_norm"]["scale"], np.float64)))
    gate, up = np.moveaxis(np.einsum("bld,dpf->blpf", h, kernel("mlp", "gate_up")), 2, 0)
    h = inputs["down"] = on_grid(gate / (1 + np.exp(-gate)) * up)
    return inputs, x + h @ kernel("mlp", "down")


@pytest.mark.slow
@pytest.mark.parametrize("a_bits", [16, 4])
def test_gptq_sees_the_inputs_that_layers_already_quantized_make(params, tokens, quantized, a_bits):
    """Every kernel equals GPTQ of the float64 Hessian of the inputs that the finished, quantized model produces: what
    comes before a projection is quantized by then, and what comes after does not reach its inputs."""
    result = quantized("gptq", a_bits)
    found = at_bits(result, 3)
    assert not result[1].fell_back.any()
    x = np.asarray(params["embedding"]["embedding"], np.float64)[tokens]
    unlike_rtn = 0
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], found["layers"]["block"])
        inputs, x = numpy_layer_inputs(block, x, a_bits)
        for module, name in apply.LINEARS:
            h = inputs[name].reshape(-1, inputs[name].shape[-1])
            kernel = kernel_of(params, layer, module, name)
            expected = np.asarray(gptq.quantize_kernel(kernel, (h.T @ h).astype(np.float32), 3, damping=DAMPING))
            actual = kernel_of(found, layer, module, name)
            # A value on a rounding boundary may go either way in float32: all but a few must be the same.
            output, j = h @ kernel, apply.LINEARS.index((module, name))
            for reported, q in ((result[1].error, actual), (result[1].rtn_error, rtn.quantize_kernel(kernel, 3))):
                relative = np.sum((h @ (kernel - q)) ** 2) / np.sum(output**2)
                np.testing.assert_allclose(reported[BITS.index(3), layer, j], relative, rtol=0.02)
            same = np.isclose(actual, expected, atol=1e-4)
            assert np.mean(same) > 0.98, (layer, name, np.mean(same))
            unlike_rtn += np.mean(actual != np.asarray(rtn.quantize_kernel(kernel, 3))) > 0.02
    assert unlike_rtn == 8


@pytest.mark.slow
def test_gptq_of_unquantized_layers_would_have_other_inputs(params, tokens, quantized):
    """The test above can tell: with the Hessian of the original model's inputs the last kernels come out otherwise."""
    found = at_bits(quantized("gptq"), 3)
    x = np.asarray(params["embedding"]["embedding"], np.float64)[tokens]
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"]["block"])
        inputs, x = numpy_layer_inputs(block, x, 16)
    h = inputs["down"].reshape(-1, 24)
    other = gptq.quantize_kernel(kernel_of(params, 1, "mlp", "down"), (h.T @ h).astype(np.float32), 3, damping=DAMPING)
    assert np.mean(np.isclose(kernel_of(found, 1, "mlp", "down"), other, atol=1e-4)) < 0.98


@pytest.mark.slow
def test_awq_changes_what_attention_adds_no_more_than_rounding_to_nearest_does(params, tokens):
    x = np.asarray(params["embedding"]["embedding"])[tokens]
    block = block_of(params, 0)
    h = Block(MODEL).apply({"params": block}, x, method=Block.before_qkv)
    found = statistics.add(Products(PROGRAM, grids_of()), statistics.nothing(16), h)
    found = found._replace(magnitude_I=found.magnitude_I / tokens.size)

    def added(block, kernel=None):
        if kernel is not None:
            block = projection.with_kernel(block, apply.QKV, kernel)
        apply_block = functools.partial(Block(MODEL).apply, {"params": block})
        products = Products(PROGRAM, grids_of())
        o = apply_block(apply_block(x, method=Block.before_qkv), products, method=Block.before_out)
        return np.asarray(apply_block(np.zeros_like(x), o, products, method=Block.after_out))

    for bits in BITS:
        fmt = parse(bits)
        solver = projection._solver(STATIC, scheme_of("awq"), fmt.kind, apply.QKV, local_layout())
        codes, _ = solver(block, found, h[None], grids_of(), fmt.grid(), DAMPING)
        plain = rtn.quantize_kernel(kernel_of(params, 0, "attention", "qkv"), bits)
        kernels = dequantize(codes), plain.reshape(codes.codes.shape)
        awq, nearest = (np.sum((added(block, kernel) - added(block)) ** 2) for kernel in kernels)
        assert awq <= 1.001 * nearest
        assert np.ptp(codes.row_scales) > 0.01


def block_of(params, layer):
    return jax.tree.map(lambda leaf: leaf[layer], params["layers"]["block"])


@pytest.mark.slow
def test_scales_of_inputs_are_folded_into_what_makes_them_and_the_block_computes_the_same():
    """Whatever the factors: of norms, of values that two heads read, of the half of gate_up that is not activated."""
    model = dataclasses.replace(MODEL, heads=4, kv_heads=2, qkv_bias=True)
    step_config = dataclasses.replace(STATIC, model=model, static=StaticPrecision())
    rng = np.random.default_rng(0)
    block = block_of(decoder.init(model, jax.random.key(0)), 0)
    block["attention"]["qkv_bias"] = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)
    stream = Stream([x], math.inf)
    quantizer = apply.BlockQuantizer(step_config, scheme_of("awq"), local_layout(), {}, DAMPING, stream, [None])
    task = apply._Task(quantizer, block, dict.fromkeys(apply.LINEARS, parse(8)))
    task._of = dataclasses.replace(quantizer, scheme=scheme_of("rtn"))  # codes without scales of their own
    for linear in apply.LINEARS:
        task.round(linear)
    before = Block(model).apply({"params": task.block}, x, Products())
    changed = []
    for linear in (apply.OUT, apply.DOWN, apply.QKV, apply.GATE_UP):
        size = projection.kernel_of(block, linear).shape[0]
        factor = np.exp(rng.normal(size=size)).astype(np.float32)
        if linear == apply.OUT:
            factor = np.asarray(projection._per_value(factor, model))
            assert len(np.unique(factor)) == 8
        kernel = projection.kernel_of(task.block, linear)
        changed.append(task._fold(linear, factor))
        divided = kernel / factor.reshape(-1, *(1 for _ in kernel.shape[1:]))
        task.block = projection.with_kernel(task.block, linear, divided)
    assert changed == [True, True, False, False]
    after = Block(model).apply({"params": task.block}, x, Products())
    np.testing.assert_allclose(after, before, atol=2e-5)
    kernels, rest, _ = task.result()
    assert not np.allclose(rest["mlp_norm"]["scale"], 1) and rest["attention"]["qkv_bias"].shape == (8, 4)
    # What is stored has the folded scales: without the rows' factors it is what the block has.
    rows = (rest["mlp_norm"]["scale"] / block["mlp_norm"]["scale"])[:, None, None]
    folded = dequantize(kernels["mlp"]["gate_up"])
    np.testing.assert_allclose(folded, projection.kernel_of(task.block, apply.GATE_UP) * rows, rtol=1e-5)


@pytest.mark.parametrize("width", [24, 520])  # the second in panels
def test_the_hessian_is_the_sum_of_outer_products(width):
    x = np.random.default_rng(0).normal(size=(2, 9, width)).astype(np.float32)
    found = jax.jit(functools.partial(statistics.add, Products()))(statistics.nothing(width), x)
    rows = x.reshape(-1, width).astype(np.float64)
    np.testing.assert_allclose(found.hessian_IxI, rows.T @ rows, atol=1e-4)
    np.testing.assert_allclose(found.hessian_IxI, found.hessian_IxI.T, atol=1e-5)
    np.testing.assert_allclose(found.magnitude_I, np.abs(rows).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(found.largest_I, np.abs(x).max((0, 1)))


@pytest.mark.slow
def test_awq_leaves_a_model_without_scales_of_its_own(params, tokens, quantized):
    models, report = quantized("awq")
    for codes in each(models[1].kernels):
        assert codes.row_scales is None
    found = at_bits((models, report), 8)
    gains = found["layers"]["block"]["mlp_norm"]["scale"] / np.asarray(params["layers"]["block"]["mlp_norm"]["scale"])
    assert np.ptp(gains) > 0.01
    sequences = np.concatenate([tokens, tokens[:, :1]], axis=1).reshape(2, 3, 9)
    loss = jax.jit(functools.partial(step.validation_loss, STATIC))
    whole, at_8, at_3 = (float(loss(p, grids_of(), sequences)) for p in (params, found, at_bits((models, report), 3)))
    assert abs(at_8 - whole) < 0.01 < abs(at_3 - whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "corrected"])
def test_a_block_that_was_quantized_before_is_followed_to_the_same_bits(params, tokens, method, tmp_path):
    scheme = scheme_of("gptq", correct_inputs=0.5) if method == "corrected" else scheme_of(method)
    step_config = dataclasses.replace(STATIC, static=scheme.static(PROGRAM))
    grids, layout, blocks = grids_of(a=4), local_layout(), Stacked(params)

    def quantizer():
        text = apply.calibration_stream(step_config, layout, grids, blocks.top(), tokens, 3, 100)  # all in a file
        return apply.BlockQuantizer(step_config, scheme, layout, grids, DAMPING, *text)

    wanted = dict.fromkeys(apply.LINEARS, parse(4))
    undisturbed, parts = quantizer(), Parts(tmp_path / "parts", "key")
    parts.write(0, undisturbed.quantize(blocks.block(0), wanted))
    last = undisturbed.quantize(blocks.block(1), wanted)
    again = quantizer()
    again.follow(parts.read(0), lambda: blocks.block(0))
    jax.tree.map(np.testing.assert_array_equal, again.quantize(blocks.block(1), wanted), last)
    assert parts.read(1) is None and Parts(tmp_path / "parts", "other").read(0) is None
    path = tmp_path / "parts" / "0000.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert parts.read(0) is None  # damaged


@pytest.mark.slow
def test_errors_split_into_what_a_kernel_makes_and_what_it_inherits_and_correcting_lowers_their_sum(params, tokens):
    many = np.random.default_rng(1).integers(0, 31, (48, 8)).astype(np.int32)
    reports = {}
    for share in (1e-6, 1.0):
        options = {"scheme": scheme_of("gptq", correct_inputs=share), "batch_size": 6, "layout": local_layout()}
        (model,), reports[share] = apply.quantize_model(STATIC, params, grids_of(), many, (2,), 1e-4, **options)
    plain, corrected = reports[1e-6], reports[1.0]
    assert np.all(plain.inherited_error[0, 0, 0] == 0)  # nothing is quantized before the first
    np.testing.assert_allclose(plain.total_error[0, 0, 0], plain.error[0, 0, 0], rtol=1e-4)
    assert np.all(corrected.total_error[0, :, 1:].sum() < plain.total_error[0, :, 1:].sum())
    # The last projection's, from its inputs in both models.
    forward = apply.forward(STATIC, local_layout())
    x = {"as it was": forward.embed({"embedding": params["embedding"]}, grids_of(), many)}
    x["quantized"] = x["as it was"]
    blocks, quantized = Stacked(params), Stacked(parameters(model))
    x = {
        name: forward.through(of.block(0), grids_of(), x[name], None)
        for name, of in (("as it was", blocks), ("quantized", quantized))
    }
    h = {
        name: forward.inputs(apply.DOWN, of.block(1), grids_of(), x[name], None)
        for name, of in (("as it was", blocks), ("quantized", quantized))
    }
    h = {name: np.asarray(value, np.float64).reshape(-1, 24) for name, value in h.items()}
    w, q = (np.asarray(projection.kernel_of(of.block(1), apply.DOWN), np.float64) for of in (blocks, quantized))
    size = np.sum((h["quantized"] @ w) ** 2)
    expected = [h["as it was"] @ w - h["quantized"] @ w, h["as it was"] @ w - h["quantized"] @ q]
    found = corrected.inherited_error[0, 1, 3], corrected.total_error[0, 1, 3]
    np.testing.assert_allclose(found, [np.sum(e**2) / size for e in expected], rtol=1e-3)


def test_projections_are_all_there_are_and_come_in_the_order_of_the_data(params):
    kernels = {
        tuple(entry.key for entry in path[2:4])
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
        if path[0].key == "layers" and path[-1].key == "kernel"
    }
    assert kernels == set(apply.LINEARS)
    assert [name for _, name in apply.LINEARS] == ["qkv", "out", "gate_up", "down"]
    assert operands.OPERANDS[:2] == ("w", "a")
