"""The registry of scaling laws and their prediction.

Every command takes a law from `LAWS` by name. To add a law, write its `Law` in one of the modules below and list it in
that module's LAWS; docs/analysis.md shows one, and how to register it from Python.
"""

import numpy as np

from analysis.laws import capacity, derived, noise, paper, published_laws
from analysis.laws.law import Law, LawError, Values
from analysis.table.columns import HIGH_PRECISION_BITS, PRECISIONS

LAWS: dict[str, Law] = {law.name: law for law in (*paper.LAWS, *published_laws.LAWS, *capacity.LAWS, *noise.LAWS)}


def get(name: str | Law) -> Law:
    """The law of that name; a Law is returned unchanged."""
    if isinstance(name, Law):
        return name
    if name not in LAWS:
        raise LawError(f"unknown law {name!r}: choose one of {', '.join(LAWS)}")
    return LAWS[name]


def resolve(law: str | Law, params: Values | None = None, columns: Values | None = None) -> Law:
    """The law with concrete parameters: a family gets one for each label found in `params`, else in `columns`."""
    law = get(law)
    if law.family is None:
        return law
    if params is not None:
        return law.family.law(tuple(name for name in params if name.startswith(law.family.prefix)))
    return law if columns is None else law.family.law(law.family.labels(columns))


def precisions_of(name: str) -> dict[str, float] | None:
    """The training precisions that a capacity parameter such as eff_w4_a4 stands for; None for other parameters."""
    return capacity.bits_of(name) if name.startswith(capacity.FORWARD) else None


def published(law: str | Law) -> dict[str, float]:
    """The law's published constants (see `source`); parameters without one are absent."""
    return get(law).published


def complete_columns(law: Law, columns: Values) -> dict[str, np.ndarray]:
    """The law's columns as float64 arrays of one shape; an absent precision is 16 bits, an absent P_post no PTQ."""
    defaults = dict.fromkeys(PRECISIONS, HIGH_PRECISION_BITS)
    if law.target == "loss":
        defaults["P_post"] = np.nan
    out = {}
    for name in law.columns:
        value = columns.get(name, defaults.get(name))
        if value is None:
            value = derived.column(name, {**defaults, **columns})
        if value is None:
            raise LawError(f"law {law.name} needs column {name}; given: {', '.join(columns) or 'none'}")
        try:
            out[name] = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise LawError(f"column {name} holds something that is not a number: {error}") from None
    try:
        shape = np.broadcast_shapes(*(v.shape for v in out.values()))
    except ValueError:
        raise LawError("columns of different lengths: " + ", ".join(f"{k} {v.shape}" for k, v in out.items())) from None
    return {name: np.broadcast_to(value, shape) for name, value in out.items()}


def predict(law: str | Law, params: Values, **columns) -> np.ndarray:
    """Loss in nats per token (δ for laws of δ alone, such as "ptq") at the given columns; numpy in, numpy out.

    N and D are counts, P_* bits (16 where left out). Constants left out of `params` take the law's defaults (biases 0).
    Other columns are ignored. Raises LawError for an unknown law, a missing or null constant, or a
    missing column.
    """
    law = resolve(law, params)
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(law.evaluate(law.values(params), complete_columns(law, columns), np))[()]
