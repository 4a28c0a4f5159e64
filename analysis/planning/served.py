"""Bits to serve in within a memory: fewer bits allow more parameters, and lose more to PTQ."""

import dataclasses
from typing import Any

from analysis.planning.cost import CostError
from analysis.planning.minimize import Budget, BudgetError, minimize
from analysis.planning.options import Option
from analysis.planning.surface import Surface

SERVED_BITS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # that PTQ methods write


def by_bits(surface: Surface, budget: Budget) -> list[Option]:
    """The best plan for every number of bits that the law of δ has rows of, and for serving as trained; each within the
    memory. Those that no model fits are left out.
    """
    span = surface.data_range("P_post")
    known = [bits for bits in SERVED_BITS if span and span[0] <= bits <= span[1]]
    found = []
    asked = [] if budget.serve_bits is None else [budget.serve_bits]
    for bits in [*sorted({*known, *asked}), None]:
        served = dataclasses.replace(budget, serve_bits=bits)
        try:
            found.append(Option(surface, served, minimize(surface, served)))
        except (BudgetError, CostError):
            continue
    return found


def memory(option: Option) -> dict[str, Any]:
    """Bytes of an option as served, by what they are for, and the layout that the cache was counted with."""
    serving, point, budget = option.budget.serving, option.point, option.budget
    width, depth = map(float, serving.shape(point.n))
    weights = float(serving.weights(point.n, option.bits))
    found = {
        "weights_bytes": weights,
        "weight_bits": option.bits,
        "stored_bits": weights * 8 / point.n,
        "kv_cache_bytes": float(serving.cache(point.n, point.p)),
        "kv_bits": float(serving.cache_bits(point.p)),
        "embedding_bytes": float(serving.embeddings(point.n)),
        "total_bytes": option.memory,
        "context": serving.context,
        "batch": serving.batch,
        "width": width,
        "depth": depth,
        "layout": None if serving.layout is None else dataclasses.asdict(serving.layout),
    }
    if budget.memory_bytes is not None:
        found |= {"limit_bytes": budget.memory_bytes, "fits": bool(budget.fits_memory(point.n, point.p))}
    return found


def row(option: Option) -> dict[str, Any]:
    """A line of the table of bits to serve in."""
    point = option.point
    return {
        "serve_bits": option.budget.serve_bits,
        "N": round(point.n),
        "D": round(point.d),
        "P": point.p,
        "loss": point.loss,
        "delta": point.delta,
        "flops": point.flops,
        **memory(option),
    }
