"""The loss of a trained run on any text, at its own precision or as one of its packed models."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from precision_scaling.data import DataError, text_files
from precision_scaling.errors import UserError
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import codes, packed, registry
from precision_scaling.runtime.progress import progress_bar
from precision_scaling.runtime.sharding import BATCH
from precision_scaling.study.evaluate import validation_loss
from precision_scaling.study.ptq import packed_path
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.run import Cohort, Run
from precision_scaling.training.step import StepConfig


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """loss: nats per token, the mean over `tokens` predicted tokens. bytes: of the text that they are, about."""

    loss: float
    tokens: int
    documents: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """What an encoding by the model would take: comparable between tokenizers."""
        return self.loss * self.tokens / self.bytes / math.log(2)


@dataclasses.dataclass(frozen=True)
class Model:
    """What is evaluated: parameters, what is compiled, and the grids."""

    params: Any
    config: StepConfig
    grids: Any


def model_of(workspace: Workspace, cohort: Cohort, run: Run, quantized: str = "") -> Model:
    """A trained run, or the packed model of that name (a folder of its quantized/). UserError where it is not there."""
    static = cohort.static.evaluation()
    if not quantized:
        config = StepConfig(run.shape.model, static, workspace.experiment.optimizer)
        return Model(workspace.parameters(run), config, static.grids(run.precision, run.shape.model.depth))
    loaded = packed.load(packed_path(workspace.directory(run), quantized))
    scheme = registry.of_method(loaded.method.partition("-")[0], workspace.experiment.config.ptq)
    if loaded.operands and scheme.name != loaded.method:  # what shares a scale in activations is an option, too
        raise UserError(f"--quantized={quantized}: allowed with the options of {scheme.name}, those of the workdir")
    static = scheme.static(cohort.static)
    grids = static.grids(run.precision, run.shape.model.depth, w=parse("bf16"))
    if loaded.operands:  # at the width of the kernels, which is one then
        grids |= dict.fromkeys(loaded.operands, parse(loaded.bits).grid())
    config = StepConfig(packed.decoder(run.shape.model, loaded), static, workspace.experiment.optimizer)
    return Model(codes.parameters(loaded.model), config, grids)


def on_text(workspace: Workspace, model: Model, root: str, feature: str = "text", tokens: int = 0) -> TextLoss:
    """The loss on the documents of files, in windows of the run's sequence length that follow each other.

    root, feature: as `data.root` and `data.feature` of the corpus "text". tokens: of the first so many; 0: all. Text
    that is shorter than a window is refused. Raises UserError.
    """
    corpus, length = workspace.corpus, model.config.model.sequence_length
    broken, documents, size = text_files.Broken(), 0, 0
    ids: list[np.ndarray] = [np.array([corpus.end_of_text])]
    count, tokenizer = 0, corpus.load_tokenizer()
    for text in _documents(root, feature, broken):
        encoded = text.encode("utf-8")
        (found,) = tokenizer.encode([encoded])
        ids += [np.asarray(found), np.array([corpus.end_of_text])]
        documents, size, count = documents + 1, size + len(encoded), count + len(found) + 1
        if tokens and count >= tokens:
            break
    stream = np.concatenate(ids).astype(np.int32)
    windows = min(count, tokens or count) // length
    if not windows:
        raise UserError(
            f"--text={root}: {count} tokens in {documents} documents ({broken.count} records left out); allowed is "
            f"{length} or more, a window of the model"
        )
    starts = np.arange(windows) * length
    windows_NxS1 = stream[starts[:, None] + np.arange(length + 1)]
    share = windows * length / count
    return TextLoss(
        _mean_loss(workspace, model, windows_NxS1), windows * length, documents, max(1, round(size * share))
    )


def _documents(root: str, feature: str, broken: text_files.Broken) -> Iterator[str]:
    try:
        for name, path in text_files.find_files(root):
            yield from text_files.documents(path, name, feature, broken)
    except DataError as error:
        raise UserError(str(error).replace("data.root", "--text").replace("data.feature", "--feature")) from None


def _mean_loss(workspace: Workspace, model: Model, windows_NxS1: np.ndarray) -> float:
    """Over batches of `evaluate.batch_size`; the windows that are left are a batch of their own."""
    loss = validation_loss(model.config, workspace.layout)
    params = jax.device_put(model.params, workspace.layout.of_tree(model.params))
    size = workspace.experiment.config.evaluate.batch_size
    batches = [windows_NxS1[start : start + size] for start in range(0, len(windows_NxS1), size)]
    total = 0.0
    for batch in progress_bar(batches, desc="evaluating", unit=" batches", leave=False):
        place = workspace.layout.of_shape((1, *batch.shape), None, ("run", *BATCH))
        total += float(loss(params, model.grids, jax.device_put(batch[None], place))) * len(batch)
    return total / len(windows_NxS1)
