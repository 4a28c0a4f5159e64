"""A study's table: its runs, rows and columns; what is done again and what is not; shares of it; other configs."""

import csv
import json
import math
import shutil
import types

import numpy as np
import pytest

from precision_scaling.config import experiment, options
from precision_scaling.errors import UserError
from precision_scaling.runtime.files import read_sealed, write_sealed
from precision_scaling.study import plan, results, run_missing
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import open_workspace, reopen_workspace
from precision_scaling.training.run import Shard

CONTRACT = ["run", "N", "D", "P_w", "P_a", "P_kv", "P_post", "loss"]


def table(workdir):
    with open(workdir / "runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(workdir):
    """What is there and when it was written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in workdir.rglob("*") if path.is_file()}


def test_columns_of_the_contract_come_first(finished_study):
    _, workdir = finished_study
    header = (workdir / "runs.csv").read_text().splitlines()[0].split(",")
    assert header[:8] == CONTRACT
    assert len(set(header)) == len(header)
    assert {"seed", "status", "epochs", "method", "training_flops", "device", "w_format"} <= set(header)


def test_rows_say_what_was_trained_and_measured(finished_study):
    workspace, workdir = finished_study
    rows = table(workdir)
    trained = [row for row in rows if row["P_post"] == ""]
    assert len(trained) == 4 and len(rows) == 4 + 3 * 2  # three runs ask for PTQ, at two bit-widths
    precision = {(row["D"], row["P_w"], row["P_a"], row["P_kv"]) for row in trained}
    assert precision == {
        ("768", "16", "16", "16"),
        ("448", "16", "16", "16"),
        ("768", "4", "16", "16"),
        ("768", "3", "4", "4"),
    }
    for row in rows:
        assert row["N"] == "4432" and row["status"] == "ok" and row["seed"] == "0"
        windows = (len(workspace.corpus.train) - 1) // 16
        assert float(row["epochs"]) == pytest.approx(int(row["D"]) / (16 * windows), abs=1e-4)
        assert int(row["training_flops"]) == int(row["D"]) * (6 * (4432 + 257 * 16) + 12 * 2 * 16 * 16)
        assert 2 < float(row["loss"]) < math.log(257) + 1
    for row in rows:
        if row["P_post"]:
            assert row["method"] == "rtn" and row["P_post"] in ("3", "4")


def test_ptq_rows_follow_from_the_row_of_their_run(finished_study):
    _, workdir = finished_study
    rows = table(workdir)
    before = {row["run"]: float(row["loss"]) for row in rows if not row["P_post"]}
    deltas = {(row["P_w"], row["P_post"]): float(row["loss"]) - before[row["run"]] for row in rows if row["P_post"]}
    # Law 4: no loss where training and inference precision are equal.
    assert deltas["4", "4"] == 0
    assert deltas["4", "3"] != 0 and deltas["16", "3"] != 0


def test_equal_points_of_the_grid_are_one_run(finished_study):
    workspace, _ = finished_study
    runs = workspace.experiment.runs
    assert len({run.id for run in runs}) == len(runs) == 4
    assert {run.id.rsplit("-", 1)[0]: run.ptq for run in runs} == {
        "4.43k-D768-bf16-s0": True,
        "4.43k-D448-bf16-s0": True,
        "4.43k-D768-wint4-s0": True,  # only one of the two parts that name it asks for PTQ
        "4.43k-D768-wint3_aint4_kint4_vint4-s0": False,
    }


def test_a_finished_study_is_left_alone(finished_study):
    workspace, workdir = finished_study
    before = files(workdir)
    again = open_workspace(workspace.experiment.config, workdir)
    run_missing.train_missing(again)
    assert quantize_missing(again, ("rtn",), (3, 4)) == []
    table_before = (workdir / "runs.csv").read_bytes()
    results.gather(workdir)
    assert (workdir / "runs.csv").read_bytes() == table_before
    after = files(workdir)
    assert set(after) == set(before)
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed <= {"config.json", "runs.csv"}


@pytest.fixture(scope="module")
def workdir_of_two(study_config, tmp_path_factory, quick_compile):
    """The same study by two workers, and what the first of them left before the second began."""
    workdir = tmp_path_factory.mktemp("shards")
    workspace = open_workspace(study_config, workdir)
    run_missing.train_missing(workspace, Shard(0, 2))
    quantize_missing(workspace, ("rtn",), (3, 4), Shard(0, 2))
    results.gather(workdir)
    first = table(workdir)
    kept = files(workdir / "runs")
    run_missing.train_missing(workspace, Shard(1, 2))
    quantize_missing(workspace, ("rtn",), (3, 4), Shard(1, 2))
    results.gather(workdir)
    return workdir, first, kept


def test_two_shares_make_the_whole_study(finished_study, workdir_of_two):
    _, whole = finished_study
    workdir, first, kept = workdir_of_two
    assert (workdir / "runs.csv").read_bytes() == (whole / "runs.csv").read_bytes()
    assert 0 < len(first) < len(table(workdir))
    now = files(workdir / "runs")
    assert all(now[path] == kept[path] for path in kept)


def test_only_what_is_missing_is_measured(workdir_of_two, study_config, finished_study):
    workdir, _, _ = workdir_of_two
    workspace = open_workspace(study_config, workdir)
    lost = next(run for run in workspace.experiment.runs if "D448" in run.id)
    path = workdir / "runs" / lost.id / "rows-trained.json"
    ptq = workdir / "runs" / lost.id / "rows-rtn.json"
    path.unlink()
    rows = results.read_rows(workdir / "runs" / lost.id, "rtn")
    results.write_rows(ptq.parent, "rtn", [row | {"P_post": {3: 3, 4: 5}[row["P_post"]]} for row in rows])
    before = files(workdir / "runs")
    run_missing.train_missing(workspace)
    quantize_missing(workspace, ("rtn",), (3, 4))
    after = files(workdir / "runs")
    changed = {path for path in after if after[path] != before.get(path)}
    assert path in changed and ptq in changed
    assert all(lost.id in str(path) for path in changed)
    assert sorted(row["P_post"] for row in results.read_rows(workdir / "runs" / lost.id, "rtn")) == [3, 4, 5]
    trained = results.read_rows(workdir / "runs" / lost.id, "trained")
    assert trained == results.read_rows(finished_study[1] / "runs" / lost.id, "trained")


@pytest.fixture
def copied_study(finished_study, tmp_path):
    """Workdir of a copy of the finished study, which tests in other processes leave alone."""
    return shutil.copytree(finished_study[1], tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))


def test_a_workdir_of_another_config_is_refused_and_left_as_it_is(copied_study, study_config):
    workdir = copied_study
    before = files(workdir)
    for key, value in (("optimizer.peak_lr", 1e-3), ("evaluate.sequences", 4), ("model.width", 8)):
        other = study_config.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        with pytest.raises(UserError, match="holds results of another config") as error:
            open_workspace(other, workdir)
        assert key in str(error.value) and "\n" not in str(error.value)
    assert files(workdir) == before


def test_options_that_change_no_number_may_change(copied_study, study_config):
    workdir = copied_study
    other = study_config.copy_and_resolve_references()
    other.update_from_flattened_dict(
        {"train.log_every": 7, "train.checkpoint_seconds": 5.0, "ptq.bits": (6,), "study.lanes": 1}
    )
    open_workspace(other, workdir)
    assert reopen_workspace(workdir).experiment.config.train.log_every == 7
    open_workspace(study_config, workdir)


def test_a_workdir_of_options_with_their_earlier_names_goes_on(study_config, tmp_path):
    workspace = open_workspace(study_config, tmp_path)
    path = tmp_path / "config.json"
    claim = read_sealed(path)
    for old, new in options.RENAMED.items():
        section, leaf = old.split(".")
        claim["config"][section][leaf] = claim["config"][section].pop(new.partition(".")[2])
    write_sealed(path, claim)
    again = reopen_workspace(tmp_path)
    assert [run.id for run in again.experiment.runs] == [run.id for run in workspace.experiment.runs]
    assert again.experiment.config.optimizer.peak_lr == study_config.optimizer.peak_lr


def test_a_workdir_that_is_older_than_an_option_has_it_at_the_default_that_it_had_when_new(study_config, tmp_path):
    open_workspace(study_config, tmp_path)
    path = tmp_path / "config.json"
    claim = json.loads(path.read_text())
    del claim["config"]["train"]["rewinds"], claim["config"]["optimizer"]["z_loss"], claim["config"]["mesh"]
    del claim["config"]["model"]["parametrization"], claim["fingerprint"]
    path.write_text(json.dumps(claim))
    again = reopen_workspace(tmp_path).experiment.config
    assert again.train.rewinds == 0 and again.model.parametrization == "depth_mup" != study_config.model.parametrization
    path.write_text(json.dumps(claim))
    other = study_config.copy_and_resolve_references()
    other.model.parametrization = "depth_mup"
    other.optimizer.z_loss = 1e-4
    with pytest.raises(UserError, match=r"optimizer.z_loss was 0.0 and is 0.0001 now"):
        open_workspace(other, tmp_path)


def test_a_diverged_run_has_a_row_without_a_loss_and_is_not_quantized(tiny_config, tmp_path, quick_compile):
    config = tiny_config(
        optimizer__peak_lr=1e38,
        grid={"one": {"sizes": ("25k",), "tokens": (64 * 12,), "precisions": ("w4", "w3_a4_kv4"), "ptq": True}},
    )
    workspace = open_workspace(config, tmp_path)
    run_missing.train_missing(workspace)
    assert quantize_missing(workspace, ("rtn",), (3,)) == []
    assert results.gather(tmp_path) == 2
    for row in table(tmp_path):
        assert row["status"] == "diverged" and row["loss"] == "" and row["P_post"] == ""
    before = files(tmp_path / "runs")
    run_missing.train_missing(workspace)
    assert files(tmp_path / "runs") == before


def test_a_pattern_chooses_runs_and_the_rest_can_follow(finished_study, study_config, tmp_path, quick_compile):
    whole = {(row["run"], row["P_post"]): row["loss"] for row in table(finished_study[1])}
    workspace = open_workspace(study_config, tmp_path)
    some = Shard(only="-bf16-")
    run_missing.train_missing(workspace, some)
    assert quantize_missing(workspace, ("rtn",), (3, 4), some) == []
    results.gather(tmp_path)
    chosen = {(row["run"], row["P_post"]): row["loss"] for row in table(tmp_path)}
    assert chosen == {key: loss for key, loss in whole.items() if "-bf16-" in key[0]} and len(chosen) == 6
    run_missing.train_missing(workspace)
    assert quantize_missing(workspace, ("rtn",), (3, 4)) == []
    results.gather(tmp_path)
    assert {(row["run"], row["P_post"]): row["loss"] for row in table(tmp_path)} == whole


def test_shares_are_parsed_and_cover_every_run_once():
    assert plan.parse_shard("0/1") == Shard() and plan.parse_shard("2/3", "^1M-") == Shard(2, 3, "^1M-")
    for text in ("1/1", "3/2", "-1/2", "1", "a/b", "0/0", "1/2/3", ""):
        with pytest.raises(UserError, match="0 <= i < n"):
            plan.parse_shard(text)
    with pytest.raises(UserError, match=r"--only=\(: allowed is a regular expression"):
        plan.parse_shard("0/1", "(")
    # branches of five trunks
    runs = [types.SimpleNamespace(trunk=number // 2, id=f"run-{number}") for number in range(9)]
    shares = [Shard(i, 3).of(runs) for i in range(3)]
    assert sorted(map(id, sum(shares, ()))) == sorted(map(id, runs))
    assert not {run.trunk for run in shares[0]} & {run.trunk for run in shares[1]}
    # The shards are of all runs, whichever of them are wanted: another pattern moves no run to another worker.
    some = [Shard(i, 3, "[1-4]$").of(runs) for i in range(3)]
    assert all(all(run in many for run in few) for few, many in zip(some, shares, strict=True))
    assert sorted(run.id for run in sum(some, ())) == ["run-1", "run-2", "run-3", "run-4"]
    assert len({Shard(0, 3).name, Shard(0, 3, "a").name, Shard(0, 3, "b").name}) == 3


def test_the_plan_counts_runs_tokens_and_flops(study_config):
    resolved = experiment.resolve(study_config, 257)
    text = plan.plan_text(resolved)
    tokens = 3 * 768 + 448
    flops = tokens * (6 * (4432 + 257 * 16) + 12 * 2 * 16 * 16)
    assert f"4 runs in 1 cohorts, {tokens:,} tokens, {flops:.2e} FLOPs; 3 runs are quantized" in text
    assert "4,432" in text and f"{4432 + 2 * 257 * 16:,}" in text


def test_losses_in_the_table_keep_the_digits_of_the_measurement(finished_study):
    _, workdir = finished_study
    for row in table(workdir):
        if not row["P_post"]:
            (exact,) = results.read_rows(workdir / "runs" / row["run"], "trained")
            assert np.float32(row["loss"]) == np.float32(exact["loss"])
