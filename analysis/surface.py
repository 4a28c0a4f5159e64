"""From one or two fits to a loss of (N, D, P, P_post) that can be minimized: what `analysis.plan` and the figures
plan with.

A fit of L alone (`chinchilla`, `precision`, ...) becomes a loss as trained; with a fit of δ (`ptq`, `qid`) or a law
of both (`unified`) it becomes a loss as served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import fit as fits
from analysis import laws
from analysis.fit import Fit
from analysis.law import HIGH_PRECISION_BITS
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


def reads(fit: Fit, part: str) -> bool:
    """Whether the law reads the training precision of a part (w, a, kv), as bits or as the error they make."""
    return bool({f"P_{part}", f"s_{part}", f"gmse_{part}"} & set(laws.resolve(fit.law, fit.values).columns))


def informed_parts(fit: Fit) -> tuple[str, ...]:
    """The parts whose training precision the law reads and the fit's table informed, in the order w, a, kv."""
    read = {f"P_{x}" for x in PARTS} & set(laws.resolve(fit.law, fit.values).columns)
    amplitude = {"power_laws": "C_"}.get(fit.law, "gamma_")
    labels = [name for name in fit.values if name.startswith("eff_")]
    if labels:
        return max((_parts_of(label) for label in labels), key=lambda parts: (_tied(fit, parts), len(parts)))
    return tuple(
        x
        for x in PARTS
        if f"P_{x}" in read and f"{amplitude}{x}" in fit.values and f"{amplitude}{x}" not in fit.refused
    )


def known_precisions(fit: Fit, parts: Sequence[str]) -> tuple[float, ...] | None:
    """The only precisions a law can plan for: 16 where it knows no other, those with a capacity of their own, None
    for any.

    Raises SurfaceError for laws in which the precision is not a number of bits to choose.
    """
    law = laws.resolve(fit.law, fit.values)
    if law.high_precision_only:
        return (HIGH_PRECISION_BITS,)
    if fit.law == "capacity":
        bits = [_bits(label, parts) for label in fit.values if label.startswith("eff_")]
        return (*sorted(b for b in bits if b is not None), HIGH_PRECISION_BITS)
    if fit.law in ("qat", "floating_point"):
        raise SurfaceError(f"law {fit.law} does not say how loss depends on bits: give --precision")
    return None if parts else (HIGH_PRECISION_BITS,)


def _parts_of(label: str) -> tuple[str, ...]:
    return tuple(piece.rstrip("0123456789.") for piece in label.removeprefix("eff_").split("_"))


def _bits(label: str, parts: Sequence[str]) -> float | None:
    """The one precision of a capacity's label if just these parts share it (eff_w4_a4 with w, a: 4), else None."""
    bits = {float(piece.lstrip("abcdefghijklmnopqrstuvwxyz")) for piece in label.removeprefix("eff_").split("_")}
    return bits.pop() if _parts_of(label) == tuple(parts) and len(bits) == 1 else None


def _tied(fit: Fit, parts: Sequence[str]) -> int:
    return sum(_bits(name, parts) is not None for name in fit.values if name.startswith("eff_"))


def capacity(fit: Fit, parts: Sequence[str] = PARTS):
    """f(P) = N_eff/N with the `parts` trained at P bits, the others at 16 (law 3), or None for laws without N_eff."""
    if fit.law not in ("precision", "unified"):
        return None
    params = {**dict.fromkeys((f"n_{x}" for x in PARTS), 0.0), **fit.values}
    return lambda p: laws.effective_parameters(params, {"N": 1.0, **_precisions(np.asarray(p, np.float64), parts)})


def _precisions(p, parts: Sequence[str]) -> dict:
    return {f"P_{x}": p if x in parts else np.full(np.shape(p), HIGH_PRECISION_BITS) for x in PARTS}


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
    missing = [name for name in law.columns if name not in (*PLANNED, *columns)]
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
            n_eff = n if share is None else n * share(p) / share(HIGH_PRECISION_BITS)
            size = laws.predict(delta_fit.law, delta_fit.values, N=n_eff, D=d, P_post=bits, **columns)
            return np.where(p > bits, size, 0.0)

    return Surface(loss, delta)
