"""Whether a learning rate carries over between widths and depths: validation loss against peak rate, and the best one.

    python -m benchmarks.rate_transfer [--shapes=32x2,32x8,32x16] [--parametrizations=depth_mup,completep,standard]
        [--optimizer=muon]

The base has width 32 and depth 2, where all parametrizations are one. Runs of one shape train together, at all rates
and seeds. Printed: the mean loss at each rate, the rate at the minimum of a parabola in log(rate) through the least
loss and its neighbours, and in brackets the least and the largest such rate of a single seed.

Twenty minutes on two CPU cores.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import coordinate_check
from benchmarks.coordinate_check import BASE_DEPTH, BASE_WIDTH, BATCH, SEQUENCE
from precision_scaling.config import base
from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import prepare
from precision_scaling.errors import UserError
from precision_scaling.model.config import PARAMETRIZATIONS, ModelConfig
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import cli, compilation
from precision_scaling.training import optimizer, schedule
from precision_scaling.training import step as step_lib
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import RunInputs, StepConfig

NAMES = (*PARAMETRIZATIONS, "standard")

FLAGS = flags.FlagValues()
_SHAPES = flags.DEFINE_list("shapes", "32x2,32x8,32x16", "WIDTHxDEPTH, with commas between them.", flag_values=FLAGS)
_PARAMETRIZATIONS = flags.DEFINE_list("parametrizations", ",".join(NAMES), f"Of {', '.join(NAMES)}.", flag_values=FLAGS)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", optimizer.NAMES, "What trains.", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of each run, of 512 tokens.", lower_bound=10, flag_values=FLAGS)
_SEEDS = flags.DEFINE_integer("seeds", 2, "Initializations of each run.", lower_bound=1, flag_values=FLAGS)
_POWERS = flags.DEFINE_list("powers", "-11,-10,-9,-8,-7,-6,-5", "Rates, as powers of 2.", flag_values=FLAGS)


def losses(config: ModelConfig, loader: Loader, rates: np.ndarray, seeds: int, steps: int, name: str) -> np.ndarray:
    """Validation loss at each rate with each seed, (rates, seeds); all of them train at once."""
    adamw = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1, name=name)
    step_config = StepConfig(config, UNQUANTIZED, adamw)
    schedules = [schedule.of("cosine", rate, steps, steps // 10, 0) for rate in np.repeat(rates, seeds)]
    inputs = RunInputs({}, jax.tree.map(lambda *lanes: np.stack(lanes), *schedules))
    tokens_TxBxS1 = jnp.asarray(loader.windows(loader.window_indices(0, 0, steps)).astype(np.int32))
    held_out_NxBxS1 = jnp.asarray(loader.validation_windows(128).reshape(4, 32, -1).astype(np.int32))

    def train(seeds_R):
        state = jax.vmap(functools.partial(step_lib.init_state, step_config))(seeds_R)
        fetch = lambda t: jnp.broadcast_to(tokens_TxBxS1[t], (len(seeds_R), *tokens_TxBxS1.shape[1:]))
        state, _ = step_lib.train_chunk(step_config, state, inputs, fetch, steps, steps)
        return jax.vmap(lambda params: step_lib.validation_loss(step_config, params, {}, held_out_NxBxS1))(state.params)

    found = compilation.jit(train)(np.tile(np.arange(seeds), len(rates)))
    return np.asarray(found, np.float64).reshape(-1, seeds)


def best_rate(rates: np.ndarray, found: np.ndarray) -> float | None:
    """Where the parabola in log(rate) through the least loss and its neighbours has its minimum; None where the least
    loss is at an end."""
    i = int(np.argmin(np.where(np.isfinite(found), found, np.inf)))
    if i in (0, len(rates) - 1) or not np.isfinite(found[i - 1 : i + 2]).all():
        return None
    a, b, _ = np.polyfit(np.log2(rates[i - 1 : i + 2]), found[i - 1 : i + 2], 2)
    return float(2 ** (-b / (2 * a)))


def in_words(rates: np.ndarray, found: np.ndarray) -> str:
    """The best rate of the means, and those of the seeds."""
    show = lambda rate: "none inside" if rate is None else f"{rate:.2e}"
    own = [best_rate(rates, one) for one in found.T]
    inside = [rate for rate in own if rate is not None]
    spread = f"[{min(inside):.2e}, {max(inside):.2e}]" if len(inside) == len(own) else "[none inside]"
    return f"{show(best_rate(rates, found.mean(axis=1)))} {spread}"


def _shapes(texts: list[str]) -> list[tuple[int, int]]:
    try:
        shapes = [(int(width), int(depth)) for width, depth in (text.split("x") for text in texts)]
    except ValueError:
        shapes = []
    if not shapes or any(width < BASE_WIDTH or width % BASE_WIDTH or depth < 1 for width, depth in shapes):
        raise UserError(f"--shapes={','.join(texts)}: allowed are WIDTHxDEPTH, widths multiples of {BASE_WIDTH}")
    return shapes


def main() -> None:
    shapes, names = _shapes(_SHAPES.value), _PARAMETRIZATIONS.value
    if not set(names) <= set(NAMES):
        raise UserError(f"--parametrizations={','.join(names)}: allowed are {', '.join(NAMES)}")
    rates = np.exp2(np.asarray(_POWERS.value, np.float32))
    config = base.get_config()
    compilation.use_cache(config.compilation_cache)
    loader = Loader(prepare(**config.data), SEQUENCE, BATCH)
    print(f"{_OPTIMIZER.value}, {_STEPS.value} steps of {SEQUENCE * BATCH} tokens, {_SEEDS.value} seeds")
    print(
        f"{'width, depth':>22} " + " ".join(f"{f'2^{float(p):g}':>7}" for p in _POWERS.value) + "  best rate [by seed]"
    )
    for width, depth in shapes:
        at_base = (width, depth) == (BASE_WIDTH, BASE_DEPTH)
        for name in names[:1] if at_base else names:
            shape = (width, depth, name != "standard", "depth_mup" if name == "standard" else name)
            model = coordinate_check.decoder(*shape)
            found = losses(model, loader, rates, _SEEDS.value, _STEPS.value, _OPTIMIZER.value)
            text = " ".join(f"{loss:>7.3f}" for loss in found.mean(axis=1))
            label = f"{width}, {depth}, {'base' if at_base else name}"
            print(f"{label:>22} {text}  {in_words(rates, found)}", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
