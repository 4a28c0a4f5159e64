"""Plans the next run: `python -m analysis.plan --fit=fit.json|paper --flops=1e21 [--serve-bits=4] --out=plan.json`.

Reads fits, minimizes the loss they predict under a budget, and says which formats there are near the best precision,
what serving takes in memory, when to stop training on more data, what other laws would say, and how far the answer lies
outside the data of the fit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence

from absl import flags

from analysis import command, laws
from analysis import surface as surfaces
from analysis.cost import MAX_BITS, CostError, CostModel, bits_of_format, named_format
from analysis.fit import Fit, FitError
from analysis.law import HIGH_PRECISION_BITS
from analysis.optimum import Budget, BudgetError, Point, minimize, turning_point
from analysis.planning import memory, options, served, spread, text
from analysis.planning.intervals import Interval, intervals
from analysis.planning.options import Option
from analysis.planning.reach import Reach, reaches
from analysis.planning.warnings import warnings
from analysis.surface import Surface, SurfaceError
from precision_scaling.files import atomic_write
from precision_scaling.formats import Format


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan and what to know before acting on it; N in parameters, D in tokens, P in bits, losses in nats a token.

    alternatives: whole bits, and formats: those that exist near P, each at its best N and D under the same budget, as
    in plan.json. serving: bits to serve in under the memory.
    """

    chosen: Option
    budget: Budget  # as asked for: what the plan chose is None
    loss_ci: Interval | None
    intervals: dict[str, Interval]
    alternatives: list[dict]
    formats: list[dict]
    serving: list[Option]
    opinions: list[spread.Opinion]
    critical_tokens: float | None
    reaches: list[Reach]
    warnings: list[str]

    @property
    def best(self) -> Point:
        return self.chosen.point

    @property
    def surface(self) -> Surface:
        return self.chosen.surface

    @property
    def parts(self) -> tuple[str, ...]:
        return self.surface.parts

    @property
    def laws(self) -> tuple[str, ...]:
        return tuple(fit.law for fit in self.surface.fits)

    def to_json(self) -> str:
        best, turning = self.best, self.critical_tokens
        raw = {
            "N": round(best.n), "D": round(best.d), "P": best.p, "loss": best.loss, "loss_ci": self.loss_ci,
            "flops": best.flops, "alternatives": self.alternatives,
            "delta": best.delta, "tokens_per_parameter": best.d / best.n, "serve_bits": self.budget.serve_bits,
            "D_crit": None if turning is None or math.isinf(turning) else turning, **self.intervals,
            "format": self.chosen.fmt and self.chosen.fmt.name, "formats": self.formats,
            "memory": served.memory(self.chosen), "serving": [served.row(option) for option in self.serving],
            "model_spread": spread.record(self.chosen, self.opinions),
            "extrapolation": {reach.name: reach.record() for reach in self.reaches},
            "parts": list(self.parts), "laws": list(self.laws), "warnings": self.warnings,
        }  # fmt: skip
        return json.dumps(raw, indent=1, allow_nan=False) + "\n"


def plan(
    fits: Sequence[Fit],
    budget: Budget,
    parts: Sequence[str] | None = None,
    columns: dict | None = None,
    fmt: Format | None = None,
) -> Plan:
    """The best point of these fits under the budget, with intervals, alternatives and warnings. Raises UserError.

    fits: of the loss, the first of which makes the plan and the others its spread, and of δ. fmt: train in this format,
    of the budget's p bits.
    """
    informed, *others = surfaces.pairs(fits, columns)
    surface = _with_parts(informed, parts)
    budget = _with_choices(surface, budget)
    chosen = _choose(surface, budget, fmt)
    best, bits = chosen.point, chosen.budget.serve_bits
    listed = options.existing_formats(surface, budget, best.p)
    near = [option for one in listed if (option := options.in_format(surface, budget, best, one)) is not None]
    beside = [*options.whole_bits(surface, budget, best), *near]
    spans = intervals(chosen, beside, budget)
    rows = [options.row(option, chosen, ci) for option, ci in zip(beside, spans.options, strict=True)]
    opinions = spread.opinions(chosen, others, budget)
    far = reaches(surface, best, best.flops, bits)
    found = Plan(
        chosen, budget, spans.loss, spans.optimum, rows[: len(rows) - len(near)], rows[len(rows) - len(near) :],
        served.by_bits(surface, budget) if None not in (budget.memory_bytes, budget.flops) else [], opinions,
        turning_point(chosen.surface, best.n, best.p, bits) if bits is not None else None, far, [],
    )  # fmt: skip
    without = [one.name for one in listed if one.name not in {option.fmt.name for option in near}]
    uninformed = surfaces.uninformed_parts(surface.fit) if parts is None else ()
    words = warnings(chosen, budget, far, uninformed, spans.loss is not None)
    return dataclasses.replace(found, warnings=[*words, *text.about_formats(budget, without)])


def _with_parts(surface: Surface, parts: Sequence[str] | None) -> Surface:
    """The surface with these parts trained low, which the fit's table must inform; None: those that it informs."""
    if parts is None:
        return surface
    name = surface.fit.law
    if unread := [x for x in parts if not surface.law.reads_part(x)]:
        raise SurfaceError(f"--parts: law {name} does not read the training precision of {text.named(unread)}")
    if unknown := [x for x in parts if x in surfaces.uninformed_parts(surface.fit)]:
        raise SurfaceError(
            f"--parts: the fit's table does not inform {text.named(unknown)}; it informs {text.named(surface.parts)}"
        )
    return dataclasses.replace(surface, parts=tuple(parts))


def _with_choices(surface: Surface, budget: Budget) -> Budget:
    """The budget with the precisions that the law knows. Raises SurfaceError for what it cannot plan."""
    fit = surface.fit
    if budget.serve_bits is not None and surface.delta_fit is None:
        raise SurfaceError(f"--serve-bits needs a law of δ: give --fit={fit.law}.json,ptq.json or a fit of unified")
    if budget.serve_bits is not None and fit.serve_bits is not None:
        raise SurfaceError(
            f"--serve-bits={budget.serve_bits:g}: law {fit.law} is one of losses after PTQ to {fit.serve_bits:g} bits "
            "already; leave the flag out"
        )
    in_16_bits_only = budget.p is not None and not surface.parts and not laws.get(fit.law).bits_given
    if in_16_bits_only and budget.p < HIGH_PRECISION_BITS:
        raise SurfaceError(f"--precision={budget.p:g}: law {fit.law} as fitted knows training in 16 bits only")
    serving = dataclasses.replace(budget.serving, cache_trained_low="kv" in surface.parts)
    choices = () if budget.p is not None else surfaces.known_precisions(fit, surface.parts) or ()
    return dataclasses.replace(budget, serving=serving, p_choices=choices)


def _choose(surface: Surface, budget: Budget, fmt: Format | None) -> Option:
    if fmt is None:
        return Option(surface, budget, minimize(surface, budget))
    special, fixed = options.trained_in(surface, budget, fmt)
    return Option(special, fixed, minimize(special, fixed), fmt)


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
_FLOPS = _number("flops", None, "budget in FLOPs of 16 bits; training, and serving with --inference-tokens")
_PARAMS = _number("params", None, "fix N, non-embedding parameters")
_TOKENS = _number("tokens", None, "fix D, training tokens")
_PRECISION = _text("precision", None, "fix P: bits, or a format to train in (nvfp4; fp8 is e4m3fn)")
_SERVE_BITS = _number("serve-bits", None, "bits of the weights after PTQ; without it the model is served as trained")
_SERVE_GROUP = _whole("serve-group", 0, "weights that share a scale of 16 bits as served; 0: an output channel does")
_INFERENCE = _number("inference-tokens", 0.0, "tokens to serve that the budget must also pay for (2 N per token)")
_MEMORY = _text("memory", None, "what weights, KV cache and embeddings may take as served, such as 24GiB or 80GB")
_CONTEXT = _number("context", 0.0, "tokens of context in the KV cache; 0 leaves the cache out")
_BATCH = _number("batch", 1.0, "sequences served at once, each with a cache of its own")
_KV_BITS = _text("kv-bits", None, "bits or format of the cache as served (default: as trained, else 16)")
_LAYOUT = _text("layout", None, "layers x KV heads x head width, such as 32x8x128 (default: width of 100 x layers)")
_VOCAB = _whole("vocab", 0, "entries of an embedding and a head, held in 16 bits; 0 leaves them out")
_SPEEDS = _text("speeds", "", "measured speeds such as bf16:1,fp8:1.6; without it cost is linear in bits")
_PARTS = _list("parts", None, "parts trained at P: w, a, kv (default: those that the fit's table informs)")
_COLUMNS = _list("columns", [], "other columns the law reads, such as group_size:128")
_OUT = _text("out", None, "file for the plan as JSON")


# What a flag can be: beyond it there is no model, and sums of costs would leave float64.
ALLOWED = {
    "flops": (1.0, 1e40),
    "params": (1.0, 1e20),
    "tokens": (1.0, 1e20),
    "inference-tokens": (1.0, 1e30),
    "context": (1.0, 1e9),
    "batch": (1.0, 1e9),
    "vocab": (1, 10**8),
    "serve-group": (1, 10**6),
    "serve-bits": (1.0, MAX_BITS),
}


def _number_of(flag: flags.FlagHolder) -> float | None:
    low, high = ALLOWED[flag.name]
    value = flag.value
    if value is None or (value == 0 and flag.default == 0) or low <= value <= high:
        return value
    raise BudgetError(f"--{flag.name}={value:g}: want {low:g} to {high:g}{', or 0' if flag.default == 0 else ''}")


def _bits(flag: flags.FlagHolder) -> float | None:
    try:
        return None if flag.value is None else bits_of_format(flag.value)
    except CostError as err:
        raise CostError(f"--{flag.name}={flag.value}: {err}") from None


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
    if unknown := [x for x in _PARTS.value if x not in surfaces.PARTS]:
        raise SurfaceError(
            f"--parts={','.join(_PARTS.value)}: {unknown[0]!r} is not one of {', '.join(surfaces.PARTS)}"
        )
    return tuple(x for x in surfaces.PARTS if x in _PARTS.value)


def _columns_of_flags() -> dict[str, float]:
    columns = {}
    for entry in _COLUMNS.value:
        name, separator, text = (piece.strip() for piece in entry.partition(":"))
        value = command.finite(text)
        if not separator or value is None or value < 0 or name in columns:
            raise SurfaceError(f"--columns={entry}: want NAME:NUMBER, such as group_size:128, each name once")
        columns[name] = value
    return columns


def main() -> None:
    if not _FIT.value:
        raise FitError("--fit is required: 'paper' or a fit.json")
    fit_files = [] if _FIT.value.strip() == "paper" else [name.strip() for name in _FIT.value.split(",")]
    out = None if not _OUT.value else command.output("out", _OUT.value, reads=fit_files)
    fmt = None if _PRECISION.value is None else named_format(_PRECISION.value)
    result = plan(surfaces.load(_FIT.value), _budget_of_flags(), _parts_of_flags(), _columns_of_flags(), fmt)
    print(text.describe(result))
    if out is not None:
        with command.writing("out", out, instead=result.to_json):
            atomic_write(out, result.to_json())
        print(f"\nwrote {out}")


if __name__ == "__main__":
    sys.exit(command.run(__doc__, FLAGS, main, sys.argv))
