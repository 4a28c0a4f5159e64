"""Flags that say how a law is fitted, shared by the commands that fit."""

import math
from collections.abc import Callable
from typing import Any

from absl import flags

from analysis.fitting.problem import LOSSES, FitError
from analysis.fitting.residual import DELTA_RESIDUALS, RESIDUALS
from precision_scaling.runtime.cli import finite

MOST_REPEATS = 100_000  # starts or resamples that a command takes


def define(values: flags.FlagValues) -> Callable[[], dict[str, Any]]:
    """Defines the flags on `values`; returns the function that reads them as keywords of `problem.Options`."""
    add = {"flag_values": values}
    flags.DEFINE_list("free", [], "Parameters fitted that otherwise keep their default (g, nu, ...).", **add)
    flags.DEFINE_float(
        "serve_bits", None, "Fit the losses after PTQ to this many bits, by laws of the loss alone.", **add
    )
    flags.DEFINE_enum("loss", "huber", LOSSES, "What is minimized, of residuals.", **add)
    flags.DEFINE_float("huber_delta", 1e-3, "Where Huber's function turns linear, in units of the residual.", **add)
    flags.DEFINE_enum("residual", "log_loss", RESIDUALS, "What a row compares: log L, or L in nats.", **add)
    flags.DEFINE_enum(
        "delta_residual",
        None,
        DELTA_RESIDUALS,
        "What rows after PTQ compare: log delta (laws of delta), the loss (laws of both), or log delta above a floor.",
        **add,
    )
    flags.DEFINE_float("delta_floor", None, "Noise of delta in nats, of floored (told by repeats with seeds).", **add)
    flags.DEFINE_string("sigma_column", None, "Column of standard deviations of the loss, which weigh the rows.", **add)

    def read() -> dict[str, Any]:
        names = ("serve_bits", "loss", "huber_delta", "residual", "delta_residual", "delta_floor", "sigma_column")
        return {"freed": tuple(values["free"].value), **{name: values[name].value for name in names}}

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
    for name, value in pairs(flag, entries).items():
        out[name] = finite(value)
        if out[name] is None:
            raise FitError(f"--{flag}={name}={value}: the value must be a finite number")
    return out


def _hubers(entries: list[str]) -> tuple[float, ...]:
    """Values of Huber's delta, infinity among them. Raises FitError on anything else."""
    out = []
    for entry in entries:
        value = math.inf if entry.strip() == "inf" else finite(entry)
        if value is None or value <= 0:
            raise FitError(f"--sweep_huber={entry}: allowed are positive numbers and inf")
        out.append(value)
    return tuple(out)
