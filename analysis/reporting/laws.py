"""The laws of a report: which are fitted and which compared, in parallel processes."""

import dataclasses
from collections.abc import Mapping, Sequence

from analysis import laws
from analysis.fitting import fit as fit_lib
from analysis.fitting.comparison import Comparison, compare
from analysis.fitting.fit import Fit
from analysis.fitting.multiplicativity import is_joint
from analysis.fitting.options import FitError
from analysis.fitting.parallel import workers
from analysis.laws.law import LawError
from analysis.reporting.verdicts import multiply
from analysis.reporting.verdicts.optimum_by_law import near_best
from analysis.table import PRECISIONS, Table

LAWS = ("chinchilla", "ptq", "precision", "unified")
# On held-out rows: the paper's laws against those of others and of this project. Laws of one kind go together.
COMPARED = (
    ("chinchilla", "precision", "power_laws", "capacity", "noise", "capacity_noise"),
    ("ptq", "qid", "ptq_noise", "unified", "unified_noise"),
)
STARTS = 128  # of each search of the comparison
MOST_CAPACITIES = (
    32  # combinations of precision beyond which a constant for each takes longer to fit than all other laws
)


@dataclasses.dataclass(frozen=True)
class Made:
    """What is computed from the table: fits, why others are missing, the comparison of laws on held-out rows, and
    forecasts of joint runs (empty where there are none).
    """

    fits: Mapping[str, Fit]
    not_fitted: Mapping[str, str]
    comparison: Comparison | None
    forecasts: Mapping[str, object]


def make(table: Table, names: Sequence[str], bootstrap: int, seed: int, processes: int = 1) -> Made:
    """Fits the laws `names` and those of the loss before PTQ that are near the best on held-out rows."""
    losses, left = table.before_ptq(), _left_to_compare(table)
    with workers(processes) as pool:
        groups = [tuple(name for name in group if name not in left) for group in COMPARED]
        compared = [pool.submit(_compare, table, group, seed) for group in groups]
        fitted = {name: pool.submit(_fit, name, table, bootstrap, seed) for name in reversed(names)}
        forecasts = pool.submit(multiply.forecasts, losses, seed) if is_joint(losses).any() else None
        comparison = _together([future.result() for future in compared], left)
        for name in near_best(comparison):
            if name in laws.LAWS and name not in fitted:
                fitted[name] = pool.submit(_fit, name, table, bootstrap, seed)
        order = [*names, *(name for name in fitted if name not in names)]
        found = {name: fitted[name].result() for name in order}
        return Made(
            {name: fit for name, fit in found.items() if isinstance(fit, Fit)},
            {name: why for name, why in found.items() if not isinstance(why, Fit)},
            comparison,
            {} if forecasts is None else forecasts.result(),
        )


def _fit(name: str, table: Table, bootstrap: int, seed: int) -> Fit | str:
    """The fit of a law, or why it cannot be fitted to this table."""
    if name == "precision" and table.before_ptq().high_precision.all():
        return "no run was trained below 16 bits"
    try:
        # a constant has one interval: of the bootstrap where there is one, else of its profile
        return fit_lib.fit(name, table, bootstrap_resamples=bootstrap, profile=not bootstrap, seed=seed)
    except (FitError, LawError) as error:
        return str(error)


def _compare(table: Table, names: Sequence[str], seed: int) -> Comparison | None:
    try:
        return compare(table, tuple(names), starts=STARTS, seed=seed)
    except FitError:
        return None


def _left_to_compare(table: Table) -> dict[str, str]:
    """The laws that a report leaves to analysis.compare, with the reason."""
    losses = table.before_ptq()
    low = losses.select(~losses.high_precision)
    settings = len(set(zip(*(low[part] for part in PRECISIONS), strict=True)))
    if settings <= MOST_CAPACITIES:
        return {}
    return {"capacity": f"left to analysis.compare: {settings} combinations of precision with a constant each"}


def _together(parts: Sequence[Comparison | None], left: Mapping[str, str]) -> Comparison | None:
    """Comparisons of laws of different kinds as one, with the laws left out of it."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return dataclasses.replace(
        found[0],
        rows=tuple(row for part in found for row in part.rows),
        skipped={**left, **{law: why for part in found for law, why in part.skipped.items()}},
        notes=tuple(dict.fromkeys(note for part in found for note in part.notes)),
        nested=tuple(test for part in found for test in part.nested),
    )
