"""The train and ptq commands from end to end, as a user runs them."""

import csv
import json

import pytest

pytestmark = pytest.mark.slow

SMALL = {
    "model.width": 16,
    "model.heads": 2,
    "model.mlp_width": 24,
    "model.depth": 1,
    "model.sequence_length": 16,
    "train.batch_size": 4,
    "train.tokens": 64 * 10,
    "train.log_every": 4,
    "train.steps_per_dispatch": 4,
    "evaluate.sequences": 8,
    "evaluate.batch_size": 4,
    "ptq.calibration_sequences": 8,
    "precision.weights": "int4",
}
OPTIONS = [f"--config.{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def workdir(run_command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("train") / "run"
    done = run_command(
        "precision_scaling.train",
        "--config=configs/base.py",
        f"--workdir={workdir}",
        "--profile=1",
        *OPTIONS,
        data=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation loss" in done.stdout and str(workdir / "runs.csv") in done.stdout
    assert f"trace of 1 dispatches in {workdir / 'profile'}" in done.stdout
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    return workdir


def rows(workdir):
    with open(workdir / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_train_leaves_a_row_metrics_and_a_checkpoint(workdir):
    (row,) = rows(workdir)
    assert (row["D"], row["P_w"], row["P_post"], row["status"]) == ("640", "4", "", "ok")
    directory = workdir / "runs" / row["run"]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert [line["tokens"] for line in lines] == [256, 512, 640]
    assert lines[0]["loss"] > lines[-1]["loss"] and lines[0]["learning_rate"] > lines[-1]["learning_rate"] > 0
    assert (directory / "checkpoint").is_dir()
    assert not any(workdir.glob("cohorts/*"))


def test_ptq_adds_rows_and_a_damaged_checkpoint_is_one_line_that_loses_nothing(workdir, run_command):
    arguments = ("precision_scaling.ptq", f"--workdir={workdir}", "--method=rtn")
    done = run_command(*arguments, "--bits=4,3,4")
    assert done.returncode == 0, done.stderr[-3000:]
    trained, *quantized = rows(workdir)
    assert [(row["P_post"], row["method"], row["run"]) for row in quantized] == [
        ("4", "rtn", trained["run"]),
        ("3", "rtn", trained["run"]),
    ]
    # It was trained with weights at 4 bits, so nothing is lost there.
    assert quantized[0]["loss"] == trained["loss"] != quantized[1]["loss"]

    checkpoint = workdir / "runs" / trained["run"] / "checkpoint"
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    done = run_command(*arguments, "--bits=5")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert str(checkpoint) in line and "damaged" in line and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
