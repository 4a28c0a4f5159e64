"""The claims of Scaling Laws for Precision (arXiv 2411.04330) tested on a table, in order; each is a module of
analysis/reporting/verdicts.
"""

from analysis.reporting.evidence import Evidence
from analysis.reporting.verdicts.best_precision import optimal_precision
from analysis.reporting.verdicts.few_bits import few_bits_cost_parameters
from analysis.reporting.verdicts.finding import CONTRADICTED, FORCED, SUPPORTED, UNDECIDED, Finding
from analysis.reporting.verdicts.growth import degradation_grows, growth_sentence
from analysis.reporting.verdicts.multiply import effects_multiply
from analysis.reporting.verdicts.schedule import schedule_or_data
from analysis.reporting.verdicts.served_low import (
    low_precision_loses_less,
    nothing_lost_when_served_as_trained,
    one_law,
)
from analysis.reporting.verdicts.turning import more_data_hurts

__all__ = ["CONTRADICTED", "FORCED", "SUPPORTED", "UNDECIDED", "Finding", "all_findings", "growth_sentence"]

VERDICTS = (
    degradation_grows,
    more_data_hurts,
    effects_multiply,
    optimal_precision,
    few_bits_cost_parameters,
    low_precision_loses_less,
    nothing_lost_when_served_as_trained,
    one_law,
    schedule_or_data,
)


def all_findings(evidence: Evidence) -> list[Finding]:
    """F1 to F4, each in its parts, and the challenge to F1."""
    return [verdict(evidence) for verdict in VERDICTS]
