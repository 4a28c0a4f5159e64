"""From one or two fits to a loss of (N, D, P, P_post) that can be minimized: what `analysis.plan` and the figures
plan with.

A fit of L alone (`chinchilla`, `precision`, ...) becomes a loss as trained; with a fit of δ (`ptq`, `qid`) or a law
of both (`unified`) it becomes a loss as served.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import laws
from analysis.fitting import fit as fit_lib
from analysis.fitting.fit import Fit
from analysis.laws import derived
from analysis.laws.law import HIGH_PRECISION_BITS, PARTS, Law
from analysis.table import FORMAT_COLUMNS
from precision_scaling.errors import UserError
from precision_scaling.numerics.formats import Format

READ_OF_FORMAT = ("s_", "gmse_")  # how columns begin that a format determines beyond its bits
PLANNED = ("N", "D", "P_w", "P_a", "P_kv", "P_post")  # columns that a plan chooses
PAPER_RANGES = {
    "N": (30e6, 1.7e9),
    "D": (1.5e9, 26e9),
    "P": (3.0, 16.0),
    "P_post": (3.0, 6.0),
}  # fits to 220M, checked at 1.7B
PAPER_FORMATS = dict.fromkeys(PARTS, [f"int{bits}" for bits in range(3, 13)] + ["bf16"])


class SurfaceError(UserError):
    """Fits that do not give the loss that was asked for."""


def published() -> list[Fit]:
    """The paper's constants: its law of training precision and its law of PTQ (the C_x of its unified law are
    unpublished).
    """
    return [
        dataclasses.replace(fit_lib.published(law), reporting={"ranges": PAPER_RANGES, "formats": PAPER_FORMATS})
        for law in ("precision", "ptq")
    ]


def load(text: str) -> list[Fit]:
    """`paper`, or one or more fit.json files separated by commas. Raises analysis.fit.FitError."""
    return published() if text.strip() == "paper" else [fit_lib.load(name.strip()) for name in text.split(",")]


def draws(fit: Fit) -> int:
    """Number of bootstrap samples of the constants."""
    return min((len(values) for values in fit.samples.values()), default=0)


def draw(fit: Fit, index: int) -> Fit:
    """The fit with the constants of one bootstrap sample; constants that were not fitted stay."""
    return dataclasses.replace(fit, values={**fit.values, **{k: v[index] for k, v in fit.samples.items()}})


def data_range(fit: Fit, name: str, parts: Sequence[str] = PARTS) -> tuple[float, float] | None:
    """Smallest and largest value of a column in the rows of the fit; `P`: those that each of `parts` was trained in.
    None where not on record.
    """
    ranges = fit.reporting.get("ranges") or {}
    names = [f"P_{x}" for x in parts] if name == "P" and "P" not in ranges else [name]
    found = [ranges[n] for n in names if n in ranges]
    return (max(low for low, _ in found), min(high for _, high in found)) if found else None


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
    surface = Surface(fit, parts=tuple(parts))
    if surface.law.share is None:
        return None

    def share(p, n=None, d=None):
        if surface.law.share_varies and (n is None or d is None):
            raise SurfaceError(f"the share of N that law {surface.law.name} leaves varies with N or D: give both")
        return surface.share(np.asarray(p, np.float64), 1.0 if n is None else n, 1.0 if d is None else d)

    return share


def _precisions(p, parts: Sequence[str]) -> dict:
    return {f"P_{x}": p if x in parts else np.full(np.shape(p), HIGH_PRECISION_BITS) for x in PARTS}


def _follows(name: str) -> bool:
    """Whether a column follows from the precisions that a plan chooses."""
    return derived.column(name, dict.fromkeys(PLANNED, 4.0)) is not None


@dataclasses.dataclass(frozen=True)
class Surface:
    """The loss that a fit predicts with `parts` trained at P bits: as trained and, with a law of δ, as served.

    `columns` are what else the law reads (group_size, ...), `of_format` what a number format makes of the columns that
    follow from the bits: its own relative step, say. Arguments are arrays that broadcast: N (count), D (tokens), P
    (bits) and bits after PTQ.
    """

    fit: Fit
    delta_fit: Fit | None = None
    parts: tuple[str, ...] = PARTS
    columns: Mapping[str, float] = dataclasses.field(default_factory=dict)
    of_format: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def law(self) -> Law:
        """The law of the loss."""
        return laws.resolve(self.fit.law, self.fit.values)

    @functools.cached_property
    def _values(self) -> dict[str, float]:
        return self.law.values(self.fit.values)

    @property
    def name(self) -> str:
        """The law of the loss, as given to --fit."""
        return self.fit.law

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The fit of the loss and, where it is another, that of δ."""
        return (self.fit,) if self.delta_fit in (None, self.fit) else (self.fit, self.delta_fit)

    def _complete(self, **given) -> dict[str, np.ndarray]:
        return laws.complete_columns(self.law, {**given, **self.of_format, **self.columns})

    def _evaluate(self, n, d, p, **more):
        with np.errstate(divide="ignore", over="ignore"):
            columns = self._complete(N=n, D=d, **_precisions(p, self.parts), **more)
            return np.asarray(self.law.evaluate(self._values, columns, np))[()]

    def loss(self, n, d, p):
        """Nats per token as trained."""
        return self._evaluate(n, d, p)

    def delta(self, n, d, p, bits):
        """What PTQ of the weights to `bits` adds; 0 where that is not below P, as the model is then served as trained.

        A law of δ that knows only models trained in 16 bits is given `N f(P)/f(16)` for N, as N_eff stands in law 4:
        with the C_x unknown (infinite) that is the most that the unified law can lose.
        """
        if self.delta_fit is self.fit:
            size = self._evaluate(n, d, p, P_post=bits) - self.loss(n, d, p)
        else:
            share = self.share(p, n, d)
            n_eff = n if share is None else n * share / self._in_16_bits.share(HIGH_PRECISION_BITS, n, d)
            size = laws.predict(self.delta_fit.law, self.delta_fit.values, N=n_eff, D=d, P_post=bits, **self.columns)
        return np.where(np.asarray(p) > bits, size, 0.0)

    def served(self, n, d, p, serve_bits):
        """Nats per token after PTQ to `serve_bits`, or as trained where that is None."""
        loss = self.loss(n, d, p)
        return loss if serve_bits is None else loss + self.delta(n, d, p, serve_bits)

    def share(self, p, n, d):
        """N_eff/N at P bits, None for laws without N_eff."""
        if self.law.share is None:
            return None
        return self.law.share(self._values, self._complete(N=n, D=d, **_precisions(p, self.parts)), np)

    @functools.cached_property
    def _in_16_bits(self) -> "Surface":
        return dataclasses.replace(self, parts=(), of_format={})

    def in_formats(self, named: Sequence[Format]) -> "Surface":
        """The surface of models whose parts are trained in these formats, one for each entry of the arguments.

        Laws that read a relative step or an error take that of the format (weights scaled by channel, activations and
        cache by tensor, where it has no blocks); laws that read bits take its bits, whatever the format.
        """
        bits, texts = np.array([fmt.bits for fmt in named]), np.array([fmt.name for fmt in named])
        columns = _precisions(bits, self.parts)
        for part in self.parts:
            columns |= dict.fromkeys(FORMAT_COLUMNS[part], texts)
        names = [name for name in self.law.columns if name.startswith(READ_OF_FORMAT) and name != "s_post"]
        found = {name: derived.column(name, columns) for name in names if name not in self.columns}
        return dataclasses.replace(self, of_format=found)

    def in_format(self, fmt: Format) -> "Surface":
        """The surface of models trained in one format, for arguments of any shape."""
        many = self.in_formats([fmt])
        return dataclasses.replace(many, of_format={name: values[0] for name, values in many.of_format.items()})

    @property
    def reads_formats(self) -> bool:
        """Whether the law tells formats of the same bits apart."""
        return any(name.startswith(READ_OF_FORMAT) and name != "s_post" for name in self.law.columns)

    def draws(self, of_delta: bool) -> int:
        """Number of bootstrap samples that all constants have; `of_delta`: those of the law of δ, too."""
        return min(draws(fit) for fit in (self.fits if of_delta else self.fits[:1]))

    def draw(self, index: int) -> "Surface":
        """The surface at one bootstrap sample of the constants."""
        drawn = {fit.law: fit if draws(fit) <= index else draw(fit, index) for fit in self.fits}
        delta = None if self.delta_fit is None else drawn[self.delta_fit.law]
        return dataclasses.replace(self, fit=drawn[self.fit.law], delta_fit=delta)


def _check_columns(given: Sequence[Fit], columns: Mapping[str, float]) -> None:
    """Raises SurfaceError for a column that no law of the fits reads, or that the plan itself chooses."""
    read = {name for fit in given for name in laws.resolve(fit.law, fit.values).columns} - set(PLANNED)
    for name in columns:
        if name not in read:
            more = f"it is {', '.join(sorted(read))}" if read else "there is none"
            raise SurfaceError(
                f"--columns={name}: no column that {' and '.join(fit.law for fit in given)} read besides "
                f"{', '.join(PLANNED)}; {more}"
            )


def build(given: Sequence[Fit], parts: Sequence[str] = PARTS, columns: Mapping[str, float] | None = None) -> "Surface":
    """The surface of the first fit of a loss among these, with `parts` trained at P bits."""
    return dataclasses.replace(pairs(given, columns)[0], parts=tuple(parts))


def pairs(given: Sequence[Fit], columns: Mapping[str, float] | None = None) -> list[Surface]:
    """A surface for every fit of the loss, in their order, each with the parts that its table informs.

    A law of both is its own law of δ; the others are served by the one law of δ alone that is given, if any.
    Raises SurfaceError where fits are missing, do not go together or need columns.
    """
    columns, named = dict(columns or {}), ", ".join(fit.law for fit in given)
    losses = [fit for fit in given if laws.get(fit.law).target == "loss"]
    deltas = [fit for fit in given if laws.get(fit.law).target == "delta"]
    if not losses:
        raise SurfaceError(f"--fit gives no law of the loss ({named}); want one, such as precision, besides a law of δ")
    for i, fit in enumerate(losses):
        if any((fit.law, fit.values) == (other.law, other.values) for other in losses[:i]):
            raise SurfaceError(f"--fit gives the same fit of the loss twice ({named}); want laws or tables that differ")
    alone = [fit for fit in losses if laws.get(fit.law).log_delta is None]
    if len(deltas) > 1 or (deltas and not alone):
        raise SurfaceError(f"--fit gives more than one law of δ ({named}); want one for each law of the loss")
    _check_columns(given, columns)
    found = []
    for fit in losses:
        delta = next(iter(deltas), None) if fit in alone else fit
        law = laws.resolve(fit.law, fit.values)
        missing = [name for name in law.columns if name not in (*PLANNED, *columns) and not _follows(name)]
        if missing:
            raise SurfaceError(f"law {law.name} also reads {', '.join(missing)}: give --columns={missing[0]}:VALUE")
        found.append(Surface(fit, delta, informed_parts(fit), columns))
    return found
