"""What feeding batches from the token file costs, against a corpus that is kept on the device.

    python -m benchmarks.input_pipeline [--tokens=1_000_000_000] [--size=1M] [--steps=20]

Writes a file of random uint16 tokens (deleted afterwards) and trains on it twice, in turns: fed by `feed` from the
memory map, and with the corpus on the device (of the same number of tokens at most 100 million, so that it fits) and
windows gathered there. Prints time per step of both, the share of time spent waiting for tokens, and the memory of the
process while it is fed: its own, and with the pages of the file that are mapped.
"""

import functools
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import Corpus
from precision_scaling.model import sizes
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import formats
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer
from precision_scaling.runtime import cli, compilation, sharding
from precision_scaling.training import optimizer, schedule, step
from precision_scaling.training.feed import Chunk, Prefetcher
from precision_scaling.training.step import RunInputs, StepConfig

FLAGS = flags.FlagValues()
_TOKENS = flags.DEFINE_integer(
    "tokens", 1_000_000_000, "Tokens in the file, two bytes each.", lower_bound=100_000, flag_values=FLAGS
)
_SIZE = flags.DEFINE_string("size", "1M", "Named size of the model.", flag_values=FLAGS)
_SEQUENCE = flags.DEFINE_integer("sequence_length", 64, "Tokens per sequence.", lower_bound=1, flag_values=FLAGS)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Sequences per step.", lower_bound=1, flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps per dispatch.", lower_bound=1, flag_values=FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Dispatches of each, after a first.", lower_bound=1, flag_values=FLAGS)
_DIRECTORY = flags.DEFINE_string(
    "directory", None, "Where the file is written; default: the system's for such.", flag_values=FLAGS
)

VOCABULARY = 257


def _memory() -> dict[str, int]:
    """MiB of this process: its own, and pages of files it has mapped."""
    status = Path("/proc/self/status").read_text()
    return {key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) // 1024 for key in ("RssAnon", "RssFile", "VmHWM")}


def _write(path: Path, tokens: int) -> np.memmap:
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, tokens, 1 << 24):
            rng.integers(0, VOCABULARY, min(1 << 24, tokens - start), np.uint16).tofile(file)
    return np.memmap(path, np.uint16, mode="r")


def _main() -> None:
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
        tokens = _write(Path(directory) / "train.bin", _TOKENS.value)
        print(f"{len(tokens):,} tokens written; memory in MiB: {_memory()}", flush=True)
        _compare(Corpus(tokens, tokens[:100_000], VOCABULARY, 0, Path(directory), {}))


def _compare(corpus: Corpus) -> None:
    size = sizes.named(_SIZE.value)
    shape = ModelConfig(
        vocab_size=VOCABULARY,
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        mlp_width=size.mlp_width,
        sequence_length=_SEQUENCE.value,
        base_width=size.width,
        base_depth=size.depth,
    )
    static = StaticPrecision(
        tuple(
            (name, StaticQuantizer(formats.parse("int4").kind, "channel" if name == "w" else "tensor"))
            for name in "wakv"
        )
    )
    step_config = StepConfig(shape, static, optimizer.OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1))
    grids = {name: jax.tree.map(lambda x: np.asarray(x)[None], formats.parse("int4").grid()) for name in "wakv"}
    inputs = RunInputs(grids, jax.tree.map(lambda x: x[None], schedule.of("cosine", 1e-3, 10_000, 10, 0)))
    layout = sharding.make_layout({"slices": 1, "run": 1, "data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    loader = Loader(corpus, _SEQUENCE.value, _BATCH.value)
    feed = Prefetcher(loader, layout, lanes=1, microbatches=1, max_steps=_STEPS.value)
    steps, length = feed.max_steps, _SEQUENCE.value
    held = jnp.asarray(np.asarray(corpus.train[:100_000_000]))
    part = Corpus(corpus.train[: held.size], corpus.validation, VOCABULARY, 0, Path(), {})
    held_loader = Loader(part, length, _BATCH.value)

    def fed(state, inputs, tokens_TxRxMxBxS1):
        fetch = lambda t: jax.lax.dynamic_index_in_dim(tokens_TxRxMxBxS1, t, 0, keepdims=False).astype(jnp.int32)
        return step.train_chunk(step_config, state, inputs, fetch, steps, steps)

    def gathered(state, inputs, corpus, index_TxB):
        window = lambda i: jax.lax.dynamic_slice(corpus, (i * length,), (length + 1,))

        def fetch(t):
            index_B = jax.lax.dynamic_index_in_dim(index_TxB, t, 0, keepdims=False)
            return jax.vmap(window)(index_B).astype(jnp.int32)[None]

        return step.train_chunk(step_config, state, inputs, fetch, steps, steps)

    initialize = compilation.jit(functools.partial(step.init_state, step_config), level=1)
    states = {name: jax.tree.map(lambda x: x[None], initialize(0)) for name in ("fed", "gathered")}
    statics = {name: compilation.jit(f, donate_argnums=0) for name, f in (("fed", fed), ("gathered", gathered))}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    waits, at = [], {"fed": 0, "gathered": 0}

    def dispatch(name: str) -> None:
        started, waited = time.perf_counter(), feed.wait_seconds
        first = at[name]
        at[name] += steps
        if name == "fed":
            tokens = (feed.take(Chunk(((0, first),), steps)),)
            feed.read_ahead(Chunk(((0, first + steps),), steps))
        else:
            tokens = (held, held_loader.window_indices(0, first, steps))
        states[name], metrics = statics[name](states[name], inputs, *tokens)
        assert np.isfinite(np.asarray(metrics.loss)).all()
        seconds[name].append((time.perf_counter() - started) / steps)
        if name == "fed":
            waits.append((feed.wait_seconds - waited) / (time.perf_counter() - started))

    memory = []
    for _ in range(_REPEATS.value + 1):
        for name in states:
            dispatch(name)
        memory.append(_memory())
    best = {name: min(values[1:]) for name, values in seconds.items()}
    print(
        f"{jax.devices()[0].device_kind}, size {_SIZE.value}, {_BATCH.value} x {length} tokens a step: "
        f"fed {best['fed'] * 1e3:.2f} ms, gathered on the device {best['gathered'] * 1e3:.2f} ms a step, "
        f"ratio {best['fed'] / best['gathered']:.3f} of the best, "
        f"{np.median(seconds['fed'][1:]) / np.median(seconds['gathered'][1:]):.3f} of the medians"
    )
    # Reading itself, without a step beside it.
    reads = []
    for i in range(_REPEATS.value):
        chunk = Chunk(((1, i * steps),), steps)
        started = time.perf_counter()
        feed.take(chunk)
        reads.append((time.perf_counter() - started) / steps)
    print(
        f"waiting for tokens: {100 * np.mean(waits[1:]):.2f} % of the time; reading a step's tokens takes "
        f"{np.median(reads) * 1e3:.3f} ms, {100 * np.median(reads) / best['fed']:.2f} % of a step"
    )
    print(
        f"memory in MiB over the dispatches: {json.dumps([memory[0], memory[-1]])}; {held.nbytes >> 20} are the corpus"
    )
    feed.close()


if __name__ == "__main__":
    sys.exit(cli.run(_main, FLAGS))
