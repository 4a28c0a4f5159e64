"""What quantization does to each operand of each layer of a trained run: a table and a figure in the run's directory.

python -m precision_scaling.layer_stats --workdir=DIR [--run=ID] [--precision=w4_a4_kv4]

Reads a checkpoint that `train` or `study` has left and follows held-out text through its quantized layers. It touches
nothing else. Shape letters: C batches, B sequences, S positions, L layers, O operands.
"""

import csv
import functools
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from precision_scaling.config import command_line
from precision_scaling.errors import UserError
from precision_scaling.model import contraction, documents
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block, Decoder
from precision_scaling.quantize import aqt, layers, parsing
from precision_scaling.quantize import operands as operands_lib
from precision_scaling.quantize.precision import Precision
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import StaticPrecision, by_layer, static_of_one
from precision_scaling.runtime import cli, compilation, files, paths
from precision_scaling.study import layer_error
from precision_scaling.study.workspace import Workspace, reopen_workspace
from precision_scaling.training import checkpoint
from precision_scaling.training.run import Run

FLAGS = flags.FlagValues()
_WORKDIR = command_line.define_workdir(FLAGS, "A workdir of train or study.")
_RUN = flags.DEFINE_string("run", None, "Name of a run in it; all that are trained, if not given.", flag_values=FLAGS)
_PRECISION = flags.DEFINE_string(
    "precision",
    None,
    "Formats to measure at, as in a study's grid (w4_a4_kv4); the run's own, if not given.",
    flag_values=FLAGS,
)
_SEQUENCES = flags.DEFINE_integer(
    "sequences",
    None,
    "Held-out sequences that are followed, in whole batches; 64, if there are.",
    lower_bound=1,
    flag_values=FLAGS,
)

Place = tuple[str, str]  # a product of a block and one of its operands
# The products of a block in the order in which data reaches them, with their operands.
PRODUCTS = (
    *(("attention/qkv", name) for name in "aw"),
    *(("attention/scores", name) for name in "qk"),
    *(("attention/values", name) for name in "pv"),
    *((product, name) for product in ("attention/out", "mlp/gate_up", "mlp/down") for name in "aw"),
)
COLUMNS = (
    *("layer", "product", "operand", "format", "granularity"),
    *("elements", "saturated", "zeroed", "snr_db", "scale_low", "scale_high"),
)


class Sums(NamedTuple):
    """Of one operand's elements x and their values x_q on its grid."""

    elements: jax.Array  # x that are not zero: half of the attention probabilities are, before the future
    saturated: jax.Array  # x beyond the last level
    zeroed: jax.Array  # x_q is zero and x is not
    signal: jax.Array  # Σ x²
    error: jax.Array  # Σ (x - x_q)²
    # Of block formats: blocks that are not all zero, and those with the smallest and the largest scale there is; else 0
    blocks: jax.Array
    scale_low: jax.Array
    scale_high: jax.Array


def sums(x: jax.Array, x_q: jax.Array, saturated: jax.Array, ends: tuple[jax.Array, ...] | None = None) -> Sums:
    """The sums over all elements of an operand. ends: its blocks, as `rounding.scale_ends` counts them."""
    x, x_q = x.astype(jnp.float32), x_q.astype(jnp.float32)
    count = lambda where: jnp.sum(where, dtype=jnp.int32)
    return Sums(
        count(x != 0),
        count(saturated),
        count((x != 0) & (x_q == 0)),
        jnp.sum(jnp.square(x)),
        jnp.sum(jnp.square(x - x_q)),
        *(ends or (jnp.zeros((), jnp.int32),) * 3),
    )


def measure(config: ModelConfig, static: StaticPrecision, params: Any, grids: Any, tokens_CxBxS) -> dict[Place, Sums]:
    """By (product, operand) of `PRODUCTS`, for those that are quantized: sums over all batches, arrays (L,).

    Scales of activations are those of each batch, as in evaluation.
    """
    found = _compiled(config, static)(params, grids, tokens_CxBxS)
    total = lambda field: np.asarray(field, np.float64).sum(axis=0)
    named = dict(zip(_quantized(static), found, strict=True))
    return {name: Sums(*map(total, one)) for name, one in named.items()}


def _quantized(static: StaticPrecision) -> list[Place]:
    return [(product, name) for product, name in PRODUCTS if static.get(name)]


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, static: StaticPrecision):
    block = Block(config)

    def layer(starts_BxS, x_BxSxD, of_block):
        params, grids = of_block
        seen: list[tuple[str, Sums]] = []

        def observe(name, x, x_q, saturated, ends):
            if saturated is not None:
                seen.append((name, sums(x, x_q, saturated, ends)))

        with aqt.observed(observe):
            x_BxSxD = block.apply({"params": params}, x_BxSxD, Products(static, grids), starts_BxS)
        assert [name for name, _ in seen] == [name for _, name in _quantized(static)]
        return x_BxSxD, tuple(found for _, found in seen)

    def stats(params, grids, tokens_CxBxS):
        def of_batch(tokens_BxS):
            products = Products(static, grids)
            x_BxSxD = Decoder(config).apply({"params": params}, tokens_BxS, products, method=Decoder.embed)
            blocks = params["layers"]["block"], by_layer(grids, config.depth)
            return jax.lax.scan(functools.partial(layer, documents.starts(config, tokens_BxS)), x_BxSxD, blocks)[1]

        return jax.lax.map(of_batch, tokens_CxBxS)

    return compilation.jit(stats)


def snr_db(signal: float, error: float) -> float | None:
    """10 log10(Σ x² / Σ (x - x_q)²); None where nothing was lost, or nothing was there."""
    return 10 * float(np.log10(signal / error)) if signal > 0 and error > 0 else None


def rows(precision: Precision, found: dict[Place, Sums], depth: int) -> list[dict[str, Any]]:
    """A row with `COLUMNS` for each layer and operand; shares are of the elements that are not zero."""
    lines = []
    for (product, name), one in found.items():
        quantizer = precision.get(name)
        assert quantizer is not None, f"{name} is measured, so it is quantized"
        by_place, place = precision.by_place(name, depth), layers.index(name, product.rpartition("/")[2])
        for layer in range(len(one.signal)):
            elements, saturated, zeroed, signal, error, blocks, low, high = (float(field[layer]) for field in one)
            lines.append(
                {
                    "layer": layer,
                    "product": product,
                    "operand": name,
                    "format": by_place[layer][place].name,
                    "granularity": quantizer.granularity,
                    "elements": int(elements),
                    "saturated": saturated / elements if elements else None,
                    "zeroed": zeroed / elements if elements else None,
                    "snr_db": snr_db(signal, error),
                    "scale_low": low / blocks if blocks else None,
                    "scale_high": high / blocks if blocks else None,
                }
            )
    return sorted(lines, key=lambda line: line["layer"])


def of_run(
    workspace: Workspace, run: Run, precision: Precision, sequences: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of operands and of `layer_error` of a trained run at a precision, on so many held-out sequences.

    UserError for a lost checkpoint.
    """
    config, batch = run.shape.model, min(sequences, workspace.experiment.config.evaluate.batch_size)
    static = static_of_one(precision, config.dtype).evaluation().simulated()
    params = workspace.parameters(run)
    windows_NxS1 = workspace.loader(run.shape).validation_windows(sequences // batch * batch)
    tokens_CxBxS = windows_NxS1[:, :-1].reshape(-1, batch, config.sequence_length).astype(np.int32)
    arguments = config, static, params, static.grids(precision, config.depth), tokens_CxBxS
    return rows(precision, measure(*arguments), config.depth), layer_error.rows(layer_error.measure(*arguments))


def to_csv(lines: Sequence[dict[str, Any]]) -> str:
    """A table as text: six digits, empty where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in line.items()})
    return text.getvalue()


def draw(lines: Sequence[dict[str, Any]], errors: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """A column for each operand: signal-to-noise ratio and the shares lost, by layer, a colour for each product; and
    one for the error of the residual stream."""
    from matplotlib.figure import Figure  # a second to import: only where something is drawn

    operands = list(dict.fromkeys(line["operand"] for line in lines))
    drawing = Figure(figsize=(2.6 * (len(operands) + 1), 4.8), layout="constrained")
    (left, right), *_ = drawing.subfigures(1, 2, squeeze=False, width_ratios=(len(operands), 1))
    panels = left.subplots(2, len(operands), sharex=True, sharey="row", squeeze=False)
    _draw_errors(right.subplots(2, 1, sharex=True), errors)
    for j, name in enumerate(operands):
        mine = [line for line in lines if line["operand"] == name]
        for i, product in enumerate(dict.fromkeys(line["product"] for line in mine)):
            one = [line for line in mine if line["product"] == product]
            layers = [line["layer"] for line in one]
            value = lambda key, one=one: [np.nan if line[key] is None else line[key] for line in one]
            panels[0, j].plot(layers, value("snr_db"), "o-", color=f"C{i}", markersize=4, label=product)
            panels[1, j].plot(layers, value("zeroed"), "o-", color=f"C{i}", markersize=4)
            panels[1, j].plot(layers, value("saturated"), "x--", color=f"C{i}", markersize=4)
        panels[0, j].set_title(f"{name}: {mine[0]['format']}/{mine[0]['granularity']}", fontsize="medium")
        panels[0, j].legend(fontsize="x-small")
        panels[1, j].set_xlabel("layer")
        panels[1, j].xaxis.get_major_locator().set_params(integer=True)
        for panel in panels[:, j]:
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("signal to noise / dB")
    panels[1, 0].set_ylabel("zeroed (–), saturated (- -)")
    drawing.suptitle(title, fontsize="medium", parse_math=False)
    with files.replacing(path) as file:
        drawing.savefig(file, format="png", dpi=110)


def _draw_errors(panels: Any, errors: Sequence[dict[str, Any]]) -> None:
    """Relative errors of the residual stream after each layer above, the inherited share below."""
    layers = [line["layer"] for line in errors]
    for name, style in (("own", "o-"), ("inherited", "s-"), ("total", "k:")):
        panels[0].plot(layers, [line[name] or np.nan for line in errors], style, markersize=4, label=name)
    panels[0].set_yscale("log")
    panels[0].set_title("error of the stream", fontsize="medium")
    panels[0].legend(fontsize="x-small")
    share = [np.nan if line["inherited_share"] is None else line["inherited_share"] for line in errors]
    panels[1].plot(layers, share, "s-", markersize=4)
    panels[1].set(ylim=(-0.03, 1.03), xlabel="layer", ylabel="inherited share")
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.grid(alpha=0.3)


def _trained(workspace: Workspace, wanted: str | None) -> list[Run]:
    """The runs with a checkpoint, or the one of that name."""
    trained = [
        run
        for run in workspace.experiment.models(workspace.experiment.runs)
        if checkpoint.exists(workspace.directory(run) / paths.CHECKPOINT)
    ]
    chosen = [run for run in trained if wanted in (None, run.id)]
    if not chosen:
        names = ", ".join(run.id for run in trained) or "of which there is none"
        raise UserError(f"--run={wanted}: allowed is a trained run, {names}")
    return chosen


def _weakest(lines: Sequence[dict[str, Any]]) -> str:
    known = [line for line in lines if line["snr_db"] is not None]
    if not known:
        return ""
    line = min(known, key=lambda line: line["snr_db"])
    return f"; {line['snr_db']:.1f} dB at worst, {line['operand']} of {line['product']} in layer {line['layer']}"


def _inherited(errors: Sequence[dict[str, Any]]) -> str:
    share = errors[-1]["inherited_share"]
    return "" if share is None else f"; the last layer inherited {share:.0%} of its error"


def main() -> None:
    """Measure as the flags say, write the table and the figure, and print where they are. Raises UserError."""
    workspace = reopen_workspace(_WORKDIR.value)
    available = workspace.experiment.config.evaluate.sequences
    sequences = min(64, available) if _SEQUENCES.value is None else _SEQUENCES.value
    if sequences > available:
        raise UserError(f"--sequences={sequences}: allowed is 1 to {available}, config.evaluate.sequences")
    jobs = []
    for run in _trained(workspace, _RUN.value):
        precision = run.precision
        if _PRECISION.value is not None:
            precision = parsing.parse(_PRECISION.value, workspace.experiment.config.precision, "--precision")
            contraction.check_shape(precision, run.shape.model, run.shape.tokens_per_step // run.shape.microbatches)
        if any(precision.get(name) for name in operands_lib.OPERANDS):
            jobs.append((run, precision))
    if not jobs:
        raise UserError("nothing is quantized in the blocks of these runs; allowed is --precision, e.g. w4_a4_kv4")
    for run, precision in jobs:
        path = paths.layer_stats(workspace.directory(run), re.sub(r"[^\w.+:-]+", ".", _PRECISION.value or ""))
        lines, errors = of_run(workspace, run, precision, sequences)
        files.atomic_write(path, to_csv(lines))
        files.atomic_write(paths.layer_split(path), to_csv(errors))
        title = run.id if _PRECISION.value is None else f"{run.id} at {_PRECISION.value}"
        draw(lines, errors, title, path.with_suffix(".png"))
        print(f"{path}: {len(lines)} operands{_weakest(lines)}{_inherited(errors)}")


command = functools.partial(cli.run, main, FLAGS, required=("workdir",))

if __name__ == "__main__":
    sys.exit(command())
