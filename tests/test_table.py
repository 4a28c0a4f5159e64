"""Tables as they come: every row that cannot be used is left out and counted with its reason, or refused."""

import time

import numpy as np
import pytest

from analysis import table as tables
from analysis.table.reading import TableError

HEADER = "run,N,D,P_w,P_a,P_kv,P_post,loss"


def write(tmp_path, *rows, header=HEADER):
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_reads_the_contract_and_ignores_other_columns(tmp_path):
    path = write(
        tmp_path, "a,1000,2000,16,16,16,,3.5,ok,7", "a,1000,2000,16,16,16,4,3.75,ok,8", header=HEADER + ",status,x"
    )
    table = tables.load(path)
    assert len(table) == 2 and not table.left_out
    np.testing.assert_array_equal(table["N"], [1000, 1000])
    np.testing.assert_array_equal(table.quantized, [False, True])
    assert len(table.sha256) == 64


def test_a_table_of_n_d_and_loss_is_one_of_sixteen_bit_runs(tmp_path):
    table = tables.load(write(tmp_path, "1e6,2e6,3.5", "1e6,4e6,3.25", header="N,D,loss"))
    assert len(table) == 2 and len(set(table["run"])) == 2
    assert table.high_precision.all() and not table.quantized.any()


def test_delta_is_the_loss_minus_that_of_the_same_run_before_ptq(tmp_path):
    rows = (
        "a,1000,2000,16,16,16,3,3.75",
        "a,1000,2000,16,16,16,,3.5",
        "b,1000,4000,16,16,16,,3",
        "b,1000,4000,16,16,16,3,2.5",
    )
    deltas = tables.load(write(tmp_path, *rows)).deltas()
    np.testing.assert_array_equal(deltas["delta"], [0.25, -0.5])
    np.testing.assert_array_equal(deltas["loss_before"], [3.5, 3.0])


def test_rows_after_ptq_without_a_loss_before_it_are_counted(tmp_path):
    rows = ("a,1000,2000,16,16,16,,3.5", "a,1000,2000,16,16,16,3,3.75", "b,1000,2000,16,16,16,3,3.75")
    deltas = tables.load(write(tmp_path, *rows)).deltas()
    assert len(deltas) == 1
    assert deltas.left_out == {"after PTQ, but its run has no loss before PTQ": 1}


def test_every_unusable_row_is_left_out_with_its_reason(tmp_path):
    rows = (
        "good,1000,2000,16,16,16,,3.5,ok",
        "text,about 1000,2000,16,16,16,,3.5,ok",
        "nan,1000,2000,16,16,16,,nan,ok",
        "empty,1000,2000,16,16,16,,,ok",
        "inf,1000,2000,16,16,16,,inf,ok",
        "negative,1000,2000,16,16,16,,-3.5,ok",
        "zero,0,2000,16,16,16,,3.5,ok",
        "diverged,1000,2000,3,3,3,,nan,diverged",
        "post,1000,2000,16,16,16,four,3.5,ok",
        "good,1000,2000,16,16,16,,3.5,ok",
        "twice,1000,2000,16,16,16,,3.5,ok",
        "twice,1000,2000,16,16,16,,3.6,ok",
        "units,0.03,2000,16,16,16,,3.5,ok",
        "huge,1000,2000,16,16,16,,1e308,ok",
    )
    table = tables.load(write(tmp_path, *rows, header=HEADER + ",status"))
    assert list(table["run"]) == ["good"]
    assert table.left_out == {
        "N is not a number (such as 'about 1000')": 1,
        "loss is empty or NaN": 2,
        "loss is infinite": 1,
        "loss is zero or negative": 1,
        "N is zero or negative": 1,
        "status diverged": 1,
        "P_post is not a number (such as 'four')": 1,
        "N is below 1": 1,
        "loss is above 1e+06": 1,
        "the same row once more": 1,
        "several losses for the same run and settings": 2,
    }
    words = tables.describe(table.left_out)
    assert words.startswith("13 rows left out: 2 loss is empty or NaN") and "\n" not in words


def test_the_same_run_quantized_by_two_methods_is_no_repeat(tmp_path):
    rows = ("a,1000,2000,16,16,16,,3.5,", "a,1000,2000,16,16,16,3,3.7,gptq", "a,1000,2000,16,16,16,3,3.9,rtn")
    table = tables.load(write(tmp_path, *rows, header=HEADER + ",method"))
    assert len(table) == 3
    main = table.one_method()
    assert main.left_out == {"PTQ by another method than gptq": 1} and len(main.deltas()) == 1


def test_where_keeps_rows_before_ptq_that_have_no_method(tmp_path):
    rows = ("a,1000,2000,16,16,16,,3.5,", "a,1000,2000,16,16,16,3,3.7,gptq", "a,1000,2000,16,16,16,3,3.9,rtn")
    table = tables.load(write(tmp_path, *rows, header=HEADER + ",method")).where(method="rtn")
    np.testing.assert_allclose(table.deltas()["delta"], [0.4])
    assert table.left_out == {"method is not rtn": 1}


def test_where_takes_several_values_and_numbers(tmp_path):
    rows = [f"{run},1000,2000,{bits},16,16,,3.5" for run, bits in (("a", 4), ("b", 8), ("c", 16))]
    table = tables.load(write(tmp_path, *rows))
    assert list(table.where(P_w="4.0|16")["run"]) == ["a", "c"]
    with pytest.raises(TableError, match=r"no row has P_w=5; it holds 16\.0, 4\.0, 8\.0"):
        table.where(P_w="5")
    with pytest.raises(TableError, match="no column method"):
        table.where(method="rtn")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("run,N,D\na,1,2\n", "missing column loss; it has run, N, D"),
        ("N,D,loss\n", "the table has no rows"),
        ("", "not a readable CSV"),
        ("N,D,loss\n1,2,nan\n", "no usable row of 1: 1 row left out: 1 loss is empty or NaN"),
        ("N,D,loss\n1,2,3,4\n1,2\n", "not a readable CSV"),
        ("N,N,loss\n1,2,3\n", "column N appears more than once"),
        ("\x00\x01\x02", "missing column|not a readable"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "runs.csv"
    path.write_text(content)
    with pytest.raises(TableError, match=words) as caught:
        tables.load(path)
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(TableError, match="no table at"):
        tables.load(tmp_path / "nothing.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xfa\xff\xfa\x00")
    with pytest.raises(TableError, match="not a readable CSV"):
        tables.load(tmp_path / "bytes.csv")
    with pytest.raises(TableError, match="is a directory; allowed is a regular file"):
        tables.load(tmp_path)


@pytest.mark.slow
def test_a_million_rows_load_in_seconds(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "runs.csv"
    columns = [rng.integers(1, 1 << 30, 10**6), rng.integers(1, 1 << 40, 10**6), rng.uniform(2, 4, 10**6)]
    np.savetxt(path, np.column_stack(columns), fmt=["%d", "%d", "%.9f"], delimiter=",", header="N,D,loss", comments="")
    began = time.monotonic()
    assert len(tables.load(path)) == 10**6
    assert time.monotonic() - began < 60


def test_of_integers_and_floating_point_of_as_many_bits_the_integers_are_one_kind():
    columns = {
        **{"run": list("abcde"), "N": [1e6] * 5, "D": [1e8] * 5, "loss": [2.0, 2.1, 2.2, 2.3, 2.4]},
        **{"P_w": [16, 4, 4, 4, 8], "P_a": [16, 16, 16, 4, 16]},
        **{"w_format": ["bf16", "int4", "e2m1", "int4", "int8"], "a_format": ["bf16", "bf16", "bf16", "e2m1", "bf16"]},
    }
    table = tables.from_columns(columns)
    kept = table.integer_formats()
    assert list(kept["run"]) == ["a", "b", "e"]
    assert kept.left_out == {"trained in floating point below 16 bits": 2}
    floats = table.select(table["w_format"] == "e2m1")
    assert len(floats.integer_formats()) == 1
    unnamed = tables.from_columns({name: columns[name] for name in ("run", "N", "D", "loss", "P_w", "P_a")})
    assert len(unnamed.integer_formats()) == 5
    # Where layers differ, by those that round; a precision that changed in training is another matter.
    mixed = ["bf16", "bf16:0.5+int4:0.5", "bf16:0.5+e2m1:0.5", "int4:0.75+e4m3:0.25", "int8"]
    both = tables.from_columns({**columns, "w_format": mixed, "switches": ["", "", "", "", "bf16 until 0.8"]})
    assert list(both.integer_formats()["run"]) == ["a", "b", "e"]
    assert list(both.one_precision()["run"]) == ["a", "b", "c", "d"] and len(table.one_precision()) == 5
