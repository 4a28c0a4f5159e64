"""The verdicts on recipes: intervals worked out by hand, and the README's numbers against the tables beside it."""

import re

import numpy as np
import pytest

from configs import study_recipes
from results.recipes import verdicts

README = (verdicts.HERE / "README.md").read_text()


def test_an_interval_is_that_of_the_pooled_spread():
    samples = [np.array([1.0, 3.0]), np.array([4.0, 4.0, 7.0]), np.array([9.0])]
    # Squares about the means: 1 + 1, and 1 + 1 + 4; one and two degrees of freedom.
    spread, degrees = verdicts.pooled(samples)
    assert (spread, degrees) == (pytest.approx((8 / 3) ** 0.5), 3)
    # The 97.5 % point of Student's t with three degrees is 3.18245.
    half = 3.18245 * (8 / 3) ** 0.5 / 2**0.5
    assert verdicts.shown(samples[0], spread, degrees) == f"{2.0:+.4f} ± {half:.4f} | undecided | 2"
    assert verdicts.cell(np.array([-9.0, -8.0]), spread, degrees).startswith("**-8.5000 ±")


def short(number: str) -> str:
    """As the README writes it: three digits, no zero before the point."""
    return re.sub(r"\b0\.", ".", f"{float(number):+.3f}")


@pytest.mark.parametrize("size", study_recipes.SIZES)
def test_the_readme_has_the_numbers_of_the_table(size):
    rows = verdicts.table(verdicts.HERE / "recipes.csv.gz")
    lines = [
        *verdicts.compared(rows, verdicts.recipe_pairs(size)),
        *verdicts.compared(rows, verdicts.block_pairs(size)),
    ]
    found = {}
    for line in lines:
        _, name, number, *_ = (word.strip() for word in line.split("|"))
        found[name] = number.split(" ± ")
    for name in ("nvfp4_train over nvfp4", "nvint4 over nvfp4, plain", "mxfp8 over bf16"):
        mean, half = found[name]
        assert f"{short(mean)} ± {short(half)[1:]}" in README, (name, mean, half)
    assert len(found) > 15
