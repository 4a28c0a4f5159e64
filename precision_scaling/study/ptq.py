"""Quantizes the trained runs of a workdir and writes a row per scheme and bit-width.

The stage after `study`'s training: reads each run's checkpoint, has `apply` quantize it and evaluates the result.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from precision_scaling.config.options import check_ptq
from precision_scaling.errors import UserError
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import apply, codes, layers, packed
from precision_scaling.ptq.registry import planned
from precision_scaling.ptq.scheme import Scheme
from precision_scaling.runtime import files, paths
from precision_scaling.runtime.progress import progress_bar
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.study import results
from precision_scaling.study.evaluate import evaluator
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.run import WHOLE, Cohort, Run, Shard
from precision_scaling.training.step import StepConfig


@dataclasses.dataclass(frozen=True)
class _Job:
    """One run to be quantized by one scheme at bit-widths that it has no row of yet, or nothing stored."""

    group: Cohort
    run: Run
    scheme: Scheme
    bits: tuple[float, ...]


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
                    todo.append(_Job(group, run, scheme, missing))
    warnings: list[str] = []
    unreadable: list[tuple[Run, UserError]] = []
    for job in progress_bar(todo, desc="quantizing", unit="run", disable=not progress) if todo else ():
        if stop is not None and stop.asked():
            raise Stopped(stop.reason)
        try:
            warnings += _quantize_run(workspace, job, save)
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


def _stored_bits(scheme: Scheme, model: codes.QuantizedModel, bits: float) -> float:
    """Bits per weight with its share of the scales, which formats of blocks count as theirs."""
    own_scales = scheme.format and parse(scheme.format).family in ("block", "wide")
    return bits if own_scales else codes.stored_bits(model, bits)


def _quantize_run(workspace: Workspace, job: _Job, save: bool) -> list[str]:
    config, scheme, run = workspace.experiment.config, job.scheme, job.run
    directory = workspace.directory(run)
    static = scheme.static(job.group.static)
    step_config = StepConfig(job.group.shape.model, static, workspace.experiment.optimizer)
    params = workspace.parameters(run)
    # Kernels are on their grids already; what is quantized on the fly is set at each bit-width.
    grids = static.grids(run.precision, w=parse("bf16"))
    warnings: list[str] = []
    report, models = None, None
    if scheme.method.solve:
        batch = math.gcd(config.evaluate.batch_size, config.ptq.calibration_sequences)
        calibration = workspace.loader(job.group.shape).calibration_windows(
            config.ptq.calibration_sequences, seed=run.seed
        )
        models, report = apply.quantize_model(
            step_config,
            params,
            grids,
            calibration[:, :-1],
            [scheme.format] if scheme.format else job.bits,
            config.ptq.damping,
            scheme=scheme,
            batch_size=batch,
            layout=workspace.layout,
        )
        if np.isfinite(report.error).any():
            layers.write(directory, scheme.name, job.bits, report)
    evaluate = evaluator(workspace, job.group.shape, static)
    rows = []
    for k, b in enumerate(job.bits):
        post = {**grids, **{name: parse(b).grid() for name in scheme.method.operands}}
        loss = evaluate(codes.parameters(models[k]) if models else params, post)
        fallen = np.argwhere(report.fell_back[k]).tolist() if report else []
        names = [f"{layers.PROJECTIONS[j]} of layer {layer}" for layer, j in fallen]
        warnings += [
            f"{run.id} at {b} bits: {name} was rounded to nearest, its calibration is unusable" for name in names
        ]
        post_training = {
            **scheme.columns,
            "P_post": b,
            "fallback_layers": len(fallen),
            "stored_bits": round(_stored_bits(scheme, models[k], b), 4) if models else None,
        }
        rows.append(results.row(workspace, run, loss, **post_training))
        if save and models:
            packed.save(paths.packed(directory, scheme.name, b), models[k], scheme.name, int(b), scheme.method.operands)
    kept = [row for row in results.read_rows(directory, scheme.name) if row["P_post"] not in job.bits]
    results.write_rows(directory, scheme.name, [*kept, *rows])
    return warnings
