"""Quantizes the trained runs of a workdir and writes a row per scheme and bit-width.

The stage after `study`'s training: reads each run's checkpoint, has `apply` quantize it and evaluates the result.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from precision_scaling.config.options import check_ptq
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import (
    apply,
    by_layer,
    codes,
    layers,
    memory,
    packed,
    projection,
    registry,
    rotation,
    sensitivity,
)
from precision_scaling.ptq.activations import memory_limit
from precision_scaling.ptq.by_layer import ByLayer
from precision_scaling.ptq.parts import Parts
from precision_scaling.ptq.registry import planned
from precision_scaling.ptq.scheme import Scheme
from precision_scaling.runtime import files, paths
from precision_scaling.runtime.progress import Bar, progress_bar
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.study import results
from precision_scaling.study.evaluate import by_blocks
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.blocks import Blocks
from precision_scaling.training.run import WHOLE, Cohort, Run, Shape, Shard
from precision_scaling.training.step import StepConfig

PART_SECONDS = 1.0  # a block that took longer is kept on disk, for the command to go on behind it


@dataclasses.dataclass(frozen=True)
class _Job:
    """One run to be quantized by one scheme at bit-widths that it has no row of yet, or nothing stored."""

    group: Cohort
    run: Run
    scheme: Scheme
    bits: tuple[float, ...]
    planned: tuple[float, ...]  # the order of the rows

    def order(self, bits: float) -> int:
        """Place of a row among those of its scheme: as planned, others before."""
        planned = [registry.bits_post(self.scheme, b, self.group.shape.model) for b in self.planned]
        return planned.index(bits) if bits in planned else -1


def packed_path(run_directory: Path, name: str) -> Path:
    """The packed model of that name. UserError where the run has none."""
    directory = run_directory / paths.QUANTIZED
    found = [path.parent.name for path in files.matching(directory, f"*/{paths.DESCRIPTION}")]
    if name not in found:
        allowed = f"one of {', '.join(found)}" if found else "a model that precision_scaling.ptq --save wrote"
        raise UserError(f"--quantized={name}: allowed is {allowed}")
    return directory / name


def quantize_missing(
    workspace: Workspace,
    methods: Iterable[str],
    bits: Iterable[int],
    shard: Shard = WHOLE,
    everything: bool = False,
    options: Mapping[str, Any] | None = None,
    save: bool = False,
    stop: Stop | None = None,
    progress: bool = True,
    formats: Iterable[str] = (),
) -> list[str]:
    """Quantizes and evaluates the trained runs that ask for it (or all) where a method has no row at some bits.

    options: in place of those of `config.ptq`; rows of other options are other rows, see `Scheme.name`.
    save: keeps every quantized model as a packed checkpoint, too. stop: is asked between two runs; then Stopped.
    progress: shows a bar. formats: in which kernels are quantized beside integers of these bits.

    Returns a line for each layer that had to be rounded to nearest. Raises ConfigError for a scheme that does not fit
    a model before anything is quantized, and UserError for checkpoints that cannot be read after the runs that can.
    """
    chosen = {**workspace.experiment.config.ptq, **(options or {})}
    chosen |= {"methods": tuple(methods), "bits": tuple(bits), "formats": tuple(formats)}
    check_ptq(chosen)
    schemes, todo = planned(chosen), []
    for name in chosen["formats"] if (options or {}).get("clip") else ():
        if parse(name).family in ("block", "wide"):
            raise ConfigError("ptq.clip", True, f"False with the format {name}, whose scales are given")
    for group in workspace.experiment.cohorts:
        for run in shard.of(workspace.experiment.models(group.runs)):
            trained = results.read_rows(workspace.directory(run), "trained")
            if not trained or trained[0]["status"] != "ok" or not (run.ptq or everything):
                continue
            for scheme, bits_post in schemes:
                scheme.check_model(group.shape.model)
                _check_packable(scheme, bits_post, group.shape.model, save)
                missing = tuple(b for b in bits_post if _is_missing(workspace, run, scheme, b, save))
                if missing:
                    todo.append(_Job(group, run, scheme, missing, bits_post))
    warnings: list[str] = []
    unreadable: list[tuple[Run, UserError]] = []
    blocks = sum(len(job.bits) * job.group.shape.model.depth * _passes(job.scheme) for job in todo)
    with progress_bar(total=blocks, desc="quantizing", unit="block", disable=not progress or not todo) as bar:
        for job in todo:
            if stop is not None and stop.asked():
                raise Stopped(stop.reason)
            try:
                warnings += _quantize_run(workspace, job, save, bar)
            except UserError as error:
                unreadable.append((job.run, error))
    if unreadable:
        run, first = unreadable[0]
        raise UserError(
            f"{first}; {len({run.id for run, _ in unreadable})} of the runs could not be quantized, all others were: "
            f"delete {workspace.directory(run)} and train again to make its checkpoint anew"
        )
    return warnings


def _check_packable(scheme: Scheme, bits: Iterable[float], model: ModelConfig, save: bool) -> None:
    """UserError for a model that is to be saved and cannot be packed; ConfigError for layers that it has not."""
    if not scheme.method.solve:
        if save:
            raise UserError(f"--save with {scheme.method.name}: allowed are methods that quantize weights")
        return
    for b in () if scheme.target_bits or not save else bits:
        found = f"--save with the format {scheme.format}" if scheme.format else f"--save with --layers={scheme.layers}"
        wanted = registry.by_layer_of(scheme, b, model)
        by_layer.check_packable(wanted, found)
        if not scheme.method.any_format and any(fmt.family != "int" for fmts in wanted for fmt in fmts.values()):
            raise UserError(f"{found}: allowed are integers with {scheme.method.name}, whose scales take up factors")


def _is_missing(workspace: Workspace, run: Run, scheme: Scheme, b: float, save: bool) -> bool:
    directory, model = workspace.directory(run), run.shape.model
    rows = results.read_rows(directory, scheme.name)
    if scheme.target_bits:  # what it comes to is known when it is done
        label = next((row["P_post"] for row in rows), None)
    else:
        label = registry.bits_post(scheme, b, model)
        label = label if label in {row["P_post"] for row in rows} else None
    return label is None or (save and not files.exists(paths.packed(directory, scheme.name, label) / paths.DESCRIPTION))


def _passes(scheme: Scheme) -> int:
    """How often a scheme goes through the blocks."""
    return 1 + sensitivity.PASSES * bool(scheme.target_bits)


def _quantize_run(workspace: Workspace, job: _Job, save: bool, bar: Bar) -> list[str]:
    """Rows at each of the job's bit-widths, each written when it is measured; lines on what fell back."""
    directory, scheme, warnings = workspace.directory(job.run), job.scheme, []
    for planned_bits in job.bits:
        formats = _formats(workspace, job, planned_bits, bar)
        b = registry.effective_bits(formats, job.group.shape.model)
        found = _quantize_at(workspace, job, b, formats, save, bar)
        if found.report is not None and np.isfinite(found.report.error).any():
            layers.write(directory, scheme.name, [b], found.report)
        fallen = [] if found.report is None else np.argwhere(found.report.fell_back[0]).tolist()
        for layer, j in fallen:
            name = f"{layers.PROJECTIONS[j]} of layer {layer}"
            warnings.append(f"{job.run.id} at {b} bits: {name} was rounded to nearest, its calibration is unusable")
        stored = None if found.stored_bits is None else round(found.stored_bits, 4)
        columns = {**scheme.columns, "P_post": b, "fallback_layers": len(fallen), "stored_bits": stored}
        columns["post_layers"] = by_layer.describe(formats)
        row = results.row(workspace, job.run, found.loss, **columns)
        kept = [other for other in results.read_rows(directory, scheme.name) if other["P_post"] != b]
        results.write_rows(directory, scheme.name, sorted([*kept, row], key=lambda row: job.order(row["P_post"])))
        _parts(workspace, job, b, formats).clear()
    return warnings


def _formats(workspace: Workspace, job: _Job, b: float, bar: Bar) -> ByLayer:
    """Of every projection. For a target each one's expected loss is measured at every width, and kept."""
    scheme, model = job.scheme, job.group.shape.model
    if not scheme.target_bits:
        return registry.by_layer_of(scheme, b, model)
    path = paths.sensitivity(workspace.directory(job.run), scheme.without_target.name)
    key = _key(workspace, job)
    cost_LxPxK = sensitivity.read(path, key, scheme.widths)
    if cost_LxPxK is None:
        shape = _shape(scheme, job.group.shape)
        step_config = StepConfig(shape.model, job.group.static, workspace.experiment.optimizer)
        limit, damping = memory_limit(workspace.layout), workspace.experiment.config.ptq.damping
        tokens_NxS1 = _calibration_windows(workspace, job)
        batches = tokens_NxS1.reshape(-1, _batch_size(workspace), tokens_NxS1.shape[1])
        blocks = _blocks(workspace, job)
        arguments = step_config, scheme, workspace.layout, blocks, batches, damping, limit, bar.update
        cost_LxPxK = sensitivity.measure(*arguments)
        sensitivity.write(path, key, scheme.widths, cost_LxPxK)
    else:
        bar.update(sensitivity.PASSES * model.depth)
    return registry.allotted(scheme, cost_LxPxK, model)


class _Measured(NamedTuple):
    """A run under a scheme at one bit-width; report and stored_bits are None where kernels stay."""

    loss: float
    report: projection.Report | None
    stored_bits: float | None


def _key(workspace: Workspace, job: _Job) -> str:
    """Whatever a block's quantization depends on, but for its formats, in words."""
    ptq, devices = workspace.experiment.config.ptq, workspace.layout.mesh.devices
    scheme = job.scheme.without_target.described
    what = [scheme, job.run.id, ptq.damping, ptq.calibration_sequences, workspace.corpus.meta["hash"]]
    where = [jax.__version__, jaxlib.__version__, devices.flat[0].device_kind, devices.size]
    return repr([*what, workspace.experiment.config.model.imported, *where])


def _parts(workspace: Workspace, job: _Job, b: float, formats: ByLayer) -> Parts:
    """Where the blocks are that are done: of the same scheme, formats, model, text and versions."""
    key = f"{_key(workspace, job)} {by_layer.describe(formats)}"
    return Parts(paths.parts(workspace.directory(job.run), job.scheme.name, b), key)


def _quantize_at(workspace: Workspace, job: _Job, b: float, formats: ByLayer, save: bool, bar: Bar) -> _Measured:
    """Quantizes and evaluates block by block: in memory are one block and two texts on their way.

    b: P_post, which are the bits of the operands that are quantized on the fly.
    """
    scheme, run = job.scheme, job.run
    shape, step_config, grids = _evaluated(workspace, scheme, job.group, run, b)
    blocks, parts = _blocks(workspace, job), _parts(workspace, job, b, formats)
    top = blocks.top()
    held_out = by_blocks(blocks)(workspace, shape, step_config.static, grids, top)
    quantizer = _quantizer(workspace, job, step_config, grids, top) if scheme.method.solve else None
    kept, reports, sizes, written = [], [], [], time.monotonic()
    for layer, wanted in enumerate(formats):
        if quantizer is None:
            held_out.advance(blocks.block(layer))
            bar.update()
            continue
        found = parts.read(layer)
        if found is not None:
            quantizer.follow(found, functools.partial(blocks.block, layer))
        else:
            found = quantizer.quantize(blocks.block(layer), wanted)
            if time.monotonic() - written > PART_SECONDS:
                parts.write(layer, found)
        written = time.monotonic()
        held_out.advance(codes.block_parameters(found.kernels, found.rest))
        reports.append(jax.tree.map(np.asarray, found.report))
        sizes.append(codes.stored_size(found.kernels, wanted))
        if save:
            kept.append(packed.pack_block(found.kernels, found.rest, wanted))
        bar.update()
    loss = held_out.loss()
    if quantizer is None:
        return _Measured(loss, None, None)
    if save:
        path = paths.packed(workspace.directory(run), scheme.name, b)
        packed.save_blocks(path, kept, top, scheme.name, formats, scheme.method.operands)
    bits, weights = map(sum, zip(*sizes, strict=True))
    report = jax.tree.map(lambda *found: np.stack(found)[None], *reports)
    return _Measured(loss, report, bits / weights)


def _blocks(workspace: Workspace, job: _Job) -> Blocks:
    """The model as it is quantized."""
    blocks = workspace.blocks(job.run)
    return rotation.rotated(blocks, job.group.shape.model) if job.scheme.rotate else blocks


def _shape(scheme: Scheme, shape: Shape) -> Shape:
    """Of the model as it is quantized: one whose stream is rotated has a head of its own."""
    return dataclasses.replace(shape, model=rotation.decoder(shape.model)) if scheme.rotate else shape


class _Evaluated(NamedTuple):
    """What the quantized model's forward pass depends on; kernels are on their grids already."""

    shape: Shape
    step_config: StepConfig
    grids: Any


def _evaluated(workspace: Workspace, scheme: Scheme, group: Cohort, run: Run, bits: float) -> _Evaluated:
    """bits: of the operands that the scheme quantizes on the fly, where they have no format."""
    shape, static = _shape(scheme, group.shape), scheme.static(group.static)
    grids = static.grids(run.precision, shape.model.depth, w=parse("bf16"))
    if scheme.method.operands:
        grids = {**grids, **dict.fromkeys(scheme.method.operands, parse(scheme.format or bits).grid())}
    return _Evaluated(shape, StepConfig(shape.model, static, workspace.experiment.optimizer), grids)


def _quantizer(workspace: Workspace, job: _Job, step_config: StepConfig, grids: Any, top: Any) -> apply.BlockQuantizer:
    tokens_NxS1 = _calibration_windows(workspace, job)
    tokens_NxS = tokens_NxS1[: len(tokens_NxS1) if apply.needs_calibration(job.scheme) else 0, :-1]
    batch, limit = _batch_size(workspace), memory_limit(workspace.layout)
    text = apply.calibration_stream(step_config, workspace.layout, grids, top, tokens_NxS, batch, limit)
    damping = workspace.experiment.config.ptq.damping
    return apply.BlockQuantizer(step_config, job.scheme, workspace.layout, grids, damping, *text)


def _calibration_windows(workspace: Workspace, job: _Job) -> np.ndarray:
    """(N, S + 1)."""
    sequences = workspace.experiment.config.ptq.calibration_sequences
    return workspace.loader(job.group.shape).calibration_windows(sequences, seed=job.run.seed)


def _batch_size(workspace: Workspace) -> int:
    config = workspace.experiment.config
    return math.gcd(config.evaluate.batch_size, config.ptq.calibration_sequences)


def memory_text(workspace: Workspace, options: Mapping[str, Any], save: bool) -> str:
    """What quantizing takes in memory, a line for each model and scheme, and why; nothing is read or written."""
    config, lines = workspace.experiment.config, []
    for group in workspace.experiment.cohorts:
        for scheme, bits_post in planned(options):
            scheme.check_model(group.shape.model)
            _check_packable(scheme, bits_post, group.shape.model, save)
            if not scheme.method.solve:
                continue
            widest = max(scheme.widths or bits_post)
            _, step_config, grids = _evaluated(workspace, scheme, group, group.runs[0], widest)
            calibration = config.ptq.calibration_sequences, _batch_size(workspace)
            held_out = config.evaluate.sequences, config.evaluate.batch_size
            sizes = step_config, scheme, workspace.layout, grids, widest, calibration, held_out, save
            found = memory.plan(*sizes)
            parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found._asdict().items() if name != "files")
            depth, name = group.shape.model.depth, f"{group.runs[0].id}, {scheme.name}"
            text = f"{name}: {depth} blocks, {found.peak / 1e9:.2f} GB of memory beside the process ({parts})"
            lines.append(text + (f" and {found.files / 1e9:.2f} GB of temporary files" if found.files else ""))
    return "\n".join(lines)
