"""AdamW and depth-µP against formulas written out in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model.config import ModelConfig
from precision_scaling.training import optimizer
from precision_scaling.training.optimizer import OptimizerConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=5, width=16, depth=8, heads=2, mlp_width=24, sequence_length=4, base_width=4, base_depth=2
)
CONFIG = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)

update = jax.jit(optimizer.update, static_argnums=(0, 1))


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


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_updates_equal_adamw_written_out(clip_norm):
    config = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, clip_norm, 0.1)
    rng = np.random.default_rng(0)
    params = tree(rng)
    state = optimizer.init(config, params)
    expected = named(params)
    first = dict.fromkeys(LEAVES, 0.0)
    second = dict.fromkeys(LEAVES, 0.0)
    for t, (size, rate) in enumerate([(1.0, 0.1), (0.01, 0.2), (30.0, 0.05), (1.0, 0.0), (0.3, 0.1)], start=1):
        grads = tree(rng, size)
        params, state = update(config, MODEL, grads, state, params, rate)
        grads = named(grads)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, (decayed, multiplier) in LEAVES.items():
            g = grads[name] * shrink
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            direction = (first[name] / (1 - 0.9**t)) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-15)
            decay = 0.1 * expected[name] if decayed else 0.0
            expected[name] = expected[name] - rate * multiplier * (direction + decay)
    for name, value in named(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_weight_decay_shrinks_matrices_alone_when_gradients_vanish():
    params = tree(np.random.default_rng(1))
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = update(CONFIG, MODEL, zero, optimizer.init(CONFIG, params), params, 0.5)
    before = named(params)
    for name, value in named(after).items():
        decayed, multiplier = LEAVES[name]
        np.testing.assert_allclose(value, before[name] * (1 - 0.5 * multiplier * 0.1 * decayed), rtol=1e-6)


def test_rates_scale_with_width_and_depth_in_the_blocks_kernels_alone():
    found = {name: float(value) for name, value in named(optimizer.rate_multipliers(tree(np.random), MODEL)).items()}
    assert found == {name: multiplier for name, (_, multiplier) in LEAVES.items()}
