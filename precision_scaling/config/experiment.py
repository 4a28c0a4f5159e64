"""From a config to the runs it asks for: checks every option and resolves it before anything is compiled or written.

`options` checks each option alone, this module what they mean to each other. First stage of the
data flow: `study` and `train` take the runs from here and group them into cohorts.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import ml_collections

from precision_scaling.config import options
from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.errors import ConfigError
from precision_scaling.model import attention, contraction, rope, sizes
from precision_scaling.model.accounting import count_parameters
from precision_scaling.model.config import ModelConfig
from precision_scaling.ptq import registry
from precision_scaling.quantize import parsing
from precision_scaling.quantize.precision import Precision
from precision_scaling.quantize.static import static_of
from precision_scaling.training import optimizer
from precision_scaling.training.run import Cohort, Run, Shape


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config."""

    config: ml_collections.ConfigDict
    optimizer: optimizer.OptimizerConfig
    runs: tuple[Run, ...]
    cohorts: tuple[Cohort, ...]

    def models(self, runs: Iterable[Run]) -> tuple[Run, ...]:
        """What is measured of runs that are trained: each of them, and the averages of its parameters."""
        return tuple(model for run in runs for model in (run, *map(run.averaged, self.optimizer.ema)))


def resolve(config: ml_collections.ConfigDict, vocab_size: int) -> Experiment:
    """All runs of a config, grouped into cohorts. Raises ConfigError (or FormatError) for what cannot be run.

    vocab_size: of the tokenizer; the number of parameters depends on it.
    """
    options.check(config)
    _check_together(config)
    runs: dict[str, Run] = {}
    for point in _points(config):
        run = _run(config, vocab_size, point)
        if run.id in runs:
            run = dataclasses.replace(run, ptq=run.ptq or runs[run.id].ptq)
        runs[run.id] = run
    return Experiment(config, _optimizer(config), tuple(runs.values()), _cohorts(runs.values()))


def describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON-ready plain values."""
    return json.loads(config.to_json_best_effort())


class _Point(NamedTuple):
    """What the grid says of one run."""

    size: str
    tokens: float
    precision: Precision
    seed: int
    ptq: bool
    schedule: str


def _points(config) -> Iterator[_Point]:
    if not config.study.grid:
        precision, ptq = parsing.from_options(config.precision), bool(config.ptq.methods)
        yield _Point(
            config.model.size, config.train.tokens, precision, config.train.seed, ptq, config.optimizer.schedule
        )
        return
    for part in config.study.grid.values():
        schedules, ptq = part.get("schedules") or (config.optimizer.schedule,), part.get("ptq", False)
        for values in itertools.product(part.sizes, part.tokens, part.precisions, part.seeds, schedules):
            size, tokens, text, seed, schedule_name = values
            yield _Point(size, tokens, parsing.parse(text, config.precision), seed, ptq, schedule_name)


def _run(config, vocab_size: int, point: _Point) -> Run:
    c, size, tokens, seed = config.optimizer, point.size, point.tokens, point.seed
    decoder = _model_config(config, vocab_size, size)
    steps = _steps(config, tokens)
    warmup_steps = c.warmup_steps or max(1, round(c.warmup_fraction * steps))
    decay_steps = max(1, round(c.decay_fraction * steps)) if point.schedule == "wsd" else 0
    if warmup_steps + decay_steps > steps:
        key, value = ("warmup_steps", warmup_steps) if c.warmup_steps else ("decay_fraction", c.decay_fraction)
        raise ConfigError(f"optimizer.{key}", value, f"warm-up and decay within the run's {steps} steps")
    shape = Shape(_label(size, decoder), decoder, config.train.batch_size, config.train.microbatches)
    contraction.check_shape(point.precision, shape.model, shape.tokens_per_step // shape.microbatches)
    attention.check(shape.model, point.precision)
    for scheme, _ in registry.planned(config.ptq) if point.ptq else ():
        scheme.check_model(shape.model)
    run = Run(
        shape=shape,
        precision=point.precision,
        steps=steps,
        warmup_steps=warmup_steps,
        peak_lr=float(c.peak_lr),
        seed=seed,
        ptq=point.ptq,
        imported=config.model.imported,
        schedule_name=point.schedule,
        decay_steps=decay_steps,
    )
    if not all(one < after for one, after in itertools.pairwise((0, *run.switch_steps, steps))):
        found = f"{run.precision.short} at steps {', '.join(map(str, run.switch_steps))} of a {point.schedule} schedule"
        raise ConfigError("precision.switches", found, f"one after the other, at steps 1 to {steps - 1}")
    return run


def _steps(config, tokens: float) -> int:
    """The whole batches in so many tokens."""
    tokens_per_step = config.train.batch_size * config.model.sequence_length
    steps = int(tokens) // tokens_per_step
    if steps < 1:
        raise ConfigError("train.tokens", tokens, f"at least one batch, {tokens_per_step} tokens")
    if steps > options.INT32 and not config.model.imported:  # which takes no step here
        raise ConfigError("train.tokens", tokens, f"at most {options.INT32:,} batches of {tokens_per_step} tokens")
    return steps


def _label(size: str, decoder: ModelConfig) -> str:
    """What a shape is called: the size it was made from, where it has as many parameters as that, or by its number."""
    if size:
        named = dataclasses.asdict(sizes.named(size)) | {"kv_heads": 0, "head_width": 0}
        of_size = dataclasses.replace(decoder, **named)
        if decoder == of_size or count_parameters(decoder)[0] == count_parameters(of_size)[0]:
            return size
    return sizes.label(count_parameters(decoder)[0])


def _model_config(config, tokenizer_vocab_size: int, size: str) -> ModelConfig:
    c = config.model
    base = sizes.named(c.base_size) if c.base_size else None
    # Without a name every part of the shape must be given.
    named = sizes.named(size) if size else sizes.Size(0, 0, 0, 0)
    for name, value in dataclasses.asdict(named).items():
        if not (value or c[name]):
            raise ConfigError(f"model.{name}", c[name], "a number above 0 where model.size is empty")
    width, depth, heads = c.width or named.width, c.depth or named.depth, c.heads or named.heads
    mlp_width = c.mlp_width or (sizes.mlp_width_of(width, 8) if c.width else named.mlp_width)
    if not c.head_width and (width % heads or (width // heads) % 2):
        raise ConfigError("model.heads", heads, f"a divisor of the width ({width}) that leaves an even head dimension")
    if c.head_width % 2:
        raise ConfigError("model.head_width", c.head_width, "an even number")
    if c.kv_heads and heads % c.kv_heads:
        raise ConfigError("model.kv_heads", c.kv_heads, f"a divisor of the heads ({heads})")
    if c.vocab_size and c.vocab_size < tokenizer_vocab_size:
        raise ConfigError("model.vocab_size", c.vocab_size, f"at least the tokenizer's {tokenizer_vocab_size}, or 0")
    return ModelConfig(
        vocab_size=c.vocab_size or tokenizer_vocab_size,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=mlp_width,
        sequence_length=c.sequence_length,
        base_width=base.width if base else width,
        base_depth=base.depth if base else depth,
        dtype=c.dtype,
        rope_theta=float(c.rope_theta),
        norm_epsilon=float(c.norm_epsilon),
        remat=c.remat,
        # As many or as wide as by default is the default: the same model has one name.
        kv_heads=0 if c.kv_heads == heads else c.kv_heads,
        head_width=0 if c.head_width * heads == width else c.head_width,
        norm_placement=c.norm_placement,
        norm_type=c.norm_type,
        qk_norm=c.qk_norm,
        tie_embeddings=c.tie_embeddings,
        rope_scaling=c.rope_scaling,
        qkv_bias=c.qkv_bias,
        attention=c.attention,
        document_token=end_of_text(config.data.tokenizer) if config.data.within_documents else -1,
        parametrization=c.parametrization,
    )


def _optimizer(config) -> optimizer.OptimizerConfig:
    c = config.optimizer
    names = [field.name for field in dataclasses.fields(optimizer.OptimizerConfig)]
    return optimizer.OptimizerConfig(**{name: c[name] for name in names if name != "ema"}, ema=tuple(c.ema))


def _cohorts(runs) -> tuple[Cohort, ...]:
    """Cohorts by shape and by what is static about the precision, longest runs first: the lanes then end at nearly the
    same time. A precision joins the first cohort of its shape whose program can serve it, too. Small models come first:
    most rows of a study are then there early."""
    cohorts = []
    by_parameters = lambda shape: count_parameters(shape.model)[0]
    for shape in sorted(dict.fromkeys(run.shape for run in runs), key=by_parameters):
        members = sorted(
            (run for run in runs if run.shape == shape), key=lambda run: (-run.steps, -run.branch_step, run.id)
        )
        groups: list[list[Precision]] = []
        # In an order that does not depend on the grid's: a study that is repeated with more runs keeps its programs.
        for precision in sorted(
            {run.precision for run in members}, key=lambda precision: (precision.short, precision.describe())
        ):
            for group in groups:
                if static_of([*group, precision], shape.model.dtype) is not None:
                    group.append(precision)
                    break
            else:
                groups.append([precision])
        for group in groups:
            static = static_of(group, shape.model.dtype)
            assert static is not None  # checked precision by precision
            cohorts.append(Cohort(shape, static, tuple(run for run in members if run.precision in group)))
    return tuple(cohorts)


def _check_together(config) -> None:
    """Raises ConfigError for options that do not go together."""
    for name in options.AUTOMATIC:
        if options.get(config, name) == options.AUTO:
            raise ConfigError(name, options.AUTO, "a value of its own; only train and study choose one")
    kind, _ = rope.parse(config.model.rope_scaling)
    if kind == "yarn" and config.model.rope_theta <= 1:
        raise ConfigError("model.rope_theta", config.model.rope_theta, "above 1 for model.rope_scaling yarn")
    if config.model.imported and config.study.grid:
        raise ConfigError("study.grid", list(config.study.grid), "empty for a model that was imported")
    if config.model.imported and (precision := parsing.from_options(config.precision)).quantizers:
        raise ConfigError("precision", precision.describe(), "bf16 for a model that was imported")
    if config.train.batch_size % config.train.microbatches:
        raise ConfigError("train.microbatches", config.train.microbatches, "a divisor of train.batch_size")
    if config.evaluate.sequences % config.evaluate.batch_size:
        raise ConfigError("evaluate.sequences", config.evaluate.sequences, "a multiple of evaluate.batch_size")
    if config.ptq.methods and not (config.ptq.bits or config.ptq.formats):
        raise ConfigError("ptq.bits", config.ptq.bits, "at least one bit-width, or no ptq.methods")


def vocab_size(tokenizer: str) -> int:
    """Vocabulary that a tokenizer option stands for, without the corpus: what a plan is made with.

    Raises DataError for a tokenizer that does not exist.
    """
    tokenizers.identify(tokenizer)
    if match := re.fullmatch(r"bpe:(\d+)", tokenizer):
        return int(match[1])
    if tokenizer.startswith("file:"):
        return tokenizers.given(tokenizer).vocab_size
    return tokenizers.ByteTokenizer.vocab_size


def end_of_text(tokenizer: str) -> int:
    """The id that a tokenizer option ends texts with, without the corpus. Raises DataError as `vocab_size` does."""
    tokenizers.identify(tokenizer)
    if tokenizer.startswith("bpe:"):
        return tokenizers.LEARNED_END_OF_TEXT
    if tokenizer.startswith("file:"):
        return tokenizers.given(tokenizer).end_of_text
    return tokenizers.ByteTokenizer.end_of_text
