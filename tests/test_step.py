"""Steps as pure functions: microbatches, evaluation, and a batch that is spread over devices."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.training import schedule, step
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import RunInputs, StepConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, mlp_width=24, sequence_length=8, base_width=16, base_depth=2
)
OPTIMIZER = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)
WHOLE = StepConfig(MODEL, UNQUANTIZED, OPTIMIZER)
INPUTS = RunInputs(grids={}, schedule=schedule.of("cosine", 1e-3, 10, 1, 0))

initialize = jax.jit(step.init_state, static_argnums=0)
train_step = jax.jit(step.train_step, static_argnums=0)


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, 31, shape).astype(np.int32)


def test_the_seed_alone_makes_the_state():
    first, again, other = initialize(WHOLE, 0), initialize(WHOLE, 0), initialize(WHOLE, 1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernel = lambda state: np.asarray(state.params["layers"]["block"]["mlp"]["down"]["kernel"])
    assert abs(np.corrcoef(kernel(first).ravel(), kernel(other).ravel())[0, 1]) < 0.2
    assert first.step == 0 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first.params))


@pytest.mark.slow
def test_microbatches_make_the_update_of_the_full_batch():
    tokens = random_tokens(4, 9)
    parts = StepConfig(MODEL, UNQUANTIZED, OPTIMIZER, microbatches=4)
    state = initialize(WHOLE, 0)
    whole, whole_metrics = train_step(WHOLE, state, INPUTS, tokens)
    in_parts, parts_metrics = train_step(parts, state, INPUTS, tokens)
    np.testing.assert_allclose(whole_metrics, parts_metrics, rtol=1e-5)
    assert whole_metrics.rate == np.float32(1e-3) and whole.step == in_parts.step == 1
    # Adam's first step is the sign of the gradient where it isn't tiny, so a hair of rounding is all that may differ.
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(in_parts.params), strict=True):
        assert np.mean(np.abs(one - other) > 1e-6) < 0.02
    for one, other in zip(jax.tree.leaves(whole.optimizer), jax.tree.leaves(in_parts.optimizer), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7)


def test_validation_loss_is_the_mean_over_all_sequences_whatever_the_batch():
    params, tokens = initialize(WHOLE, 0).params, random_tokens(6, 9)
    loss = jax.jit(step.validation_loss, static_argnums=0)
    alone = [loss(WHOLE, params, {}, tokens[i : i + 1, None]) for i in range(6)]
    assert len({float(one) for one in alone}) == 6
    assert loss(WHOLE, params, {}, tokens.reshape(2, 3, 9)) == pytest.approx(np.mean(alone), rel=1e-6)


SHARDED = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
jax.config.update("jax_disable_most_optimizations", True)
from precision_scaling.numerics.formats import parse
from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer
from precision_scaling.training import schedule, step
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import RunInputs, StepConfig
assert jax.device_count() == 8
kind = parse("int4").kind
static = StaticPrecision(tuple((n, StaticQuantizer(kind, "channel" if n == "w" else "tensor")) for n in "wakv"))
model = ModelConfig(31, 16, 2, 2, 24, 8, 16, 2)
config = StepConfig(model, static, OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1))
grids = {n: parse("int6").grid() for n in "wakv"}
inputs = RunInputs(grids, schedule.of("cosine", 1e-3, 10, 1, 0))
train_step = jax.jit(step.train_step, static_argnums=0)
tokens = np.random.default_rng(0).integers(0, 31, (5, 8, 9)).astype(np.int32)
batch = NamedSharding(Mesh(np.array(jax.devices()), "d"), PartitionSpec("d"))
for put in (lambda x: x, lambda x: jax.device_put(x, batch)):
    state = jax.jit(step.init_state, static_argnums=0)(config, 0)
    if put(tokens[0]) is not tokens[0]:
        state = jax.device_put(state, NamedSharding(batch.mesh, PartitionSpec()))
    for t in range(5):
        state, metrics = train_step(config, state, inputs, put(tokens[t]))
        print(float(metrics.loss), end=" ")
    print()
"""


@pytest.mark.slow
def test_a_batch_spread_over_eight_devices_gives_the_same_losses():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, eight = (np.array(line.split(), float) for line in done.stdout.splitlines())
    assert one[-1] != one[0]
    np.testing.assert_allclose(eight, one, rtol=1e-4)
