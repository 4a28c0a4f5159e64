"""The decoder against a NumPy decoder written from its description, and what a causal transformer must have."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling import model as model_lib
from precision_scaling import quantize
from precision_scaling.formats import parse
from precision_scaling.model import Decoder, ModelConfig
from precision_scaling.quantize import Operand, Program

pytestmark = pytest.mark.usefixtures("quick_compile")

# base_width and base_depth differ from width and depth: every depth-µP multiplier is then something else than 1.
CONFIG = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, hidden=24, sequence_length=12, base_width=8, base_depth=1
)
QUANTIZED = Program(
    tuple((name, Operand(parse("int4").kind, "channel" if name == "w" else "tensor")) for name in "waqkvp")
)


def table_of(**bits):
    return {name: parse(bits.get(name, 16)).grid() for name in quantize.OPERANDS}


@pytest.fixture(scope="module")
def params():
    found = jax.jit(functools.partial(model_lib.init, CONFIG))(jax.random.key(3))
    # Gains away from 1, so that a norm that forgets them shows.
    gains = iter(range(100))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * (1 + 0.1 * math.sin(next(gains))) if path[-1].key == "scale" else x, found
    )


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def logits_of():
    @functools.partial(jax.jit, static_argnames=("config", "program"))
    def compute(params, tokens, table=None, config=CONFIG, program=quantize.UNQUANTIZED):
        return Decoder(config, program).apply({"params": params}, tokens, table)

    return compute


def numpy_decoder(params, tokens, c):
    """The forward pass in float64, loop by loop, from the formulas of the Transformer++ alone."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head_dim = c.width // c.heads

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * gain

    def rotate(vector, position):
        out = vector.copy()
        half = head_dim // 2
        for i in range(half):
            angle = position * c.rope_theta ** (-2 * i / head_dim)
            a, b = vector[i], vector[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    logits = []
    for sequence in tokens:
        x = p["embedding"]["embedding"][sequence]
        for layer in range(c.depth):
            block = jax.tree.map(lambda w, layer=layer: w[layer], p["layers"]["block"])
            h = norm(x, block["attention_norm"]["scale"])
            kernel = block["attention"]["qkv"]["kernel"]  # (D, 3, H, K)
            mixed = np.zeros((len(sequence), c.heads, head_dim))
            for head in range(c.heads):
                q, k, v = (h @ kernel[:, part, head] for part in range(3))
                q = np.array([rotate(row, i) for i, row in enumerate(q)])
                k = np.array([rotate(row, i) for i, row in enumerate(k)])
                for i in range(len(sequence)):
                    scores = k[: i + 1] @ q[i] / math.sqrt(head_dim)
                    weights = np.exp(scores - scores.max())
                    mixed[i, head] = weights / weights.sum() @ v[: i + 1]
            branch = mixed.reshape(len(sequence), -1) @ block["attention"]["out"]["kernel"]
            x = x + math.sqrt(c.base_depth / c.depth) * branch
            h = norm(x, block["mlp_norm"]["scale"])
            kernel = block["mlp"]["gate_up"]["kernel"]  # (D, 2, F)
            gate, up = h @ kernel[:, 0], h @ kernel[:, 1]
            branch = (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
            x = x + math.sqrt(c.base_depth / c.depth) * branch
        x = norm(x, p["final_norm"]["scale"])
        logits.append(x @ p["head"]["kernel"] * c.base_width / c.width)
    return np.array(logits)


def test_logits_equal_an_independent_numpy_decoder(params, tokens, logits_of):
    expected = numpy_decoder(params, tokens, CONFIG)
    np.testing.assert_allclose(logits_of(params, tokens), expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_counted_as_by_hand():
    # 2 layers of 4·16² (q, k, v, out) + 3·16·24 (gate, up, down) + 2·16 (gains), and the last gain of 16.
    assert model_lib.count_parameters(CONFIG) == (4432, 4432 + 2 * 31 * 16)
    for width, depth, heads, hidden in ((24, 1, 1, 64), (640, 6, 10, 1728)):
        shape = dataclasses.replace(CONFIG, width=width, depth=depth, heads=heads, hidden=hidden)
        non_embedding = depth * (4 * width**2 + 3 * width * hidden + 2 * width) + width
        assert model_lib.count_parameters(shape) == (non_embedding, non_embedding + 2 * 31 * width)


def test_training_flops_are_counted_as_by_hand():
    # 6 × (4432 + head 31·16) + 12 × 2 layers × width 16 × length 12.
    assert model_lib.training_flops_per_token(CONFIG) == 6 * (4432 + 496) + 12 * 2 * 16 * 12


def test_a_future_token_changes_no_earlier_logit(params, tokens, logits_of):
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % CONFIG.vocab_size
    before, after = logits_of(params, tokens), logits_of(params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.any(before[:, 7:] != after[:, 7:], axis=-1))


def test_rotary_scores_depend_on_the_distance_of_positions_alone():
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=8), (1, 9, 1, 8)).astype(np.float32) for _ in range(2))
    rotated_q, rotated_k = (np.asarray(model_lib.rotary(jnp.asarray(x), 10_000.0))[0, :, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(scores[0]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(rotated_q, axis=-1), np.linalg.norm(q[0, 0, 0]), rtol=1e-5)
    np.testing.assert_allclose(rotated_q[0], q[0, 0, 0])


def test_rms_norm_of_a_case_worked_by_hand():
    x = jnp.array([[3.0, 4.0]])  # mean square 12.5
    y = model_lib.RMSNorm(0.0).apply({"params": {"scale": jnp.array([1.0, 2.0])}}, x)
    np.testing.assert_allclose(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-6)
    # In bfloat16 the sum is still made in float32.
    wide = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    norm = model_lib.RMSNorm(0.0).apply({"params": {"scale": jnp.ones(4096)}}, wide)
    assert norm.dtype == jnp.bfloat16 and np.all(np.asarray(norm, np.float32) == 1)


def test_cross_entropy_of_a_case_worked_by_hand():
    # The last one neither overflows nor loses the small term.
    logits = jnp.array([[np.log([0.5, 0.25, 0.25]), np.log([1.0, 3.0, 4.0]), [1000.0, 0.0, 0.0]]])
    losses = jax.jit(model_lib.cross_entropy)(logits, jnp.array([[0, 1, 1]]))
    np.testing.assert_allclose(losses, [[math.log(2), math.log(8 / 3), 1000.0]], rtol=1e-6)


def test_the_high_precision_member_of_a_quantized_program_has_the_unquantized_logits(params, tokens, logits_of):
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, dtype=dtype)
        plain = logits_of(params, tokens, config=config)
        member = logits_of(params, tokens, table_of(), config=config, program=QUANTIZED)
        assert plain.dtype == jnp.float32
        np.testing.assert_array_equal(plain, member)


def test_every_operand_changes_the_logits_when_it_alone_is_quantized(params, tokens, logits_of):
    plain = logits_of(params, tokens, table_of(), program=QUANTIZED)
    seen = []
    for name in quantize.OPERANDS:
        coarse = logits_of(params, tokens, table_of(**{name: 3}), program=QUANTIZED)
        fine = logits_of(params, tokens, table_of(**{name: 12}), program=QUANTIZED)
        assert np.max(np.abs(coarse - plain)) > 5 * np.max(np.abs(fine - plain)) > 0, name
        seen.append(np.asarray(coarse))
    assert all(np.any(seen[i] != seen[j]) for i in range(6) for j in range(i))


def test_embedding_head_and_norms_are_never_quantized(params, tokens, logits_of):
    # With all block kernels zero only embedding, last norm and head are left.
    silent = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}
    table = table_of(**dict.fromkeys(quantize.OPERANDS, 2))
    coarse = logits_of(silent, tokens, table, program=QUANTIZED)
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
    quantized = logits_of(params, tokens, table_of(w=3), program=QUANTIZED)
    np.testing.assert_allclose(quantized, logits_of(by_hand, tokens), rtol=1e-4, atol=1e-4)


def test_depth_mup_multipliers():
    wide = dataclasses.replace(CONFIG, width=32, depth=4, base_width=8, base_depth=1)
    assert wide.logit_scale == 0.25
    assert wide.residual_scale == 0.5
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


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient(params, tokens):
    def loss(params, remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        logits = Decoder(config, QUANTIZED).apply({"params": params}, tokens[:, :-1], table_of(w=4, a=6, k=4, v=4))
        return jnp.mean(model_lib.cross_entropy(logits, tokens[:, 1:]))

    grads = jax.jit(jax.grad(loss), static_argnums=1)
    for kept, recomputed in zip(
        jax.tree.leaves(grads(params, False)), jax.tree.leaves(grads(params, True)), strict=True
    ):
        np.testing.assert_allclose(kept, recomputed, rtol=1e-5, atol=1e-7)
