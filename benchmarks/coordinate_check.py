"""Depth-µP shown at work: activations that keep their size at any width and depth, and a best rate that stays put.

    python -m benchmarks.coordinate_check [--out=docs/coordinate_check.png] [--notransfer]

Coordinate check (Yang et al. 2022, arXiv 2203.03466, appendix D.1): root mean square of the residual stream after the
last layer, of the attention logits and of the logits, on held-out text, after t = 0 to 10 steps of AdamW at one rate.
`scaled` is the project's parametrization with its base at width 32 and depth 2; `standard` has its base at every
model's own size, so that nothing is scaled. Printed: the power of width (or depth) with which each grows, of the
activations and of their change since t = 0.
Transfer test: validation loss against peak rate at four times the base's width and at four times its depth, and where
its minimum lies.

Three minutes on two CPU cores for the check, fifteen for the transfer test.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from precision_scaling.config import base
from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import prepare
from precision_scaling.model import sizes
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block, Decoder
from precision_scaling.quantize import aqt
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import cli, compilation, files
from precision_scaling.training import optimizer, schedule
from precision_scaling.training import step as step_lib
from precision_scaling.training.step import RunInputs, StepConfig

FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string("out", "docs/coordinate_check.png", "The figure.", flag_values=FLAGS)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Initializations that the check averages over; the transfer test has two.", flag_values=FLAGS
)
_RATE = flags.DEFINE_float("rate", 4e-3, "Learning rate of the coordinate check.", flag_values=FLAGS)
_TRANSFER = flags.DEFINE_bool("transfer", True, "Whether to do the transfer test.", flag_values=FLAGS)
_TRANSFER_STEPS = flags.DEFINE_integer(
    "transfer_steps", 300, "Steps of each run of the transfer test.", flag_values=FLAGS
)

BASE_WIDTH, BASE_DEPTH, HEAD, SEQUENCE, BATCH, STEPS = 32, 2, 16, 64, 8, 10
WIDTHS, DEPTHS = (32, 64, 128, 256), (2, 4, 8, 16)
RATES = tuple(2.0**k for k in range(-11, -4))  # of the transfer test
TRANSFER = ((32, 2, True), (128, 2, True), (128, 2, False), (32, 8, True), (32, 8, False))  # the base first
SHOWN = (0, 1, 3, 10)  # steps in the figure
QUANTITIES = ("residual stream", "attention logits", "logits", "learned logits")
DRAWN = QUANTITIES[:3]
ADAMW = optimizer.OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)


def decoder(width: int, depth: int, scaled: bool) -> ModelConfig:
    """A decoder with heads of one size, at the project's parametrization or the standard one."""
    return ModelConfig(
        vocab_size=257,
        width=width,
        depth=depth,
        heads=width // HEAD,
        mlp_width=sizes.mlp_width_of(width, 8),
        sequence_length=SEQUENCE,
        base_width=BASE_WIDTH if scaled else width,
        base_depth=BASE_DEPTH if scaled else depth,
    )


def activations(config: ModelConfig, params, initial_head, tokens_BxS) -> tuple[jax.Array, ...]:
    """`QUANTITIES`: (B, S, D), (L, B, H, S, S) with zeros in the future, (B, S, V) twice.

    Learned logits are those by what has been added to the initial head: that alone, which is random, gives logits that
    fall with the root of the width by design.
    """
    apply, exact = functools.partial(Decoder(config).apply, {"params": params}), Products()

    def layer(x_BxSxD, block):
        seen = {}
        with aqt.observed(lambda name, x, x_q, saturated: seen.update({name: x})):
            x_BxSxD = Block(config).apply({"params": block}, x_BxSxD, exact)
        return x_BxSxD, jnp.tril(jnp.einsum("blhk,bmhk->bhlm", seen["q"], seen["k"]))

    x_BxSxD, scores_LxBxHxSxS = jax.lax.scan(layer, apply(tokens_BxS, exact, method="embed"), params["layers"]["block"])
    logits_BxSxV = apply(x_BxSxD, exact, method="unembed")
    initial_BxSxV = Decoder(config).apply(
        {"params": {**params, "head": initial_head}}, x_BxSxD, exact, method="unembed"
    )
    return x_BxSxD, scores_LxBxHxSxS, logits_BxSxV, logits_BxSxV - initial_BxSxV


def rms(x) -> jax.Array:
    """Over the elements that are not zero."""
    return jnp.sqrt(jnp.sum(jnp.square(x)) / jnp.maximum(jnp.sum(x != 0), 1))


def coordinates(config: ModelConfig, tokens_TxBxS1, probe_BxS) -> np.ndarray:
    """Sizes of `QUANTITIES` and of their changes since t = 0, after each step: (2, T + 1, 4), means over the seeds."""
    step_config = StepConfig(config, UNQUANTIZED, ADAMW)
    constant = schedule.of("constant", _RATE.value, 1000, 1, 0)

    def trajectory(seed):
        state = step_lib.init_state(step_config, seed)
        head = state.params["head"]
        start = activations(config, state.params, head, probe_BxS)

        def look(state):
            now = activations(config, state.params, head, probe_BxS)
            sizes_now = jnp.stack([rms(x) for x in now])
            return jnp.stack([sizes_now, jnp.stack([rms(x - x0) for x, x0 in zip(now, start, strict=True)])])

        def step(state, tokens):
            state, _ = step_lib.train_step(step_config, state, RunInputs({}, constant), tokens)
            return state, look(state)

        _, found = jax.lax.scan(step, state, tokens_TxBxS1)
        return jnp.concatenate([look(state)[None], found])

    found = compilation.jit(jax.vmap(trajectory))(jnp.arange(_SEEDS.value))
    return np.asarray(found, np.float64).mean(axis=0).swapaxes(0, 1)


def power(sizes_: tuple[int, ...], values) -> float:
    """p of values ~ size^p, by least squares."""
    return float(np.polyfit(np.log(sizes_), np.log(values), 1)[0])


def check(loader: Loader):
    """The coordinate check: {(axis, scaled): (2, sizes, T + 1, 4)}, printed as powers."""
    tokens_TxBxS1 = jnp.asarray(loader.windows(loader.window_indices(0, 0, STEPS)).astype(np.int32))
    probe_BxS = jnp.asarray(loader.validation_windows(BATCH)[:, :-1].astype(np.int32))
    measured = functools.cache(lambda *shape: coordinates(decoder(*shape), tokens_TxBxS1, probe_BxS))
    found = {}
    print(f"{'':>18} {'power of the activation':^50} {'power of its change since t = 0':^67}")
    print(f"{'at t = 10':>18} " + " ".join(f"{name:>16}" for name in DRAWN + QUANTITIES))
    for axis, values in (("width", WIDTHS), ("depth", DEPTHS)):
        for scaled in (True, False):
            shapes = [(v, BASE_DEPTH, scaled) if axis == "width" else (BASE_WIDTH, v, scaled) for v in values]
            all_ = np.stack([measured(*shape) for shape in shapes], axis=1)
            found[axis, scaled] = all_
            powers = [power(values, all_[0, :, -1, q]) for q in range(len(DRAWN))]
            powers += [power(values, all_[1, :, -1, q]) for q in range(len(QUANTITIES))]
            name = f"{axis}, {'scaled' if scaled else 'standard'}"
            print(f"{name:>18} " + " ".join(f"{p:>+16.2f}" for p in powers), flush=True)
    return found


def draw(found, path: str) -> None:
    """A row for each axis and parametrization, a column for each quantity, a line for each step."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.0, 9.6), layout="constrained")
    panels = drawing.subplots(4, 3)
    for row, ((axis, scaled), all_) in enumerate(found.items()):
        values = WIDTHS if axis == "width" else DEPTHS
        for q, name in enumerate(DRAWN):
            panel = panels[row, q]
            for i, t in enumerate(SHOWN):
                colour = f"C{i}"
                panel.plot(values, all_[0, :, t, q], "o-", color=colour, markersize=4, label=f"t = {t}")
                if t:
                    panel.plot(values, all_[1, :, t, q], ":", color=colour, linewidth=1.2)
            panel.set(xscale="log", yscale="log", xticks=values, xlabel=axis)
            panel.set_xticklabels(map(str, values))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.set_title(f"{name}, {'depth-µP' if scaled else 'standard'}", fontsize="medium")
            both = np.stack([found[axis, True], found[axis, False]])[:, :, :, SHOWN, q]
            panel.set_ylim(both[both > 0].min() / 1.3, both.max() * 1.3)
        panels[row, 0].set_ylabel("root mean square")
    panels[0, 0].legend(fontsize="x-small")
    drawing.suptitle("Activations (–) and their change since t = 0 (···) after t steps", fontsize="medium")
    with files.replacing(Path(path)) as file:
        drawing.savefig(file, format=Path(path).suffix.removeprefix(".") or "png", dpi=72)


def losses(config: ModelConfig, loader: Loader) -> np.ndarray:
    """Validation loss at each of `RATES`, mean over two seeds; all of them train at once."""
    step_config, steps, seeds = StepConfig(config, UNQUANTIZED, ADAMW), _TRANSFER_STEPS.value, 2
    rates = np.repeat(np.asarray(RATES, np.float32), seeds)
    schedules = [schedule.of("cosine", rate, steps, steps // 10, 0) for rate in rates]
    inputs = RunInputs({}, jax.tree.map(lambda *lanes: np.stack(lanes), *schedules))
    tokens_TxBxS1 = jnp.asarray(loader.windows(loader.window_indices(0, 0, steps)).astype(np.int32))
    held_out_NxBxS1 = jnp.asarray(loader.validation_windows(128).reshape(4, 32, -1).astype(np.int32))

    def train(seeds_R):
        state = jax.vmap(functools.partial(step_lib.init_state, step_config))(seeds_R)
        fetch = lambda t: jnp.broadcast_to(tokens_TxBxS1[t], (len(rates), *tokens_TxBxS1.shape[1:]))
        state, _ = step_lib.train_chunk(step_config, state, inputs, fetch, steps, steps)
        return jax.vmap(lambda params: step_lib.validation_loss(step_config, params, {}, held_out_NxBxS1))(state.params)

    found = compilation.jit(train)(np.tile(np.arange(seeds), len(RATES)))
    return np.asarray(found, np.float64).reshape(-1, seeds).mean(axis=1)


def best_rate(found: np.ndarray) -> str:
    """Where the parabola in log(rate) through the least loss and its neighbours has its minimum; a bound, where the
    least loss is at an end of `RATES`."""
    i = int(np.argmin(found))
    if i in (0, len(RATES) - 1):
        return f"{'<' if i == 0 else '>'} {RATES[i]:.1e}"
    a, b, _ = np.polyfit(np.log2(RATES[i - 1 : i + 2]), found[i - 1 : i + 2], 2)
    return f"{2 ** (-b / (2 * a)):.2e}"


def transfer(loader: Loader, shapes=TRANSFER) -> None:
    """Prints the transfer test's table for shapes of (width, depth, whether it is scaled)."""
    print(f"\n{'width, depth':>18} " + " ".join(f"{f'2^{np.log2(rate):.0f}':>8}" for rate in RATES) + "    best rate")
    for width, depth, scaled in shapes:
        found = losses(decoder(width, depth, scaled), loader)
        name = "base" if (width, depth) == (BASE_WIDTH, BASE_DEPTH) else "scaled" if scaled else "standard"
        text = " ".join(f"{loss:>8.3f}" for loss in found)
        print(f"{f'{width}, {depth}, {name}':>18} {text}     {best_rate(found)}", flush=True)


def main() -> None:
    config = base.get_config()
    compilation.use_cache(config.compilation_cache)
    loader = Loader(prepare(**config.data), SEQUENCE, BATCH)
    draw(check(loader), _OUT.value)
    if _TRANSFER.value:
        transfer(loader)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
