"""The loss as a function of N, D, P and P_post by fits, for `analysis.plan` and the figures.

A fit of L alone (`chinchilla`, `precision`, ...) becomes a loss as trained; with a fit of δ (`ptq`, `qid`) or a law
of both (`unified`) it becomes a loss as served. A surface is built once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis import laws
from analysis.fitting.fit import Fit
from analysis.laws import derived
from analysis.laws.law import HIGH_PRECISION_BITS, PARTS, Law
from analysis.planning.fitted import FittedLaw
from analysis.table.columns import FORMAT_COLUMNS, is_of_format
from analysis.wording import parts_text
from precision_scaling.errors import UserError
from precision_scaling.numerics.formats import Format

PLANNED = ("N", "D", "P_w", "P_a", "P_kv", "P_post")  # columns that a plan chooses


class SurfaceError(UserError):
    """Fits that do not give the loss that was asked for."""


@dataclasses.dataclass(frozen=True)
class Surface:
    """The loss that a fit predicts with `parts` trained at P bits: as trained and, with a law of δ, as served.

    `of_delta` is `of_loss` itself where one law predicts both. `columns` are what else the law needs (group_size, ...),
    `of_format` the columns that a number format determines, such as its relative step.
    Arguments are arrays that broadcast: N (count), D (tokens), P (bits) and bits after PTQ.
    """

    of_loss: FittedLaw
    of_delta: FittedLaw | None = None
    parts: tuple[str, ...] = PARTS
    columns: Mapping[str, float] = dataclasses.field(default_factory=dict)
    of_format: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def law(self) -> Law:
        """The law of the loss."""
        return self.of_loss.law

    @property
    def name(self) -> str:
        """The law of the loss, as given to --fit."""
        return self.of_loss.name

    @property
    def fitted(self) -> tuple[FittedLaw, ...]:
        """The law of the loss and, where it is another, that of δ."""
        return (self.of_loss,) if self.of_delta in (None, self.of_loss) else (self.of_loss, self.of_delta)

    def _columns(self, n, d, p, **more) -> dict[str, Any]:
        return {"N": n, "D": d, **_precisions(p, self.parts), **more, **self.of_format, **self.columns}

    def loss(self, n, d, p):
        """Nats per token as trained."""
        return self.of_loss.predict(**self._columns(n, d, p))

    def delta(self, n, d, p, bits):
        """What PTQ of the weights to `bits` adds; 0 where that is not below P, as the model is then served as trained.

        A law of δ that describes only models trained in 16 bits is given `N f(P)/f(16)` for N, as N_eff stands in law
        4: with the C_x unknown (infinite) that is the most that the unified law can lose.
        """
        if self.of_delta is None:
            raise SurfaceError(f"no law of δ goes with law {self.name}")
        if self.of_delta is self.of_loss:
            size = self.of_loss.predict(**self._columns(n, d, p, P_post=bits)) - self.loss(n, d, p)
        else:
            share = self.share(p, n, d)
            n_eff = n if share is None else n * share / self.in_16_bits.share(HIGH_PRECISION_BITS, n, d)
            size = self.of_delta.predict(N=n_eff, D=d, P_post=bits, **self.columns)
        return np.where(np.asarray(p) > bits, size, 0.0)

    def served(self, n, d, p, serve_bits):
        """Nats per token after PTQ to `serve_bits`, or as trained where that is None."""
        loss = self.loss(n, d, p)
        return loss if serve_bits is None else loss + self.delta(n, d, p, serve_bits)

    def share(self, p, n=None, d=None):
        """N_eff/N at P bits, None for laws without N_eff. N and D may be left out where precision alone decides it."""
        if self.law.share is None:
            return None
        if self.law.share_varies and (n is None or d is None):
            raise SurfaceError(f"N_eff/N of law {self.name} varies with N or D: give both")
        columns = self._columns(1.0 if n is None else n, 1.0 if d is None else d, np.asarray(p, np.float64))
        return self.law.share(self.of_loss.values, laws.complete_columns(self.law, columns), np)

    @property
    def in_16_bits(self) -> "Surface":
        """The surface of models with every part trained in 16 bits."""
        return dataclasses.replace(self, parts=(), of_format={})

    def with_parts(self, parts: Sequence[str]) -> "Surface":
        """The surface with just these parts trained at P bits. Raises SurfaceError where the table does not
        identify one of them.
        """
        if unread := [x for x in parts if not self.law.reads_part(x)]:
            raise SurfaceError(f"--parts: law {self.name} does not read the training precision of {parts_text(unread)}")
        if unknown := [x for x in parts if x in self.of_loss.uninformed]:
            raise SurfaceError(
                f"--parts: the fit's table does not identify {parts_text(unknown)}; it identifies "
                f"{parts_text(self.of_loss.informed)}"
            )
        return dataclasses.replace(self, parts=tuple(parts))

    def in_formats(self, named: Sequence[Format]) -> "Surface":
        """The surface of models whose parts are trained in these formats, one for each entry of the arguments.

        Laws that read a relative step or an error take that of the format (weights scaled by channel, activations and
        cache by tensor, where it has no blocks); laws that read bits take its bits, whatever the format.
        """
        bits, texts = np.array([fmt.bits for fmt in named]), np.array([fmt.name for fmt in named])
        columns = _precisions(bits, self.parts)
        for part in self.parts:
            columns |= dict.fromkeys(FORMAT_COLUMNS[part], texts)
        asked = {name: derived.column(name, columns) for name in self._of_formats if name not in self.columns}
        known = {name: value for name, value in asked.items() if value is not None}
        return dataclasses.replace(self, of_format=known)

    def in_format(self, fmt: Format) -> "Surface":
        """The surface of models trained in one format, for arguments of any shape."""
        many = self.in_formats([fmt])
        return dataclasses.replace(many, of_format={name: values[0] for name, values in many.of_format.items()})

    @property
    def _of_formats(self) -> list[str]:
        return [name for name in self.law.columns if is_of_format(name) and name != "s_post"]

    @property
    def reads_formats(self) -> bool:
        """Whether the law distinguishes formats of the same bits."""
        return bool(self._of_formats)

    def saw(self, fmt: Format) -> bool | None:
        """Whether the fit's table has every part trained in the format; None where it is not on record."""
        if fmt.family == "none":
            return True
        seen = [self.of_loss.saw(part, fmt) for part in self.parts]
        return None if None in seen else all(seen)

    @property
    def precisions(self) -> tuple[float, ...] | None:
        """The only precisions that can be planned for: 16 where the law describes no other, those with a capacity of
        their own; None for any.

        Raises SurfaceError for laws in which the precision is not a number of bits to choose.
        """
        if self.law.high_precision_only:
            return (HIGH_PRECISION_BITS,)
        if self.law.bits_given:
            raise SurfaceError(f"law {self.name} does not say how loss depends on bits: give --precision")
        if self.of_loss.own_capacities:
            return (*sorted(self.of_loss.tied(self.parts)), HIGH_PRECISION_BITS)
        return (self.law.bits or None) if self.parts else (HIGH_PRECISION_BITS,)

    def data_range(self, name: str) -> tuple[float, float] | None:
        """Smallest and largest N, D, C (training cost), P_post or P (in which each part was trained) of the fit's
        table; None where not on record.
        """
        if name == "P_post":
            return None if self.of_delta is None else self.of_delta.data_range(name)
        if name != "P" or self.of_loss.data_range("P"):
            return self.of_loss.data_range(name)
        spans = [span for x in self.parts or PARTS if (span := self.of_loss.data_range(f"P_{x}"))]
        return (max(low for low, _ in spans), min(high for _, high in spans)) if spans else None

    @property
    def draws(self) -> int:
        """Number of bootstrap samples that the constants of the loss and of δ have."""
        return min(fitted.draws for fitted in self.fitted)

    def draw(self, index: int) -> "Surface":
        """The surface at one bootstrap sample of the constants."""
        loss = self.of_loss.draw(index)
        if self.of_delta is None or self.of_delta is self.of_loss:
            return dataclasses.replace(self, of_loss=loss, of_delta=self.of_delta and loss)
        return dataclasses.replace(self, of_loss=loss, of_delta=self.of_delta.draw(index))


def _precisions(p, parts: Sequence[str]) -> dict[str, Any]:
    return {f"P_{x}": p if x in parts else np.full(np.shape(p), HIGH_PRECISION_BITS) for x in PARTS}


def build(fits: Sequence[Fit], columns: Mapping[str, float] | None = None) -> Surface:
    """The surface of the first fit of a loss among these. Raises SurfaceError as `build_all`."""
    return build_all(fits, columns)[0]


def build_all(fits: Sequence[Fit], columns: Mapping[str, float] | None = None) -> list[Surface]:
    """A surface for every fit of the loss, in their order, each with the parts that its table identifies.

    A law of both is its own law of δ; the others are served by the one law of δ alone that is given, if any.
    Raises SurfaceError where fits are missing, do not go together or need columns.
    """
    fitted, given = [FittedLaw.of(fit) for fit in fits], dict(columns or {})
    losses = [one for one in fitted if one.law.target == "loss"]
    deltas = [one for one in fitted if one.law.target == "delta"]
    names = ", ".join(one.name for one in fitted)
    if not losses:
        raise SurfaceError(f"--fit gives no law of the loss ({names}); want one, such as precision, besides a law of δ")
    for i, one in enumerate(losses):
        if any((one.name, one.values) == (other.name, other.values) for other in losses[:i]):
            raise SurfaceError(f"--fit gives the same fit of the loss twice ({names}); want laws or tables that differ")
    if len(deltas) > 1 or (deltas and all(one.law.log_delta is not None for one in losses)):
        raise SurfaceError(f"--fit gives more than one law of δ ({names}); want one for each law of the loss")
    _check_columns(fitted, given)
    alone = deltas[0] if deltas else None
    return [Surface(one, alone if one.law.log_delta is None else one, one.informed, given) for one in losses]


def _check_columns(fitted: Sequence[FittedLaw], columns: Mapping[str, float]) -> None:
    """Raises SurfaceError for a column that no law reads, that the plan itself chooses, or that is missing."""
    read = {name for one in fitted for name in one.law.columns} - set(PLANNED)
    for name in columns:
        if name not in read:
            more = f"it is {', '.join(sorted(read))}" if read else "there is none"
            raise SurfaceError(
                f"--columns={name}: no column that {' and '.join(one.name for one in fitted)} read besides "
                f"{', '.join(PLANNED)}; {more}"
            )
    for one in fitted:
        missing = [name for name in one.law.columns if name not in (*PLANNED, *columns) and not _follows(name)]
        if missing and one.law.target == "loss":
            raise SurfaceError(f"law {one.name} also reads {', '.join(missing)}: give --columns={missing[0]}:VALUE")


def _follows(name: str) -> bool:
    """Whether a column follows from the precisions that a plan chooses."""
    return derived.column(name, dict.fromkeys(PLANNED, 4.0)) is not None
