"""Peaks and MFU worked out by hand, trackers read back by other means, and traces that are on disk."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from tqdm import tqdm

from precision_scaling.errors import ConfigError
from precision_scaling.model.accounting import training_flops_per_token
from precision_scaling.model.config import ModelConfig
from precision_scaling.runtime.profiling import Profile
from precision_scaling.runtime.stopping import Stop
from precision_scaling.training import cohort, metrics, trackers


def test_flops_of_a_token_are_those_counted_by_hand():
    # Width 8, hidden 12, two layers, head dimension 4; the last product with a vocabulary of 50.
    config = ModelConfig(50, 8, 2, 2, 12, 16, 8, 2, norm_type="layer")
    projections = 2 * (8 * 24 + 8 * 8 + 8 * 24 + 12 * 8)  # qkv, out, gate_up, down
    head = 8 * 50
    attention = 2 * 2 * (16 * 8)  # q·k and p·v of one token with 16 others, in two layers
    forward = 2 * (projections + head + attention)
    assert metrics.model_flops_per_second(config, 1.0) == 3 * forward
    # One table for embedding and head: the look-up costs nothing, so it is the same.
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert metrics.model_flops_per_second(tied, 10.0) == 30 * forward


def test_mfu_is_the_share_of_all_devices_peak():
    assert metrics.mfu(4 * 197e12 / 2, "TPU v5 lite", "bfloat16", 4) == pytest.approx(0.5)
    assert metrics.mfu(156e12, "NVIDIA A100-SXM4-80GB", "float32", 1) == pytest.approx(1.0)
    assert metrics.mfu(156e12, "NVIDIA A100-SXM4-80GB", "bfloat16", 1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA A10", "bfloat16"),
        ("NVIDIA L40S", "bfloat16"),
        ("TPU v5 lite", "float16"),
    ],
)
def test_a_device_without_an_entry_has_no_mfu(kind, dtype):
    assert metrics.mfu(1e12, kind, dtype, 1) is None


def test_every_device_of_the_table_is_found_once():
    kinds = {
        **{"TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v5p": 459},
        **{"TPU v6 lite": 918, "TPU v6e": 918, "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312},
        **{"NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA B200": 2250},
        "NVIDIA L4": 121,
    }
    for kind, tera in kinds.items():
        assert metrics.peak_flops_per_second(kind, "bfloat16") == tera * 1e12, kind
    for _, peak in metrics.PEAKS:
        assert peak.float32 <= peak.bfloat16


# A cohort with trackers and a profile


@pytest.fixture(scope="module")
def trained(finished_study, quick_compile, tmp_path_factory):
    """(workdir, runs, profile) of two short runs trained together, written to TensorBoard and traced."""
    pytest.importorskip("tensorboardX")
    workspace, _ = finished_study
    (group,) = workspace.experiment.cohorts
    workdir = tmp_path_factory.mktemp("trackers")
    runs = tuple(run for run in group.runs if "D768" in run.id)[:2]
    profile = Profile(workdir / "profile", 1)
    cohort.train_cohort(
        dataclasses.replace(group, runs=runs),
        workspace.loader(group.shape),
        cohort.Context(
            workspace.experiment.optimizer,
            workspace.layout,
            workdir,
            "0of1",
            cohort.Options(2, 1, 1e9, 4, trackers=("tensorboard",)),
            tqdm(disable=True, total=0),
            Stop(),
            profile,
        ),
        lambda finished: None,
    )
    profile.close()
    return workdir, runs, profile


def lines_of(workdir, run):
    return [json.loads(line) for line in (workdir / "runs" / run.id / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_speeds_and_no_mfu_on_a_cpu(trained):
    workdir, runs, _ = trained
    for run in runs:
        lines = lines_of(workdir, run)
        assert len(lines) == 12
        for line in lines:
            assert "mfu" not in line and 0 <= line["data_wait"] <= 1
            # Both runs' tokens, at the FLOPs of one.
            both = 2 * line["tokens_per_second"] * training_flops_per_token(run.shape.model)
            assert line["flops_per_second"] == pytest.approx(both, rel=1e-3)


def records(path: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of an event file, by the format of TFRecord: length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, found, at = path.read_bytes(), [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 12 + length + 4
    return found


def test_tensorboard_shows_every_line_once(trained):
    workdir, runs, _ = trained
    for run in runs:
        (path,) = (workdir / "runs" / run.id / "tensorboard").iterdir()
        found = records(path)
        losses = {step: value for step, name, value in found if name == "loss"}
        lines = lines_of(workdir, run)
        assert losses == pytest.approx({line["step"]: line["loss"] for line in lines})
        assert len(found) == sum(len(line) - 1 for line in lines)


def test_a_run_that_goes_on_has_one_curve(tmp_path):
    pytest.importorskip("tensorboardX")
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    line = lambda step, loss: json.dumps({"step": step, "loss": loss}) + "\n"
    for content in (line(1, 5.0) + line(2, 4.0), line(1, 5.0) + line(2, 4.5) + line(3, None)):
        followers = trackers.Followers(("tensorboard",))
        path.write_text(content)
        followers.follow(path)
        with path.open("a") as file:
            file.write(line(4, 3.0))
        followers.follow(path)
        followers.close()
    (file,) = (path.parent / "tensorboard").iterdir()
    assert records(file) == [(1, "loss", 5.0), (2, "loss", 4.5), (4, "loss", 3.0)]


@pytest.mark.slow
def test_wandb_takes_the_lines_of_runs_side_by_side(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    followers = trackers.Followers(("wandb",))
    for name in ("one", "other"):
        path = tmp_path / "study" / "runs" / name / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"step": 1, "loss": 5.0}) + "\n")
        followers.follow(path)
    followers.close()
    for name in ("one", "other"):
        (file,) = (tmp_path / "study" / "runs" / name).glob("wandb/offline-run-*/*.wandb")
        assert b"loss" in file.read_bytes()


def test_sinks_that_are_not_there_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="tensorboard, wandb"):
        trackers.check(("tensorbored",))
    monkeypatch.setattr(trackers.Wandb, "package", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[wandb\]'") as error:
        trackers.check(("wandb",))
    assert "\n" not in str(error.value)
    trackers.check(())


def test_a_profile_is_a_trace_of_what_ran_after_compilation(trained):
    workdir, _, profile = trained
    assert profile.report() == [f"trace of 1 dispatches in {workdir / 'profile'}"]
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    (trace,) = (workdir / "profile").rglob("*.trace.json.gz")
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("PjitFunction(train)" in name for name in names)
    assert not any("backend_compile" in name for name in names)


def test_a_profile_of_nothing_says_so(tmp_path):
    profile = Profile(tmp_path / "profile", 3)
    profile.close()
    (line,) = profile.report()
    assert "nothing was left to train" in line and not (tmp_path / "profile").exists()
    assert Profile(tmp_path, 0).report() == []


def test_a_tracker_is_one_class_and_one_entry(tmp_path, monkeypatch):
    seen = []

    class Lines:
        package = "json"

        def __init__(self, run_directory):
            self.name = run_directory.name

        def write(self, step, values):
            seen.append((self.name, step, values["loss"]))

        def close(self):
            seen.append((self.name, "closed"))

    monkeypatch.setitem(trackers.TRACKERS, "lines", Lines)
    trackers.check(("lines",))
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    followers = trackers.Followers(("lines",))
    followers.follow(path)
    followers.close()
    assert seen == [("run", 1, 2.0), ("run", 2, 1.5), ("run", "closed")]
