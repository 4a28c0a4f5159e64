"""A finding: a claim, the verdict of a table on it, and separately what follows from the form of the law whatever the
data, and what the rows of the table show.
"""

import dataclasses
from collections.abc import Mapping, Sequence

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
FORCED = "forced by the form"  # follows from the law whatever the table


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim and the verdict of the table on it.

    by_form: what follows from the law whatever its constants. by_table: what the rows show, a line for each sentence or
    method. rows: the numbers behind the verdict as a small table, one record a line. numbers: those of the sentences.
    """

    key: str
    claim: str
    verdict: str
    by_form: str
    by_table: str
    numbers: Mapping[str, object] = dataclasses.field(default_factory=dict)
    rows: Sequence[Mapping[str, object]] = ()


def undecided(key: str, claim: str, by_form: str, why: str) -> Finding:
    """A claim that the table does not test, and why."""
    return Finding(key, claim, UNDECIDED, by_form, why)


def noise_words(noise) -> str:
    """The noise between seeds in a sentence's words, or that it is not known."""
    return "no setting was repeated with other seeds, so noise is not known" if noise is None else noise.words
