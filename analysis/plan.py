"""Plans the next run: `python -m analysis.plan --fit=fit.json|paper --flops=1e21 [--serve-bits=4] --out=plan.json`.

Reads fits, minimizes the loss they predict under a budget, and says what 4-bit serving costs, when to stop training
on more data, what the other precisions would give, and how far the answer lies outside the data of the fit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags
from scipy import optimize

from analysis import command, laws
from analysis import surface as surfaces
from analysis.cost import MAX_BITS, CostError, CostModel, bits_of_format
from analysis.fit import Fit, FitError
from analysis.law import HIGH_PRECISION_BITS
from analysis.optimum import Budget, BudgetError, Point, Surface, evaluate, minimize, precisions, turning_point
from analysis.search import NO_INTERVALS, least_resamples
from analysis.surface import SurfaceError
from analysis.wording import count_label, interval_text
from precision_scaling.files import atomic_write

ALTERNATIVES = tuple(float(bits) for bits in range(4, 17))  # bits compared at the same cost
MOST_DRAWS = 200  # bootstrap samples whose own optimum is found
LEVEL = (2.5, 97.5)  # percentiles of the intervals


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan and what to know before acting on it; N in parameters, D in tokens, P in bits, losses in nats a token."""

    best: Point
    loss_ci: tuple[float, float] | None
    intervals: dict[str, tuple[float, float]]
    alternatives: list[dict]
    critical_tokens: float | None
    warnings: list[str]
    budget: Budget
    parts: tuple[str, ...]
    laws: tuple[str, ...]

    def to_json(self) -> str:
        best = self.best
        turning = self.critical_tokens
        raw = {
            "N": round(best.n), "D": round(best.d), "P": best.p, "loss": best.loss, "loss_ci": self.loss_ci,
            "flops": best.flops, "alternatives": self.alternatives,
            "delta": best.delta, "tokens_per_parameter": best.d / best.n, "serve_bits": self.budget.serve_bits,
            "D_crit": None if turning is None or math.isinf(turning) else turning, **self.intervals,
            "parts": list(self.parts), "laws": list(self.laws), "warnings": self.warnings,
        }  # fmt: skip
        return json.dumps(raw, indent=1, allow_nan=False) + "\n"


def plan(fits: Sequence[Fit], budget: Budget, parts: Sequence[str] | None = None, columns: dict | None = None) -> Plan:
    """The best point of these fits under the budget, with intervals, alternatives and warnings. Raises UserError."""
    fit = surfaces.loss_law(fits)
    surfaces.check_columns(fits, columns or {})
    warnings = []
    informed = surfaces.informed_parts(fit)
    if parts is None:
        parts = informed
        if uninformed := surfaces.uninformed_parts(fit):
            warnings.append(
                f"the fit's table does not say what low precision of {_named(uninformed)} costs: kept at 16 bits"
            )
    elif unread := [x for x in parts if not laws.resolve(fit.law, fit.values).reads_part(x)]:
        raise SurfaceError(f"--parts: law {fit.law} does not read the training precision of {_named(unread)}")
    elif unknown := [x for x in parts if x in surfaces.uninformed_parts(fit)]:
        raise SurfaceError(f"--parts: the fit's table does not inform {_named(unknown)}; it informs {_named(informed)}")
    if budget.p is None:
        choices = surfaces.known_precisions(fit, parts)
        budget = dataclasses.replace(budget, p_choices=choices or ())
        if choices == (HIGH_PRECISION_BITS,):
            warnings.append(f"law {fit.law} as fitted knows training in 16 bits only: P is not chosen")
    elif budget.p < HIGH_PRECISION_BITS and not parts and not laws.get(fit.law).bits_given:
        raise SurfaceError(f"--precision={budget.p:g}: law {fit.law} as fitted knows training in 16 bits only")
    if budget.serve_bits is not None and surfaces.delta_law(fits) is None:
        raise SurfaceError(f"--serve-bits needs a law of δ: give --fit={fit.law}.json,ptq.json or a fit of unified")
    ground = surfaces.build(fits, parts, columns)
    best = minimize(ground, budget)
    critical = turning_point(ground, best.n, best.p, budget.serve_bits) if budget.serve_bits is not None else None
    loss_ci, intervals = _intervals(fits, budget, best, parts, columns)
    warnings += _caveats(fits, budget, best, parts, loss_ci)
    capacity = surfaces.capacity(fit, parts)
    return Plan(
        best, loss_ci, intervals, _alternatives(ground, budget, best, capacity), critical, warnings, budget,
        tuple(parts), tuple(dict.fromkeys(f.law for f in fits)),
    )  # fmt: skip


def _alternatives(ground: Surface, budget: Budget, best: Point, capacity) -> list[dict]:
    """The best N and D of every other precision at the same cost; formats with a speed, else whole bits."""
    found = []
    for p in precisions(dataclasses.replace(budget, p=None)) or ALTERNATIVES:
        fixed = dataclasses.replace(budget, p=p)
        try:
            point = evaluate(ground, fixed, best.n, best.d, p) if budget.flops is None else minimize(ground, fixed)
        except (BudgetError, CostError):
            continue
        if not math.isfinite(point.loss):
            continue
        row = {
            "P": p,
            "N": round(point.n),
            "D": round(point.d),
            "loss": point.loss,
            "delta": point.delta,
            "flops": point.flops,
        }
        row["extra_loss"] = point.loss - best.loss
        row["N_factor"] = _make_up_factor(ground, best, p)
        if capacity is not None:
            row["capacity"] = float(capacity(p, point.n, point.d))
        if name := budget.cost.format_name(p):
            row["format"] = name
        found.append(row)
    return found


def _make_up_factor(ground: Surface, at: Point, p: float) -> float | None:
    """Factor on N that makes a model trained at p bits as good as one of 16 at the plan's N and D (as trained, before
    PTQ).
    """
    d, p16 = np.float64(at.d), np.float64(HIGH_PRECISION_BITS)
    target = float(ground.loss(np.float64(at.n), d, p16))
    gap = lambda log_factor: float(ground.loss(np.float64(at.n * math.exp(log_factor)), d, np.float64(p))) - target
    low, high = math.log(1e-3), math.log(1e6)
    if not gap(low) > 0 > gap(high):
        return None
    return math.exp(optimize.brentq(gap, low, high, xtol=1e-12))


def _intervals(fits, budget: Budget, best: Point, parts, columns):
    """95 % intervals from the fits' bootstrap samples: of the loss at the plan, and of what the best N, D and P would
    be.
    """
    carried = [fit for fit in (surfaces.loss_law(fits), surfaces.delta_law(fits)) if fit is not None]
    draws = min(surfaces.draws(fit) for fit in carried)
    if budget.serve_bits is None:
        draws = surfaces.draws(carried[0])
    if draws < least_resamples((LEVEL[1] - LEVEL[0]) / 100):
        return None, {}
    at_plan, optima = [], []
    for index in np.linspace(0, draws - 1, min(draws, MOST_DRAWS)).round().astype(int):
        drawn = [surfaces.draw(fit, index) if surfaces.draws(fit) > index else fit for fit in fits]
        ground = surfaces.build(drawn, parts, columns)
        at_plan.append(evaluate(ground, budget, best.n, best.d, best.p).loss)
        try:
            optima.append(minimize(ground, budget))
        except BudgetError:
            continue
    interval = lambda values: tuple(float(x) for x in np.percentile(values, LEVEL))
    free = {"N_ci": (budget.n, "n"), "D_ci": (budget.d, "d"), "P_ci": (budget.p, "p")}
    return interval(at_plan), {
        name: interval([getattr(point, key) for point in optima])
        for name, (given, key) in free.items()
        if given is None
    }


def _named(parts: Sequence[str]) -> str:
    names = {"w": "weights", "a": "activations", "kv": "KV cache"}
    return ", ".join(names[x] for x in parts) or "nothing"


def _caveats(fits, budget: Budget, best: Point, parts, loss_ci) -> list[str]:
    """What a reader must hear before believing the plan: data left behind, constants not identified, bounds reached."""
    found = []
    fit, ptq = surfaces.loss_law(fits), surfaces.delta_law(fits)
    values = {"N": best.n, "D": best.d, "P": best.p}
    used = [fit] if budget.serve_bits is None or ptq is fit else [fit, ptq]
    for name, value in values.items():
        found += _outside(name, value, surfaces.data_range(fit, name))
    if budget.serve_bits is not None:
        found += _outside("P_post", budget.serve_bits, surfaces.data_range(ptq, "P_post"))
        if ptq is not fit and best.p < HIGH_PRECISION_BITS:
            found.append(
                "δ comes from a law of models trained in 16 bits: below 16 bits it is the most that PTQ would cost"
            )
    for one in used:
        law = laws.resolve(one.law, one.values)
        of_parts = {name for x in surfaces.PARTS for name in law.part_params(x)}  # told elsewhere, part by part
        refused = [name for name in one.refused if name not in of_parts]
        if refused:
            found.append(f"{one.law}: the fit's table does not inform {', '.join(refused)}; stand-ins were used")
        found += [f"{one.law}: {note}" for note in one.notes]
    if (form := laws.get(fit.law).by_form) and budget.serve_bits is budget.p is budget.n is budget.d is None:
        found.append(f"by the form of law {fit.law} alone, {form}")
    if budget.p is None and not precisions(budget) and budget.flops is not None:
        for bound, word in zip(budget.p_range, ("lowest", "highest"), strict=True):
            if abs(best.p - bound) < 1e-3:
                found.append(f"P ends at {bound:g} bits, the {word} that was searched")
    few_runs = any(note.startswith(NO_INTERVALS) for one in used for note in one.notes)
    if loss_ci is None and any(one.n for one in used) and not few_runs:
        found.append("no interval: the fit carries no bootstrap samples (fit again with --bootstrap=1000)")
    return found


def _outside(name: str, value: float, span: tuple[float, float] | None) -> list[str]:
    if span is None or span[0] * 0.99 <= value <= span[1] * 1.01:
        return []
    show = count_label if name in ("N", "D") else "{:.3g}".format
    above = value > span[1]
    edge = span[1] if above else span[0]
    factor = f"{max(value / edge, edge / value):.3g} times {'above' if above else 'below'}"
    how = factor if name in ("N", "D") else "above" if above else "below"
    return [f"extrapolation: {name} = {show(value)} is {how} the fit's data ({show(span[0])} to {show(span[1])})"]


def advice(result: Plan) -> str:
    """The line on how long to train a model that will be served in few bits."""
    best, turning, bits = result.best, result.critical_tokens, result.budget.serve_bits
    if bits is None:
        return "No --serve-bits: loss is as trained, and more tokens always help."
    at = f"At N = {count_label(best.n)} trained in {best.p:.3g} bits and served in {bits:g}"
    if math.isinf(turning):
        return f"{at}, more data never hurts in this law: no D_crit."
    crit = f"D_crit = {count_label(turning)} tokens ({turning / best.n:.3g} per parameter)"
    if best.d > turning * 1.001:
        return f"DON'T TRAIN LONGER: {at}, loss rises past {crit}; this plan trains {best.d / turning:.3g} times that."
    if best.d > turning * 0.99:
        return f"DON'T TRAIN LONGER: {at}, loss rises past {crit}; the plan stops there and leaves budget unspent."
    return f"{at}, loss would rise past {crit}; the plan uses {best.d / turning:.2g} of that."


def _beside(span, show) -> str:
    return f"  {interval_text(span, show)}" if span else ""


def describe(result: Plan) -> str:
    """The plan as text for a terminal."""
    best, budget = result.best, result.budget
    lines = [
        f"Plan by {' + '.join(result.laws)}, precision of {_named(result.parts)}",
        f"  N      {count_label(best.n)} parameters ({best.n:.4g})"
        + _beside(result.intervals.get("N_ci"), count_label),
        f"  D      {count_label(best.d)} tokens ({best.d:.4g}), {best.d / best.n:.3g} per parameter"
        + _beside(result.intervals.get("D_ci"), count_label),
        f"  P      {best.p:.2f} bits" + _beside(result.intervals.get("P_ci"), "{:.2f}".format),
        f"  loss   {best.loss:.4f} nats per token" + _beside(result.loss_ci, "{:.4f}".format)
        + ("" if budget.serve_bits is None else f", δ {best.delta:.4f} of it from PTQ to {budget.serve_bits:g} bits"),
        f"  cost   {best.flops:.4g} FLOP-equivalents at 16 bits" + (f" of {budget.flops:.4g}" if budget.flops else ""),
        advice(result),
    ]  # fmt: skip
    if result.alternatives:
        title = "at the same cost" if budget.flops else "at the same N and D"
        lines += [
            "",
            f"Other precisions {title}:",
            "       P        N        D     D/N     loss   above best  N for 16-bit loss",
        ]
        for row in result.alternatives:
            factor = "-" if row["N_factor"] is None else f"x {row['N_factor']:.2f}"
            name = row.get("format", f"{row['P']:g}")
            lines.append(
                f"  {name:>6} {count_label(row['N']):>8} {count_label(row['D']):>8} {row['D'] / row['N']:>7.3g} "
                f"{row['loss']:>8.4f} {row['extra_loss']:>12.4f} {factor:>18}"
            )
    lines += ["", *(f"Warning: {warning}" for warning in result.warnings)] if result.warnings else []
    return "\n".join(lines)


FLAGS = flags.FlagValues()
_number = functools.partial(flags.DEFINE_float, flag_values=FLAGS)
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_list = functools.partial(flags.DEFINE_list, flag_values=FLAGS)
_FIT = _text("fit", None, "'paper', or fit.json files separated by commas: a law of the loss and, for PTQ, one of δ")
_FLOPS = _number("flops", None, "budget in FLOPs of 16 bits; training, and serving with --inference-tokens")
_PARAMS = _number("params", None, "fix N, non-embedding parameters")
_TOKENS = _number("tokens", None, "fix D, training tokens")
_PRECISION = _text("precision", None, "fix P: bits or a format (fp8)")
_SERVE_BITS = _number("serve-bits", None, "bits of the weights after PTQ; without it the model is served as trained")
_INFERENCE = _number("inference-tokens", 0.0, "tokens to serve that the budget must also pay for (2 N per token)")
_MEMORY = _number("memory-gb", None, "largest size of the weights at the precision of serving, in 1e9 bytes")
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
    "memory-gb": (1e-9, 1e12),
    "serve-bits": (1.0, MAX_BITS),
}


def _number_of(flag: flags.FlagHolder) -> float | None:
    low, high = ALLOWED[flag.name]
    value = flag.value
    if value is None or (value == 0 and flag.default == 0) or low <= value <= high:
        return value
    raise BudgetError(f"--{flag.name}={value:g}: want {low:g} to {high:g}{', or 0' if flag.default == 0 else ''}")


def _precision(text: str | None) -> float | None:
    try:
        return None if text is None else bits_of_format(text)
    except CostError as err:
        raise CostError(f"--precision={text}: {err}") from None


def _budget_of_flags() -> Budget:
    memory = _number_of(_MEMORY)
    return Budget(
        flops=_number_of(_FLOPS),
        n=_number_of(_PARAMS),
        d=_number_of(_TOKENS),
        p=_precision(_PRECISION.value),
        serve_bits=_number_of(_SERVE_BITS),
        inference_tokens=_number_of(_INFERENCE),
        memory_bytes=None if memory is None else memory * 1e9,
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
    result = plan(surfaces.load(_FIT.value), _budget_of_flags(), _parts_of_flags(), _columns_of_flags())
    print(describe(result))
    if out is not None:
        with command.writing("out", out, instead=result.to_json):
            atomic_write(out, result.to_json())
        print(f"\nwrote {out}")


if __name__ == "__main__":
    sys.exit(command.run(__doc__, FLAGS, main, sys.argv))
