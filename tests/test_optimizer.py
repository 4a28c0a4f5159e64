"""AdamW, Muon and depth-µP against formulas written out in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model import decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.training import optimizer
from precision_scaling.training.optimizer import OptimizerConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=5, width=16, depth=8, heads=2, mlp_width=24, sequence_length=4, base_width=4, base_depth=2
)
CONFIG = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)

update = jax.jit(optimizer.update, static_argnums=(0, 1))


def multipliers(config):
    return optimizer.rate_multipliers(config, MODEL, tree(np.random))


def tree(rng, size=1.0):
    """Parameters under the names that a decoder gives them."""
    draw = lambda *shape: (size * rng.normal(size=shape)).astype(np.float32)
    return {
        "embedding": {"embedding": draw(5, 3)},
        "layers": {"block": {"mlp": {"down": {"kernel": draw(2, 4, 3)}}, "mlp_norm": {"scale": draw(2, 3)}}},
        "final_norm": {"scale": draw(3)},
        "head": {"kernel": draw(3, 5)},
    }


# name of a leaf -> (weight decay acts on it, learning-rate multiplier at four times the base width and depth)
LEAVES = {
    "embedding/embedding": (True, 1.0),
    "layers/block/mlp/down/kernel": (True, 1 / 4 / math.sqrt(4)),
    "layers/block/mlp_norm/scale": (False, 1.0),
    "final_norm/scale": (False, 1.0),
    "head/kernel": (True, 1.0),
}


def named(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(entry.key for entry in path): np.asarray(leaf, np.float64) for path, leaf in flat}


COMPLETEP = dataclasses.replace(MODEL, parametrization="completep")
# name of a leaf -> multipliers of rate, weight decay and epsilon at four times the base width and depth (Dey et al.
# 2025, table 1): hidden weights 1 / m_N, m_N and 1 / (m_N m_L), embedding, head and last norm 1, 1 and 1 / m_N.
IN_COMPLETEP = {
    "embedding/embedding": (1, 1, 1 / 4),
    "layers/block/mlp/down/kernel": (1 / 4, 4, 1 / 16),
    "layers/block/mlp_norm/scale": (1, 1, 1 / 16),
    "final_norm/scale": (1, 1, 1 / 4),
    "head/kernel": (1, 1, 1 / 4),
}


@pytest.mark.parametrize("clip_norm, model, epsilon", [(1.0, MODEL, 1e-15), (0.0, MODEL, 0.1), (1.0, COMPLETEP, 0.1)])
def test_updates_equal_adamw_written_out(clip_norm, model, epsilon):
    config = OptimizerConfig(0.9, 0.95, epsilon, 0.1, clip_norm, 0.1)
    rng = np.random.default_rng(0)
    params = tree(rng)
    state = optimizer.init(config, model, params)
    expected = named(params)
    first = dict.fromkeys(LEAVES, 0.0)
    second = dict.fromkeys(LEAVES, 0.0)
    for t, (size, rate) in enumerate([(1.0, 0.1), (0.01, 0.2), (30.0, 0.05), (1.0, 0.0), (0.3, 0.1)], start=1):
        grads = tree(rng, size)
        params, state = update(config, model, grads, state, params, rate)
        grads = named(grads)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, (decayed, multiplier) in LEAVES.items():
            g = grads[name] * shrink
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            own_epsilon, decay = epsilon, 0.1 * decayed
            if model is COMPLETEP:
                multiplier, of_decay, of_epsilon = IN_COMPLETEP[name]
                own_epsilon, decay = epsilon * of_epsilon, decay * of_decay
            direction = (first[name] / (1 - 0.9**t)) / (np.sqrt(second[name] / (1 - 0.95**t)) + own_epsilon)
            expected[name] = expected[name] - rate * multiplier * (direction + decay * expected[name])
    for name, value in named(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_weight_decay_shrinks_matrices_alone_when_gradients_vanish():
    params = tree(np.random.default_rng(1))
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = update(CONFIG, MODEL, zero, optimizer.init(CONFIG, MODEL, params), params, 0.5)
    before = named(params)
    for name, value in named(after).items():
        decayed, multiplier = LEAVES[name]
        np.testing.assert_allclose(value, before[name] * (1 - 0.5 * multiplier * 0.1 * decayed), rtol=1e-6)


def test_rates_scale_with_width_and_depth_in_the_blocks_kernels_alone():
    found = {name: float(value) for name, value in named(multipliers(CONFIG)).items()}
    assert found == {name: multiplier for name, (_, multiplier) in LEAVES.items()}


def test_embedding_head_and_vectors_have_rates_of_their_own():
    config = dataclasses.replace(CONFIG, embedding_rate=2.0, head_rate=3.0, vector_rate=5.0)
    times = {"embedding/embedding": 2.0, "head/kernel": 3.0, "final_norm/scale": 5.0}
    times |= {"layers/block/mlp_norm/scale": 5.0, "layers/block/mlp/down/kernel": 1.0}
    found = {name: float(value) for name, value in named(multipliers(config)).items()}
    assert found == {name: multiplier * times[name] for name, (_, multiplier) in LEAVES.items()}


# The base of this one is a quarter as wide and half as deep; two queries share a key.
GROUPED = dataclasses.replace(MODEL, heads=4, kv_heads=2, head_width=4, depth=4, vocab_size=7)


def orthogonal(g):
    """Five Newton-Schulz iterations on one matrix."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def matrices(name, x):
    """The matrices (inputs, outputs) of a layer's kernel, as views."""
    if name.endswith("qkv/kernel"):
        return [x[:, part].reshape(len(x), -1) for part in (slice(0, 4), slice(4, 6), slice(6, 8))]
    return [x[:, 0], x[:, 1]] if name.endswith("gate_up/kernel") else [x]


def whole(name, parts, shape):
    """The kernel that `matrices` has cut."""
    if name.endswith("qkv/kernel"):
        return np.concatenate([part.reshape(len(part), -1, shape[-1]) for part in parts], axis=1)
    return np.stack(parts, axis=1) if name.endswith("gate_up/kernel") else parts[0]


@pytest.mark.slow
def test_updates_equal_muon_and_adamw_written_out():
    config = dataclasses.replace(CONFIG, name="muon", muon_beta=0.9, head_rate=0.5, vector_rate=2.0)
    rng = np.random.default_rng(0)
    params = decoder.init(GROUPED, jax.random.key(0))
    draw = lambda size: jax.tree.map(lambda x: (size * rng.normal(size=x.shape)).astype(np.float32), params)
    state, expected = optimizer.init(config, GROUPED, params), named(params)
    zeros = {name: np.zeros_like(x) for name, x in expected.items()}
    first, second = dict(zeros), dict(zeros)
    for t, (size, rate) in enumerate([(1.0, 0.1), (0.01, 0.2), (30.0, 0.05)], start=1):
        grads = draw(size)
        params, state = update(config, GROUPED, grads, state, params, rate)
        grads = named(grads)
        shrink = min(1.0, 1 / math.sqrt(sum((g**2).sum() for g in grads.values())))
        for name, x in expected.items():
            g = grads[name] * shrink
            first[name] = 0.9 * first[name] + 0.1 * g
            if "kernel" in name and "layers" in name:
                nesterov = 0.9 * first[name] / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
                direction = np.empty_like(x)
                for layer in range(4):
                    parts = [0.2 * math.sqrt(max(m.shape)) * orthogonal(m) for m in matrices(name, nesterov[layer])]
                    direction[layer] = whole(name, parts, x[layer].shape)
                own_rate = rate * 4**-0.5 * 2**-0.5
            else:
                second[name] = 0.95 * second[name] + 0.05 * g**2
                direction = (first[name] / (1 - 0.9**t)) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-15)
                own_rate = rate * {"embedding": 1.0, "kernel": 0.5}.get(name.split("/")[-1], 2.0)
            decay = 0.0 if "scale" in name else 0.1
            expected[name] = x - own_rate * (direction + decay * x)
    for name, value in named(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_muon_update_has_the_size_of_an_adam_update():
    config = dataclasses.replace(CONFIG, name="muon")
    params = decoder.init(GROUPED, jax.random.key(0))
    grads = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32), params)
    flat = {name: x for name, x in named(params).items() if "layers" in name and "kernel" in name}
    after, _ = update(config, GROUPED, grads, optimizer.init(config, GROUPED, params), params, 1.0)
    for name, x in flat.items():
        delta = (named(after)[name] - x * (1 - 0.1 * 4**-0.5 * 2**-0.5)) / (4**-0.5 * 2**-0.5)
        assert 0.1 < np.sqrt(np.mean(delta**2)) < 0.25, name  # 0.2 times singular values of 0.7 to 1.2


def test_the_state_and_the_products_of_muon_are_counted():
    held, flops = optimizer.cost(dataclasses.replace(CONFIG, name="muon"), GROUPED)
    parameters = {name: x.size for name, x in named(decoder.init(GROUPED, jax.random.key(0))).items()}
    kernels = sum(size for name, size in parameters.items() if "layers" in name and "kernel" in name)
    assert held == 4 * (3 * sum(parameters.values()) - kernels + 2)  # and two counts of updates
    assert optimizer.cost(CONFIG, GROUPED) == (4 * (3 * sum(parameters.values()) + 1), 0)
    # Of each layer: q and out (16 × 16), k and v (16 × 8), gate, up and down (16 × 24); X·Xᵀ, its square, and B·X.
    by_hand = 0
    for m, n, count in ((16, 16, 2), (8, 16, 2), (16, 24, 3)):
        by_hand += count * 4 * 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)
    assert flops == by_hand
