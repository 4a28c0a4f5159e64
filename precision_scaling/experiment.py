"""From a config to the runs it asks for: checks every option and resolves it before anything is compiled or written.

First stage of the data flow: `study` and `train` take the runs from here and group them into cohorts.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from precision_scaling import formats, model, optimizer, quantize, sizes
from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.errors import ConfigError
from precision_scaling.formats import Format

DTYPES = ("float32", "bfloat16")
PTQ_METHODS = ("gptq", "rtn")
PRECISION_KEYS = {"w": "weights", "a": "activations", "q": "q", "k": "k", "v": "v", "p": "p"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the runs of a cohort share: everything a compiled step depends on but the program."""

    size: str
    model: model.ModelConfig
    batch_size: int
    microbatches: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.sequence_length


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. formats: number format of each operand; steps: length of the schedule."""

    shape: Shape
    formats: tuple[tuple[str, Format], ...]
    steps: int
    warmup_steps: int
    peak_rate: float
    seed: int
    ptq: bool

    @property
    def tokens(self) -> int:
        """D, training tokens."""
        return self.steps * self.shape.tokens_per_step

    @functools.cached_property
    def id(self) -> str:
        """Name of the run: readable, and different for runs that differ in anything but the study's common options."""
        low = {name: fmt for name, fmt in self.formats if fmt.family != "none"}
        precision = "_".join(f"{name}{fmt.name}" for name, fmt in low.items()) or "bf16"
        readable = f"{self.shape.size}-D{self.tokens}-{precision}-s{self.seed}"
        content = repr((self.shape, self.formats, self.steps, self.warmup_steps, self.peak_rate, self.seed))
        return f"{readable}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"

    def bits(self, *operands: str) -> float:
        """Bits of an operand; of several, the fewest. Unquantized formats count as 16."""
        return min(min(dict(self.formats)[name].bits, 16.0) for name in operands)


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Runs of one shape that one compiled program serves."""

    shape: Shape
    program: quantize.Program
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config."""

    config: ml_collections.ConfigDict
    optimizer: optimizer.OptimizerConfig
    runs: tuple[Run, ...]
    cohorts: tuple[Cohort, ...]


def resolve(config: ml_collections.ConfigDict, vocab_size: int) -> Experiment:
    """All runs of a config, grouped into cohorts. Raises ConfigError (or FormatError) for what cannot be run.

    vocab_size: of the tokenizer; the number of parameters depends on it.
    """
    _check_options(config)
    runs: dict[str, Run] = {}
    for size, tokens, precision, seed, ptq in _points(config):
        run = _run(config, size, vocab_size, tokens, precision, seed, ptq)
        if run.id in runs:
            run = dataclasses.replace(run, ptq=run.ptq or runs[run.id].ptq)
        runs[run.id] = run
    return Experiment(config, _optimizer(config), tuple(runs.values()), _cohorts(config, runs.values()))


def parse_precision(text: str, default: Mapping[str, Format]) -> dict[str, Format]:
    """Formats by operand from "bf16" or a string such as "w4_a8_kv4": operands not named keep their default."""
    result = dict(default)
    if text == "bf16":
        return result
    parts = {**{name: (name,) for name in quantize.OPERANDS}, **quantize.PARTS}
    for word in text.split("_"):
        match = re.fullmatch(r"(kv|[waqkvp])(.+)", word)
        if not match:
            raise ConfigError(
                "study.grid.*.precisions",
                text,
                "'bf16' or w, a, kv, q, k, v, p with a format, joined by '_': 'w4_a8_kv4'",
            )
        for operand in parts[match[1]]:
            result[operand] = _format(f"study.grid.*.precisions = {text!r}", match[2])
    return result


def describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON-ready plain values."""
    return json.loads(config.to_json_best_effort())


def _points(config):
    """(size, tokens, precision, seed, ptq) of every run the grid asks for."""
    default = {name: _format(f"precision.{key}", config.precision[key]) for name, key in PRECISION_KEYS.items()}
    if not config.study.grid:
        ptq = bool(config.ptq.methods)
        yield config.model.size, config.train.tokens, default, config.train.seed, ptq
        return
    for name, part in config.study.grid.items():
        for key in ("sizes", "tokens", "precisions", "seeds"):
            if not isinstance(part.get(key), tuple | list) or not part[key]:
                raise ConfigError(f"study.grid.{name}.{key}", part.get(key), "a tuple that is not empty")
        unknown = set(part) - {"sizes", "tokens", "precisions", "seeds", "ptq"}
        if unknown:
            raise ConfigError(f"study.grid.{name}", sorted(unknown), "sizes, tokens, precisions, seeds, ptq")
        for size, tokens, text, seed in itertools.product(part.sizes, part.tokens, part.precisions, part.seeds):
            yield size, tokens, parse_precision(text, default), seed, part.ptq


def _format(key: str, spec: object) -> Format:
    try:
        return formats.parse(spec)
    except formats.FormatError as error:
        raise ConfigError(key, spec, str(error).partition("allowed: ")[2] or str(error)) from None


def _run(config, size, vocab_size, tokens, precision, seed, ptq) -> Run:
    shape = Shape(size, _model_config(config, size, vocab_size), config.train.batch_size, config.train.microbatches)
    steps = int(tokens) // shape.tokens_per_step
    if steps < 1:
        raise ConfigError("train.tokens", tokens, f"at least one batch, {shape.tokens_per_step} tokens")
    return Run(
        shape=shape,
        formats=tuple((name, precision[name]) for name in quantize.OPERANDS),
        steps=steps,
        warmup_steps=max(1, round(config.optimizer.warmup_fraction * steps)),
        peak_rate=float(config.optimizer.peak_rate),
        seed=int(seed),
        ptq=bool(ptq),
    )


def _model_config(config, size: str, vocab_size: int) -> model.ModelConfig:
    c, named, base = config.model, sizes.named(size), sizes.named(config.model.base_size)
    width = c.width or named.width
    heads = c.heads or named.heads
    hidden = c.hidden or (sizes.hidden_width(width, 8) if c.width else named.hidden)
    if width % heads or (width // heads) % 2:
        raise ConfigError("model.heads", heads, f"a divisor of the width ({width}) that leaves an even head dimension")
    return model.ModelConfig(
        vocab_size=vocab_size,
        width=width,
        depth=c.depth or named.depth,
        heads=heads,
        hidden=hidden,
        sequence_length=c.sequence_length,
        base_width=base.width,
        base_depth=base.depth,
        dtype=c.dtype,
        rope_theta=c.rope_theta,
        norm_epsilon=c.norm_epsilon,
        remat=c.remat,
    )


def _optimizer(config) -> optimizer.OptimizerConfig:
    c = config.optimizer
    return optimizer.OptimizerConfig(c.beta1, c.beta2, c.epsilon, c.weight_decay, c.clip_norm, c.final_fraction)


def _cohorts(config, runs) -> tuple[Cohort, ...]:
    """One cohort per shape, longest runs first: the lanes then end at nearly the same time."""
    cohorts = []
    for shape in dict.fromkeys(run.shape for run in runs):
        members = sorted((run for run in runs if run.shape == shape), key=lambda run: (-run.steps, run.id))
        cohorts.append(Cohort(shape, _program(config, members), tuple(members)))
    return tuple(cohorts)


def _program(config, runs) -> quantize.Program:
    granularity = {
        "w": config.precision.weights_granularity,
        "a": config.precision.activations_granularity,
        **dict.fromkeys("qkvp", config.precision.attention_granularity),
    }
    operands = []
    for name in quantize.OPERANDS:
        kind = formats.shared_kind(dict(run.formats)[name] for run in runs)
        if kind is None:
            names = sorted({dict(run.formats)[name].name for run in runs})
            raise ConfigError(
                "study.grid", names, f"formats of one family for operand {name!r} in the runs of one shape"
            )
        if kind.family != "none":
            operands.append((name, quantize.Operand(kind, granularity[name])))
    return quantize.Program(tuple(operands))


def _check_options(config) -> None:
    for key, allowed in (
        ("model.dtype", DTYPES),
        ("precision.weights_granularity", quantize.GRANULARITIES),
        ("precision.activations_granularity", quantize.GRANULARITIES),
        ("precision.attention_granularity", quantize.GRANULARITIES),
    ):
        section, name = key.split(".")
        if config[section][name] not in allowed:
            raise ConfigError(key, config[section][name], f"one of {', '.join(allowed)}")
    positive = {
        "model": ("sequence_length", "rope_theta", "norm_epsilon"),
        "optimizer": ("peak_rate", "epsilon"),
        "train": ("tokens", "batch_size", "microbatches", "log_every", "steps_per_dispatch"),
        "evaluate": ("sequences", "batch_size"),
        "ptq": ("calibration_sequences",),
        "study": ("lanes",),
    }
    for section, names in positive.items():
        for name in names:
            if not config[section][name] > 0:
                raise ConfigError(f"{section}.{name}", config[section][name], "a number above 0")
    for section, names in {
        "model": ("width", "depth", "heads", "hidden"),
        "optimizer": ("weight_decay", "clip_norm"),
    }.items():
        for name in names:
            if config[section][name] < 0:
                raise ConfigError(f"{section}.{name}", config[section][name], "0 or more")
    for section, name in (("optimizer", "warmup_fraction"), ("optimizer", "final_fraction")):
        if not 0 <= config[section][name] <= 1:
            raise ConfigError(f"{section}.{name}", config[section][name], "a fraction from 0 to 1")
    for section, name in (("optimizer", "beta1"), ("optimizer", "beta2")):
        if not 0 <= config[section][name] < 1:
            raise ConfigError(f"{section}.{name}", config[section][name], "from 0 up to, but not, 1")
    if config.train.batch_size % config.train.microbatches:
        raise ConfigError("train.microbatches", config.train.microbatches, "a divisor of train.batch_size")
    if config.evaluate.sequences % config.evaluate.batch_size:
        raise ConfigError("evaluate.sequences", config.evaluate.sequences, "a multiple of evaluate.batch_size")
    for method in config.ptq.methods:
        if method not in PTQ_METHODS:
            raise ConfigError("ptq.methods", method, f"any of {', '.join(PTQ_METHODS)}")
    for bits in config.ptq.bits:
        if not 2 <= bits <= 8:
            raise ConfigError("ptq.bits", bits, "whole numbers from 2 to 8")


def vocab_size(tokenizer: str) -> int:
    """Vocabulary that a tokenizer option stands for, without the corpus: what a plan is made with."""
    if match := re.fullmatch(r"bpe:(\d+)", tokenizer):
        return int(match[1])
    if tokenizer.startswith("file:"):
        return tokenizers.from_file(Path(tokenizer[len("file:") :]).expanduser(), tokenizer).vocab_size
    return tokenizers.ByteTokenizer.vocab_size
