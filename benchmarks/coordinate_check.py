"""Parametrizations shown at work: activations that keep their size at any width and depth.

    python -m benchmarks.coordinate_check [--parametrization=depth_mup] [--out=docs/coordinate_check.png]

Coordinate check (Yang et al. 2022, arXiv 2203.03466, appendix D.1): root mean square of the residual stream after the
last layer, of the attention logits and of the logits, on held-out text, after t = 0 to 10 steps of AdamW at one rate.
`scaled` is a parametrization of the project with its base at width 32 and depth 2; `standard` has its base at every
model's own size, so that nothing is scaled. Printed: the power of width (or depth) with which each grows, of the
activations and of their change since t = 0. Whether a rate carries over, `rate_transfer` measures.

Three minutes on two CPU cores.
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
from precision_scaling.model.config import PARAMETRIZATIONS, ModelConfig
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
_SEEDS = flags.DEFINE_integer("seeds", 3, "Initializations that it averages over.", flag_values=FLAGS)
_PARAMETRIZATION = flags.DEFINE_enum(
    "parametrization", "completep", PARAMETRIZATIONS, "That of the scaled models.", flag_values=FLAGS
)
_RATE = flags.DEFINE_float("rate", 4e-3, "Learning rate.", flag_values=FLAGS)

BASE_WIDTH, BASE_DEPTH, HEAD, SEQUENCE, BATCH, STEPS = 32, 2, 16, 64, 8, 10
WIDTHS, DEPTHS = (32, 64, 128, 256), (2, 4, 8, 16)
SHOWN = (0, 1, 3, 10)  # steps in the figure
QUANTITIES = ("residual stream", "attention logits", "logits", "learned logits")
DRAWN = QUANTITIES[:3]
ADAMW = optimizer.OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)


def decoder(width: int, depth: int, scaled: bool, parametrization: str = "completep") -> ModelConfig:
    """A decoder with heads of one size, at a parametrization of the project or, not scaled, the standard one."""
    return ModelConfig(
        vocab_size=257,
        width=width,
        depth=depth,
        heads=width // HEAD,
        mlp_width=sizes.mlp_width_of(width, 8),
        sequence_length=SEQUENCE,
        base_width=BASE_WIDTH if scaled else width,
        base_depth=BASE_DEPTH if scaled else depth,
        parametrization=parametrization,
    )


def activations(config: ModelConfig, params, initial_head, tokens_BxS) -> tuple[jax.Array, ...]:
    """`QUANTITIES`: (B, S, D), (L, B, H, S, S) with zeros in the future, (B, S, V) twice.

    Learned logits are those by what has been added to the initial head: that alone, which is random, gives logits that
    fall with the root of the width by design.
    """
    apply, exact = functools.partial(Decoder(config).apply, {"params": params}), Products()

    def layer(x_BxSxD, block):
        seen = {}
        with aqt.observed(lambda name, x, *_: seen.update({name: x})):
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


def coordinates(config: ModelConfig, tokens_TxBxS1, probe_BxS, rate: float, seeds: int) -> np.ndarray:
    """Sizes of `QUANTITIES` and of their changes since t = 0, after each step: (2, T + 1, 4), means over the seeds."""
    step_config = StepConfig(config, UNQUANTIZED, ADAMW)
    constant = schedule.of("constant", rate, 1000, 1, 0)

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

    found = compilation.jit(jax.vmap(trajectory))(jnp.arange(seeds))
    return np.asarray(found, np.float64).mean(axis=0).swapaxes(0, 1)


def power(sizes_: tuple[int, ...], values) -> float:
    """p of values ~ size^p, by least squares."""
    return float(np.polyfit(np.log(sizes_), np.log(values), 1)[0])


def check(loader: Loader):
    """The coordinate check: {(axis, scaled): (2, sizes, T + 1, 4)}, printed as powers."""
    tokens_TxBxS1 = jnp.asarray(loader.windows(loader.window_indices(0, 0, STEPS)).astype(np.int32))
    probe_BxS = jnp.asarray(loader.validation_windows(BATCH)[:, :-1].astype(np.int32))
    how = _RATE.value, _SEEDS.value
    model = functools.partial(decoder, parametrization=_PARAMETRIZATION.value)
    measured = functools.cache(lambda *shape: coordinates(model(*shape), tokens_TxBxS1, probe_BxS, *how))
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
            panel.set_title(f"{name}, {_PARAMETRIZATION.value if scaled else 'standard'}", fontsize="medium")
            both = np.stack([found[axis, True], found[axis, False]])[:, :, :, SHOWN, q]
            panel.set_ylim(both[both > 0].min() / 1.3, both.max() * 1.3)
        panels[row, 0].set_ylabel("root mean square")
    panels[0, 0].legend(fontsize="x-small")
    drawing.suptitle("Activations (–) and their change since t = 0 (···) after t steps", fontsize="medium")
    with files.replacing(Path(path)) as file:
        drawing.savefig(file, format=Path(path).suffix.removeprefix(".") or "png", dpi=72)


def main() -> None:
    config = base.get_config()
    compilation.use_cache(config.compilation_cache)
    loader = Loader(prepare(**config.data), SEQUENCE, BATCH)
    draw(check(loader), _OUT.value)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))
