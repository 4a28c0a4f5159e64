"""Flags that say how a law is fitted, shared by the commands that fit."""

import functools
import math
from collections.abc import Callable
from typing import Any

from absl import flags

from analysis.fitting.options import LOSSES, FitError
from analysis.fitting.residual import DELTA_RESIDUALS, RESIDUALS
from precision_scaling.runtime.cli import finite

MOST_REPEATS = 100_000  # starts or resamples that a command takes


def define(values: flags.FlagValues) -> Callable[[], dict[str, Any]]:
    """Defines the flags on `values`; returns the function that reads them as keywords of `Options`."""
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    choice = functools.partial(flags.DEFINE_enum, flag_values=values)
    flags.DEFINE_list("free", [], "Parameters to fit that otherwise keep their default (g, nu, ...).", values)
    number("serve_bits", None, "Fit the losses after PTQ to this many bits, by laws of the loss alone.")
    choice("loss", "huber", LOSSES, "What is minimized, of residuals.")
    number("huber_delta", 1e-3, "Where Huber's function turns linear, in units of the residual.")
    choice("residual", "log_loss", RESIDUALS, "What a row compares: log L, or L in nats.")
    of_delta = "log delta (laws of delta), the loss (laws of both), or log delta above a floor"
    choice("delta_residual", None, DELTA_RESIDUALS, f"What rows after PTQ compare: {of_delta}.")
    number("delta_floor", None, "Noise of delta in nats, of floored (by default estimated from repeated seeds).")
    flags.DEFINE_string(
        "sigma_column", None, "Column of standard deviations of the loss, by which rows are weighted.", values
    )

    def read() -> dict[str, Any]:
        names = ("serve_bits", "loss", "huber_delta", "residual", "delta_residual", "delta_floor", "sigma_column")
        return {"freed": tuple(values["free"].value or ()), **{name: values[name].value for name in names}}

    return read


def pairs(flag: str, entries: list[str]) -> dict[str, str]:
    """`name=value` entries as a dict. Raises FitError on anything else."""
    out = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.strip() or not value.strip() or name.strip() in out:
            raise FitError(f"--{flag}={entry}: allowed is name=value, each name once")
        out[name.strip()] = value.strip()
    return out


def numbers(flag: str, entries: list[str]) -> dict[str, float]:
    """`name=number` entries as a dict. Raises FitError on anything else."""
    out = {}
    for name, text in pairs(flag, entries).items():
        if (value := finite(text)) is None:
            raise FitError(f"--{flag}={name}={text}: the value must be a finite number")
        out[name] = value
    return out


def hubers(entries: list[str]) -> tuple[float, ...]:
    """Values of Huber's delta, infinity among them. Raises FitError on anything else."""
    out = []
    for entry in entries:
        value = math.inf if entry.strip() == "inf" else finite(entry)
        if value is None or value <= 0:
            raise FitError(f"--sweep_huber={entry}: allowed are positive numbers and inf")
        out.append(value)
    return tuple(out)
