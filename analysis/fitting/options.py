"""How a law is fitted: the options of every fit, and the error of a fit that cannot be made."""

import dataclasses
from collections.abc import Mapping

from analysis.fitting.residual import DELTA_RESIDUALS, RESIDUALS
from analysis.laws.law import Law
from precision_scaling.errors import UserError

LOSSES = ("huber", "least_squares")
STAGES = ("joint", "staged")


class FitError(UserError):
    """A fit that cannot be made or read: too few rows, an unknown option, a file that is not a fit."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to fit. Raises FitError for values that are not allowed.

    fixed: constants. tied: {follower: leader}. freed: parameters to fit that otherwise stay at their default (an outer
        exponent, say). biased: False sets the law's biases to 0.
    serve_bits: fits a law of the loss before PTQ to the losses after PTQ to that many bits instead.
    loss: Huber's function (with `huber_delta`) or least squares. residual: what a row compares, log L or L.
    delta_residual: what a row after PTQ compares. "log_delta"; "floored", log δ that turns linear below the noise of δ
        (`delta_floor` in nats; None: estimated from runs repeated with other seeds); or "log_loss", the loss before PTQ
        plus δ. None: log δ for laws of δ alone, the loss for laws of both. The last two keep zero and negative δ.
    sigma_column: a column of standard deviations of the loss in nats; a residual is weighted by their median over its
        own.
    stages: all parameters at once ("joint"), or in the law's stages as in the paper ("staged").
    fit_where: an expression that the rows to fit satisfy (analysis/table/expression.py); δ is paired before rows are
        chosen.
    """

    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    freed: tuple[str, ...] = ()
    serve_bits: float | None = None
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    biased: bool = True
    loss: str = "huber"
    huber_delta: float = 1e-3
    residual: str = "log_loss"
    delta_residual: str | None = None
    delta_floor: float | None = None
    sigma_column: str | None = None
    stages: str = "joint"
    fit_where: str | None = None

    def __post_init__(self):
        for key, value, allowed in (
            ("loss", self.loss, LOSSES),
            ("stages", self.stages, STAGES),
            ("residual", self.residual, RESIDUALS),
            ("delta_residual", self.delta_residual, (None, *DELTA_RESIDUALS)),
        ):
            if value not in allowed:
                raise FitError(f"{key} is {value!r}: choose one of {', '.join(str(a) for a in allowed if a)}")
        if not self.huber_delta > 0:
            raise FitError(f"huber_delta is {self.huber_delta}: it must be positive")
        if self.delta_floor is not None and not self.delta_floor > 0:
            raise FitError(f"delta_floor is {self.delta_floor}: it must be positive")

    def delta_residual_of(self, law: Law) -> str:
        """What rows after PTQ compare in a fit of the law, one of DELTA_RESIDUALS."""
        return self.delta_residual or ("log_delta" if law.target == "delta" else "log_loss")
