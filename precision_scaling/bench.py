"""What the runs of a study are measured with: the resolved config, its corpus, the workdir and its held-out sequences.

`study` trains the runs on it and `ptq.runs` quantizes them; both write the rows that are made here.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import base
from precision_scaling import (
    checkpoint,
    compilation,
    experiment,
    files,
    hosts,
    model,
    optimizer,
    patterns,
    precision,
    programs,
    sharding,
)
from precision_scaling import step as step_lib
from precision_scaling.cohort import run_directory
from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import Corpus, prepare
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.experiment import Experiment, Run
from precision_scaling.progress import progress_bar
from precision_scaling.ptq.setting import of_config
from precision_scaling.quantize import Program
from precision_scaling.sharding import BATCH, Layout
from precision_scaling.step import Static

# Options that change no measured number: a workdir may be used again with others. Whether two roots hold the same
# corpus, its hash says.
_FREE_OPTIONS = re.compile(
    r"study\.|ptq\.(methods|bits|group_size|symmetric|act_order|clip|smoothing|granularity)"
    r"|train\.(log_every|checkpoint_seconds|steps_per_dispatch|rewinds|sinks)"
    r"|data\.(cache_dir|tfds_dir|workers|beam_options|hash|root)|compilation_cache|mesh\."
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the runs of a study are measured with."""

    experiment: Experiment
    corpus: Corpus
    workdir: Path
    layout: Layout

    def loader(self, shape: experiment.Shape) -> Loader:
        """Batches of one shape."""
        return Loader(self.corpus, shape.model.sequence_length, shape.batch_size)

    def directory(self, run: Run) -> Path:
        """Where everything about a run is kept."""
        return run_directory(self.workdir, run)

    def parameters(self, run: Run) -> Any:
        """The parameters of a trained run, from its checkpoint, in their places. UserError where it cannot be read."""
        abstract = self.layout.abstract(_abstract_parameters(run.shape.model))
        return checkpoint.restore(self.directory(run) / "checkpoint", abstract)


@functools.lru_cache(maxsize=8)
def _abstract_parameters(config: model.ModelConfig) -> Any:
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def open_bench(config, workdir: Path, layout: Layout | None = None) -> Bench:
    """Checks the config, prepares the corpus and claims the workdir. UserError before anything is trained.

    layout: that of `config.mesh` by default.
    """
    planned = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
    if layout is None:
        layout = sharding.make_layout(config.mesh)
        sharding.check(layout, config, [group.shape.model for group in planned.cohorts])
    names = optimizer.parameter_names(_abstract_parameters(planned.runs[0].shape.model))
    patterns.check("config.optimizer.decayed", config.optimizer.decayed, names)
    for group in planned.cohorts:
        programs.check_memory(layout, group.shape.model)
    corpus = prepare(**config.data)
    resolved = experiment.resolve(config, corpus.vocab_size)
    for run in resolved.runs:
        precision.check_device(run.precision)
    bench = Bench(resolved, corpus, workdir, layout)
    for group in resolved.cohorts:
        loader = bench.loader(group.shape)
        for key, wanted, available in (
            ("evaluate.sequences", config.evaluate.sequences, loader.n_validation_windows),
            ("ptq.calibration_sequences", config.ptq.calibration_sequences, loader.n_windows),
        ):
            if wanted > available:
                raise ConfigError(key, wanted, f"at most {available}, what the corpus holds at this sequence length")
    compilation.use_cache(config.compilation_cache)
    _claim(workdir, config, corpus)
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
    hosts.wait_for_all("read the claim")
    if not hosts.primary():
        return
    try:
        files.write_sealed(path, now)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}; allowed is a directory that can be written") from None


def _read_claim(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        claim = files.read_sealed(path, older=lambda found: set(found) == {"config", "corpus"})
        defaults = experiment.describe(base.get_config())
        return {"config": _filled(dict(claim["config"]), defaults), "corpus": claim["corpus"]}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--workdir={workdir}: no config.json there; allowed is the --workdir of train or study"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a config ({error}); allowed is a new --workdir or one of train or study"
        ) from None


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A workdir's config with the options that are newer than it, at their defaults."""
    nested = {key: _filled(config[key], value) for key, value in defaults.items() if isinstance(config.get(key), dict)}
    return {**defaults, **config, **nested}


def reopen_bench(workdir: Path) -> Bench:
    """The bench of a workdir that `train` or `study` has filled."""
    return open_bench(ml_collections.ConfigDict(_read_claim(workdir)["config"]), workdir, sharding.local_layout())


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removeprefix("config."): tree}
    items = ((f"{prefix}.{key}" if prefix else key, value) for key, value in tree.items())
    return {name: leaf for key, value in items for name, leaf in _flatten(value, key).items()}


def evaluator(
    bench: Bench, shape: experiment.Shape, program: Program, progress: bool = False
) -> Callable[[Any, Any], float]:
    """(params, table) -> validation loss on the study's fixed held-out sequences, compiled once per program.

    progress: a bar, for which each batch is a dispatch of its own.
    """
    config = bench.experiment.config.evaluate
    windows_NxS1 = bench.loader(shape).validation_windows(config.sequences)
    windows_NxBxS1 = windows_NxS1.reshape(-1, config.batch_size, windows_NxS1.shape[-1])
    parts = np.split(windows_NxBxS1, len(windows_NxBxS1) if progress else 1)
    # Every axis that a batch can be split over has its share of the work, whatever it is for in training.
    place = bench.layout.of_shape(parts[0].shape, None, ("run", *BATCH))
    tokens = [jax.make_array_from_callback(part.shape, place, part.__getitem__) for part in parts]
    loss = _validation_loss(Static(shape.model, program, bench.experiment.optimizer), bench.layout)

    def mean_loss(params, table) -> float:
        params = jax.device_put(params, bench.layout.of_tree(params))  # in place they are, after training
        bar = progress_bar(tokens, desc="evaluating", unit=" batches", disable=not progress)
        return float(np.mean([float(loss(params, table, part)) for part in bar]))

    return mean_loss


@functools.lru_cache(maxsize=8)
def _validation_loss(static: Static, layout: Layout):
    def loss(params, table, tokens_NxBxS1):
        with sharding.splitting(layout, ("run", *BATCH)):
            return step_lib.validation_loss(static, params, table, tokens_NxBxS1)

    return compilation.jit(loss, out_shardings=layout.place())


def row(bench: Bench, run: Run, loss: float | None, **more: Any) -> dict[str, Any]:
    """One line of runs.csv: a run's columns with a measured loss; `more` adds or replaces columns."""
    shape = run.shape
    return {
        **setting_columns(bench.experiment.config, run),
        "loss": loss,
        "epochs": None if run.imported else round(bench.loader(shape).epochs(run.tokens), 4),
        "corpus": bench.corpus.meta["hash"],
        "device": jax.devices()[0].device_kind,
        "jax_version": jax.__version__,
        **more,
    }


def setting_columns(config, run: Run) -> dict[str, Any]:
    """The columns of a run's rows that are known before it is trained."""
    shape = run.shape
    non_embedding, _ = model.count_parameters(shape.model)
    return {
        "run": run.id,
        "N": non_embedding,
        "D": run.tokens,
        "P_w": run.bits("w"),
        "P_a": run.bits("a"),
        "P_kv": run.bits("k", "v"),
        "P_post": None,
        "status": "ok",
        "method": "",
        "seed": run.seed,
        "size": shape.size,
        "training_flops": model.training_flops_per_token(shape.model) * run.tokens,
        "width": shape.model.width,
        "depth": shape.model.depth,
        "heads": shape.model.heads,
        "sequence_length": shape.model.sequence_length,
        "batch_size": shape.batch_size,
        "peak_rate": run.peak_rate,
        "warmup_fraction": round(run.warmup_steps / run.steps, 4),
        "schedule": run.schedule_name,
        **{f"{name}_format": fmt.name for name, fmt in run.formats},
        "w_granularity": run.precision.granularity("w"),
        "a_granularity": run.precision.granularity("a"),
        "attention_granularity": run.precision.granularity(*"qkvp"),
        "precision": run.precision.describe(),
        "validation_tokens": config.evaluate.sequences * shape.model.sequence_length,
        "vocab_size": shape.model.vocab_size,
        "imported": run.imported,
        # How a model was trained elsewhere is not known here.
        **(dict.fromkeys(("batch_size", "peak_rate", "warmup_fraction", "schedule")) if run.imported else {}),
    }


def planned_rows(config, run: Run) -> Iterator[dict[str, Any]]:
    """The rows that a run will have, without what only a measurement can tell."""
    columns = setting_columns(config, run) | {"status": ""}
    yield columns
    for setting in of_config(config.ptq) if run.ptq else ():
        for bits in config.ptq.bits:
            yield {**columns, **setting.columns, "P_post": bits}
