"""Fits a scaling law to a table of measured losses: `python -m analysis.fit --runs=runs.csv --law=NAME --out=fit.json`.

A Fit holds the constants, their intervals, what the table could not tell, and everything needed to repeat it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis import laws
from analysis.law import Law
from analysis.table import Table


class FitError(ValueError):
    """A fit that cannot be made or read: too few rows, an unknown option, a file that is not a fit."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law. The first ten fields are the contract of fit.json, in its order.

    `params` holds None for a constant that the table does not inform: `refused` says why, and `values` holds the number that
    stood in for it, so that predictions at the table's own settings remain right.
    """

    law: str
    params: Mapping[str, float | None]
    ci: Mapping[str, tuple[float | None, float | None]]
    r2: float
    objective: float
    n: int
    starts: int
    seconds: float
    columns: tuple[str, ...]
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)  # parameter -> why it is not reported
    notes: tuple[str, ...] = ()  # weakly identified parameters, bounds reached, confounded parameters: in words
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    starts_at_best: float = 0.0  # share of starts that ended at the best objective
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    identifiability: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reporting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)  # bootstrap draws, all parameters

    def predict(self, **columns) -> np.ndarray:
        """Loss (or δ) of the fitted law at the given columns."""
        return laws.predict(self.law, self.values, **columns)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Fit":
        """Reads fit.json; also one written by hand with only `law` and `params`. Raises FitError on anything else."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as err:
            raise FitError(f"not JSON: {err}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("law"), str) or not isinstance(raw.get("params"), dict):
            raise FitError('a fit needs "law": name and "params": {name: value}')
        fallback = {"ci": {}, "r2": float("nan"), "objective": float("nan"), "n": 0, "starts": 0, "seconds": 0.0, "columns": ()}
        fields = {f.name for f in dataclasses.fields(cls)}
        known = {**fallback, **{k: v for k, v in raw.items() if k in fields}}
        law = laws.resolve(known["law"], known["params"])
        for name in known["params"]:
            law.parameter(name)
        for name in ("columns", "notes"):
            known[name] = tuple(known.get(name, ()))
        known["ci"] = {k: tuple(v) for k, v in known["ci"].items()}
        known["samples"] = {k: tuple(v) for k, v in known.get("samples", {}).items()}
        if not known.get("values"):
            known["values"] = {k: v for k, v in known["params"].items() if v is not None}
        return cls(**known)


def load(path: str | Path) -> Fit:
    """Read fit.json. Raises FitError in one line where it is missing or not a fit."""
    try:
        return Fit.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise FitError(f"cannot read fit {path}: {err}") from None
    except (FitError, laws.LawError) as err:
        raise FitError(f"{path} is not a fit: {err}") from None


def published(law: str) -> Fit:
    """The law's published constants as a Fit without data."""
    law = laws.get(law)
    missing = [p.name for p in law.params if p.published is None and p.default is None]
    if missing:
        raise FitError(f"law {law.name}: no published value of {', '.join(missing)}")
    values = law.values(law.published)
    nan = float("nan")
    return Fit(law.name, values, {}, nan, nan, 0, 0, 0.0, law.columns, values, reporting={"source": law.source})


def fit(
    law: str | Law,
    table: Table,
    *,
    starts: int | None = None,
    bootstrap: int = 0,
    level: float = 0.95,
    fixed: Mapping[str, float] | None = None,
    tied: Mapping[str, str] | None = None,
    biased: bool = True,
    loss: str = "huber",
    huber_delta: float = 1e-3,
    stages: str = "joint",
    delta_residual: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Fit:
    """Fit `law` to `table`."""
    raise NotImplementedError("the fitting engine is not there yet")
