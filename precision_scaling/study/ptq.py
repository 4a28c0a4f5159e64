"""Quantizes the trained runs of a workdir and writes a row per scheme and bit-width.

The stage after `study`'s training: reads each run's checkpoint, has `apply` quantize it and evaluates the result.
"""

import dataclasses
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
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import apply, codes, layers, packed
from precision_scaling.ptq.activations import memory_limit
from precision_scaling.ptq.parts import Parts
from precision_scaling.ptq.registry import planned
from precision_scaling.ptq.scheme import Scheme
from precision_scaling.runtime import files, paths
from precision_scaling.runtime.progress import Bar, progress_bar
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.study import results
from precision_scaling.study.evaluate import by_blocks
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.run import WHOLE, Cohort, Run, Shard
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
        return self.planned.index(bits) if bits in self.planned else -1


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
    for scheme, _ in schemes if save else ():
        if scheme.format:
            raise UserError(f"--save with the format {scheme.format}: allowed are integers, which can be packed")
        if not scheme.method.solve:
            raise UserError(f"--save with {scheme.method.name}: allowed are methods that quantize weights")
    for group in workspace.experiment.cohorts:
        for run in shard.of(group.runs):
            trained = results.read_rows(workspace.directory(run), "trained")
            if not trained or trained[0]["status"] != "ok" or not (run.ptq or everything):
                continue
            for scheme, bits_post in schemes:
                scheme.check_model(group.shape.model)
                missing = tuple(b for b in bits_post if _is_missing(workspace.directory(run), scheme, b, save))
                if missing:
                    todo.append(_Job(group, run, scheme, missing, bits_post))
    warnings: list[str] = []
    unreadable: list[tuple[Run, UserError]] = []
    blocks = sum(len(job.bits) * job.group.shape.model.depth for job in todo)
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


def _is_missing(directory: Path, scheme: Scheme, bits: float, save: bool) -> bool:
    if save and not files.exists(paths.packed(directory, scheme.name, bits) / paths.DESCRIPTION):
        return True
    return bits not in {row["P_post"] for row in results.read_rows(directory, scheme.name)}


def _quantize_run(workspace: Workspace, job: _Job, save: bool, bar: Bar) -> list[str]:
    """Rows at each of the job's bit-widths, each written when it is measured; lines on what fell back."""
    directory, scheme, warnings = workspace.directory(job.run), job.scheme, []
    for b in job.bits:
        found = _quantize_at(workspace, job, b, save, bar)
        if found.report is not None and np.isfinite(found.report.error).any():
            layers.write(directory, scheme.name, [b], found.report)
        fallen = [] if found.report is None else np.argwhere(found.report.fell_back[0]).tolist()
        for layer, j in fallen:
            name = f"{layers.PROJECTIONS[j]} of layer {layer}"
            warnings.append(f"{job.run.id} at {b} bits: {name} was rounded to nearest, its calibration is unusable")
        stored = None if found.stored_bits is None else round(found.stored_bits, 4)
        columns = {**scheme.columns, "P_post": b, "fallback_layers": len(fallen), "stored_bits": stored}
        row = results.row(workspace, job.run, found.loss, **columns)
        kept = [other for other in results.read_rows(directory, scheme.name) if other["P_post"] != b]
        results.write_rows(directory, scheme.name, sorted([*kept, row], key=lambda row: job.order(row["P_post"])))
        _parts(workspace, job, b).clear()
    return warnings


class _Measured(NamedTuple):
    """A run under a scheme at one bit-width; report and stored_bits are None where kernels stay."""

    loss: float
    report: apply.Report | None
    stored_bits: float | None


def _parts(workspace: Workspace, job: _Job, b: float) -> Parts:
    """Where the blocks are that are done: of the same scheme, model, text and versions."""
    ptq, devices = workspace.experiment.config.ptq, workspace.layout.mesh.devices
    what = [job.scheme, job.run.id, ptq.damping, ptq.calibration_sequences, workspace.corpus.meta["hash"]]
    where = [jax.__version__, jaxlib.__version__, devices.flat[0].device_kind, devices.size]
    key = repr([*what, workspace.experiment.config.model.imported, *where])
    return Parts(paths.parts(workspace.directory(job.run), job.scheme.name, b), key)


def _quantize_at(workspace: Workspace, job: _Job, b: float, save: bool, bar: Bar) -> _Measured:
    """Quantizes and evaluates block by block: in memory are one block and two texts on their way."""
    scheme, run, model = job.scheme, job.run, job.group.shape.model
    static = scheme.static(job.group.static)
    step_config = StepConfig(model, static, workspace.experiment.optimizer)
    # Kernels are on their grids already; what is quantized on the fly is set at each bit-width.
    grids = static.grids(run.precision, model.depth, w=parse("bf16"))
    fmt = parse(scheme.format or b)
    grids = {**grids, **dict.fromkeys(scheme.method.operands, fmt.grid())}
    blocks, parts = workspace.blocks(run), _parts(workspace, job, b)
    top = blocks.top()
    held_out = by_blocks(blocks)(workspace, job.group.shape, static, grids, top)
    quantizer = _quantizer(workspace, job, step_config, grids, top) if scheme.method.solve else None
    kept, reports, sizes, written = [], [], [], time.monotonic()
    for layer in range(blocks.depth):
        if quantizer is None:
            held_out.advance(blocks.block(layer))
            bar.update()
            continue
        found = parts.read(layer)
        if found is not None:
            quantizer.follow(found)
        else:
            found = quantizer.quantize(blocks.block(layer), dict.fromkeys(apply.LINEARS, fmt))
            if time.monotonic() - written > PART_SECONDS:
                parts.write(layer, found)
        written = time.monotonic()
        held_out.advance(codes.block_parameters(found.kernels, found.rest))
        reports.append(jax.tree.map(np.asarray, found.report))
        sizes.append(codes.stored_size(found.kernels, b))
        if save:
            kept.append(packed.pack_block(found.kernels, found.rest, int(b)))
        bar.update()
    loss = held_out.loss()
    if quantizer is None:
        return _Measured(loss, None, None)
    if save:
        path = paths.packed(workspace.directory(run), scheme.name, b)
        packed.save_blocks(path, kept, top, scheme.name, int(b), scheme.method.operands)
    bits, weights = map(sum, zip(*sizes, strict=True))
    # Formats of blocks count the bits of their scales.
    own_scales = scheme.format and fmt.family in ("block", "wide")
    report = jax.tree.map(lambda *found: np.stack(found)[None], *reports)
    return _Measured(loss, report, b if own_scales else bits / weights)


def _quantizer(workspace: Workspace, job: _Job, step_config: StepConfig, grids: Any, top: Any) -> apply.BlockQuantizer:
    config, limit = workspace.experiment.config, memory_limit(workspace.layout)
    loader = workspace.loader(job.group.shape)
    sequences = config.ptq.calibration_sequences
    tokens_NxS1 = loader.calibration_windows(sequences, seed=job.run.seed)
    tokens_NxS = tokens_NxS1[: sequences if apply.needs_calibration(job.scheme) else 0, :-1]
    batch = math.gcd(config.evaluate.batch_size, sequences)
    stream = apply.calibration_stream(step_config, workspace.layout, grids, top, tokens_NxS, batch, limit)
    return apply.BlockQuantizer(step_config, job.scheme, workspace.layout, grids, config.ptq.damping, stream)
