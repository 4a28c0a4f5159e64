"""Rows chosen by expressions: what they mean, and that they hold nothing but comparisons of columns."""

import numpy as np
import pytest

from analysis import table
from analysis.table.expression import ExpressionError, rows_where

TABLE = table.from_columns(
    {
        "run": ["a", "b", "c", "d"],
        "N": [1e4, 1e5, 1e6, 1e4],
        "D": [1e6, 1e6, 1e7, 1e7],
        "P_w": [16, 4, 16, 3],
        "P_post": [np.nan, np.nan, np.nan, 3],
        "loss": [3.0, 2.5, 2.0, 4.0],
        "schedule": ["cosine", "wsd", "cosine", ""],
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("N < 3e5", "1101"),
        ("1e4 < N <= 1e5", "0100"),
        ("P_w == 16 and D / N >= 100", "1000"),
        ("P_w == 16 or not N == 1e4", "1110"),
        ("P_post is None", "1110"),
        ("P_post is not None", "0001"),
        ("P_post == 3", "0001"),
        ("schedule == 'cosine'", "1010"),
        ("schedule != 'cosine' and schedule is not None", "0100"),
        ("-N > -2e4", "1001"),
        ("N > D - D", "1111"),
        ("1 < 2", "1111"),
    ],
)
def test_expressions_mean_what_they_say(text, expected):
    assert rows_where(text, TABLE).tolist() == [digit == "1" for digit in expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("N <", "allowed are columns"),
        ("", "allowed are columns"),
        ("M < 3", "no column M"),
        ("N", "must be true or false"),
        ("N and D", "'N' must be true or false"),
        ("schedule == 3", "schedule is a text and 3 a number"),
        ("schedule < 3", "'schedule' must be a number"),
        ("__import__('os').system('true') == 0", "not allowed"),
        ("[row for row in N] == 3", "not allowed"),
        ("N ** 9999 > 3", "not allowed"),
        ("N.size == 4", "not allowed"),
        ("N in (1, 2)", "allowed are columns"),
        ("(" * 5000 + "N" + ")" * 5000, "allowed are"),
        ("True", "not allowed"),
        ("1j < N", "not allowed"),
    ],
)
def test_everything_else_is_refused_in_one_line(text, words):
    with pytest.raises(ExpressionError, match="expression") as error:
        rows_where(text, TABLE)
    assert words in str(error.value) and "\n" not in str(error.value)
