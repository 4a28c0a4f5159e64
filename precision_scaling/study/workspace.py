"""What the runs of a study are measured with: the resolved config, its corpus, the workdir and its held-out sequences.

`study` trains the runs on it and `ptq.runs` quantizes them; both write the rows that are made here.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import ml_collections

from precision_scaling.config import base, experiment, options
from precision_scaling.config.experiment import Experiment
from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import Corpus, prepare
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.model import attention, decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize import native
from precision_scaling.runtime import compilation, files, hosts, paths, patterns, sharding, targets
from precision_scaling.runtime.sharding import Layout
from precision_scaling.runtime.targets import Target
from precision_scaling.study import automatic
from precision_scaling.study.automatic import Choice
from precision_scaling.training import blocks, checkpoint, compiled, optimizer
from precision_scaling.training import run as run_lib
from precision_scaling.training.run import Run

# Options that change no measured number: a workdir may be used again with others. Whether two roots hold the same
# corpus, its hash says.
_FREE_OPTIONS = re.compile(
    r"study\.|ptq\.(methods|bits|formats|group_size|symmetric|full_range|act_order|clip|rotate|correct_inputs|smoothing|granularity|layers|target_bits)"
    r"|train\.(log_every|checkpoint_seconds|steps_per_dispatch|rewinds|trackers)"
    r"|data\.(cache_dir|tfds_dir|workers|beam_options|hash|root)|compilation_cache|mesh\."
)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What the runs of a study are measured with."""

    experiment: Experiment
    corpus: Corpus
    workdir: Path
    layout: Layout

    def loader(self, shape: run_lib.Shape) -> Loader:
        """Batches of one shape."""
        return Loader(self.corpus, shape.model.sequence_length, shape.batch_size)

    def directory(self, run: Run) -> Path:
        """Where everything about a run is kept."""
        return paths.run(self.workdir, run.id)

    def parameters(self, run: Run) -> Any:
        """The parameters of a trained run, from its checkpoint, in their places. UserError where it cannot be read."""
        directory = self.directory(run) / paths.CHECKPOINT
        if blocks.is_stored(directory):
            return blocks.stack(blocks.Stored(directory, run.shape.model, self.layout))
        return checkpoint.restore(directory, self.layout.abstract(decoder.abstract(run.shape.model)))

    def blocks(self, run: Run) -> blocks.Blocks:
        """The same a block at a time: of a model from elsewhere, no more than one is in memory."""
        directory = self.directory(run) / paths.CHECKPOINT
        if blocks.is_stored(directory):
            return blocks.ReadAhead(blocks.Stored(directory, run.shape.model, self.layout))
        return blocks.Stacked(self.parameters(run))


def open_workspace(config, workdir: Path, layout: Layout | None = None) -> Workspace:
    """Checks the config, prepares the corpus and claims the workdir. UserError before anything is trained.

    What is "auto" in the config is chosen first, see `automatic`; the workspace's config has it as numbers.
    layout: that of `config.mesh` by default.
    """
    given, new = config, not files.exists(workdir / paths.CONFIG)
    if choice := chosen(config, workdir):
        config = choice.config
        if hosts.primary():
            print(choice, file=sys.stderr)
    if files.is_remote(workdir) and config.train.trackers:
        raise ConfigError("train.trackers", tuple(config.train.trackers), "none with a --workdir in a bucket")
    planned = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
    if layout is None:
        layout = sharding.make_layout(config.mesh)
        sharding.check(layout, config, [group.shape.model for group in planned.cohorts])
    names = optimizer.parameter_names(decoder.abstract(planned.runs[0].shape.model))
    patterns.check("config.optimizer.decay_pattern", config.optimizer.decay_pattern, names)
    for group in () if config.model.imported else planned.cohorts:  # an imported model is read a block at a time
        compiled.check_memory(layout, group.shape.model)
    corpus = prepare(**config.data)
    resolved = experiment.resolve(config, corpus.vocab_size)
    if config.data.within_documents:
        _check_ends(corpus, resolved.runs[0].shape.model)
    for run in resolved.runs:
        native.check_device(run.precision)
        attention.check_device(run.shape.model)
    workspace = Workspace(resolved, corpus, workdir, layout)
    for group in resolved.cohorts:
        loader = workspace.loader(group.shape)
        for key, wanted, available in (
            ("evaluate.sequences", config.evaluate.sequences, loader.n_validation_windows),
            ("ptq.calibration_sequences", config.ptq.calibration_sequences, loader.n_windows),
        ):
            if wanted > available:
                raise ConfigError(key, wanted, f"at most {available}, what the corpus holds at this sequence length")
    compilation.use_cache(config.compilation_cache)
    if choice and hosts.largest(int(new and files.exists(workdir / paths.CONFIG))):
        # Another worker was faster, and its choice is the workdir's.
        return open_workspace(given, workdir, layout)
    _claim(workdir, config, corpus, choice)
    return workspace


def chosen(config, workdir: Path, target: Target | None = None) -> Choice | None:
    """What "auto" in a config stands for, None where it has none; as the workdir has it, where it holds something.

    target: devices that are not here, to choose for; those of this run by default. Raises UserError.
    """
    options.check(config)
    if not automatic.asked(config):
        return None
    held = _read_claim(workdir) if files.exists(workdir / paths.CONFIG) else None
    if target is None:
        compilation.use_cache(config.compilation_cache)  # what is compiled to choose is what will run
    return automatic.choose(config, target or targets.here(), held)


def _check_ends(corpus: Corpus, model: ModelConfig) -> None:
    """ConfigError for a corpus whose documents do not end with the token that the model takes for that."""
    for side, last in corpus.last_tokens().items():
        if not last == corpus.end_of_text == model.document_token:
            raise ConfigError(
                "data.within_documents",
                True,
                f"a corpus whose documents end with the token {model.document_token}: the {side} tokens of "
                f"{corpus.directory} end with {last}",
            )


def _claim(workdir: Path, config, corpus: Corpus, choice: Choice | None) -> None:
    """Writes the config into a new workdir; of a used one, checks that its rows would be comparable."""
    now = {"config": experiment.describe(config), "corpus": corpus.meta["hash"]}
    made = choice.as_json() if choice else None
    path = workdir / paths.CONFIG
    if files.exists(path):
        before = _read_claim(workdir)
        made = made or before.get("chosen")
        then, new = _flatten({name: before[name] for name in now}), _flatten(now)
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
        files.write_sealed(path, now | ({"chosen": made} if made else {}))
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}; allowed is a directory that can be written") from None


def _read_claim(workdir: Path) -> dict[str, Any]:
    path = workdir / paths.CONFIG
    try:
        claim = files.read_sealed(path, older=lambda found: set(found) == {"config", "corpus"})
        before = base.get_config()
        before.update_from_flattened_dict(options.WHEN_NEW)
        defaults = experiment.describe(before)
        return {**claim, "config": _filled(_renamed(claim["config"]), defaults), "corpus": claim["corpus"]}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--workdir={workdir}: no {paths.CONFIG} there; allowed is the --workdir of train or study"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a config ({error}); allowed is a new --workdir or one of train or study"
        ) from None


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A workdir's config with every option under the name that it has now."""
    sections = {name: dict(values) if isinstance(values, dict) else values for name, values in dict(config).items()}
    for old, new in options.RENAMED.items():
        section, leaf, name = *old.split("."), new.partition(".")[2]
        if isinstance(sections.get(section), dict) and leaf in sections[section]:
            sections[section][name] = sections[section].pop(leaf)
    return sections


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A workdir's config with the options that are newer than it, at their defaults."""
    nested = {key: _filled(config[key], value) for key, value in defaults.items() if isinstance(config.get(key), dict)}
    return {**defaults, **config, **nested}


def reopen_workspace(workdir: Path) -> Workspace:
    """The workspace of a workdir that `train` or `study` has filled."""
    return open_workspace(ml_collections.ConfigDict(_read_claim(workdir)["config"]), workdir, sharding.local_layout())


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removeprefix("config."): tree}
    items = ((f"{prefix}.{key}" if prefix else key, value) for key, value in tree.items())
    return {name: leaf for key, value in items for name, leaf in _flatten(value, key).items()}
