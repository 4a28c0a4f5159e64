"""What can be given wrongly to the commands that train and quantize, as data: the change, and what must be said to it.

`test_bad_inputs` runs them. Every option of configs/base.py gets wrong values by its type, so that a new one is covered
by being there; what is right for a few of them is listed here by hand, and not taken from the code's own rules.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from precision_scaling.config import base
from precision_scaling.runtime import files

TRAIN, STUDY = "precision_scaling.train", "precision_scaling.study"
PTQ, LAYER_STATS = "precision_scaling.ptq", "precision_scaling.layer_stats"


class Case(NamedTuple):
    """A command that must be refused. {tmp}: a directory of the test's own; {workdir}: one that does not exist in it.

    said: what stands in the one line, besides "error:". files: by name, what lies in {tmp}; a directory for None.
    """

    module: str
    argv: tuple[str, ...]
    said: tuple[str, ...]
    files: dict[str, str | bytes | None] = {}  # noqa: RUF012  never changed

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]} {' '.join(self.argv)}"[:90]


def leaves(tree, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, default) of every option."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


OPTIONS = dict(leaves(base.get_config()))

# Wrong values of every option.

# Numbers that may be zero, and numbers that must be a fraction, by hand.
ZERO_IS_RIGHT = {
    *(f"data.{name}" for name in ("split_seed", "workers")),
    *(f"model.{name}" for name in ("width", "depth", "heads", "kv_heads", "head_width", "mlp_width", "vocab_size")),
    *(f"optimizer.{name}" for name in ("warmup_fraction", "warmup_steps", "decay_fraction", "final_fraction")),
    *(f"optimizer.{name}" for name in ("beta1", "beta2", "weight_decay", "z_loss", "clip_norm", "muon_beta")),
    *(f"optimizer.{name}_rate" for name in ("embedding", "head", "vector")),
    *(f"train.{name}" for name in ("seed", "checkpoint_seconds", "rewinds")),
    *(f"ptq.{name}" for name in ("damping", "group_size", "smoothing", "correct_inputs", "target_bits")),
    "data.validation_fraction",  # not by itself: with data.validation_split it counts for nothing
}
# Options whose text is free.
FREE_TEXTS = {
    *(f"data.{name}" for name in ("root", "validation_split", "hash", "cache_dir", "tfds_dir", "beam_options")),
    *("model.imported", "compilation_cache"),
}
# Options that any text that is not empty may be the value of, as long as nobody looks for what it names.
NAMES = {"data.name", "data.split", "data.feature", "data.tokenizer"}
# Empty means something.
EMPTY_IS_RIGHT = {
    *("model.size", "model.base_size", "model.rope_scaling", "ptq.layers"),
    *(name for name in OPTIONS if name.startswith("precision.")),
}


def wrong_values(name: str, default: object) -> list[object]:
    """Values that no option of that type and name can have, as Python has them."""
    other = {bool: ("no", 1, 0.0, (True,)), str: (True, 3, 0.5, ("a",)), tuple: ("gptq", 3, True, {"gptq": 1})}
    values = [None, *other.get(type(default), ("3", (3,), [], {}))]
    if type(default) is int:  # ml_collections makes a number of it where the default is a float
        values += [True]
    if type(default) is tuple:
        values += [(None,), (True,), (("gptq",),), ("nonsense",), (-3,), (10**30,), (float("nan"),), ("",)]
    if type(default) in (int, float):
        values += [float("nan"), float("inf"), float("-inf"), -3, -1e-9, 10**30 if type(default) is int else 1e39]
        values += [] if name in ZERO_IS_RIGHT else [0]
    if type(default) is int:
        values += [1.5, 2.0, 2**40 if name != "train.tokens" else 2**60]
    if type(default) is str and name not in FREE_TEXTS | NAMES:
        values += ["nonsense"] if name != "optimizer.decay_pattern" else ["(", "*"]
    if type(default) is str and name not in FREE_TEXTS | EMPTY_IS_RIGHT and name != "optimizer.decay_pattern":
        values += ["", " "]
    return values


def _on_the_command_line() -> Iterator[Case]:
    """The wrong values that can be written there, of the types that have any."""
    for name, default in OPTIONS.items():
        texts = {
            bool: ("maybe", "2"),
            int: ("nan", "-3", "1e30", "many"),
            float: ("nan", "inf", "-3", "1e39", "much"),
            tuple: ("nonsense", "gptq,nonsense", "{3}", "9,1"),
            str: ("nonsense",),
        }[type(default)]
        if type(default) is str and (name in FREE_TEXTS | NAMES or name == "optimizer.decay_pattern"):
            continue
        for text in texts:
            shown = {"1e30": "10000000000", "1e39": "1e+39"}.get(text, text.partition(",")[0])
            yield Case(TRAIN, (*BASE, f"--config.{name}={text}"), (f"config.{name}", shown, "allowed"))


BASE = ("--config=configs/base.py", "--workdir={workdir}")
GRID = ("--config=configs/study_cpu.py", "--workdir={workdir}", "--dry_run")


def _trains(said: str | tuple[str, ...], *argv: str) -> Case:
    return Case(TRAIN, (*BASE, *argv), (said,) if isinstance(said, str) else said)


def _studies(said: str | tuple[str, ...], *argv: str) -> Case:
    return Case(STUDY, (*GRID, *argv), (said,) if isinstance(said, str) else said)


# Names, and the way overrides are written.

NAMES_OF_OPTIONS = [
    _trains(("--config.optimizer.lr", "peak_lr", "warmup_steps"), "--config.optimizer.lr=1"),
    _trains("did you mean config.model.width?", "--config.model.widht=3"),
    _trains("did you mean config.model.width?", "--config.width=3"),
    _trains("did you mean config.train?", "--config.trian.tokens=3"),
    _trains("did you mean config.train.batch_size?", "--config.optimizer.batch_size=3"),
    _trains("did you mean config.precision.backward.weights_saved?", "--config.precision.weights_saved=int4"),
    _trains("config.model.width has no parts", "--config.model.width.x=3"),
    _trains("config.ptq.bits has no parts", "--config.ptq.bits[0]=3"),
    _trains("not the name of an option", "--config.model..width=3"),
    _trains("not the name of an option", "--config.=3"),
    _trains("not the name of an option", "--config.model.my-width=3"),
    _trains("--config.model", "--config.model=3"),
    _trains("Missing value for flag --config.model.width", "--config.model.width"),
    _trains("is missing", "--config.model={'width': 64}"),
    _trains("will overwrite", "--config.model.width=64", "--config.model={'width': 64}"),
    _trains("does not take an argument", "--noconfig.ptq.clip=3"),
    _trains("noconfig.ptq.bits", "--noconfig.ptq.bits"),
    _trains("no such option", "--config.study.grid.full.sizes=25k"),
    _studies("no such option", "--config.study.grid.ful.sizes=25k"),
    _studies("did you mean config.study.grid.full.sizes", "--config.study.grid.full.size=25k"),
]

# Options that do not go together, or not with the model.

TOGETHER = [
    _trains(("train.microbatches", "divisor"), "--config.train.microbatches=3"),
    _trains(("evaluate.sequences", "multiple"), "--config.evaluate.sequences=100"),
    _trains(("train.tokens", "1024"), "--config.train.tokens=1023"),
    _trains(("train.tokens", "2,147,483,647 batches"), "--config.train.tokens=9e15"),
    _trains(("model.heads", "divisor"), "--config.model.heads=3"),
    _trains(("model.kv_heads", "divisor"), "--config.model.kv_heads=3"),
    _trains(("model.head_width", "even"), "--config.model.head_width=7"),
    _trains(("model.vocab_size", "257"), "--config.model.vocab_size=256"),
    _trains(("model.width", "size is empty"), "--config.model.size="),
    _trains(("model.depth = 1000000000", "65,536"), "--config.model.depth=1000000000"),
    _trains(
        ("config.model.size", "width 65536, depth 4096", "GiB"),
        *("--config.model.depth=4096", "--config.model.width=65536", "--config.model.heads=2"),
    ),
    _trains(("optimizer.warmup_steps", "within"), "--config.optimizer.warmup_steps=100000"),
    _trains(
        ("optimizer.decay_fraction", "within"),
        *("--config.optimizer.schedule=wsd", "--config.optimizer.decay_fraction=1"),
    ),
    _trains(("ptq.group_size", "0, or at most"), "--config.ptq.group_size=7000"),
    _trains(("ptq.bits", "at least one"), "--config.ptq.bits="),
    _trains(("ptq.methods", "twice"), "--config.ptq.methods=rtn,rtn"),
    _trains(("ptq.methods", "gptq$"), "--config.ptq.methods=gptq$"),
    _trains(("ptq.methods", "gptq$"), "--config.ptq.methods=gptq$,rtn"),
    _trains(("ptq.damping = -1.0", "from 0"), "--config.ptq.damping=-1"),
    _trains(("train.trackers", "twice"), "--config.train.trackers=wandb,wandb"),
    _trains(("mesh.fsdp", "mesh.data is -1"), "--config.mesh.fsdp=-1"),
    _trains(("mesh", "devices"), "--config.mesh.tensor=7"),
    _trains(("mesh.fsdp", "or auto"), "--config.mesh.fsdp=some"),
    _trains(("train.microbatches = 0", "from 1", "or auto"), "--config.train.microbatches=0"),
    _trains(("config.model", "mesh alone"), "--config.model=auto"),
    _trains(("train.seed", "whole number"), "--config.train.seed=auto"),
    _trains(("mesh.data = 1", "-1 with mesh.run = auto"), "--config.mesh=auto", "--config.mesh.data=1"),
    _trains(("data.tokenizer", "bpe:VOCAB"), "--config.data.tokenizer=words"),
    _trains(("data.tokenizer", "bpe:VOCAB"), "--config.data.tokenizer=bpe:7"),
    _trains(("data.tokenizer", "no such file"), "--config.data.tokenizer=file:nowhere.json"),
    _studies(("data.tokenizer", "bpe:VOCAB"), "--config.data.tokenizer=words"),
]

# Precisions: of an option, and in the shorthand of grids.

FORMATS = ("int1", "int17", "int", "1", "0", "-4", "4.5", "nan", "inf", "e0m3", "e9m1", "e5m11", "e4", "m3", "int４")
FORMATS += ("e4m３", "float7_e4m3", "fp8", "mxfp5", "int4/", "/token", "int4//nearest", "int4/row", "int4/group:0")
FORMATS += ("int4/group:-2", "int4/group:", "int4/group:1.5", "int4/channel/channel", "int4/nearest/stochastic")
FORMATS += ("int4/channel/nearest/3", "mxfp4/channel", "mxfp4/group:16", "exact", "forward", "none", "w4")
FORMATS += ("int4 int4", "('int4',)")
SHORTHANDS = ("w4_w5", "w4_w4", "kv4_k3", "k3_kv4", "v2_kv2", "kv4_kv4", "g4_g4", "fp8_w4_w5", "w4_a4_w4", "q4_k4_q4")
SHORTHANDS += ("w", "x4", "w4__a4", "w4_", "_w4", "_", "fp8_", "fp8x", "fp8__w4", "qat_x4", "wint1", "w1", "w4_b8")
SHORTHANDS += ("bf16_w4", "w4-a4", "w 4", "w4 a4", "W4", "w4/token", "w4/group:0", "w4/up", "wmxfp4/channel", "e4")

PRECISIONS = [
    *(_trains(("config.precision.weights", "allowed"), f"--config.precision.weights={text}") for text in FORMATS),
    *(
        _studies(("precisions", text.strip(), "allowed"), f"--config.study.grid.weights.precisions={text}")
        for text in SHORTHANDS
    ),
    _studies(("study.grid.weights.precisions", "not empty"), "--config.study.grid.weights.precisions="),
    # What no run of the grid uses is checked, too.
    _studies(("config.precision.weights", "int1"), "--config.precision.weights=int1"),
    _studies(("config.precision.preset", "fp9"), "--config.precision.preset=fp9"),
    _trains("config.precision.backward.saved_granularity", "--config.precision.backward.saved_granularity=row"),
    _trains("config.precision.backward.saved_rounding", "--config.precision.backward.saved_rounding=up"),
    _trains(("precision.mode", "activations = bf16"), "--config.precision.mode=native", "--config.precision.weights=8"),
    _trains(("precision.weights", "group:48", "model.width, 32"), "--config.precision.weights=4/group:48"),
    _trains(("precision.k", "the head dimension, 16"), "--config.precision.k=mxfp4"),
]

# Grids.

GRIDS = [
    *(
        _studies(("study.grid.full.tokens", "allowed"), f"--config.study.grid.full.tokens={text}")
        for text in ("nan", "inf", "-1", "0", "0.5", "1e30", "many", "True", "None", "", "1e5,nan", "(1e5,(1e5,))")
    ),
    *(
        _studies(("study.grid.full.sizes", "allowed"), f"--config.study.grid.full.sizes={text}")
        for text in ("26k", "25", "25k,26k", "('25k',7)", "", "True", "[['25k']]", "25K")
    ),
    *(
        _studies(("study.grid.full.seeds", "allowed"), f"--config.study.grid.full.seeds={text}")
        for text in ("-1", "1.0", "nan", "a", "True", "2147483648", "", "0,None")
    ),
    *(
        _studies(("study.grid.full.schedules", "allowed"), f"--config.study.grid.full.schedules={text}")
        for text in ("step", "wsd,step", "3", "True")
    ),
    *(
        _studies(("study.grid.full.ptq", "true or false"), f"--config.study.grid.full.ptq={text}")
        for text in ("maybe", "gptq", "2", "")
    ),
    _studies("config.study.grid.full", "--config.study.grid.full=3"),
    _studies("config.study.grid.full.sizes", "--config.study.grid.full={'tokens': (1000,)}"),
    _studies(("did you mean config.study.grid.full.seeds?",), "--config.study.grid.full={'seed': 0}"),
    _studies(("at least one part",), "--config.study.grid={}"),
    _studies(("model.size is empty",), "--config.study.grid.full.sizes=('',)"),
    _studies(("train.tokens", "1024"), "--config.study.grid.full.tokens=100"),
    Case(TRAIN, ("--config=configs/study_cpu.py", "--workdir={workdir}"), ("study.grid", "precision_scaling.study")),
]

# Config files: what stands in them, and what must be said.

_HEAD = "from configs import base\ndef get_config():\n    c = base.get_config()\n"
_FILES = {
    "1 / 0\n": ("line 1", "ZeroDivisionError"),
    "import nothing_of_that_name\n": ("line 1", "nothing_of_that_name"),
    "def get_config(:\n": ("line 1", "SyntaxError"),
    "\n\ndef get_config():\n  x = 1\n y = 2\n": ("line 5", "IndentationError"),
    "import sys\nsys.exit(3)\n": ("line 2", "SystemExit"),
    "": ("no get_config()",),
    "get_config = 3\n": ("no get_config()",),
    "def get_config():\n    return None\n": ("NoneType", "ConfigDict"),
    "def get_config():\n    return {'model': {}}\n": ("dict", "ConfigDict"),
    "def get_config():\n    return 3\n": ("int", "ConfigDict"),
    "def get_config(which):\n    return None\n": ("TypeError", "which"),
    "def get_config():\n    return get_config()\n": ("RecursionError",),
    "def get_config():\n    raise ValueError('so\\n and so')\n": ("line 2", "ValueError: so and so"),
    "def get_config():\n    raise KeyError('so')\n": ("line 2", "KeyError"),
    "def get_config():\n    open('nowhere.txt')\n": ("line 2", "nowhere.txt"),
    "def get_config():\n    return undefined\n": ("line 2", "NameError"),
    "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n": ("is missing", "base.py"),
    _HEAD + "    c.model.widht = 3\n    return c\n": ("line 4", "widht"),
    _HEAD + "    c.trian.tokens = 3\n    return c\n": ("line 4", "trian"),
    _HEAD + "    c.train.tokens = 'many'\n    return c\n": ("line 4", "tokens"),
    _HEAD + "    c.train.tokens = 1.5\n    return c\n": ("line 4", "tokens"),
    _HEAD + "    c.train.tokens = True\n    return c\n": ("config.train.tokens = True", "whole number"),
    _HEAD + "    c.train.tokens = None\n    return c\n": ("config.train.tokens = None", "whole number"),
    _HEAD + "    c.train.seed = 10**5000\n    return c\n": ("config.train.seed", "whole number"),
    _HEAD + "    c.ptq.methods = None\n    return c\n": ("config.ptq.methods = None", "gptq"),
    _HEAD + "    c.ptq.bits = ('3',)\n    return c\n": ("config.ptq.bits", "2 to 8"),
    _HEAD + "    c.optimizer.peak_lr = float('nan')\n    return c\n": ("config.optimizer.peak_lr = nan",),
    _HEAD + "    c.model.rope_theta = float('inf')\n    return c\n": ("config.model.rope_theta = inf",),
    _HEAD + "    c.data = None\n    return c\n": ("config.data = None", "section"),
    _HEAD + "    c.unlock()\n    c.lr = 3\n    return c\n": ("config.lr", "no such option"),
    _HEAD + "    c.unlock()\n    del c['optimizer']\n    return c\n": ("config.optimizer is missing",),
    _HEAD + "    c.unlock()\n    del c.model['width']\n    return c\n": ("config.model.width is missing",),
    "from ml_collections import config_dict\n"
    + _HEAD
    + "    c.model.width = config_dict.placeholder(int)\n    return c\n": ("config.model.width = None",),
    "from ml_collections import config_dict\n"
    + _HEAD
    + "    c.model.width = config_dict.required_placeholder(int)\n    return c\n": ("config.model.width = None",),
}
_PARTS = {
    "3": ("study.grid.one = 3",),
    "None": ("study.grid.one = None",),
    "base.grid('25k', (10_000,))": ("study.grid.one.sizes", "tuple"),
    "base.grid(('25k',), 10_000)": ("study.grid.one.tokens", "tuple"),
    "base.grid(('25k',), ())": ("study.grid.one.tokens", "not empty"),
    "base.grid(('25k',), (float('nan'),))": ("study.grid.one.tokens = nan",),
    "base.grid(('25k',), ('1e4',))": ("study.grid.one.tokens = '1e4'",),
    "base.grid(('25k',), (10_000,), 'w4')": ("study.grid.one.precisions", "tuple"),
    "base.grid(('25k',), (10_000,), (4,))": ("study.grid.one.precisions = 4",),
    "base.grid(('25k',), (10_000,), (None,))": ("study.grid.one.precisions = None",),
    "base.grid(('25k',), (10_000,), ('w4_w5',))": ("precisions = 'w4_w5'", "twice"),
    "base.grid((None,), (10_000,))": ("study.grid.one.sizes = None",),
    "base.grid((('25k',),), (10_000,))": ("study.grid.one.sizes",),
    "base.grid(('25k',), (10_000,), seeds=(True,))": ("study.grid.one.seeds = True",),
    "base.grid(('25k',), (10_000,), seeds=0)": ("study.grid.one.seeds = 0",),
    "base.grid(('25k',), (10_000,), ptq='no')": ("study.grid.one.ptq = 'no'", "true or false"),
    "base.grid(('25k',), (10_000,), ptq=1)": ("study.grid.one.ptq = 1", "true or false"),
    "base.grid(('25k',), (10_000,), schedules='wsd')": ("study.grid.one.schedules", "tuple"),
    "base.grid(('25k',), (10_000,), schedules=('step',))": ("study.grid.one.schedules = 'step'", "cosine"),
    "{'sizes': ('25k',), 'tokens': (10_000,)}": ("study.grid.one.precisions", "not empty"),
}
_IN_TMP = ("--config={tmp}/config.py", "--workdir={workdir}")
CONFIG_FILES = [
    *(Case(TRAIN, _IN_TMP, said, {"config.py": text}) for text, said in _FILES.items()),
    *(
        Case(STUDY, _IN_TMP, said, {"config.py": f"{_HEAD}    c.study.grid.one = {text}\n    return c\n"})
        for text, said in _PARTS.items()
    ),
    Case(TRAIN, _IN_TMP, ("config.py", "no such file", "configs/base.py")),
    Case(TRAIN, _IN_TMP, ("config.py", "no regular file"), {"config.py": None}),
    Case(TRAIN, _IN_TMP, ("config.py", "null bytes"), {"config.py": b"x = 1\0\n"}),
    Case(TRAIN, _IN_TMP, ("config.py", "SyntaxError"), {"config.py": b"x = '\xff'\n"}),
    Case(TRAIN, ("--config=/dev/zero", "--workdir={workdir}"), ("--config=/dev/zero", "no regular file")),
    Case(TRAIN, ("--config=", "--workdir={workdir}"), ("--config=", "no such file")),
    Case(TRAIN, ("--config=configs/base.py:small", "--workdir={workdir}"), ("TypeError", "argument")),
    Case(TRAIN, ("--config", "--workdir={workdir}"), ("no such file",)),
    Case(TRAIN, (*BASE, "--config=configs/base.py"), ("--config is there twice",)),
    Case(TRAIN, ("--workdir={workdir}",), ("--config",)),
    Case(TRAIN, ("--config.model.width=64", *BASE), ("before a value for --config",)),
]

# Flags.


def _flags(module: str, argv: tuple[str, ...], table: dict[str, tuple[str, ...]]) -> list[Case]:
    return [Case(module, (*argv, flag), (flag.partition("=")[0].strip("-"), *said)) for flag, said in table.items()]


_WORKDIRS = [
    ("--workdir=", ("allowed is the name of a directory",), {}),
    ("--workdir= ", ("allowed is the name of a directory",), {}),
    ("--workdir={tmp}/file", ("file is no directory",), {"file": ""}),
    ("--workdir={tmp}/file/below", ("file is no directory",), {"file": ""}),
    ("--workdir=~nobody_of_that_name/x", ("home",), {}),
    ("--workdir=" + "x" * 300, ("too long",), {}),
    *((f"--workdir={scheme}://bucket/run", (f"{scheme}:// is not known here",), {}) for scheme in ("s3", "hdfs")),
]
_EVERYWHERE = {
    "--time_limit=nan": ("finite",),
    "--time_limit=inf": ("525600",),
    "--time_limit=-1": ("525600",),
    "--time_limit=1e9": ("525600",),
    "--time_limit=soon": (),
    "--time_limit=": (),
    "--profile=-1": ("non-negative",),
    "--profile=1.5": (),
    "--profile=many": (),
    "--num_processes=-1": ("non-negative",),
    "--num_processes=2": ("--coordinator_address",),
    "--process_id=0": ("--coordinator_address",),
    "--process_id=-2": ("-1",),
    "--workdri=x": ("workdir",),
    "--distributed=maybe": (),
}
_TOGETHER = [
    (("--coordinator_address=host", "--num_processes=1", "--process_id=0"), ("coordinator_address=host", "HOST:PORT")),
    (("--coordinator_address=:80", "--num_processes=1", "--process_id=0"), ("HOST:PORT",)),
    (("--coordinator_address=a:b", "--num_processes=1", "--process_id=0"), ("HOST:PORT",)),
    (("--coordinator_address=http://a:80", "--num_processes=1", "--process_id=0"), ("HOST:PORT",)),
    (("--coordinator_address=a:80", "--num_processes=2", "--process_id=2"), ("--process_id=2", "below")),
    (("--coordinator_address=a:80",), ("--process_id=-1", "--num_processes=0")),
    (("--coordinator_address=a:80", "--distributed"), ("--distributed", "one of them")),
    (("stray",), ("unexpected argument 'stray'",)),
    (("--flagfile={tmp}/nothing",), ("flagfile",)),
]
_SHARDS = ("", "0", "1/0", "0/0", "2/2", "-1/2", "a/b", "0/2/4", "1.0/2", "0/-2", " 0/2")
_PATTERNS = ("(", "*", "[a", "(?P<x>a)(?P<x>b)")
_STUDIES = ("--config=configs/study_cpu.py", "--workdir={workdir}")
FLAGS = [
    *(
        Case(module, (config, flag), ("--workdir", *said), files)
        for module, config in ((TRAIN, BASE[0]), (STUDY, _STUDIES[0]))
        for flag, said, files in _WORKDIRS
    ),
    *(
        Case(module, (flag,), ("--workdir", *said), files)
        for module in (PTQ, LAYER_STATS)
        for flag, said, files in _WORKDIRS
    ),
    Case(TRAIN, (BASE[0],), ("--workdir",)),
    Case(PTQ, (), ("--workdir",)),
    Case(LAYER_STATS, (), ("--workdir",)),
    *_flags(TRAIN, BASE, _EVERYWHERE),
    *_flags(STUDY, _STUDIES, _EVERYWHERE),
    *(Case(TRAIN, (*BASE, *argv), said) for argv, said in _TOGETHER),
    *_flags(STUDY, _STUDIES, {f"--shard={text}": ("allowed is i/n",) for text in _SHARDS}),
    *_flags(STUDY, _STUDIES, {f"--only={text}": ("regular expression",) for text in _PATTERNS}),
    *_flags(STUDY, _STUDIES, {"--only=nothing": ("finds none of",), "--dry_run=maybe": ()}),
]

# Post-training quantization and layer statistics of a workdir. {study}: one that `study` has filled.

_BITS = ("", "1", "9", "3,1", "4.5", "four", "3,,4", "3 4", "-3", "nan", "²", "(3,4)")
_MORE = {
    "--method=magic": ("gptq",),
    "--method=": ("gptq",),
    "--method=rtn$": ("gptq",),
    "--method=gptq,rtn": ("gptq",),
    "--group_size=1": ("from 2", "or 0"),
    "--group_size=-8": ("from 2", "or 0"),
    "--group_size=8.5": (),
    "--group_size=nan": (),
    "--smoothing=nan": ("finite",),
    "--smoothing=-0.5": ("from 0 to 1",),
    "--smoothing=1.5": ("from 0 to 1",),
    "--smoothing=inf": ("finite",),
    "--granularity=channel": ("tensor",),
    "--asymmetric=maybe": (),
    "--act_order=2": (),
    "--full_range=2": (),
    "--clip=x": (),
    "--rotate=x": (),
    "--correct_inputs=1.5": ("from 0 to 1",),
    "--layers=*.up=4": ("rules LAYERS",),
    "--layers=*:4": ("rules LAYERS",),
    "--layers=*=1": ("rules LAYERS",),
    "--target_bits=9": ("0, or from 2 to 8",),
    "--target_bits=nan": ("finite",),
    "--target_bytes=much": (),
    "--save=x": (),
    "--dry_run=x": (),
    "--damping=1": (),
}


def _sealed(config: object) -> str:
    """The text of a workdir's config.json with these options in it, as it is written."""
    record = {"config": config, "corpus": ""}
    return json.dumps({**record, files.FINGERPRINT: files.fingerprint(record)})


_CLAIMS = {
    "": "not a config",
    "[]": "not a config",
    "{}": "not a config",
    "3": "not a config",
    '{"config": {}': "not a config",
    _sealed(3): "not a config",
    # An edited one has another fingerprint.
    _sealed({"model": {"width": 64}}).replace("64", "96"): "fingerprint",
    # Of another version of this program, or of a config that was checked less.
    _sealed({"model": 3}): "config.model = 3",
    _sealed({"model": {"width": "wide"}}): "config.model.width = 'wide'",
    _sealed({"model": {"width": 1.5}}): "config.model.width = 1.5",
    _sealed({"model": {"widht": 64}}): "did you mean config.model.width?",
    _sealed({"optimizer": {"peak_rate": float("nan")}}): "config.optimizer.peak_lr = nan",
    _sealed({"ptq": {"damping": -1}}): "config.ptq.damping = -1",
    _sealed({"ptq": {"methods": "gptq"}}): "config.ptq.methods = 'gptq'",
    _sealed({"study": {"grid": {"one": {"sizes": "25k"}}}}): "config.study.grid.one.sizes = '25k'",
}
WORKDIRS = [
    *_flags(PTQ, ("--workdir={tmp}",), {f"--bits={text}": ("whole numbers from 2 to 8",) for text in _BITS}),
    *_flags(PTQ, ("--workdir={tmp}",), _MORE),
    *(Case(module, ("--workdir={tmp}",), ("no config.json there",)) for module in (PTQ, LAYER_STATS)),
    *(Case(module, ("--workdir={workdir}",), ("no config.json there",)) for module in (PTQ, LAYER_STATS)),
    Case(PTQ, ("--workdir={tmp}",), ("config.json",), {"config.json": None}),
    *(Case(PTQ, ("--workdir={tmp}",), (said,), {"config.json": text}) for text, said in _CLAIMS.items()),
    *_flags(LAYER_STATS, ("--workdir={tmp}",), {f"--sequences={text}": () for text in ("0", "-1", "x", "1.5")}),
]
STUDIED = [
    Case(PTQ, ("--workdir={study}", "--method=gptq", "--group_size=700"), ("ptq.group_size", "0, or at most")),
    Case(PTQ, ("--workdir={study}", "--formats=ternary", "--group_size=7"), ("ptq.group_size", "a divisor of")),
    Case(PTQ, ("--workdir={study}", "--method=rtn", "--act_order"), ("act_order", "no such option")),
    Case(PTQ, ("--workdir={study}", "--method=gptq", "--smoothing=0.25"), ("smoothing", "no such option")),
    Case(PTQ, ("--workdir={study}", "--method=rtn", "--correct_inputs=0.5"), ("correct_inputs", "no such option")),
    Case(PTQ, ("--workdir={study}", "--method=kv_cache", "--save"), ("--save", "weights")),
    Case(PTQ, ("--workdir={study}", "--target_bits=3", "--layers=*=4"), ("ptq.target_bits = 3.0", "0 with ptq.layers")),
    Case(PTQ, ("--workdir={study}", "--target_bits=2.5", "--bits=3,4"), ("2.5 with bits (3, 4)", "not above it")),
    Case(PTQ, ("--workdir={study}", "--target_bits=4", "--formats=e2m1"), ("ptq.target_bits", "no formats")),
    Case(PTQ, ("--workdir={study}", "--layers=40.down=4"), ("ptq.layers = '40.down'", "layers from 0 to")),
    Case(PTQ, ("--workdir={study}", "--layers=*.down=e5m6", "--save"), ("--save with --layers", "8 bits at most")),
    Case(PTQ, ("--workdir={study}", "--method=smoothquant", "--layers=*.down=4"), ("layers", "no such option")),
    Case(PTQ, ("--workdir={study}", "--method=awq", "--target_bits=3"), ("target_bits", "no such option")),
    Case(PTQ, ("--workdir={study}", "--target_bytes=1e9"), ("--target_bytes=1e+09", "allowed")),
    Case(PTQ, ("--workdir={study}", "--target_bytes=1e5", "--target_bits=3"), ("without --target_bits",)),
    Case(LAYER_STATS, ("--workdir={study}", "--run=nothing"), ("--run=nothing", "allowed is a trained run")),
    Case(LAYER_STATS, ("--workdir={study}", "--run="), ("--run=", "allowed is a trained run")),
    Case(LAYER_STATS, ("--workdir={study}", "--sequences=1000"), ("--sequences=1000", "1 to 8")),
    *(
        Case(LAYER_STATS, ("--workdir={study}", f"--precision={text}"), ("--precision", "allowed"))
        for text in ("", "w4_w5", "kv4_k3", "x4", "wint1", "w4/token")
    ),
    Case(LAYER_STATS, ("--workdir={study}", "--precision=w4/group:7"), ("precision.weights", "group:7")),
    Case(LAYER_STATS, ("--workdir={study}", "--precision=bf16"), ("nothing is quantized",)),
]

CASES = [
    *_on_the_command_line(),
    *(NAMES_OF_OPTIONS + TOGETHER + PRECISIONS + GRIDS + CONFIG_FILES + FLAGS + WORKDIRS),
]

# What is written otherwise than Python has it, and right: (override, its line from `print_config`).

RIGHT = [
    ("train.tokens=1e6", "train.tokens = 1000000"),
    ("train.tokens=2.5e5", "train.tokens = 250000"),
    ("train.tokens=1_000_000", "train.tokens = 1000000"),
    ("train.seed=0", "train.seed = 0"),
    ("model.width=64.0", "model.width = 64"),
    ("optimizer.peak_lr=1", "optimizer.peak_lr = 1.0"),
    ("optimizer.weight_decay=0", "optimizer.weight_decay = 0.0"),
    ("ptq.methods=gptq,rtn", "ptq.methods = ('gptq', 'rtn')"),
    ("ptq.methods=gptq", "ptq.methods = ('gptq',)"),
    ("ptq.methods='gptq','awq'", "ptq.methods = ('gptq', 'awq')"),
    ("ptq.methods=('gptq', 'awq')", "ptq.methods = ('gptq', 'awq')"),
    ("ptq.methods=['rtn']", "ptq.methods = ('rtn',)"),
    ("ptq.methods=gptq, rtn", "ptq.methods = ('gptq', 'rtn')"),
    ("ptq.methods=", "ptq.methods = ()"),
    ("ptq.bits=3,4", "ptq.bits = (3, 4)"),
    ("ptq.bits=(3, 4)", "ptq.bits = (3, 4)"),
    ("ptq.bits=8", "ptq.bits = (8,)"),
    ("ptq.clip=true", "ptq.clip = True"),
    ("ptq.symmetric=False", "ptq.symmetric = False"),
    ("mesh.fsdp=4", "mesh.fsdp = 4"),
    ("mesh.fsdp=1e1", "mesh.fsdp = 10"),
    ("mesh.fsdp=auto", "mesh.fsdp = 'auto'"),
    ("precision.weights=4", "precision.weights = '4'"),
    ("precision.weights=mxfp6_e3m2", "precision.weights = 'mxfp6_e3m2'"),
    ("model.size=", "model.size = ''"),
]

# Calls of fake_quant that are refused: (arguments beside x = ones of (12, 64) and fmt = 4, what is said).

FAKE_QUANT = [
    *(({"fmt": fmt}, repr(fmt)) for fmt in (None, True, -4, 0, 1, 15.5, float("nan"), float("inf"), 4 + 0j, b"int4")),
    *(({"fmt": fmt}, repr(fmt)) for fmt in ("", "int1", "int17", "e0m3", "e9m1", "4.5", "-4", "nan", "1e1", "4/token")),
    *(({"fmt": fmt}, repr(fmt)) for fmt in ([], {}, (4,), "fp8", "float7_e4m3", "int４")),
    *(({"axis": axis}, repr(axis)) for axis in ("a", 1.5, True, (0, "b"), (0, 0), (0, -2), 2, -3, (0, 2))),
    *(({"group_size": size}, repr(size)) for size in (True, "16", -1, 0, 7, 128, float("nan"), 2.5)),
    *(({"x": x}, said) for x, said in (("abc", "str"), (None, "NoneType"), ([[1.0], [2.0, 3.0]], "list"), (3, "int"))),
    *(({"x": x}, said) for x, said in (([True], "bool"), ([1j], "complex"), (len, "builtin"))),
    *(({"rounding": rounding}, repr(rounding)) for rounding in (None, "Nearest", 1, "up")),
    *(({"rounding": "stochastic", "key": key}, "key") for key in (None, 3, "k", [0, 1], (0, 1), 1.5)),
]
