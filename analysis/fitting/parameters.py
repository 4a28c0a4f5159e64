"""Which parameters of a law are free: not fixed or tied by the options, and identified by the design of the table."""

from collections.abc import Mapping

import numpy as np

from analysis.fitting.options import FitError, Options
from analysis.laws.law import Law, Need, Parameter
from analysis.table import Table


def to_theta(parameter: Parameter, value) -> np.ndarray:
    """A parameter's value as it is fitted: its logarithm where positive, clipped to its bounds."""
    value = np.clip(value, parameter.lower, parameter.upper)
    return np.log(value) if parameter.log else value


def given(law: Law, options: Options) -> tuple[dict[str, float], dict[str, str]]:
    """The constants that are not fitted (fixed, biases of the unbiased form, those at their default), and the ties."""
    for name in options.freed:
        law.parameter(name)
        if name in options.fixed or name in options.tied:
            raise FitError(f"freed {name}: it is fixed or tied, too")
    held = (p for p in law.params if not p.fit and p.name not in options.freed)
    constants = {p.name: p.default for p in held if p.default is not None}
    if not options.biased:
        constants.update(dict.fromkeys(law.biases, 0.0))
    for name, value in options.fixed.items():
        p = law.parameter(name)
        if not p.lower <= value <= p.upper:
            raise FitError(f"fixed {name} = {value}: law {law.name} allows {p.lower:g} to {p.upper:g}")
        constants[name] = float(value)
    tied = dict(options.tied)
    for follower, leader in tied.items():
        law.parameter(follower), law.parameter(leader)
        if leader in tied or follower in options.fixed or leader == follower:
            raise FitError(f"tied {follower} = {leader}: the left one follows a parameter that is itself free or fixed")
        if law.parameter(follower).log != law.parameter(leader).log:
            raise FitError(f"tied {follower} = {leader}: one is positive, the other is not")
    for follower in tied:
        constants.pop(follower, None)
    return constants, tied


def uninformed(law: Law, tied: Mapping[str, str], loss_rows: Table | None, delta_rows: Table | None) -> dict[str, str]:
    """Parameters that the design of the table does not identify, with the reason.

    Any member identifies a tied group.
    """
    unknown: dict[str, str] = {}
    for need in law.needs:
        values = _distinct(need, loss_rows, delta_rows)
        if len(values) < need.levels:
            column = " or ".join(need.columns)
            seen = f"only {column} = {', '.join(f'{v:g}' for v in values)}" if len(values) else f"no {column}"
            seen += " in training below 16 bits" * (need.rows == "low")
            for name in need.params:
                unknown.setdefault(
                    name, f"the rows have {seen}; {need.levels} different values are needed to identify {name}"
                )
    for leader in set(tied.values()):
        group = [leader, *(f for f, to in tied.items() if to == leader)]
        if any(name not in unknown for name in group):
            for name in group:
                unknown.pop(name, None)
    return unknown


def _distinct(need: Need, loss_rows: Table | None, delta_rows: Table | None) -> np.ndarray:
    """The different values of the need's column on its rows; of several columns those of the richest."""
    tables = []
    if loss_rows is not None and need.rows in ("loss", "low", "any"):
        tables.append(loss_rows.select(~loss_rows.high_precision) if need.rows == "low" else loss_rows)
    if delta_rows is not None and need.rows in ("delta", "any"):
        tables.append(delta_rows)
    found = [np.unique(np.concatenate([t[name] for t in tables])) if tables else np.array([]) for name in need.columns]
    return max(found, key=len)
