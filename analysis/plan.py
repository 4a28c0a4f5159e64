"""Plans the next run: `python -m analysis.plan --fit=fit.json|paper --flops=1e21 [--serve_bits=4] --out=plan.json`.

Reads fits, minimizes the loss they predict under a budget, and reports the number formats near the best precision, the
memory of the served model, past how many tokens more data hurts, what other laws predict, and how far the plan
extrapolates.
"""

import functools
import sys
from typing import TypeVar

from absl import flags

from analysis.laws import law
from analysis.planning import fitted, memory, text
from analysis.planning.cost import MAX_BITS, CostError, CostModel, bits_of_format, named_format
from analysis.planning.minimize import Budget, BudgetError
from analysis.planning.plan import plan
from analysis.planning.surface import SurfaceError
from precision_scaling.runtime import cli
from precision_scaling.runtime.files import atomic_write
from precision_scaling.runtime.outputs import output, writing

FLAGS = flags.FlagValues()
_number = functools.partial(flags.DEFINE_float, flag_values=FLAGS)
_whole = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_list = functools.partial(flags.DEFINE_list, flag_values=FLAGS)
_FIT = _text(
    "fit",
    None,
    "'paper', or fit.json files separated by commas: a law of the loss, which makes the plan, others of the loss to "
    "compare with and, for PTQ, one of δ",
)
_FLOPS = _number("flops", None, "budget in FLOPs of 16 bits; training, and serving with --inference_tokens")
_PARAMS = _number("params", None, "fix N, non-embedding parameters")
_TOKENS = _number("tokens", None, "fix D, training tokens")
_PRECISION = _text("precision", None, "fix P: bits, or a format to train in (nvfp4; fp8 is e4m3fn)")
_SERVE_BITS = _number("serve_bits", None, "bits of the weights after PTQ; without it the model is served as trained")
_SERVE_GROUP = _whole("serve_group", 0, "weights that share a 16-bit scale when served; 0: those of an output channel")
_INFERENCE = _number("inference_tokens", 0.0, "tokens to serve, at 2 N FLOPs each, as part of the budget")
_MEMORY = _text("memory", None, "memory for weights, KV cache and embeddings when served, such as 24GiB or 80GB")
_CONTEXT = _number("context", 0.0, "tokens of context in the KV cache; 0 leaves the cache out")
_BATCH = _number("batch", 1.0, "sequences served at once, each with its own cache")
_KV_BITS = _text("kv_bits", None, "bits or format of the served cache (default: as trained, else 16)")
_LAYOUT = _text("layout", None, "layers x KV heads x head width, such as 32x8x128 (default: width of 100 x layers)")
_VOCAB = _whole("vocab", 0, "vocabulary of a 16-bit embedding and head in memory; 0 leaves them out")
_SPEEDS = _text("speeds", "", "measured speeds such as bf16:1,fp8:1.6; without it cost is linear in bits")
_PARTS = _list("parts", None, "parts trained at P: w, a, kv (default: those that the fit's table identifies)")
_COLUMNS = _list("columns", [], "other columns that the law needs, such as group_size:128")
_OUT = _text("out", None, "file for the plan as JSON")


Number = TypeVar("Number", int, float, float | None)

# Ranges of flags: no model lies beyond them, and costs stay within float64.
ALLOWED = {
    "flops": (1.0, 1e40),
    "params": (1.0, 1e20),
    "tokens": (1.0, 1e20),
    "inference_tokens": (1.0, 1e30),
    "context": (1.0, 1e9),
    "batch": (1.0, 1e9),
    "vocab": (1, 10**8),
    "serve_group": (1, 10**6),
    "serve_bits": (1.0, MAX_BITS),
}


def _number_of(flag: flags.FlagHolder[Number]) -> Number:
    """The number of a flag; None where it is not given and has no default. Raises BudgetError."""
    low, high = ALLOWED[flag.name]
    value = flag.value
    if value is None or (value == 0 and flag.default == 0) or low <= value <= high:
        return value
    raise BudgetError(f"--{flag.name}={value:g}: want {low:g} to {high:g}{', or 0' if flag.default == 0 else ''}")


def _bits(flag: flags.FlagHolder) -> float | None:
    try:
        return None if flag.value is None else bits_of_format(flag.value)
    except CostError as error:
        raise CostError(f"--{flag.name}={flag.value}: {error}") from None


def _serving_of_flags() -> memory.Serving:
    return memory.Serving(
        context=_number_of(_CONTEXT),
        batch=_number_of(_BATCH),
        kv_bits=_bits(_KV_BITS),
        group_size=_number_of(_SERVE_GROUP),
        vocabulary=_number_of(_VOCAB),
        layout=None if _LAYOUT.value is None else memory.Layout.parse(_LAYOUT.value),
    )


def _budget_of_flags() -> Budget:
    return Budget(
        flops=_number_of(_FLOPS),
        n=_number_of(_PARAMS),
        d=_number_of(_TOKENS),
        p=_bits(_PRECISION),
        serve_bits=_number_of(_SERVE_BITS),
        inference_tokens=_number_of(_INFERENCE),
        memory_bytes=None if _MEMORY.value is None else memory.parse_bytes(_MEMORY.value),
        serving=_serving_of_flags(),
        cost=CostModel.parse(_SPEEDS.value),
    )


def _parts_of_flags() -> tuple[str, ...] | None:
    if _PARTS.value is None:
        return None
    if unknown := [x for x in _PARTS.value if x not in law.PARTS]:
        raise SurfaceError(f"--parts={','.join(_PARTS.value)}: {unknown[0]!r} is not one of {', '.join(law.PARTS)}")
    return tuple(x for x in law.PARTS if x in _PARTS.value)


def _columns_of_flags() -> dict[str, float]:
    columns = {}
    for entry in _COLUMNS.value:
        name, separator, text = (piece.strip() for piece in entry.partition(":"))
        value = cli.finite(text)
        if not separator or value is None or value < 0 or name in columns:
            raise SurfaceError(f"--columns={entry}: want NAME:NUMBER, such as group_size:128, each name once")
        columns[name] = value
    return columns


def main() -> None:
    fit_files = [] if _FIT.value.strip() == "paper" else [name.strip() for name in _FIT.value.split(",")]
    out = None if not _OUT.value else output("out", _OUT.value, reads=fit_files)
    fmt = None if _PRECISION.value is None else named_format(_PRECISION.value)
    result = plan(fitted.load(_FIT.value), _budget_of_flags(), _parts_of_flags(), _columns_of_flags(), fmt)
    print(text.describe(result))
    if out is not None:
        with writing("out", out, instead=result.to_json):
            atomic_write(out, result.to_json())
        print(f"\nwrote {out}")


command = functools.partial(cli.run, main, FLAGS, required=("fit",))

if __name__ == "__main__":
    sys.exit(command())
