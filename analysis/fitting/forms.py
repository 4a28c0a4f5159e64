"""The forms in which laws are compared: with or without its biases, with its outer exponent free, by kind."""

import dataclasses

from analysis import laws
from analysis.fitting.options import Options
from analysis.laws.law import OUTER_EXPONENT, Law, LawError

UNBIASED = "_unbiased"  # ends the name of a law whose biases n are 0
OUTER = "_outer"  # ends the name of a law whose outer exponent g is free
KINDS = {
    "loss": "loss before PTQ",
    "high": "loss before PTQ of runs in 16 bits",
    "delta": "delta of PTQ",
    "both": "loss before and after PTQ",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A law as it is compared: with or without its biases, and with parameters freed."""

    name: str
    law: Law
    biased: bool = True
    freed: tuple[str, ...] = ()

    def options(self, options: Options) -> Options:
        """The options of a comparison for this form: fitted jointly, without parameters that its law does not have."""
        known = set(self.law.names)
        return dataclasses.replace(
            options,
            fixed={k: v for k, v in options.fixed.items() if k in known},
            tied={k: v for k, v in options.tied.items() if {k, v} <= known},
            freed=tuple(dict.fromkeys((*self.freed, *(name for name in options.freed if name in known)))),
            biased=self.biased and options.biased,
            stages="joint",
        )


def named(name: str) -> Form:
    """The form of that name. Raises LawError for an unknown name, and for a form that the law does not have."""
    if name in laws.LAWS:
        return Form(name, laws.get(name))
    inner = name.removesuffix(OUTER)
    law = laws.get(inner.removesuffix(UNBIASED))
    if inner.endswith(UNBIASED) and not law.biases:
        raise LawError(f"{name}: {law.name} has no biases to leave out")
    if name.endswith(OUTER) and not law.frees_outer_exponent:
        raise LawError(f"{name}: {law.name} has no outer exponent {OUTER_EXPONENT} to free")
    return Form(name, law, not inner.endswith(UNBIASED), (OUTER_EXPONENT,) if name.endswith(OUTER) else ())


def all_names() -> tuple[str, ...]:
    """Every law, each with biases followed by the same without them."""
    return tuple(n for name, law in laws.LAWS.items() for n in (name, *([name + UNBIASED] if law.biases else [])))


def held_by(name: str) -> set[str]:
    """The names of the forms that a form becomes where some of its parameters are held."""
    form = named(name)
    plain = name.removesuffix(OUTER) if form.freed else name
    held = {plain} if form.freed else set()
    if form.law.biases and form.biased:
        held.add(plain + UNBIASED + (OUTER if form.freed else ""))
    return held | (set(form.law.holds) if plain == name and form.biased else set())


def of_high_precision(law: Law) -> bool:
    """Whether it is a law of the loss that describes 16 bits alone."""
    return law.high_precision_only and law.log_delta is None


def kinds_of(law: Law, low: bool, high: bool) -> list[tuple[Law, str]]:
    """The kinds that a law is judged in.

    low: the table has rows of low precision. Laws of 16 bits alone are then judged on rows of 16 bits, if `high`: there
    are several; a baseline is also judged among the other laws, on all rows.
    """
    if law.log_delta is not None:
        return [(law, "delta" if law.log_loss is None else "both")]
    if not (low and of_high_precision(law)):
        return [(law, "loss")]
    everywhere = [(dataclasses.replace(law, high_precision_only=False), "loss")] if law.baseline else []
    return [*everywhere, *([(law, "high")] if high or not everywhere else [])]
