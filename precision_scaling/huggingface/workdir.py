"""A Hugging Face model as the one run of a workdir, as `train` would have left it; and a run as a Hugging Face model.

What `ptq` needs is then there: the config with the model's own tokenizer, a checkpoint, and the row of its loss.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from precision_scaling.data import DataError
from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.errors import UserError
from precision_scaling.huggingface import config_json, reading
from precision_scaling.huggingface import quantized as quantized_lib
from precision_scaling.huggingface.directory import Pretrained, open_pretrained, write_pretrained, write_tensors
from precision_scaling.ptq import packed
from precision_scaling.runtime import files, paths, sharding
from precision_scaling.runtime.progress import progress_bar
from precision_scaling.study import evaluate, results
from precision_scaling.study.generate import trained_run
from precision_scaling.study.ptq import packed_path
from precision_scaling.study.workspace import open_workspace, reopen_workspace
from precision_scaling.training import blocks
from precision_scaling.training.run import Run

# Longest sequences that are chosen unasked: the attention products grow with their square.
DEFAULT_SEQUENCE_LENGTH = 1024


def import_model(
    directory: Path, workdir: Path, tokens: float, config: Any, sequence_length: int = 0, end_of_text: str = ""
) -> Run:
    """Makes a workdir of a model directory: evaluates the model on the config's corpus and writes checkpoint and row.

    Raises UserError for a directory, a config or a workdir that cannot be used, before anything is written.

    tokens: D, training tokens that the model has seen; its files do not say. config: like configs/base.py; of its
    `model` section dtype and remat are kept, the rest is the model's own. sequence_length: of evaluation and
    calibration; 0 is what the model allows, at most 1024. end_of_text: name or id of the token between documents; empty
    is the one that config.json names.
    """
    pretrained = open_pretrained(directory)
    config = _config_of(pretrained, tokens, config, sequence_length, end_of_text)
    workspace = open_workspace(config, workdir, sharding.local_layout())
    (group,) = workspace.experiment.cohorts
    (run,) = group.runs
    if results.read_rows(workspace.directory(run), "trained"):
        return run
    static, path = group.static.evaluation(), workspace.directory(run) / paths.CHECKPOINT
    grids = static.grids(run.precision, group.shape.model.depth)
    held_out = evaluate.BlockwiseLoss(workspace, group.shape, static, grids, pretrained.top())
    with progress_bar(total=pretrained.depth, desc="reading and evaluating", unit="block") as bar:

        def done(block: Any) -> None:
            held_out.advance(jax.device_put(block, workspace.layout.of_tree(block)))
            bar.update()

        blocks.store(path, pretrained, done)
    loss = held_out.loss()
    if not math.isfinite(loss):
        files.remove_tree(path)
        raise UserError(f"{directory}: the model's validation loss is {loss}; allowed is a model whose loss is finite")
    results.write_rows(workspace.directory(run), "trained", [results.row(workspace, run, loss)])
    results.gather(workdir)
    return run


def _config_of(pretrained: Pretrained, tokens: float, config: Any, sequence_length: int, end_of_text: str) -> Any:
    """The config of the workdir."""
    tokenizer = _tokenizer_of(pretrained, end_of_text)
    longest, _ = config_json.longest_sequence(pretrained.config) or (DEFAULT_SEQUENCE_LENGTH, "")
    sequence_length = sequence_length or min(longest, DEFAULT_SEQUENCE_LENGTH)
    pretrained.model(sequence_length)  # refuses a length that the model was not made for
    if not sequence_length <= tokens < math.inf:
        raise UserError(f"--tokens={tokens:g}: allowed is the training tokens of the model, {sequence_length} or more")
    config = config.copy_and_resolve_references()
    config.data.tokenizer = tokenizer
    config.model.update(pretrained.options)
    config.model.update({"size": "", "base_size": "", "sequence_length": sequence_length})
    config.model.imported = pretrained.fingerprint
    # Nothing is trained: a step of one sequence rounds D down by the least.
    config.train.update({"tokens": int(tokens), "batch_size": 1, "microbatches": 1, "seed": 0})
    return config


def _tokenizer_of(pretrained: Pretrained, end_of_text: str) -> str:
    """The tokenizer option: the model's own, with the end of text that is asked for, or that its config.json names.

    Of several that one counts which is named as an end of text usually is, or the first: others end an answer.
    """
    path, ends = pretrained.directory / "tokenizer.json", config_json.end_of_text(pretrained.config)
    reading.regular_size(path)
    spec = f"file:{path}"
    if end_of_text:
        named = f"{spec}?end_of_text={end_of_text}"
        try:
            tokenizers.from_file(path, named)
        except DataError as error:
            raise UserError(f"--end_of_text={end_of_text}: {error}") from None
        return named
    named = f"{spec}?end_of_text={ends[0]}" if ends else spec
    tokenizer = tokenizers.from_file(path, named)
    return spec if tokenizer.usual_ends and tokenizer.usual_ends[0] in (ends or tokenizer.usual_ends) else named


DTYPES = ("float32", "bfloat16")


def export_run(workdir: Path, out: Path, run_id: str = "", quantized: str = "", dtype: str = "float32") -> Run:
    """Writes a trained run of a workdir as a directory that `transformers` loads, with its tokenizer.

    run_id: may be left empty where only one run is trained. quantized: a folder of the run's packed models ("gptq-4");
    it is written as integers and scales (`compressed`). dtype: of what is not quantized, scales included. Raises
    UserError for what is not there, a decoder that no Hugging Face architecture computes, or a format that the target
    cannot hold, before anything is written; `out` must be new or empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: there is something already; allowed is a new or an empty directory")
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: allowed is one of {', '.join(DTYPES)}")
    workspace = reopen_workspace(workdir)
    _, run = trained_run(workspace, run_id)
    model, end_of_text = run.shape.model, workspace.corpus.end_of_text
    ends = {"bos_token_id": None, "eos_token_id": end_of_text, "pad_token_id": None}
    if not quantized:
        params = workspace.parameters(run)
        with _whole_or_nothing(out):
            _write_tokenizer(workspace.corpus.directory / "tokenizer.json", out, end_of_text)
            write_pretrained(out, model, params, dtype, **ends)
        return run
    loaded = packed.load(packed_path(workspace.directory(run), quantized))
    decoder = packed.decoder(model, loaded)
    quantized_lib.check(loaded, quantized, decoder)
    plain, tensors, quantization = quantized_lib.tensors(decoder, loaded, np.dtype(dtype))
    with _whole_or_nothing(out):
        _write_tokenizer(workspace.corpus.directory / "tokenizer.json", out, end_of_text)
        write_tensors(out, plain, tensors, dtype, quantization_config=quantization, **ends)
    return run


@contextlib.contextmanager
def _whole_or_nothing(out: Path) -> Iterator[None]:
    """Removes what was written to a new or empty directory where the block fails. UserError for a full disk."""
    existed = out.exists()
    try:
        yield
    except BaseException as error:
        for path in out.glob("*"):
            path.unlink(missing_ok=True)
        if not existed and out.exists():
            out.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--out={out}: {error.strerror}; allowed is a directory that can be written") from None
        raise


def _write_tokenizer(tokenizer: Path, out: Path, end_of_text: int) -> None:
    """Tokenizer and generation config, before the model: a directory without config.json is no model."""
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer.exists():  # bytes need none
        files.copy(tokenizer, out / "tokenizer.json")
        token = Tokenizer.from_file(str(tokenizer)).id_to_token(end_of_text)
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token}
        files.atomic_write(out / "tokenizer_config.json", json.dumps(described, indent=1) + "\n")
    files.atomic_write(out / "generation_config.json", json.dumps({"eos_token_id": end_of_text}, indent=1) + "\n")
