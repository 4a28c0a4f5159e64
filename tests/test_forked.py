"""The runner of commands in forks: exit codes, output and timeouts as those of `python -m`."""

import pytest

from tests import forked


def test_exit_codes_and_output_are_those_of_the_command(tmp_path):
    done = forked.run("calendar", ["2024", "2"], tmp_path)
    assert done.code == 0 and "February 2024" in done.stdout and done.stderr == ""
    done = forked.run("calendar", ["--nothing"], tmp_path)
    assert done.code == 2 and done.stdout == "" and "--nothing" in done.stderr
    done = forked.run("json.tool", ["missing.json"], tmp_path)
    assert done.code == 2 and "missing.json" in done.stderr
    assert "Traceback" in forked.run("no_such_module", [], tmp_path).stderr


def test_a_command_runs_in_its_directory_and_leaves_the_next_one_as_it_was(tmp_path):
    (tmp_path / "a.json").write_text('{"b":1}')
    for _ in range(2):
        assert forked.run("json.tool", ["a.json", "out.json"], tmp_path).code == 0
    assert (tmp_path / "out.json").read_text() == '{\n    "b": 1\n}\n'


def test_a_command_that_takes_too_long_is_killed(tmp_path):
    done = forked.run("timeit", ["-n1", "-r1", "-s", "import time", "time.sleep(60)"], tmp_path, timeout=0.3)
    assert done.code == forked.KILLED and 0.3 <= done.seconds < 5


def test_a_refusal_is_one_line_and_nothing_else():
    line = "error: --starts=0: at least 1\n"
    bar = "\rptq: starts:  50%|xxx  | 1/2\n"
    assert forked.refusal(forked.Done(2, "", bar + line, 0.1)) == line.strip()
    for code, said in ((0, line), (2, line + line), (2, ""), (1, "Traceback\n" + line), (2, "nothing\n")):
        with pytest.raises(AssertionError):
            forked.refusal(forked.Done(code, "", said, 0.1))
