"""Train, quantize, evaluate and sample models from Python: the commands `train`, `study` and `ptq` as functions.

Each works on a workdir, as the commands do, and does what is missing in it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from ml_collections import ConfigDict

from precision_scaling.config import base, command_line
from precision_scaling.config import options as options_lib
from precision_scaling.config.base import grid
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.numerics.formats import register as register_format
from precision_scaling.quantize import fake_quant
from precision_scaling.runtime import files, paths
from precision_scaling.study import generate as sampling
from precision_scaling.study import locks, results, run_missing, text_loss
from precision_scaling.study.evaluate import evaluator
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import open_workspace, reopen_workspace

__all__ = [
    "evaluate",
    "fake_quant",
    "generate",
    "grid",
    "load_config",
    "quantize_model",
    "register_format",
    "run_study",
    "train_model",
]


def load_config(file: str | Path | None = None, options: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config that a file's get_config() returns, by default that of configs/base.py, with other values of options.

    options: values by name, e.g. {"model.size": "25k", "train.tokens": 500_000}. For a study, add parts to the grid:
    config.study.grid.mine = grid(sizes=("25k",), tokens=(500_000,)). Raises UserError, one line, for a mistake.
    """
    config = base.get_config() if file is None else command_line.load_config(str(file))
    config.study.grid.unlock()
    for name, value in (options or {}).items():
        prefix, _, leaf = name.rpartition(".")
        section: Any = config
        for key in prefix.split("."):
            section = section[key] if isinstance(section, ConfigDict) and key in section else {}
        if leaf not in section:
            raise UserError(f"config.{name}: {options_lib.unknown(section, f'{prefix}.', leaf)}")
        if isinstance(section[leaf], int) and isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e6
        options_lib.check_option(name, value)
        section[leaf] = tuple(value) if isinstance(value, list) else value
    options_lib.check(config)
    return config


def train_model(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains the one model that a config describes, where it is not trained yet; the row of its loss.

    The row has the columns of runs.csv: "loss" is the validation loss in nats per token, None where "status" is
    "diverged". Raises UserError for a config or a workdir that cannot be used.
    """
    options_lib.check(config)
    if config.study.grid:
        raise ConfigError("study.grid", list(config.study.grid), "empty; for a grid there is run_study")
    workdir = files.place(workdir, "workdir")
    workspace = open_workspace(config, workdir)
    with locks.hold(workdir, (0, 1)):
        run_missing.train_missing(workspace)
        results.gather(workdir)
    (run,) = workspace.experiment.runs
    (row,) = results.read_rows(workspace.directory(run), "trained")
    return row


def run_study(config: ConfigDict, workdir: str | Path) -> pd.DataFrame:
    """Trains every run of a config's grid and quantizes those that ask for it; the table of all losses, as in runs.csv.

    Raises UserError.
    """
    options_lib.check(config)
    workdir = files.place(workdir, "workdir")
    workspace = open_workspace(config, workdir)
    with locks.hold(workdir, (0, 1)):
        run_missing.train_missing(workspace)
        quantize_missing(workspace, config.ptq.methods, config.ptq.bits, formats=config.ptq.formats)
        results.gather(workdir)
    return pd.read_csv(workdir / paths.TABLE)


def quantize_model(
    workdir: str | Path,
    method: str = "gptq",
    bits: Iterable[int] = (3, 4, 5, 6),
    formats: Iterable[str] = (),
    save: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """Quantizes every trained run of a workdir after training; the table of all its losses, as in runs.csv.

    method: gptq, awq, rtn, smoothquant or kv_cache. bits: of integers. formats: others, by name. options: of the
    config's `ptq` section, e.g. group_size=32. save: keeps the quantized models, packed. Raises UserError.
    """
    workdir = files.place(workdir, "workdir")
    workspace = reopen_workspace(workdir)
    for name in options:
        if name not in workspace.experiment.config.ptq:
            raise UserError(f"ptq.{name}: {options_lib.unknown(workspace.experiment.config.ptq, 'ptq.', name)}")
    with locks.hold(workdir, (0, 1)):
        quantize_missing(workspace, [method], bits, everything=True, options=options, save=save, formats=formats)
        results.gather(workdir)
    return pd.read_csv(workdir / paths.TABLE)


def evaluate(workdir: str | Path, run: str = "", text: str | Path = "", quantized: str = "") -> float:
    """The loss of a trained run in nats per token, measured from its checkpoint.

    run: its id; may be left empty where only one is trained. text: files to evaluate on, as `data.root` of the corpus
    "text"; empty is the run's held-out text. quantized: a packed model of the run, such as "gptq-4". Raises UserError.
    """
    workspace = reopen_workspace(files.place(workdir, "workdir"))
    cohort, chosen = sampling.trained_run(workspace, run)
    model = text_loss.model_of(workspace, cohort, chosen, quantized)
    if text:
        return text_loss.on_text(workspace, model, str(text)).loss
    return evaluator(workspace, cohort.shape, model.config.static)(model.params, model.grids)


def generate(
    workdir: str | Path, prompt: str, tokens: int = 100, temperature: float = 0.0, seed: int = 0, run: str = ""
) -> str:
    """The text with which a trained run continues a prompt, by at most `tokens` tokens. The prompt begins a document.

    temperature: 0 takes the likeliest token each time, 1 samples from the model's distribution. run: as in `evaluate`.
    """
    workspace = reopen_workspace(files.place(workdir, "workdir"))
    pieces = sampling.continuation(workspace, prompt, tokens, temperature, seed, run)
    return b"".join(pieces).decode("utf-8", "replace")
