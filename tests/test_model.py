"""The decoder against a NumPy decoder written from its description, and what a causal transformer must have."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from precision_scaling.model import decoder
from precision_scaling.model.accounting import count_parameters, training_flops_per_token
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block, Decoder
from precision_scaling.numerics.formats import parse
from precision_scaling.quantize import operands
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED, StaticPrecision, StaticQuantizer

pytestmark = pytest.mark.usefixtures("quick_compile")

# base_width and base_depth differ from width and depth: every depth-µP multiplier is then something else than 1.
CONFIG = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, mlp_width=24, sequence_length=12, base_width=8, base_depth=1
)
QUANTIZED = StaticPrecision(
    tuple((name, StaticQuantizer(parse("int4").kind, "channel" if name == "w" else "tensor")) for name in "waqkvp")
)


def grids_of(**bits):
    return {name: parse(bits.get(name, 16)).grid() for name in operands.OPERANDS}


# What OLMo, OLMo 2, Llama 3 and Qwen 2 and 3 do otherwise, mixed so that every option meets two values of the others.
VARIANTS = {
    "grouped_queries": {"kv_heads": 2, "head_width": 6, "tie_embeddings": True},
    "one_key_head": {"kv_heads": 1, "norm_placement": "post", "qk_norm": "projection"},
    "layer_norm": {"norm_type": "layer", "tie_embeddings": True},
    "head_norm": {"kv_heads": 2, "head_width": 10, "qk_norm": "head", "norm_placement": "post"},
    "biases": {"kv_heads": 2, "qkv_bias": True, "head_width": 8, "rope_theta": 20.0, "rope_scaling": "llama3:8,1,4,12"},
    "stretched": {"rope_scaling": "linear:2.5", "norm_type": "layer"},
}


def variant(name):
    return dataclasses.replace(CONFIG, heads=4, **VARIANTS[name])


def initial(config):
    found = jax.jit(functools.partial(decoder.init, config))(jax.random.key(3))

    def away(path, x):
        """Gains away from 1 and biases from 0, and from each other, so that it shows where one is forgotten."""
        wave = np.sin(np.arange(x.size).reshape(x.shape))
        return {"scale": x * (1 + 0.1 * wave), "qkv_bias": x + 0.3 * wave}.get(path[-1].key, x)

    return jax.tree_util.tree_map_with_path(away, found)


@pytest.fixture(scope="module")
def params():
    return initial(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def logits_of():
    @functools.partial(jax.jit, static_argnames=("config", "static"))
    def compute(params, tokens, grids=None, config=CONFIG, static=UNQUANTIZED):
        return Decoder(config, static).apply({"params": params}, tokens, grids)

    return compute


def numpy_decoder(params, tokens, c):
    """The forward pass in float64, loop by loop, from the formulas of the Transformer++ and of its variants alone."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head_dim, kv_heads = c.head_width or c.width // c.heads, c.kv_heads or c.heads

    def norm(x, gain):
        if c.norm_type == "layer":
            assert gain is None
            return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_epsilon)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * gain["scale"]

    def frequency(i):
        """Of the i-th pair of a head, by wavelengths as Llama's own code has it."""
        found = c.rope_theta ** (-2 * i / head_dim)
        kind, _, numbers = c.rope_scaling.partition(":")
        if kind == "linear":
            return found / float(numbers)
        if kind == "llama3":
            factor, low, high, original = map(float, numbers.split(","))
            wavelength = 2 * math.pi / found
            if wavelength < original / high:
                return found
            if wavelength > original / low:
                return found / factor
            smooth = (original / wavelength - low) / (high - low)
            return (1 - smooth) * found / factor + smooth * found
        return found

    def heads_of(h, kernel, bias, gain):
        """Query or key heads (L, H, K) of the branch's input."""
        heads = np.stack([h @ kernel[:, i] + bias[i] for i in range(kernel.shape[1])], axis=1)
        if c.qk_norm == "projection":
            heads = norm(heads.reshape(len(h), -1), gain).reshape(heads.shape)
        if c.qk_norm == "head":
            heads = np.stack([norm(heads[:, i], gain) for i in range(heads.shape[1])], axis=1)
        return np.array([[rotate(head, position) for head in row] for position, row in enumerate(heads)])

    def rotate(vector, position):
        out = vector.copy()
        half = head_dim // 2
        for i in range(half):
            angle = position * frequency(i)
            a, b = vector[i], vector[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(h, block):
        kernel = block["attention"]["qkv"]["kernel"]  # (D, heads of q, then of k, then of v, K)
        q_kernel, k_kernel, v_kernel = np.split(kernel, [c.heads, c.heads + kv_heads], axis=1)
        bias = block["attention"].get("qkv_bias", np.zeros(kernel.shape[1:]))
        q_bias, k_bias, v_bias = np.split(bias, [c.heads, c.heads + kv_heads])
        q = heads_of(h, q_kernel, q_bias, block["attention"].get("q_norm"))
        k = heads_of(h, k_kernel, k_bias, block["attention"].get("k_norm"))
        mixed = np.zeros((len(h), c.heads, head_dim))
        for head in range(c.heads):
            shared = head // (c.heads // kv_heads)
            v = h @ v_kernel[:, shared] + v_bias[shared]
            for i in range(len(h)):
                scores = k[: i + 1, shared] @ q[i, head] / math.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                mixed[i, head] = weights / weights.sum() @ v[: i + 1]
        return mixed.reshape(len(h), -1) @ block["attention"]["out"]["kernel"]

    def mlp(h, block):
        kernel = block["mlp"]["gate_up"]["kernel"]  # (D, 2, F)
        gate, up = h @ kernel[:, 0], h @ kernel[:, 1]
        return (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]

    logits = []
    for sequence in tokens:
        x = p["embedding"]["embedding"][sequence]
        for layer in range(c.depth):
            block = jax.tree.map(lambda w, layer=layer: w[layer], p["layers"]["block"])
            for branch, gain in ((attention, block.get("attention_norm")), (mlp, block.get("mlp_norm"))):
                h = branch(norm(x, gain), block) if c.norm_placement == "pre" else norm(branch(x, block), gain)
                x = x + math.sqrt(c.base_depth / c.depth) * h
        kernel = p["embedding"]["embedding"].T if c.tie_embeddings else p["head"]["kernel"]
        logits.append(norm(x, p.get("final_norm")) @ kernel * c.base_width / c.width)
    return np.array(logits)


@pytest.mark.slow
def test_logits_equal_an_independent_numpy_decoder(params, tokens, logits_of):
    expected = numpy_decoder(params, tokens, CONFIG)
    np.testing.assert_allclose(logits_of(params, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_the_numpy_decoder(name, tokens, logits_of):
    config = variant(name)
    params = initial(config)
    expected = numpy_decoder(params, tokens, config)
    np.testing.assert_allclose(logits_of(params, tokens, config=config), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_key_head", "layer_norm", "biases"])
def test_a_block_cut_at_its_projections_is_the_block(name):
    config = variant(name)
    params = jax.tree.map(lambda x: x[1], initial(config)["layers"]["block"])
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 12, 16)), jnp.float32)
    products = Products(QUANTIZED, grids_of(w=4, a=5, q=6, k=4, v=4, p=5))

    @jax.jit
    def both(params):
        step = lambda method, *args: Block(config).apply({"params": params}, *args, method=method)
        h = step(Block.before_qkv, x)
        stream = step(Block.after_out, x, step(Block.before_out, h, products), products)
        h = step(Block.before_down, step(Block.before_gate_up, stream), products)
        cut = step(Block.after_down, stream, h, products)
        return cut, Block(config).apply({"params": params}, x, products)

    cut, whole = both(params)
    np.testing.assert_allclose(cut, whole, rtol=1e-6, atol=1e-6)
    assert np.max(np.abs(whole - x)) > 0.1


def test_parameters_are_counted_as_by_hand():
    # 2 layers of 4·16² (q, k, v, out) + 3·16·24 (gate, up, down) + 2·16 (gains), and the last gain of 16.
    assert count_parameters(CONFIG) == (4432, 4432 + 2 * 31 * 16)
    for width, depth, heads, hidden in ((24, 1, 1, 64), (640, 6, 10, 1728)):
        shape = dataclasses.replace(CONFIG, width=width, depth=depth, heads=heads, mlp_width=hidden)
        non_embedding = depth * (4 * width**2 + 3 * width * hidden + 2 * width) + width
        assert count_parameters(shape) == (non_embedding, non_embedding + 2 * 31 * width)


def test_parameters_of_variants_are_counted_as_by_hand():
    mlp, grids = 3 * 16 * 24, 31 * 16
    for name, block, outer in (
        # q and out 16·(4·6), k and v 16·(2·6), gains of two norms; the one table is the head's, too
        ("grouped_queries", 2 * 16 * 24 + 2 * 16 * 12 + mlp + 2 * 16, grids),
        # one head of 4 for keys; gains of q (16) and k (4) besides
        ("one_key_head", 2 * 16 * 16 + 2 * 16 * 4 + mlp + 2 * 16 + 16 + 4, 2 * grids),
        ("layer_norm", 4 * 16 * 16 + mlp, grids),
        ("head_norm", 2 * 16 * 40 + 2 * 16 * 20 + mlp + 2 * 16 + 10 + 10, 2 * grids),
    ):
        non_embedding = 2 * block + (0 if name == "layer_norm" else 16)
        config = variant(name)
        assert count_parameters(config) == (non_embedding, non_embedding + outer), name
        # The head's product costs the same where its kernel is the embedding's.
        attention = 12 * 2 * 4 * config.head_dim * 12
        assert training_flops_per_token(config) == 6 * (non_embedding + grids) + attention, name


def test_training_flops_are_counted_as_by_hand():
    # 6 × (4432 + head 31·16) + 12 × 2 layers × width 16 × length 12.
    assert training_flops_per_token(CONFIG) == 6 * (4432 + 496) + 12 * 2 * 16 * 12


def test_a_future_token_changes_no_earlier_logit(params, tokens, logits_of):
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    before, after = logits_of(params, tokens), logits_of(params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.any(before[:, 7:] != after[:, 7:], axis=-1))


def test_rotary_scores_depend_on_the_distance_of_positions_alone():
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=8), (1, 9, 1, 8)).astype(np.float32) for _ in range(2))
    rotated_q, rotated_k = (np.asarray(decoder.rotary(jnp.asarray(x), 10_000.0))[0, :, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(scores[0]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(rotated_q, axis=-1), np.linalg.norm(q[0, 0, 0]), rtol=1e-5)
    np.testing.assert_allclose(rotated_q[0], q[0, 0, 0])


def test_rms_norm_of_a_case_worked_by_hand():
    x = jnp.array([[3.0, 4.0]])  # mean square 12.5
    y = decoder.RMSNorm(0.0).apply({"params": {"scale": jnp.array([1.0, 2.0])}}, x)
    np.testing.assert_allclose(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-6)
    # In bfloat16 the sum is still made in float32.
    wide = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    norm = decoder.RMSNorm(0.0).apply({"params": {"scale": jnp.ones(4096)}}, wide)
    assert norm.dtype == jnp.bfloat16 and np.all(np.asarray(norm, np.float32) == 1)


@pytest.mark.slow
def test_the_high_precision_member_of_a_quantized_program_has_the_unquantized_logits(params, tokens, logits_of):
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        plain = logits_of(params, tokens, config=config)
        member = logits_of(params, tokens, grids_of(), config=config, static=QUANTIZED)
        assert plain.dtype == jnp.float32
        np.testing.assert_array_equal(plain, member)


def test_every_operand_changes_the_logits_when_it_alone_is_quantized(params, tokens, logits_of):
    plain = logits_of(params, tokens, grids_of(), static=QUANTIZED)
    seen = []
    for name in operands.OPERANDS:
        coarse = logits_of(params, tokens, grids_of(**{name: 3}), static=QUANTIZED)
        fine = logits_of(params, tokens, grids_of(**{name: 12}), static=QUANTIZED)
        assert np.max(np.abs(coarse - plain)) > 5 * np.max(np.abs(fine - plain)) > 0, name
        seen.append(np.asarray(coarse))
    assert all(np.any(seen[i] != seen[j]) for i in range(6) for j in range(i))


def test_embedding_head_and_norms_are_never_quantized(params, tokens, logits_of):
    # With all block kernels zero only embedding, last norm and head are left.
    silent = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}
    grids = grids_of(**dict.fromkeys(operands.OPERANDS, 2))
    coarse = logits_of(silent, tokens, grids, static=QUANTIZED)
    np.testing.assert_array_equal(coarse, logits_of(silent, tokens))
    np.testing.assert_allclose(coarse, numpy_decoder(silent, tokens, CONFIG), rtol=1e-5, atol=1e-5)


def test_weights_on_their_grid_give_the_logits_of_quantized_weights(params, tokens, logits_of):
    def on_grid(path, kernel):
        if path[-1].key != "kernel":
            return kernel
        absmax = np.max(np.abs(kernel), axis=1, keepdims=True)  # axis 0 is the layer, axis 1 the input
        return np.rint(kernel / (absmax / 3)) * (absmax / 3)

    by_hand = {
        **params,
        "layers": jax.tree_util.tree_map_with_path(on_grid, jax.tree.map(np.asarray, params["layers"])),
    }
    quantized = logits_of(params, tokens, grids_of(w=3), static=QUANTIZED)
    np.testing.assert_allclose(quantized, logits_of(by_hand, tokens), rtol=1e-4, atol=1e-4)


def test_depth_mup_multipliers():
    wide = dataclasses.replace(CONFIG, width=32, depth=4, base_width=8, base_depth=1)
    assert wide.logit_scale == 0.25
    assert wide.residual_scale == 0.5
    assert dataclasses.replace(wide, parametrization="completep").residual_scale == 0.25
    at_base = dataclasses.replace(CONFIG, base_width=16, base_depth=2)
    assert at_base.logit_scale == at_base.residual_scale == 1.0


def test_initial_weights_have_the_variances_that_mup_asks_for(params):
    block = params["layers"]["block"]
    for kernel, fan_in in (
        (block["attention"]["qkv"]["kernel"], 16),
        (block["attention"]["out"]["kernel"], 16),
        (block["mlp"]["gate_up"]["kernel"], 16),
        (block["mlp"]["down"]["kernel"], 24),
        (params["head"]["kernel"], 8),  # of the base width: the logits' multiplier does the rest
        (params["embedding"]["embedding"], 1),
    ):
        assert np.std(kernel) == pytest.approx(1 / math.sqrt(fan_in), rel=0.1)
    first, second = np.asarray(block["attention"]["qkv"]["kernel"])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.15  # layers do not start as copies


def test_layer_norm_of_a_case_worked_by_hand():
    y = decoder.LayerNorm(0.0).apply({}, jnp.array([[1.0, 3.0], [10.0, 12.0]]))
    np.testing.assert_allclose(y, [[-1, 1], [-1, 1]], rtol=1e-6)


@pytest.mark.slow
def test_shared_keys_and_values_are_quantized_once(tokens, logits_of):
    """Two key heads, each written twice, are four: rounding must give each copy what it gives the one."""
    config = variant("grouped_queries")
    params = initial(config)
    qkv = np.asarray(params["layers"]["block"]["attention"]["qkv"]["kernel"])
    q, k, v = np.split(qkv, [4, 6], axis=2)
    written_out = np.concatenate([q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)], axis=2)
    repeated = jax.tree.map(lambda x: written_out if x.shape == qkv.shape else x, params)
    full = dataclasses.replace(config, kv_heads=0)
    grids = grids_of(q=5, k=4, v=4, p=6)
    shared = logits_of(params, tokens, grids, config=config, static=QUANTIZED)
    # A value on a rounding boundary may go either way.
    np.testing.assert_allclose(
        shared, logits_of(repeated, tokens, grids, config=full, static=QUANTIZED), rtol=1e-3, atol=1e-3
    )
    plain = logits_of(params, tokens, grids_of(), config=config, static=QUANTIZED)
    assert np.max(np.abs(shared - plain)) > 0.05


@pytest.mark.slow
def test_a_tied_head_starts_with_logits_of_order_one(tokens, logits_of):
    config = dataclasses.replace(variant("grouped_queries"), base_width=16)
    assert 0.5 < np.std(logits_of(initial(config), tokens, config=config)) < 2


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient(params, tokens):
    def loss(params, remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        logits = Decoder(config, QUANTIZED).apply({"params": params}, tokens[:, :-1], grids_of(w=4, a=6, k=4, v=4))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    grads = jax.jit(jax.grad(loss), static_argnums=1)
    kept = grads(params, "none")
    for remat in ("dots", "full"):
        for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(grads(params, remat)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_recomputing_more_keeps_less_in_memory():
    tokens_BxS1 = jax.ShapeDtypeStruct((4, 129), jnp.int32)

    def temporary_bytes(remat):
        config = dataclasses.replace(CONFIG, width=64, mlp_width=192, depth=8, sequence_length=128, remat=remat)
        params = jax.eval_shape(lambda: initial(config))

        def loss(params, tokens):
            logits = Decoder(config, QUANTIZED).apply({"params": params}, tokens[:, :-1], grids_of(w=4, a=6, k=4, v=4))
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        compiled = jax.jit(jax.grad(loss)).lower(params, tokens_BxS1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    everything, dots, blocks = (temporary_bytes(remat) for remat in ("none", "dots", "full"))
    assert everything > 2 * dots > 2.5 * blocks
