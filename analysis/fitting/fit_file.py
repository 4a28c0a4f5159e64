"""Reads fit.json: every field has the type of the contract, and numbers that the file holds twice agree.

A file may be written by hand with `law` and `params` alone. A constant that was changed in one place only is an error:
which of the two is meant is unknown.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from analysis import laws
from analysis.fitting.options import FitError
from analysis.fitting.statistics import percentiles
from analysis.laws.law import Law

SAME = 1e-9  # relative difference up to which two numbers are one that was printed twice
KEYS = {"unidentified": "refused"}  # fields of a Fit whose key in the file has another name


def key_of(field: str) -> str:
    """The key of a field of a Fit in fit.json."""
    return KEYS.get(field, field)


def read(text: str, fields: Iterable[str]) -> dict[str, Any]:
    """The fields of a fit; those that the file leaves out are as in a fit without data. Raises FitError or LawError.

    fields: the names of all fields of a Fit.
    """
    raw = _parse(text)
    known = [key_of(field) for field in fields]
    if not isinstance(raw, dict) or not isinstance(raw.get("law"), str) or not isinstance(raw.get("params"), dict):
        raise FitError('a fit needs "law": name and "params": {name: value}')
    for key in set(raw) - set(known):
        if close := difflib.get_close_matches(key, known, 1, 0.75):
            raise FitError(f"key {key!r}: did you mean {close[0]!r}?")
    law = laws.resolve(raw["law"], raw["params"])
    params = _constants(law, "params", raw["params"], null=True)
    values = _constants(law, "values", raw.get("values", {}))
    if extra := [name for name in values if name not in params]:
        raise FitError(f"values.{extra[0]} is {values[extra[0]]:g}, but params has no {extra[0]}")
    for name, value in params.items() if values else ():
        if value is not None and not _alike(value, values.get(name)):
            said = f"values.{name} is {values[name]:g}" if name in values else f"values has no {name}"
            raise FitError(f"params.{name} is {value:g}, but {said}: change both, or leave values out")
    unidentified = _mapping("refused", raw.get("refused", {}), law, lambda key, why: _of_type(key, why, str, "a text"))
    for name in unidentified:
        if params.get(name) is not None:
            raise FitError(f"params.{name} is {params[name]:g}, but refused says that the table does not identify it")
    columns = _texts("columns", raw.get("columns", list(law.columns)))
    if set(columns) != set(law.columns):
        raise FitError(f"columns are {', '.join(columns)}, but law {law.name} reads {', '.join(law.columns)}")
    found: dict[str, Any] = {
        "law": law.name,
        "params": params,
        "values": values or {name: value for name, value in params.items() if value is not None},
        "unidentified": unidentified,
        "columns": columns,
        "ci": _mapping("ci", raw.get("ci", {}), law, _ends),
        "r2": _number("r2", raw.get("r2"), null=True),
        "objective": _number("objective", raw.get("objective"), null=True),
        "n": _count("n", raw.get("n", 0)),
        "starts": _count("starts", raw.get("starts", 0)),
        "seconds": _number("seconds", raw.get("seconds", 0.0)),
        "notes": _texts("notes", raw.get("notes", [])),
        "left_out": _mapping("left_out", raw.get("left_out", {}), None, _count),
        "starts_at_best": _number("starts_at_best", raw.get("starts_at_best"), null=True),
        "samples": _samples(law, raw.get("samples", {})),
        "residuals": _mapping("residuals", raw.get("residuals", {}), None, _numbers),
        "serve_bits": _number("serve_bits", raw.get("serve_bits"), null=True),
    }
    for name in ("metrics", "identifiability", "reporting"):
        found[name] = _of_type(name, raw.get(name, {}), dict, "an object")
    _check_reporting(found)
    return found


def _check_reporting(fields: Mapping[str, Any]) -> None:
    """What a plan reads of how the fit was made, and the numbers that are stored there a second time."""
    reporting, metrics = fields["reporting"], fields["metrics"]
    _mapping("reporting.ranges", reporting.get("ranges", {}), None, _range)
    for name in ("ptq_method", "delta_residual"):
        _of_type(f"reporting.{name}", reporting.get(name) or "", str, "a text or null")
    if "r2" in metrics and not _alike(metrics["r2"], fields["r2"]):
        raise FitError(f"r2 is {fields['r2']}, but metrics.r2 is {metrics['r2']}")
    if (level := _number("reporting.level", reporting.get("level"), null=True)) is not None:
        _check_intervals(fields["ci"], fields["samples"], level)
    rows = [reporting.get(name) for name in ("rows_before_ptq", "rows_after_ptq")]
    if all(isinstance(count, int) for count in rows) and sum(rows) != fields["n"]:
        raise FitError(f"n is {fields['n']}, but reporting counts {rows[0]} rows before PTQ and {rows[1]} after it")


def _check_intervals(ci: Mapping[str, Any], samples: Mapping[str, Any], level: float) -> None:
    """Raises FitError where an interval is not the percentiles of the draws; an end that is null is open."""
    if not 0 < level < 1:
        raise FitError(f"reporting.level is {level:g}: it must be above 0 and below 1")
    for name, ends in ci.items():
        drawn = percentiles(samples[name], level) if samples.get(name) else ends
        for end, of_draws in zip(ends, drawn, strict=True):
            if end is not None and not _alike(end, float(of_draws)):
                raise FitError(f"ci.{name} ends at {end:g}, but its samples say {of_draws:g}: leave ci or samples out")


def _parse(text: str) -> Any:
    def unique(pairs):
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise FitError(f"{twice!r} appears twice in the same object")
        return dict(pairs)

    def no_number(word):
        raise FitError(f"{word} is not a number that a fit can hold")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except FitError:
        raise
    except (ValueError, RecursionError) as error:
        raise FitError(f"not JSON: {error}") from None


def _of_type(key: str, value: Any, kind: type, words: str) -> Any:
    if not isinstance(value, kind):
        raise FitError(f"{key} is {_shown(value)}: it must be {words}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _number(key: str, value: Any, null: bool = False) -> float | None:
    return (
        None
        if value is None and null
        else _finite(key, value, "a finite number or null" if null else "a finite number")
    )


def _finite(key: str, value: Any, words: str = "a finite number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FitError(f"{key} is {_shown(value)}: it must be {words}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        finite = False
    if not finite:
        raise FitError(f"{key} is {_shown(value)}: it must be {words}")
    return value


def _count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FitError(f"{key} is {_shown(value)}: it must be a whole number from 0 up")
    return value


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    listed = _of_type(key, value, list, "a list of numbers")
    return tuple(_finite(f"{key}[{i}]", number) for i, number in enumerate(listed))


def _texts(key: str, value: Any) -> tuple[str, ...]:
    return tuple(_of_type(key, text, str, "a list of texts") for text in _of_type(key, value, list, "a list of texts"))


def _mapping(key: str, value: Any, law: Law | None, check) -> dict[str, Any]:
    """An object whose entries pass `check(key, value)`; with a law its keys are parameters of it."""
    found = {}
    for name, entry in _of_type(key, value, dict, "an object").items():
        if law is not None:
            law.parameter(name)
        found[name] = check(f"{key}.{name}", entry)
    return found


def _constants(law: Law, key: str, value: Any, null: bool = False) -> dict[str, float | None]:
    found = _mapping(key, value, law, lambda key, number: _number(key, number, null))
    for name, number in found.items():
        if number is not None and number < 0 and law.parameter(name).log:
            raise FitError(f"{key}.{name} is {number:g}: it must not be negative")
    return found


def _ends(key: str, value: Any) -> tuple[float | None, float | None]:
    if not isinstance(value, list) or len(value) != 2:
        raise FitError(f"{key} is {_shown(value)}: it must be [low, high]")
    low, high = (_number(key, end, null=True) for end in value)
    if low is not None and high is not None and low > high:
        raise FitError(f"{key} is {_shown(value)}: it must be [low, high]")
    return low, high


def _range(key: str, value: Any) -> tuple[float, float]:
    low, high = _ends(key, value)
    if low is None or high is None:
        raise FitError(f"{key} is {_shown(value)}: it must be [least, most]")
    return low, high


def _samples(law: Law, value: Any) -> dict[str, tuple[float, ...]]:
    """Draws of the constants, equally many of each."""
    found = _mapping("samples", value, law, _numbers)
    for name, numbers in found.items():
        if law.parameter(name).log and min(numbers, default=0) < 0:
            raise FitError(f"samples.{name} holds {min(numbers):g}: it must not be negative")
    if len(counts := {len(numbers) for numbers in found.values()}) > 1:
        raise FitError(f"samples hold {min(counts)} to {max(counts)} draws: they must be as many of every constant")
    return found


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None or isinstance(one, str) or isinstance(other, str):
        return one == other
    return isinstance(one, int | float) and isinstance(other, int | float) and math.isclose(one, other, rel_tol=SAME)
