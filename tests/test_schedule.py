"""Learning-rate schedules against values worked out by hand and formulas written out in NumPy."""

import functools
import math

import jax
import numpy as np
import pytest

from precision_scaling.training import schedule

rate = jax.jit(functools.partial(schedule.learning_rate, final_fraction=0.1))

# 100 steps, 10 of them warm-up, peak 2, final 0.2: a tenth of the peak after the first step. WSD falls from step 80 on.
BY_HAND = {
    "cosine": ((55, 1.1), (99, 0.2 + 0.9 * (1 + math.cos(math.pi * 89 / 90))), (100, 0.2), (120, 0.2)),
    "linear": ((55, 1.1), (28, 2 - 1.8 * 0.2), (99, 0.2 + 1.8 / 90), (100, 0.2)),
    "constant": ((11, 2.0), (99, 2.0)),
    "wsd": ((79, 2.0), (80, 2.0), (90, 1.1), (99, 0.2 + 1.8 / 20), (100, 0.2)),
}


@pytest.mark.parametrize("name", schedule.NAMES)
def test_schedules_have_the_values_worked_out_by_hand(name):
    made = schedule.of(name, 2.0, 100, 10, 20)
    for step, value in ((0, 0.2), (4, 1.0), (9, 2.0), (10, 2.0), *BY_HAND[name]):
        assert rate(step, made) == pytest.approx(value, rel=1e-5), step


@pytest.mark.parametrize("name", schedule.NAMES)
def test_runs_of_one_step_and_runs_that_are_all_warm_up(name):
    assert rate(0, schedule.of(name, 2.0, 1, 1, 0)) == pytest.approx(2.0)
    assert rate(3, schedule.of(name, 2.0, 4, 4, 0)) == pytest.approx(2.0)


def test_names_lengths_and_rates_are_data():
    made = [schedule.of(*arguments) for arguments in (("cosine", 1.0, 10, 1, 0), ("wsd", 3.0, 40, 4, 8))]
    before = rate._cache_size()
    one_by_one = [[rate(step, each) for step in range(40)] for each in made]
    assert rate._cache_size() <= before + 1
    stacked = jax.tree.map(lambda *x: np.stack(x), *made)
    together = jax.vmap(lambda each: jax.vmap(lambda step: rate(step, each))(np.arange(40)))(stacked)
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6)
