"""From one or two fits to a loss of (N, D, P, P_post) that can be minimized: what `analysis.plan` and the figures
plan with.

A fit of L alone (`chinchilla`, `precision`, ...) becomes a loss as trained; with a fit of δ (`ptq`, `qid`) or a law
of both (`unified`) it becomes a loss as served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import derived, laws
from analysis import fit as fits
from analysis.fit import Fit
from analysis.law import HIGH_PRECISION_BITS, Law
from analysis.optimum import Surface
from precision_scaling.errors import UserError

PARTS = ("w", "a", "kv")
PLANNED = ("N", "D", "P_w", "P_a", "P_kv", "P_post")  # columns that a plan chooses
PAPER_RANGES = {
    "N": (30e6, 1.7e9),
    "D": (1.5e9, 26e9),
    "P": (3.0, 16.0),
    "P_post": (3.0, 6.0),
}  # fits to 220M, checked at 1.7B


class SurfaceError(UserError):
    """Fits that do not give the loss that was asked for."""


def published() -> list[Fit]:
    """The paper's constants: its law of training precision and its law of PTQ (the C_x of its unified law are
    unpublished).
    """
    return [
        dataclasses.replace(fits.published(law), reporting={"ranges": PAPER_RANGES}) for law in ("precision", "ptq")
    ]


def load(text: str) -> list[Fit]:
    """`paper`, or one or more fit.json files separated by commas. Raises analysis.fit.FitError."""
    return published() if text.strip() == "paper" else [fits.load(name.strip()) for name in text.split(",")]


def draws(fit: Fit) -> int:
    """Number of bootstrap samples of the constants."""
    return min((len(values) for values in fit.samples.values()), default=0)


def draw(fit: Fit, index: int) -> Fit:
    """The fit with the constants of one bootstrap sample; constants that were not fitted stay."""
    return dataclasses.replace(fit, values={**fit.values, **{k: v[index] for k, v in fit.samples.items()}})


def data_range(fit: Fit, name: str) -> tuple[float, float] | None:
    """Smallest and largest value of a column in the rows of the fit; `P` spans the three parts. None where not on
    record.
    """
    ranges = fit.reporting.get("ranges") or {}
    names = [f"P_{x}" for x in PARTS] if name == "P" and "P" not in ranges else [name]
    found = [ranges[n] for n in names if n in ranges]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def loss_law(given: Sequence[Fit]) -> Fit:
    """The one fit of a loss among them. Raises SurfaceError where there is none or more than one."""
    found = [fit for fit in given if laws.get(fit.law).target == "loss"]
    if len(found) != 1:
        named = ", ".join(fit.law for fit in given)
        raise SurfaceError(
            f"--fit gives {len(found)} laws of the loss ({named}); want one, such as precision, besides a law of δ"
        )
    return found[0]


def delta_law(given: Sequence[Fit]) -> Fit | None:
    """The fit that says what PTQ costs: a law of both if there is one, else a law of δ, else None."""
    found = [fit for fit in given if laws.get(fit.law).log_delta is not None]
    if len(found) > 1:
        raise SurfaceError(f"--fit gives more than one law of δ ({', '.join(fit.law for fit in found)}); want one")
    return found[0] if found else None


def informed_parts(fit: Fit) -> tuple[str, ...]:
    """The parts whose training precision the law reads and the fit's table informed, in the order w, a, kv."""
    law, labels = laws.resolve(fit.law, fit.values), _labels(fit)
    if labels:
        return max((tuple(bits) for bits in labels), key=lambda parts: (len(_tied(labels, parts)), len(parts)))
    return tuple(x for x in PARTS if law.reads_part(x) and _informs(fit, law, x))


def _informs(fit: Fit, law: Law, part: str) -> bool:
    """Whether the amplitude of a part is reported; where a law has none of its own, whether rows were low in it."""
    params = law.part_params(part)
    if params:
        return params[0] in fit.values and params[0] not in fit.refused
    span = data_range(fit, f"P_{part}")
    return span is None or span[0] < HIGH_PRECISION_BITS


def uninformed_parts(fit: Fit) -> tuple[str, ...]:
    """The parts that the law reads and the fit's table does not inform."""
    law, known = laws.resolve(fit.law, fit.values), informed_parts(fit)
    return () if _labels(fit) else tuple(x for x in PARTS if law.reads_part(x) and x not in known)


def known_precisions(fit: Fit, parts: Sequence[str]) -> tuple[float, ...] | None:
    """The only precisions a law can plan for: 16 where it knows no other, those with a capacity of their own, None
    for any.

    Raises SurfaceError for laws in which the precision is not a number of bits to choose.
    """
    law = laws.resolve(fit.law, fit.values)
    if law.high_precision_only:
        return (HIGH_PRECISION_BITS,)
    if law.bits_given:
        raise SurfaceError(f"law {fit.law} does not say how loss depends on bits: give --precision")
    if labels := _labels(fit):
        return (*sorted(_tied(labels, parts)), HIGH_PRECISION_BITS)
    return (law.bits or None) if parts else (HIGH_PRECISION_BITS,)


def _labels(fit: Fit) -> list[dict[str, float]]:
    """The training precisions that have a capacity of their own, as bits by part."""
    found = [laws.precisions_of(name) for name in fit.values]
    return [bits for bits in found if bits is not None and set(bits) <= set(PARTS)]


def _tied(labels: Sequence[Mapping[str, float]], parts: Sequence[str]) -> set[float]:
    """The precisions that just these parts share in a label."""
    return {next(iter(bits.values())) for bits in labels if tuple(bits) == tuple(parts) and len({*bits.values()}) == 1}


def capacity(fit: Fit, parts: Sequence[str] = PARTS):
    """The function f(P, N, D) = N_eff/N with the `parts` trained at P bits, the others at 16, or None for laws without
    N_eff. N and D may be left out where the law's share depends on precision alone.
    """
    law = laws.resolve(fit.law, fit.values)
    if law.share is None:
        return None
    params = law.values(fit.values)

    def share(p, n=None, d=None):
        if law.share_varies and (n is None or d is None):
            raise SurfaceError(f"the share of N that law {law.name} leaves varies with N or D: give both")
        given = {"N": 1.0 if n is None else n, "D": 1.0 if d is None else d}
        columns = laws.complete_columns(law, {**given, **_precisions(np.asarray(p, np.float64), parts)})
        return law.share(params, columns, np)

    return share


def _precisions(p, parts: Sequence[str]) -> dict:
    return {f"P_{x}": p if x in parts else np.full(np.shape(p), HIGH_PRECISION_BITS) for x in PARTS}


def _follows(name: str) -> bool:
    """Whether a column follows from the precisions that a plan chooses."""
    return derived.column(name, dict.fromkeys(PLANNED, 4.0)) is not None


def check_columns(given: Sequence[Fit], columns: Mapping[str, float]) -> None:
    """Raises SurfaceError for a column that no law of the fits reads, or that the plan itself chooses."""
    read = {name for fit in given for name in laws.resolve(fit.law, fit.values).columns} - set(PLANNED)
    for name in columns:
        if name not in read:
            more = f"it is {', '.join(sorted(read))}" if read else "there is none"
            raise SurfaceError(
                f"--columns={name}: no column that {' and '.join(fit.law for fit in given)} read besides "
                f"{', '.join(PLANNED)}; {more}"
            )


def build(given: Sequence[Fit], parts: Sequence[str] = PARTS, columns: Mapping[str, float] | None = None) -> Surface:
    """The surface of these fits with `parts` trained at P bits; `columns` are what else the law reads (group_size,
    ...).

    A law of δ that knows only models trained in 16 bits is given `N f(P)/f(16)` for N, as N_eff stands in law 4, and
    zero where P_post is not below P: with the C_x unknown (infinite) that is the most that the unified law can lose.
    """
    loss_fit, delta_fit, columns = loss_law(given), delta_law(given), dict(columns or {})
    law = laws.resolve(loss_fit.law, loss_fit.values)
    missing = [name for name in law.columns if name not in (*PLANNED, *columns) and not _follows(name)]
    if missing:
        raise SurfaceError(f"law {law.name} also reads {', '.join(missing)}: give --columns={missing[0]}:VALUE")

    def loss(n, d, p):
        return laws.predict(law, loss_fit.values, N=n, D=d, **_precisions(p, parts), **columns)

    if delta_fit is None:
        return Surface(loss)
    if delta_fit is loss_fit:

        def delta(n, d, p, bits):
            served = laws.predict(law, loss_fit.values, N=n, D=d, P_post=bits, **_precisions(p, parts), **columns)
            return served - loss(n, d, p)
    else:
        share = capacity(loss_fit, parts)

        def delta(n, d, p, bits):
            n_eff = n if share is None else n * share(p, n, d) / share(HIGH_PRECISION_BITS, n, d)
            size = laws.predict(delta_fit.law, delta_fit.values, N=n_eff, D=d, P_post=bits, **columns)
            return np.where(p > bits, size, 0.0)

    return Surface(loss, delta)
