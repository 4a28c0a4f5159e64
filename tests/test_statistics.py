"""Summaries of errors: what counts, and what files hold of numbers that are not finite."""

import numpy as np
import pytest

from analysis.fitting.statistics import finite_or_null, percentiles, rms


def test_rows_without_a_prediction_are_left_out_and_failed_ones_count():
    assert rms(np.array([3.0, np.nan, -4.0])) == pytest.approx(12.5**0.5)
    assert rms(np.array([np.nan, np.nan])) is None and rms(np.array([])) is None
    assert rms(np.array([0.1, -np.inf])) == np.inf  # a law that predicts a loss of zero


def test_percentiles_are_those_of_a_central_interval():
    draws = np.arange(101.0)
    np.testing.assert_allclose(percentiles(draws, 0.9), [5, 95])
    np.testing.assert_allclose(percentiles(np.stack([draws, 2 * draws], axis=1), 0.9), [[5, 10], [95, 190]])


def test_numbers_that_are_not_finite_are_null_at_any_depth():
    assert finite_or_null({"a": (1.0, np.inf), "b": {"c": float("nan"), "d": 2}}) == {
        "a": [1.0, None],
        "b": {"c": None, "d": 2},
    }
