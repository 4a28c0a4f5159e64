"""What every option of a config may be: its name and type as in base.py, its values by `RULES`.

`experiment.resolve` checks a config with it before anything else, and then what options mean to each other. Of options
without a rule, the name, the type and, for a number, finiteness are checked.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections
from ml_collections.config_dict import RequiredValueError

from precision_scaling.config import base
from precision_scaling.config.base import AUTO
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.model import attention, decoder, sizes
from precision_scaling.model.config import NORM_PLACEMENTS, NORM_TYPES, PARAMETRIZATIONS, QK_NORMS
from precision_scaling.numerics import formats
from precision_scaling.ptq import by_layer
from precision_scaling.ptq.registry import METHODS
from precision_scaling.ptq.scheme import GRANULARITIES
from precision_scaling.quantize import parsing
from precision_scaling.training import optimizer, schedule, trackers

DTYPES = ("float32", "bfloat16")

# Options that had another name in earlier versions.
RENAMED = {
    "model.hidden": "model.mlp_width",
    "optimizer.peak_rate": "optimizer.peak_lr",
    "optimizer.decayed": "optimizer.decay_pattern",
    "train.sinks": "train.trackers",
}

# What options had as their default when they were new, where it is another now: workdirs that lack them are older.
WHEN_NEW = {"model.parametrization": "depth_mup"}

INT32 = 2**31 - 1  # counts and seeds are int32 in the compiled programs
# Numbers are float32 there: above zero is what is not flushed to zero.
SMALLEST, LARGEST = 2.0**-126, 3.4e38
MOST_TOKENS = 2**53  # whole numbers up to here are exact as floats, too


class Rule(NamedTuple):
    """The values that an option may have, in words and as a predicate on values of its type."""

    allowed: str
    holds: Callable[[Any], bool]


def _whole(low: int, high: int = INT32, also: int | None = None) -> Rule:
    extra = "" if also is None else f", or {also}"
    return Rule(f"a whole number from {low} to {high:,}{extra}", lambda x: low <= x <= high or x == also)


def _number(low: float, high: float = LARGEST) -> Rule:
    return Rule(f"a number from {low:.3g} to {high:.3g}", lambda x: low <= x <= high)


def _one_of(names: Iterable[str], also: str = "") -> Rule:
    names = tuple(names)
    return Rule(f"one of {', '.join(names)}{also and f', or {also!r}'}", lambda x: x in names)


def _each(rule: Rule, kind: type, once: bool = True) -> Rule:
    def holds(values) -> bool:
        return all(_is(x, kind) and rule.holds(x) for x in values) and not (once and len(set(values)) < len(values))

    return Rule(f"a tuple, each {rule.allowed}{', none of them twice' * once}", holds)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError):
        return False
    return True


def _is_weight_format(name: str) -> bool:
    try:
        return formats.parse(name).family not in ("none", "int")
    except formats.FormatError:
        return False


def _is_by_layer(text: str) -> bool:
    try:
        by_layer.split(text)
    except ConfigError:
        return False
    return True


_ANY = Rule("a text", lambda text: True)
_NOT_EMPTY = Rule("a text that is not empty", lambda text: bool(text.strip()))
_SIZE = Rule(f"one of {', '.join(sizes.SIZES)}, or empty", lambda name: name in ("", *sizes.SIZES))
_ABOVE_0 = Rule(f"a number above 0, from {SMALLEST:.3g} to {LARGEST:.3g}", lambda x: SMALLEST <= x <= LARGEST)
_FRACTION = _number(0, 1)
_BELOW_1 = Rule("a number from 0 up to, but not, 1", lambda x: 0 <= x < 1)
_COUNT = _whole(1)

# Of every option but those of `precision`, which `parsing.check` has, and those that are true or false.
RULES = {
    "data.name": _NOT_EMPTY,
    "data.root": _ANY,
    "data.split": _NOT_EMPTY,
    "data.validation_split": _ANY,
    "data.feature": _NOT_EMPTY,
    "data.tokenizer": _NOT_EMPTY,
    "data.validation_fraction": _FRACTION,
    "data.split_seed": _whole(0),
    "data.hash": _ANY,
    "data.cache_dir": _ANY,
    "data.tfds_dir": _ANY,
    "data.beam_options": _ANY,
    "data.workers": _whole(0),
    "model.size": _SIZE,
    "model.width": _whole(0, 2**20),
    "model.depth": _whole(0, 2**16),
    "model.heads": _whole(0, 2**16),
    "model.kv_heads": _whole(0, 2**16),
    "model.head_width": _whole(0, 2**20),
    "model.mlp_width": _whole(0, 2**22),
    "model.vocab_size": _whole(0, 2**24),
    "model.sequence_length": _whole(1, 2**24),
    "model.dtype": _one_of(DTYPES),
    "model.rope_theta": _ABOVE_0,
    "model.rope_scaling": _ANY,  # `rope.parse` has its rule
    "model.norm_placement": _one_of(NORM_PLACEMENTS),
    "model.norm_type": _one_of(NORM_TYPES),
    "model.qk_norm": _one_of(QK_NORMS),
    "model.norm_epsilon": _ABOVE_0,
    "model.attention": _one_of(attention.WAYS),
    "model.remat": _one_of(decoder.REMATS),
    "model.parametrization": _one_of(PARAMETRIZATIONS),
    "model.base_size": _SIZE,
    "model.imported": _ANY,
    "optimizer.name": _one_of(optimizer.NAMES),
    "optimizer.peak_lr": _ABOVE_0,
    "optimizer.embedding_rate": _number(0),
    "optimizer.head_rate": _number(0),
    "optimizer.vector_rate": _number(0),
    "optimizer.schedule": _one_of(schedule.NAMES),
    "optimizer.warmup_fraction": _FRACTION,
    "optimizer.warmup_steps": _whole(0),
    "optimizer.decay_fraction": _FRACTION,
    "optimizer.final_fraction": _FRACTION,
    "optimizer.beta1": _BELOW_1,
    "optimizer.beta2": _BELOW_1,
    "optimizer.epsilon": _ABOVE_0,
    "optimizer.muon_beta": _BELOW_1,
    "optimizer.weight_decay": _number(0),
    "optimizer.decay_pattern": Rule("a regular expression", _is_pattern),
    "optimizer.ema": _each(Rule("a number above 0 and below 1", lambda x: 0 < x < 1), float),
    "optimizer.z_loss": _number(0),
    "optimizer.clip_norm": _number(0),
    "optimizer.gradient_sum": _one_of(DTYPES),
    "train.tokens": _whole(1, MOST_TOKENS),
    "train.batch_size": _whole(1, 2**24),
    "train.microbatches": _whole(1, 2**24),
    "train.seed": _whole(0),
    "train.log_every": _COUNT,
    "train.trackers": _each(_one_of(trackers.TRACKERS), str),
    "train.checkpoint_seconds": _number(0),
    "train.rewinds": _whole(0),
    "train.steps_per_dispatch": _COUNT,
    "evaluate.sequences": _COUNT,
    "evaluate.batch_size": _COUNT,
    "ptq.methods": _each(_one_of(METHODS), str),
    "ptq.bits": _each(_whole(2, 8), int, once=False),
    "ptq.formats": _each(Rule("a number format other than an integer's", _is_weight_format), str),
    "ptq.calibration_sequences": _COUNT,
    "ptq.damping": _number(0),
    "ptq.group_size": _whole(2, also=0),
    "ptq.smoothing": _FRACTION,
    "ptq.correct_inputs": _FRACTION,
    "ptq.granularity": _one_of(GRANULARITIES),
    "ptq.layers": Rule(by_layer.ALLOWED, _is_by_layer),
    "ptq.target_bits": Rule("0, or from 2 to 8", lambda x: x == 0 or 2 <= x <= 8),
    "study.lanes": _COUNT,
    **{f"mesh.{axis}": _whole(1, also=-1) for axis in ("slices", "run", "data", "fsdp", "tensor")},
    "compilation_cache": _ANY,
}
# Options that may be AUTO, too: `train` and `study` choose their values for the devices.
AUTOMATIC = ("train.microbatches", "mesh.run", "mesh.fsdp", "model.remat")
# Of the lists of a part of the grid, `base.grid`: one value each.
GRID_RULES = {
    "sizes": _SIZE,
    "tokens": Rule(f"a number from 1 to {MOST_TOKENS:,}", lambda x: 1 <= x <= MOST_TOKENS),
    "precisions": _NOT_EMPTY,
    "seeds": _whole(0),
    "schedules": _one_of(schedule.NAMES),
}
_OPTIONAL = ("ptq", "schedules")  # in a part of the grid
_GRID_TYPES = {"sizes": str, "tokens": float, "precisions": str, "seeds": int, "schedules": str}
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}


@functools.cache
def _defaults() -> ml_collections.ConfigDict:
    return base.get_config()


def check(config: Any) -> None:
    """Raises ConfigError for the first option that is unknown, missing, of another type than in base.py, or that has a
    value which its rule does not allow."""
    check_names(config)
    for name, default in _leaves(_defaults()):
        check_option(name, get(config, name), type(default))
    for name, part in config.study.grid.items():
        _check_part(f"study.grid.{name}", part)
    parsing.check(config.precision)


def check_names(config: Any) -> None:
    """Raises ConfigError where a config's sections and options are not those of base.py."""
    _check_names(config, _defaults(), "")


def check_option(name: str, value: Any, kind: type | None = None, shown: str = "") -> None:
    """Raises ConfigError for a value that the option cannot have.

    kind: the type of its default; None: looked up in base.py. shown: the name in the message, such as that of a flag.
    """
    kind = kind or type(get(_defaults(), name))
    rule = RULES.get(name, Rule(_TYPES[kind], lambda value: True))
    if name in AUTOMATIC and value == AUTO:
        return
    if not (_is(value, kind) and rule.holds(value)):
        raise ConfigError(shown or name, value, rule.allowed + f", or {AUTO}" * (name in AUTOMATIC))


def check_ptq(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value that the config's `ptq` section cannot have."""
    for name, value in options.items():
        check_option(f"ptq.{name}", value)
    target = options.get("target_bits")
    if target and options["layers"]:
        raise ConfigError("ptq.target_bits", target, f"0 with ptq.layers = {options['layers']!r}")
    if target and (options["formats"] or not options["bits"] or min(options["bits"]) > target):
        found = f"{target:g} with bits {tuple(options['bits'])} and formats {tuple(options['formats'])}"
        raise ConfigError("ptq.target_bits", found, "bits to choose among, the fewest not above it, and no formats")


def unknown(section: Any, prefix: str, name: object) -> str:
    """The message for an unknown option: the nearest known one, and all that the section has."""
    everywhere = {key.rpartition(".")[2]: key for key, _ in _leaves(_defaults())}
    closest = lambda names, cutoff: difflib.get_close_matches(str(name), list(names), 1, cutoff)
    near = [f"{prefix}{key}" for key in closest(section, 0.8)]
    near += [everywhere[key] for key in closest(everywhere, 0.75)] + [f"{prefix}{key}" for key in closest(section, 0.6)]
    near = [RENAMED[renamed]] if (renamed := f"{prefix}{name}") in RENAMED else near
    meant = f"did you mean config.{near[0]}? " if near else ""
    return f"there is no such option; {meant}config{f'.{prefix}'.rstrip('.')} has {', '.join(section)}"


def _is(value: Any, kind: type) -> bool:
    """Whether a value has an option's type. Numbers are finite, floats may be whole; of tuples, each element counts."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, tuple | list) and all(
            isinstance(x, str | int | float) and _is(x, type(x)) for x in value
        )
    if kind is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    return isinstance(value, kind)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(name, default) of every option; the grid is empty."""
    for key, value in tree.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def get(tree: Any, name: str) -> Any:
    """The value of an option; None for a placeholder that has none yet."""
    try:
        for key in name.split("."):
            tree = tree[key]
        return tree
    except RequiredValueError:
        return None


def replaced(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A config with other values of some options, by their names; whether they are allowed is for `check`."""
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        for name, value in values.items():
            section, leaf = name.split(".")
            config[section][leaf] = value
    return config


def _check_names(section: Any, default: ml_collections.ConfigDict, prefix: str) -> None:
    if not isinstance(section, ml_collections.ConfigDict):
        raise ConfigError(prefix.rstrip("."), section, f"a section with {', '.join(default)}")
    if prefix == "study.grid.":
        return  # its parts have names of their own
    for key in section:
        if key not in default:
            raise UserError(f"config.{prefix}{key}: {unknown(default, prefix, key)}")
    for key, value in default.items():
        if key not in section:
            raise UserError(f"config.{prefix}{key} is missing: allowed is a config made from configs/base.py")
        if isinstance(value, ml_collections.ConfigDict):
            _check_names(section[key], value, f"{prefix}{key}.")


def _check_part(name: str, part: Any) -> None:
    """A part of the grid, as `base.grid` makes it."""
    keys = (*GRID_RULES, "ptq")
    if not isinstance(part, ml_collections.ConfigDict):
        raise ConfigError(name, part, f"what configs/base.py's grid() makes: {', '.join(keys)}")
    for key in part:
        if key not in keys:
            raise UserError(f"config.{name}.{key}: {unknown(dict.fromkeys(keys), f'{name}.', key)}")
    for key, rule in GRID_RULES.items():
        values = get(part, key) if key in part else () if key in _OPTIONAL else None
        if not isinstance(values, tuple | list) or not (values or key in _OPTIONAL):
            raise ConfigError(f"{name}.{key}", values, "a tuple that is not empty")
        for value in values:
            if not (_is(value, _GRID_TYPES[key]) and rule.holds(value)):
                raise ConfigError(f"{name}.{key}", value, f"a tuple of values each {rule.allowed}")
    if "ptq" in part and not isinstance(get(part, "ptq"), bool):
        raise ConfigError(f"{name}.ptq", get(part, "ptq"), _TYPES[bool])
