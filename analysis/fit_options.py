"""Flags that say how a law is fitted, shared by the commands that fit: what is compared, and how it is weighed."""

from collections.abc import Callable
from typing import Any

from absl import flags

from analysis.problem import LOSSES
from analysis.residual import DELTA_RESIDUALS, RESIDUALS


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
