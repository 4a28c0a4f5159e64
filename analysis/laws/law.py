"""A scaling law: named parameters, the columns it reads, and log L or log δ as pure functions.

The functions are written against an array namespace `xp` (numpy or jax.numpy), so that prediction, fitting and planning
share one definition. All that other code needs to know about a law is a field or property of `Law`: nothing branches on
its name. analysis/laws/__init__.py is the registry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from analysis.table.columns import GAUSSIAN_ERROR, HIGH_PRECISION_BITS, PARTS, STEP, is_of_format
from precision_scaling.errors import UserError

Values = Mapping[str, Any]
LogFunction = Callable[[Values, Values, Any], Any]

OUTER_EXPONENT = "g"
AFTER_PTQ = ("P_post", "s_post")  # columns that are empty (NaN) before PTQ
MIN_FRACTION = 1e-3  # f_x is clipped here: below its zero the paper's runs diverge, and log f must stay finite


class LawError(UserError):
    """A law, parameter or column that does not exist, is missing or is out of range."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One constant of a law.

    log: positive, and fitted as its logarithm. grid: the values that starts are drawn from. default: its value where a
    set of constants leaves it out. held: the value at which it has no effect, used where no row identifies it. fit:
    False for a parameter that stays at its default unless a fit frees it (`Options.freed`), because it is redundant or
    most tables do not identify it. wide: a positive parameter is weakly identified where the ends of its interval lie
    further apart than this ratio.
    """

    name: str
    lower: float
    upper: float
    grid: tuple[float, ...]
    log: bool = False
    unit: str = "1"
    published: float | None = None
    default: float | None = None
    held: float | None = None
    fit: bool = True
    wide: float = 10.0

    def __post_init__(self):
        if not self.fit and self.default is None:
            raise LawError(f"parameter {self.name}: one that is not fitted needs a default")


@dataclasses.dataclass(frozen=True)
class Need:
    """`params` are identified only if `column` (one of several) takes at least `levels` values on these rows."""

    column: str | tuple[str, ...]
    levels: int
    params: tuple[str, ...]
    rows: str = "any"  # "loss" (before PTQ), "low" (of those, trained below 16 bits), "delta" (after PTQ) or "any"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,) if isinstance(self.column, str) else self.column


@dataclasses.dataclass(frozen=True)
class LawStage:
    """One step of a staged fit: `params` are fitted on `rows` ("high_precision", "loss", "delta"), the rest held."""

    rows: str
    params: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """Laws with one parameter for each label in a table, such as a capacity for each training precision.

    prefix: how the names of those parameters begin. law: the law with these parameters. labels: their names for
    complete columns.
    """

    prefix: str
    law: Callable[[tuple[str, ...]], "Law"]
    labels: Callable[[Values], tuple[str, ...]]


# Model sizes (parameters) and token budgets of 2411.04330.
PAPER_SIZES = (30e6, 60e6, 110e6, 220e6)
PAPER_TOKENS = (1.5e9, 3e9, 6e9, 13e9, 26e9)


@dataclasses.dataclass(frozen=True)
class Law:
    """A scaling law: `log_loss(params, columns, xp)` is the log of L in nats per token, `log_delta` that of δ.

    A law with only `log_delta` predicts δ; one with both predicts L + δ, with δ = 0 where P_post is empty (NaN).
    Raises LawError where both are missing.
    """

    name: str
    formula: str
    source: str
    params: tuple[Parameter, ...]
    columns: tuple[str, ...]
    log_loss: LogFunction | None = None
    log_delta: LogFunction | None = None
    needs: tuple[Need, ...] = ()
    stages: tuple[LawStage, ...] = ()
    biases: tuple[str, ...] = ()  # zero in the unbiased form
    high_precision_only: bool = False  # the law describes only runs trained in 16 bits
    check: Callable[[Values], str | None] | None = None  # why the law does not apply to these columns, or None
    family: Family | None = None
    baseline: bool = False  # compared on rows of every precision, too, as the law without an effect of precision
    # What a plan needs. `share` is N_eff/N; `share_varies`: with N or D, not with precision alone.
    share: LogFunction | None = None
    share_varies: bool = False
    bits: tuple[float, ...] = ()  # the only training precisions that the law knows; () for any number of bits
    bits_given: bool = False  # the law does not say how loss depends on the number of bits
    holds: tuple[str, ...] = ()  # laws that this one becomes where some of its parameters are held
    by_form: str = ""  # what the formula implies for the best precision, whatever the constants
    # What a synthetic table needs (synthetic.py): constants that no source gives, and where to measure.
    example: Values = dataclasses.field(default_factory=dict, hash=False)
    sizes: tuple[float, ...] = PAPER_SIZES
    tokens: tuple[float, ...] = PAPER_TOKENS

    def __post_init__(self):
        if self.log_loss is None and self.log_delta is None:
            raise LawError(f"law {self.name}: log_loss, log_delta or both must be given")

    @property
    def target(self) -> str:
        """'delta' for a law of the PTQ loss alone, else 'loss'."""
        return "delta" if self.log_loss is None else "loss"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.params)

    @property
    def fractions(self) -> tuple[tuple[str, str], ...]:
        """The names (gamma_x, n_x) of every f_x in the law."""
        pairs = ((name, name.replace("gamma_", "n_", 1)) for name in self.names if name.startswith("gamma_"))
        return tuple(pair for pair in pairs if pair[1] in self.names)

    @property
    def effects(self) -> frozenset[str]:
        """The parameters beyond those of Chinchilla's law, for laws of the loss that contain it; else none."""
        if self.log_delta is not None or not {*self.names, OUTER_EXPONENT} >= CHINCHILLA_NAMES:
            return frozenset()
        return frozenset(self.names) - CHINCHILLA_NAMES

    @property
    def frees_outer_exponent(self) -> bool:
        """Whether the law has an outer exponent that stays at its default unless a fit frees it."""
        return any(p.name == OUTER_EXPONENT and not p.fit for p in self.params)

    @property
    def reads_formats(self) -> bool:
        """Whether the law reads relative steps or errors, which formats determine, and not bits alone."""
        return any(is_of_format(name) for name in self.columns)

    def reads_part(self, part: str) -> bool:
        """Whether the precision or the error of a part ("w", "a", "kv") enters the law."""
        return bool(_part_columns(part) & set(self.columns))

    def part_params(self, part: str) -> tuple[str, ...]:
        """The parameters that, before PTQ, only rows with that part in low precision identify; the amplitude first."""
        needs = [n for n in self.needs if set(n.columns) <= _part_columns(part) and n.rows != "delta"]
        return tuple(dict.fromkeys(name for need in needs for name in need.params))

    def parameter(self, name: str) -> Parameter:
        for p in self.params:
            if p.name == name:
                return p
        raise LawError(f"law {self.name} has no parameter {name!r}; it has {', '.join(self.names)}")

    @property
    def published(self) -> dict[str, float]:
        """The published constants: those of the parameters that have one."""
        return {p.name: p.published for p in self.params if p.published is not None}

    def values(self, params: Values) -> dict[str, Any]:
        """`params` completed with defaults; raises LawError on a name that is unknown, missing or null."""
        for name in params:
            self.parameter(name)
        out = {}
        for p in self.params:
            value = params.get(p.name, p.default)
            if value is None:
                why = "is null (the fit's table does not identify it)" if p.name in params else "is missing"
                raise LawError(f"parameter {p.name} of law {self.name} {why}")
            out[p.name] = value
        return out

    def evaluate(self, params: Values, columns: Values, xp=np):
        """Predicted L (nats per token), or δ where the law is one of δ alone; `params` and `columns` complete."""
        if self.log_delta is None:
            assert self.log_loss is not None  # by __post_init__
            return xp.exp(self.log_loss(params, columns, xp))
        if self.log_loss is None:
            return xp.exp(self.log_delta(params, columns, xp))
        loss = xp.exp(self.log_loss(params, columns, xp))
        after = next(name for name in AFTER_PTQ if name in columns)
        quantized = ~xp.isnan(xp.asarray(columns[after]))
        stand_in = {"P_post": HIGH_PRECISION_BITS, "s_post": 0.0}
        safe = {name: xp.where(quantized, columns[name], stand_in[name]) for name in AFTER_PTQ if name in columns}
        safe = {**columns, **safe}
        return loss + xp.where(quantized, xp.exp(self.log_delta(params, safe, xp)), 0.0)


def _part_columns(part: str) -> set[str]:
    return {f"P_{part}", f"{STEP}{part}", f"{GAUSSIAN_ERROR}{part}"}


def fraction(P, gamma, n, xp=np):
    """f(P) = 1 - exp(-P/γ + n): the share of N that P bits leave, at least MIN_FRACTION (2411.04330, section 4.1)."""
    return xp.maximum(-xp.expm1(n - P / gamma), MIN_FRACTION)


def log_power_law(amplitude, exponent, count, xp=np):
    """log(amplitude · count^-exponent)."""
    return xp.log(amplitude) - exponent * xp.log(count)


def log_sum(xp, *log_terms):
    """log Σ exp(term). Bounds keep the terms far from overflow, so they are not shifted (twice as slow)."""
    total = xp.exp(log_terms[0])
    for term in log_terms[1:]:
        total = total + xp.exp(term)
    return xp.log(total)


def log_chinchilla(p: Values, n, d, xp=np):
    """log(E + (A n^-alpha + B d^-beta)^g) (2203.15556, eq. 10; g = 1 there and where the law has no g)."""
    size, data = log_power_law(p["A"], p["alpha"], n, xp), log_power_law(p["B"], p["beta"], d, xp)
    if OUTER_EXPONENT not in p:
        return log_sum(xp, size, data, xp.log(p["E"]))
    return log_sum(xp, p[OUTER_EXPONENT] * log_sum(xp, size, data), xp.log(p["E"]))


# `by_form` of laws in which precision multiplies N or D by a factor f.
FIXED_OPTIMUM = (
    "the best P maximizes f(P) per cost, f the product of the factors on N and D, and is the same at every budget"
)


def chinchilla_parameters(published: Mapping[str, float]) -> tuple[Parameter, ...]:
    """A, alpha, B, beta, E with the start grid of Hoffmann et al. (2203.15556, appendix D.3)."""
    logs = (1.0, 148.4, 22026.0, 3.269e6, 4.852e8, 7.2e10)  # exp(0, 5, ..., 25)
    exponents = (0.0, 0.5, 1.0, 1.5, 2.0)
    floors = (0.3679, 0.6065, 1.0, 1.6487, 2.7183)  # exp(-1, -.5, ..., 1)
    get = published.get
    return (
        Parameter("A", 1e-6, 1e30, logs, log=True, unit="nats · parameters^alpha", published=get("A"), held=1e-6),
        Parameter("alpha", 0.0, 3.0, exponents, published=get("alpha"), held=0.5),
        Parameter("B", 1e-6, 1e30, logs, log=True, unit="nats · tokens^beta", published=get("B"), held=1e-6),
        Parameter("beta", 0.0, 3.0, exponents, published=get("beta"), held=0.5),
        Parameter("E", 1e-3, 30.0, floors, log=True, unit="nats per token", published=get("E"), held=1e-3, wide=1.5),
    )


def outer_exponent(fit: bool = True) -> Parameter:
    """g of E + (A N^-alpha + B D^-beta)^g; `fit` False: 1 unless freed."""
    return Parameter(OUTER_EXPONENT, 0.05, 5.0, (0.3, 0.6, 1.0), True, default=None if fit else 1.0, held=1.0, fit=fit)


CHINCHILLA_NAMES = frozenset(p.name for p in chinchilla_parameters({})) | {OUTER_EXPONENT}
CHINCHILLA_NEEDS = (Need("N", 2, ("A", "alpha")), Need("D", 2, ("B", "beta")))
# A power of one term is a power law, so the outer exponent is identified only by several values of both.
OUTER_NEEDS = (*CHINCHILLA_NEEDS, Need("N", 2, (OUTER_EXPONENT,)), Need("D", 2, (OUTER_EXPONENT,)))


def fraction_parameters(
    published: Mapping[str, float], parts: tuple[str, ...] = PARTS, suffix: str = ""
) -> tuple[Parameter, ...]:
    """gamma_x and n_x of f_x for every part, with the values that make f_x = 1 as the held ones."""
    out = []
    for x in parts:
        gamma, n = f"gamma_{x}{suffix}", f"n_{x}{suffix}"
        out.append(Parameter(gamma, 0.05, 50.0, (0.5, 1.0, 2.0, 4.0), True, "bits", published.get(gamma), held=0.05))
        out.append(Parameter(n, -10.0, 10.0, (0.0, 1.0, 2.0), False, "1", published.get(n), default=0.0, held=0.0))
    return tuple(out)


def fraction_needs(parts: tuple[str, ...] = PARTS, suffix: str = "") -> tuple[Need, ...]:
    """Two precisions of a part identify one of gamma_x and n_x, three both."""
    one = tuple(Need(f"P_{x}", 2, (f"gamma_{x}{suffix}", f"n_{x}{suffix}")) for x in parts)
    two = tuple(Need(f"P_{x}", 3, (f"n_{x}{suffix}",)) for x in parts)
    return one + two
