"""Rows on disk and the table that is gathered from them."""

import csv

import pytest

from precision_scaling.errors import UserError
from precision_scaling.runtime import files
from precision_scaling.study import results


def row(run, n, d, loss, p_post=None, method=""):
    return {"run": run, "N": n, "D": d, "P_w": 16.0, "P_post": p_post, "loss": loss, "method": method}


def test_rows_come_back_and_make_a_sorted_table(tmp_path):
    large, small = tmp_path / "runs" / "large", tmp_path / "runs" / "small"
    results.write_rows(large, "trained", [row("large", 200, 10, 2.5)])
    results.write_rows(small, "trained", [row("small", 100, 10, 3.123456789)])
    results.write_rows(small, "rtn", [row("small", 100, 10, 3.5, 3, "rtn"), row("small", 100, 10, 3.25, 4, "rtn")])
    assert results.read_rows(small, "gptq") == []
    assert results.read_rows(large, "trained") == [row("large", 200, 10, 2.5)]
    assert results.gather(tmp_path) == 4
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(r["run"], r["P_w"], r["P_post"], r["loss"], r["seed"]) for r in rows]
    assert found == [
        ("small", "16", "", "3.123456789", ""),
        ("small", "16", "4", "3.25", ""),
        ("small", "16", "3", "3.5", ""),
        ("large", "16", "", "2.5", ""),
    ]


def test_an_empty_study_has_a_table_with_a_header_alone(tmp_path):
    assert results.gather(tmp_path) == 0
    assert (tmp_path / "runs.csv").read_text() == ",".join(results.COLUMNS) + "\n"


def test_a_file_that_is_not_rows_is_one_clear_line(tmp_path):
    results.write_rows(tmp_path / "runs" / "a", "trained", [row("a", 1, 1, 1.0)])
    path = tmp_path / "runs" / "a" / "rows-trained.json"
    path.write_text(path.read_text()[:-9])
    for read in (lambda: results.gather(tmp_path), lambda: results.read_rows(path.parent, "trained")):
        with pytest.raises(UserError, match="not a file of rows") as error:
            read()
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_write_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("a longer text", "short"):
        files.atomic_write(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
