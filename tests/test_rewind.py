"""Which batch a step takes when some of the stream are left out, and where that is kept."""

import json

import pytest

from precision_scaling.errors import UserError
from precision_scaling.runtime import paths
from precision_scaling.training import rewind


def test_a_step_takes_the_batch_that_a_stream_without_the_left_out_ones_has_there():
    left_out = (2, 3, 7)
    stream = [batch for batch in range(20) if batch not in left_out]
    assert [rewind.batch_of(step, left_out) for step in range(17)] == stream
    for step in range(17):
        count = min(rewind.steps_in_a_row(step, left_out), 17 - step)
        assert stream[step : step + count] == list(range(stream[step], stream[step] + count))
    assert [rewind.steps_in_a_row(step, left_out) for step in (0, 1, 2, 4, 5)] == [2, 1, 3, 1, float("inf")]


def test_rewinds_are_kept_and_count_in_batches_of_the_stream(tmp_path):
    assert rewind.left_out(tmp_path) == ()
    assert [rewind.leave_out(tmp_path, step) for step in (5, 5, 2)] == [5, 6, 2]
    assert rewind.left_out(tmp_path) == (2, 5, 6)
    assert json.loads((tmp_path / paths.REWINDS).read_text())["rewinds"][1] == {"step": 5, "batch": 6}


@pytest.mark.parametrize("text", ["", "{}}", '[{"step": 3}]', "7"])
def test_a_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / paths.REWINDS).write_text(text)
    with pytest.raises(UserError, match="not a list of rewinds"):
        rewind.left_out(tmp_path)
