"""Quantizes the trained runs of a workdir and writes a row per method and bit-width.

The stage after `study`'s training: reads each run's checkpoint, has `apply` quantize it and evaluates the result.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from precision_scaling import bench as bench_lib
from precision_scaling import checkpoint, results
from precision_scaling import step as step_lib
from precision_scaling.bench import Bench
from precision_scaling.cohort import table_of
from precision_scaling.errors import UserError
from precision_scaling.experiment import Cohort, Run, of_shard
from precision_scaling.formats import parse
from precision_scaling.ptq import apply
from precision_scaling.step import Static


def quantize_missing(
    bench: Bench, methods: Iterable[str], bits: Iterable[int], shard=(0, 1), everything=False
) -> list[str]:
    """Quantizes and evaluates the trained runs that ask for it (or all) where a method has no row at some bits.

    Returns a line for each layer that GPTQ had to round to nearest. Raises UserError for checkpoints that cannot be
    read, after the runs that can.
    """
    todo = []
    for group in bench.experiment.cohorts:
        for run in of_shard(group.runs, shard):
            trained = results.read_rows(bench.directory(run), "trained")
            if not trained or trained[0]["status"] != "ok" or not (run.ptq or everything):
                continue
            for method in methods:
                have = {row["P_post"] for row in results.read_rows(bench.directory(run), method)}
                missing = [b for b in dict.fromkeys(bits) if b not in have]
                if missing:
                    todo.append((group, run, method, missing))
    warnings, unreadable = [], []
    for group, run, method, missing in tqdm(todo, desc="quantizing", unit="run") if todo else ():
        try:
            warnings += _quantize_run(bench, group, run, method, missing)
        except UserError as error:
            unreadable.append((run, error))
    if unreadable:
        run, error = unreadable[0]
        raise UserError(
            f"{error}; {len({run.id for run, _ in unreadable})} of the runs could not be quantized, all others were: "
            f"delete {bench.directory(run)} and train again to make its checkpoint anew"
        )
    return warnings


def _quantize_run(bench: Bench, group: Cohort, run: Run, method: str, bits: list[int]) -> list[str]:
    config = bench.experiment.config
    # With weights of another format than the hardware multiplies, the forward pass of a native run is simulated.
    program = group.program.evaluation().simulated()
    static = Static(group.shape.model, program, bench.experiment.optimizer)
    abstract = jax.eval_shape(lambda: step_lib.init_state(static, 0).params)
    params = checkpoint.restore(bench.directory(run) / "checkpoint", abstract)
    calibration = bench.loader(group.shape).calibration_windows(config.ptq.calibration_sequences, seed=run.seed)
    table = table_of(run, program, w=parse("bf16"))
    batch = math.gcd(config.evaluate.batch_size, config.ptq.calibration_sequences)
    quantized = apply.quantize_model(
        static,
        params,
        table,
        calibration[:, :-1],
        jnp.asarray(bits, jnp.float32),
        config.ptq.damping,
        method=method,
        batch_size=batch,
    )
    evaluate = bench_lib.evaluator(bench, group.shape, program)
    rows, warnings = [], []
    for i, b in enumerate(bits):
        loss = evaluate(jax.tree.map(lambda x, i=i: x[i], quantized.params), table)
        fallen = np.argwhere(np.asarray(quantized.fell_back[i])).tolist()
        names = ["/".join(apply.LINEARS[j]) + f" of layer {layer}" for layer, j in fallen]
        warnings += [f"{run.id} at {b} bits: {name} was rounded to nearest, its Hessian is unusable" for name in names]
        rows.append(
            bench_lib.row(
                bench, run, loss, method=method, P_post=b, fallback_layers=len(fallen), ptq_granularity="channel"
            )
        )
    results.write_rows(bench.directory(run), method, [*results.read_rows(bench.directory(run), method), *rows])
    return warnings
