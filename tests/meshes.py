"""Trains a small cohort on meshes of eight forced host devices, quantizes a model there, and prints what came of it.

A line of JSON for each mesh.

python tests/meshes.py WORKDIR MESH ...    where MESH is run,data,fsdp,tensor; 1,1,1,1 takes the first device alone

MESH:muon trains with Muon and an average of the parameters, and quantizes nothing. MESH:parts makes logits in chunks,
and attention goes by blocks.
MESH:documents keeps attention within documents.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import simple_loops
from tqdm import tqdm

from precision_scaling.config import base, experiment
from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import Corpus
from precision_scaling.model import blockwise, cross_entropy
from precision_scaling.ptq import apply, statistics
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import compilation, paths, sharding
from precision_scaling.runtime.stopping import Stop
from precision_scaling.training import cohort, step
from precision_scaling.training.compiled import compiled_cohort
from precision_scaling.training.step import StepConfig

VOCABULARY = 64
DEFAULTS = blockwise.BLOCK, cross_entropy.CHUNK_BYTES
QUANTIZED = ((1, 1, 1, 1), (1, 2, 2, 2), (2, 2, 2, 1))  # each axis is on one of them; it takes as long as training


def config(kind: str):
    """Three runs of one shape, with a lane to spare: unquantized, quantized weights, and all parts quantized."""
    c = base.get_config()
    shape = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 64, "sequence_length": 16}
    c.update_from_flattened_dict({f"model.{name}": value for name, value in shape.items()})
    c.optimizer.name, c.optimizer.ema = ("muon", (0.9,)) if kind == "muon" else ("adamw", ())
    if kind == "documents":
        c.data.within_documents, c.data.tokenizer = True, "bpe:300"  # whose end of text is 0, as the corpus' is
    c.train.batch_size, c.train.microbatches, c.train.log_every, c.study.lanes = 16, 2, 1, 4
    c.model.attention = "blocks" if kind == "parts" else "auto"
    tokens = (16 * 16 * 12,)
    c.study.grid.all = base.grid(("25k",), tokens, ("bf16", "w4", "w4_a6_kv4"))
    return c


def corpus() -> Corpus:
    """Tokens that follow each other with a rule and some noise."""
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.choice((1, 2, 5), 20_000)).astype(np.uint16) % VOCABULARY
    return Corpus(tokens, tokens[:500], VOCABULARY, 0, Path(), {})


def train(sizes: tuple[int, ...], kind: str, workdir: Path) -> dict:
    """Losses of every run at every step and bytes on every device, on one mesh."""
    parts = kind == "parts"
    blockwise.BLOCK, cross_entropy.CHUNK_BYTES = (6, 4 * 6 * VOCABULARY) if parts else DEFAULTS
    c = config(kind)
    resolved = experiment.resolve(c, VOCABULARY)
    (group,) = resolved.cohorts
    devices = jax.devices()[: int(np.prod(sizes))]
    layout = sharding.make_layout({"slices": 1, **dict(zip(sharding.AXES, sizes, strict=True))}, devices)
    sharding.check(layout, c, [group.shape.model])
    loader = Loader(corpus(), c.model.sequence_length, c.train.batch_size)
    step_config = StepConfig(group.shape.model, group.static, resolved.optimizer, c.train.microbatches)
    programs = compiled_cohort(step_config, layout, c.study.lanes)
    state = programs.spread(programs.initialize(0))
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves((state.params, state.optimizer, state.averages)):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    total = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.optimizer, state.averages)))
    finished = {}
    options = cohort.Options(lanes=4, log_every=1, checkpoint_seconds=1e9, steps_per_dispatch=5)
    cohort.train_cohort(
        group,
        loader,
        cohort.Context(resolved.optimizer, layout, workdir, "0of1", options, tqdm(disable=True, total=0), Stop()),
        lambda ended: finished.update({ended.run: ended.params}),
    )
    assert all(leaf.sharding.mesh == layout.mesh for leaf in jax.tree.leaves(list(finished.values())))
    losses = {}
    for run in group.runs:
        lines = (paths.run(workdir, run.id) / "metrics.jsonl").read_text().splitlines()
        losses[run.precision.short] = [json.loads(line)["loss"] for line in lines]
    return {
        "losses": losses,
        "bytes": sorted(set(held.values())),
        "total": total,
        "hessian_parts": hessian_parts(layout),
        "gptq": quantize(step_config, layout, loader) if sizes in QUANTIZED and kind == "adamw" else None,
    }


def quantize(step_config: StepConfig, layout: sharding.Layout, loader: Loader) -> list[float]:
    """GPTQ's relative output errors on this mesh."""
    scheme = scheme_of("gptq")
    step_config = dataclasses.replace(step_config, static=scheme.static(UNQUANTIZED))
    initialize = lambda: step.init_state(step_config, 0).params
    params = jax.jit(initialize, out_shardings=layout.of_tree(jax.eval_shape(initialize)))()
    tokens_NxS = loader.calibration_windows(32, seed=0)[:, :-1]
    options = {"scheme": scheme, "batch_size": 16, "layout": layout}
    _, report = apply.quantize_model(step_config, params, {}, tokens_NxS, (3,), 0.01, **options)
    return report.error.ravel().tolist()


def hessian_parts(layout: sharding.Layout) -> list[int]:
    """The parts of a Hessian's rows that a device holds; the Hessian is that of NumPy."""

    @jax.jit
    def hessian(x_CxBxSxI):
        with sharding.splitting(layout):
            found = statistics.nothing(x_CxBxSxI.shape[-1])
            for x_BxSxI in x_CxBxSxI:
                found = statistics.add(Products(UNQUANTIZED), found, x_BxSxI)
            return found.hessian_IxI

    x_CxBxSxI = np.random.default_rng(0).normal(size=(2, 16, 8, 32)).astype(np.float32)
    h_IxI = hessian(x_CxBxSxI)
    np.testing.assert_allclose(h_IxI, np.einsum("cbsi,cbsj->ij", x_CxBxSxI, x_CxBxSxI), rtol=1e-4, atol=1e-4)
    parts = len(h_IxI) // np.array([shard.data.shape[0] for shard in h_IxI.addressable_shards])
    return sorted(set(parts.tolist()))


if __name__ == "__main__":
    simple_loops.use()
    jax.config.update("jax_disable_most_optimizations", True)
    compilation.jit = lambda function, level=0, platform=None, **options: jax.jit(function, **options)
    for text in sys.argv[2:]:
        mesh, _, optimizer = text.partition(":")
        sizes = tuple(map(int, mesh.split(",")))
        print(json.dumps({"mesh": text, **train(sizes, optimizer or "adamw", Path(sys.argv[1]) / text)}), flush=True)
