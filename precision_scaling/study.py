"""A study: trains every run of a grid, quantizes and evaluates them, and leaves one row per measured loss in runs.csv.

The command of the data flow's middle: config in, workdir/runs.csv out. Safe to repeat: it does what is missing.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from precision_scaling import checkpoint, cohort, compilation, errors, experiment, model, precision, results
from precision_scaling import step as step_lib
from precision_scaling.cohort import Finished, run_directory, table_of
from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import Corpus, prepare
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.experiment import Cohort, Experiment, Run
from precision_scaling.formats import parse
from precision_scaling.ptq import apply
from precision_scaling.quantize import Program
from precision_scaling.step import Static

# Options that change no measured number: a workdir may be used again with others.
_FREE_OPTIONS = re.compile(
    r"study\.|ptq\.(methods|bits)|train\.(log_every|checkpoint_seconds|steps_per_dispatch)"
    r"|data\.(cache_dir|tfds_dir)|compilation_cache"
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the runs of a study are measured with."""

    experiment: Experiment
    corpus: Corpus
    workdir: Path

    def loader(self, shape: experiment.Shape) -> Loader:
        """Batches of one shape."""
        return Loader(self.corpus, shape.model.sequence_length, shape.batch_size)


def open_bench(config, workdir: Path) -> Bench:
    """Checks the config, prepares the corpus and claims the workdir. UserError before anything is trained."""
    experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
    corpus = prepare(**config.data)
    resolved = experiment.resolve(config, corpus.vocab_size)
    for run in resolved.runs:
        precision.check_device(run.precision)
    bench = Bench(resolved, corpus, workdir)
    for group in resolved.cohorts:
        loader = bench.loader(group.shape)
        for key, wanted, available in (
            ("evaluate.sequences", config.evaluate.sequences, loader.n_validation_windows),
            ("ptq.calibration_sequences", config.ptq.calibration_sequences, loader.n_windows),
        ):
            if wanted > available:
                raise ConfigError(key, wanted, f"at most {available}, what the corpus holds at this sequence length")
    _claim(workdir, config, corpus)
    compilation.use_cache(config.compilation_cache)
    return bench


def _claim(workdir: Path, config, corpus: Corpus) -> None:
    """Writes the config into a new workdir; of a used one, checks that its rows would be comparable."""
    now = {"config": experiment.describe(config), "corpus": corpus.meta["hash"]}
    path = workdir / "config.json"
    if path.exists():
        then, new = _flatten(_read_claim(workdir)), _flatten(now)
        for key in sorted(set(new) | set(then)):
            if new.get(key) != then.get(key) and not _FREE_OPTIONS.match(key):
                raise UserError(
                    f"--workdir={workdir} holds results of another config: {key} was {then.get(key)!r} and is "
                    f"{new.get(key)!r} now; allowed is the same value, or another --workdir"
                )
    try:
        results.atomic_write(path, json.dumps(now, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}; allowed is a directory that can be written") from None


def _read_claim(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        claim = json.loads(path.read_text(encoding="utf-8"))
        return {"config": dict(claim["config"]), "corpus": claim["corpus"]}
    except FileNotFoundError:
        raise UserError(
            f"--workdir={workdir}: no config.json there; allowed is the --workdir of train or study"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a config; allowed is a new --workdir or one of train or study") from None


def reopen_bench(workdir: Path) -> Bench:
    """The bench of a workdir that `train` or `study` has filled."""
    return open_bench(ml_collections.ConfigDict(_read_claim(workdir)["config"]), workdir)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removeprefix("config."): tree}
    items = ((f"{prefix}.{key}" if prefix else key, value) for key, value in tree.items())
    return {name: leaf for key, value in items for name, leaf in _flatten(value, key).items()}


def train_missing(bench: Bench, shard: tuple[int, int] = (0, 1)) -> None:
    """Trains this shard's runs that have no row yet; evaluates each and writes its checkpoint and row as it ends."""
    config = bench.experiment.config
    options = cohort.Options(
        lanes=config.study.lanes,
        log_every=config.train.log_every,
        checkpoint_seconds=config.train.checkpoint_seconds,
        steps_per_dispatch=config.train.steps_per_dispatch,
    )
    worker = f"{shard[0]}of{shard[1]}"
    todo: list[tuple[Cohort, cohort.Options]] = []
    for group in bench.experiment.cohorts:
        missing = tuple(
            run for run in of_shard(group.runs, shard) if not results.read_rows(_dir(bench, run), "trained")
        )
        if missing:
            # By the whole cohort's runs, whichever are left or in this shard: the lanes must not depend on that.
            lanes = min(config.study.lanes, len(group.runs))
            todo.append((dataclasses.replace(group, runs=missing), dataclasses.replace(options, lanes=lanes)))
        else:  # of a process that was killed between the last row and this
            cohort.cohort_checkpoints(bench.workdir, group, worker).clear()
    total = sum(run.tokens for group, _ in todo for run in group.runs)
    if not todo:
        return
    tokens = jnp.asarray(bench.corpus.train)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="training", smoothing=0.05) as progress:
        for group, group_options in todo:
            progress.set_description(f"training {group.shape.size} ({len(group.runs)} runs)")
            program = group.program.evaluation()
            evaluate = _evaluator(bench, group.shape, program)
            cohort.train_cohort(
                group,
                bench.experiment.optimizer,
                bench.loader(group.shape),
                tokens,
                bench.workdir,
                worker,
                group_options,
                lambda finished, evaluate=evaluate, program=program: _record(bench, finished, evaluate, program),
                progress,
            )
            results.gather(bench.workdir)


def of_shard(runs: Iterable[Run], shard: tuple[int, int]) -> tuple[Run, ...]:
    """Every n-th run from the i-th on, so that the shards of a cohort share its long and its short runs."""
    return tuple(runs)[shard[0] :: shard[1]]


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
            trained = results.read_rows(_dir(bench, run), "trained")
            if not trained or trained[0]["status"] != "ok" or not (run.ptq or everything):
                continue
            for method in methods:
                have = {row["P_post"] for row in results.read_rows(_dir(bench, run), method)}
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
            f"delete {_dir(bench, run)} and train again to make its checkpoint anew"
        )
    return warnings


def _quantize_run(bench: Bench, group: Cohort, run: Run, method: str, bits: list[int]) -> list[str]:
    config = bench.experiment.config
    # With weights of another format than the hardware multiplies, the forward pass of a native run is simulated.
    program = group.program.evaluation().simulated()
    static = Static(group.shape.model, program, bench.experiment.optimizer)
    abstract = jax.eval_shape(lambda: step_lib.init_state(static, 0).params)
    params = checkpoint.restore(_dir(bench, run) / "checkpoint", abstract)
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
    evaluate = _evaluator(bench, group.shape, program)
    rows, warnings = [], []
    for i, b in enumerate(bits):
        loss = evaluate(jax.tree.map(lambda x, i=i: x[i], quantized.params), table)
        fallen = np.argwhere(np.asarray(quantized.fell_back[i])).tolist()
        names = ["/".join(apply.LINEARS[j]) + f" of layer {layer}" for layer, j in fallen]
        warnings += [f"{run.id} at {b} bits: {name} was rounded to nearest, its Hessian is unusable" for name in names]
        rows.append(
            _row(bench, run, loss, method=method, P_post=b, fallback_layers=len(fallen), ptq_granularity="channel")
        )
    results.write_rows(_dir(bench, run), method, [*results.read_rows(_dir(bench, run), method), *rows])
    return warnings


def _evaluator(bench: Bench, shape: experiment.Shape, program: Program) -> Callable[[Any, Any], float]:
    """(params, table) -> validation loss on the study's fixed held-out sequences, compiled once per program."""
    config = bench.experiment.config.evaluate
    static = Static(shape.model, program, bench.experiment.optimizer)
    loss = _validation_loss(static, config.batch_size)
    tokens = jnp.asarray(bench.loader(shape).validation_windows(config.sequences))
    return lambda params, table: float(loss(params, table, tokens))


@functools.lru_cache(maxsize=8)
def _validation_loss(static: Static, batch_size: int):
    return compilation.jit(
        lambda params, table, tokens: step_lib.validation_loss(static, params, table, tokens, batch_size)
    )


def _dir(bench: Bench, run: Run) -> Path:
    return run_directory(bench.workdir, run)


def _record(bench: Bench, finished: Finished, evaluate, program: Program) -> None:
    """Evaluates a run that has ended and writes what it leaves: the checkpoint first, the row that says so last."""
    run = finished.run
    if finished.diverged_step is not None:
        row = _row(bench, run, None, status="diverged", diverged_step=finished.diverged_step)
    else:
        loss = evaluate(finished.params, table_of(run, program))
        checkpoint.save(_dir(bench, run) / "checkpoint", finished.params)
        row = _row(bench, run, loss) if math.isfinite(loss) else _row(bench, run, None, status="diverged")
    results.write_rows(_dir(bench, run), "trained", [row])


def _row(bench: Bench, run: Run, loss: float | None, **more: Any) -> dict[str, Any]:
    config, shape = bench.experiment.config, run.shape
    non_embedding, _ = model.count_parameters(shape.model)
    return {
        "run": run.id,
        "N": non_embedding,
        "D": run.tokens,
        "P_w": run.bits("w"),
        "P_a": run.bits("a"),
        "P_kv": run.bits("k", "v"),
        "P_post": None,
        "loss": loss,
        "status": "ok",
        "method": "",
        "seed": run.seed,
        "size": shape.size,
        "epochs": round(bench.loader(shape).epochs(run.tokens), 4),
        "training_flops": model.training_flops_per_token(shape.model) * run.tokens,
        "width": shape.model.width,
        "depth": shape.model.depth,
        "heads": shape.model.heads,
        "sequence_length": shape.model.sequence_length,
        "batch_size": shape.batch_size,
        "peak_rate": run.peak_rate,
        "warmup_fraction": config.optimizer.warmup_fraction,
        **{f"{name}_format": fmt.name for name, fmt in run.formats},
        "w_granularity": run.precision.granularity("w"),
        "a_granularity": run.precision.granularity("a"),
        "attention_granularity": run.precision.granularity(*"qkvp"),
        "precision": run.precision.describe(),
        "validation_tokens": config.evaluate.sequences * shape.model.sequence_length,
        "vocab_size": shape.model.vocab_size,
        "corpus": bench.corpus.meta["hash"],
        "device": jax.devices()[0].device_kind,
        "jax_version": jax.__version__,
        **more,
    }


def plan_text(resolved: Experiment) -> str:
    """What a study would do: cohorts with their runs, parameters, tokens and FLOPs."""
    lines = [f"{'cohort':>8} {'runs':>5} {'N':>14} {'all params':>14} {'tokens':>18} {'FLOPs':>10}  quantized operands"]
    flops_total = 0
    for group in resolved.cohorts:
        non_embedding, parameters = model.count_parameters(group.shape.model)
        tokens = sum(run.tokens for run in group.runs)
        flops = tokens * model.training_flops_per_token(group.shape.model)
        flops_total += flops
        lines.append(
            f"{group.shape.size:>8} {len(group.runs):>5} {non_embedding:>14,} {parameters:>14,} {tokens:>18,} "
            f"{flops:>10.2e}  {precision.describe_program(group.program)}"
        )
    tokens = sum(run.tokens for run in resolved.runs)
    lines.append(
        f"{len(resolved.runs)} runs in {len(resolved.cohorts)} cohorts, {tokens:,} tokens, {flops_total:.2e} FLOPs; "
        f"{sum(run.ptq for run in resolved.runs)} runs are quantized after training"
    )
    return "\n".join(lines)


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n". UserError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={text}: allowed is i/n with 0 <= i < n")
    return int(match[1]), int(match[2])


def _main(argv) -> None:
    del argv
    config, workdir = _CONFIG.value, Path(_WORKDIR.value).expanduser()
    if not config.study.grid:
        raise ConfigError("study.grid", "empty", "at least one part; to train one model use precision_scaling.train")
    shard = parse_shard(_SHARD.value)
    if _DRY_RUN.value:
        print(plan_text(experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))))
        return
    bench = open_bench(config, workdir)
    train_missing(bench, shard)
    try:
        warnings = quantize_missing(bench, config.ptq.methods, config.ptq.bits, shard)
    finally:
        rows = results.gather(workdir)
    print("\n".join([*warnings, f"{rows} measured losses in {workdir / 'runs.csv'}"]))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; any option in it can be overridden.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study: checkpoints, metrics and runs.csv.")
    _SHARD = flags.DEFINE_string(
        "shard", "0/1", "i/n: do the i-th of n shares of the study, so that n workers can share it."
    )
    _DRY_RUN = flags.DEFINE_bool(
        "dry_run", False, "Print the plan (runs, cohorts, parameters, tokens, FLOPs) and stop."
    )
    flags.mark_flags_as_required(["config", "workdir"])
    errors.run(_main)
