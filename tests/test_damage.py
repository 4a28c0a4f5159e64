"""Whatever happens to a file that a command has left behind: it is refused in one line, harmless, or made again.

A damage is a flipped bit, another digit, a run of other bytes, a cut, an empty file, bytes that follow, or a pipe or a
directory in its place; of a file drawn among all of an artefact. Afterwards what is read is what was written, or there
is a UserError. Never another number.
"""

import collections
import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest

from precision_scaling.data import tokenize, tokens
from precision_scaling.errors import UserError
from precision_scaling.ptq import codes, layers, packed
from precision_scaling.ptq.projection import Report
from precision_scaling.runtime import files, paths
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.study import results, run_missing
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import _read_claim, open_workspace
from precision_scaling.training import checkpoint, metrics_log, rewind, trackers
from precision_scaling.training import step as step_lib
from tests import forked

SECONDS = 30  # for one damage; most take milliseconds


def often(few: int, many: int) -> pytest.MarkDecorator:
    """So many damages in the fast tests, and so many in the slow ones."""
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.slow)])


def digit(rng: np.random.Generator, content: bytearray) -> None:
    """Changes one of the digits, where there is one: what an editor would do."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if places:
        place = int(rng.choice(places))
        content[place] = 48 + (content[place] - 48 + int(rng.integers(1, 10))) % 10


def flip(rng: np.random.Generator, content: bytearray) -> None:
    if content:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))


def overwrite(rng: np.random.Generator, content: bytearray) -> None:
    start, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 64))
    content[start : start + length] = rng.bytes(len(content[start : start + length]))


def cut(rng: np.random.Generator, content: bytearray) -> None:
    del content[int(rng.integers(len(content) + 1)) :]


def empty(rng: np.random.Generator, content: bytearray) -> None:
    content.clear()


def append(rng: np.random.Generator, content: bytearray) -> None:
    content += content[: int(rng.integers(1, 100))]


CHANGES = (digit, digit, flip, flip, flip, overwrite, cut, empty, append)
REPLACEMENTS = (os.mkfifo, os.mkdir)  # a pipe, which nobody writes to, or a directory


def damage(directory: Path, rng: np.random.Generator) -> str:
    """Damages a file below a directory; says which and how."""
    path = rng.choice(sorted(path for path in directory.rglob("*") if path.is_file()))
    change = (CHANGES + REPLACEMENTS)[rng.integers(len(CHANGES) + len(REPLACEMENTS))]
    if change in REPLACEMENTS:
        path.unlink()
        change(path)
    else:
        content = bytearray(path.read_bytes())
        change(rng, content)
        path.write_bytes(content)
    return f"{change.__name__} {path.relative_to(directory)}"


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def end(*_):
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], Any], *allowed: Any) -> str:
    """What came of it: "refused" in one line, or "same", one of the values that are allowed."""
    with time_limit():
        try:
            found = read()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return "refused"
    assert found in allowed
    return "same"


def suffer(whole: Path, read: Callable[[Path], Any], n: int, tmp_path: Path, *allowed: Any) -> collections.Counter:
    """Copies, damages and reads n times; counts outcomes. Every value must be that of the whole, or in `allowed`."""
    rng, counts = np.random.default_rng(0), collections.Counter()
    copy = tmp_path / "copy" / whole.name
    wanted = read(shutil.copytree(whole, copy))
    for _ in range(n):
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        what = damage(copy, rng)
        try:
            counts[outcome(lambda: read(copy), wanted, *allowed)] += 1
        except Exception as error:
            raise AssertionError(f"after {what}") from error
    assert counts["refused"] + counts["same"] == n
    return counts


def digest(tree: Any) -> str:
    """Of a tree of arrays: structure, types, shapes and bits."""
    found = hashlib.blake2b(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        leaf = np.asarray(leaf)
        found.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return found.hexdigest()


class State(collections.namedtuple("State", "step params")):
    """A little train state of two lanes."""


def state(step: int) -> State:
    rng = np.random.default_rng(step)
    params = {"kernel": rng.normal(size=(2, 8, 16)).astype(np.float32), "scale": np.ones((2, 3), np.float32)}
    return State(np.array([step, 0], np.int32), params)


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@often(25, 150)
def test_rows(finished_study, tmp_path, n):
    whole = tmp_path / "study"
    for path in finished_study[1].glob("runs/*/rows-*.json"):
        files.copy(path, whole / path.relative_to(finished_study[1]))

    def read(workdir):
        results.gather(workdir)
        return (workdir / "runs.csv").read_bytes()

    assert suffer(whole, read, n, tmp_path)["refused"] > n / 2


@often(25, 150)
def test_the_config_of_a_workdir(finished_study, tmp_path, n):
    files.copy(finished_study[1] / "config.json", tmp_path / "study" / "config.json")
    assert suffer(tmp_path / "study", _read_claim, n, tmp_path)["refused"] > n / 2


@often(25, 150)
def test_rewinds(tmp_path, n):
    for step in (5, 5, 2, 11):
        rewind.leave_out(tmp_path / "run", step)
    assert rewind.left_out(tmp_path / "run") == (2, 5, 6, 14)
    assert suffer(tmp_path / "run", rewind.left_out, n, tmp_path)["refused"] > n / 2


@often(25, 150)
def test_the_report_of_errors_by_layer(tmp_path, n):
    rng = np.random.default_rng(0)
    numbers = lambda: rng.random((2, 3, len(layers.PROJECTIONS)))
    report = Report(numbers() > 0.5, numbers() * np.nan, numbers(), numbers(), numbers(), numbers())
    layers.write(tmp_path / "run", "gptq", (3, 4), report)
    read = lambda run: layers._read(paths.layer_errors(run, "gptq"))
    assert suffer(tmp_path / "run", read, n, tmp_path)["refused"] > n / 2


@often(25, 150)
def test_the_checkpoint_of_a_run(tmp_path, n):
    wanted = jax.tree.map(jax.numpy.asarray, state(3))
    checkpoint.save(tmp_path / "checkpoint", wanted)
    read = lambda path: digest(checkpoint.restore(path, abstract(wanted)))
    # Orbax writes some things that nobody reads.
    assert suffer(tmp_path / "checkpoint", read, n, tmp_path)["refused"] > n / 8


@often(25, 150)
def test_the_checkpoints_of_a_cohort(tmp_path, n):
    checkpoints = checkpoint.CohortCheckpoints(tmp_path / "cohort")
    lanes = lambda step: [{"run": "a", "step": step, "left_out": []}, {"run": None, "step": 0}]
    for step in (33, 47):
        checkpoints.save(lanes(step), state(step))

    def read(directory):
        found = checkpoint.CohortCheckpoints(directory).restore(lambda lanes: abstract(state(0)))
        return found and (found[0], digest(found[1]))

    before = (lanes(33), digest(state(33)))
    assert suffer(tmp_path / "cohort", read, n, tmp_path, before) == {"same": n}  # the one or the other


@often(25, 150)
def test_a_packed_model(tmp_path, n):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 8, (2, 32, 16)).astype(np.uint8)
    scales, zeros = rng.random((2, 4, 16)).astype(np.float32), rng.integers(0, 8, (2, 4, 16)).astype(np.uint8)
    rest = {"layers": {"block": {"norm": np.ones((2, 16), np.float32)}}}
    model = codes.QuantizedModel({"mlp": {"down": codes.Codes(values, scales, zeros)}}, rest)
    packed.save(tmp_path / "rtn-3", model, "rtn", 3, ("a",))

    def read(path):
        loaded = packed.load(path)
        return digest(loaded.model), loaded.method, loaded.bits, loaded.operands

    assert suffer(tmp_path / "rtn-3", read, n, tmp_path)["refused"] > n / 8


@often(25, 150)
def test_metrics_are_cut_back_and_followed(tmp_path, n):
    found = [np.linspace(5, 4, 40), np.ones(40), np.full(40, 0.01)]
    metrics_log.MetricsLog().append(tmp_path / "run" / paths.METRICS, step_lib.StepMetrics(*found), 1, 40, 1, 64, {})
    seen = []

    def read(run):
        path = run / paths.METRICS
        metrics_log.MetricsLog().truncate(path, 30)
        lines = [trackers.scalars(json.loads(line)) for line in path.read_bytes().splitlines()]
        seen.append(len(lines))
        steps = [step for step, _ in lines]
        return steps == sorted(set(steps)) and (not steps or steps[-1] <= 30)

    counts = suffer(tmp_path / "run", read, n, tmp_path)
    assert counts["same"] > n / 2  # what is no file is refused
    assert seen[0] == 30 and np.median(seen) > 25  # of a damaged file most is kept


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Sources of several parts."""
    root = tmp_path_factory.mktemp("tree")
    for i in range(60):
        (root / f"module{i:03}.py").write_text(f"value_{i} = {i}  # é 中 {'word ' * i}\n" * 3)
    return root


@pytest.fixture
def small_parts(monkeypatch):
    for name, value in (("_SCAN_DOCUMENTS", 16), ("_PART_BYTES", 6000)):
        monkeypatch.setattr(tokenize, name, value)


def prepare(cache: Path | str, tree: Path) -> tokens.Corpus:
    return tokens.prepare(
        **{"name": "python_stdlib", "root": str(tree), "split": "train", "validation_split": "", "feature": "text"},
        **{"tokenizer": "bpe:300", "validation_fraction": 0.25, "split_seed": 0, "hash": "", "cache_dir": str(cache)},
        **{"tfds_dir": "", "workers": 1, "beam_options": "", "progress": False},
    )


def content(corpus: tokens.Corpus) -> tuple:
    """Everything that training sees of a corpus."""
    tokenizer = (corpus.directory / "tokenizer.json").read_bytes()
    return digest([np.asarray(corpus.train), np.asarray(corpus.validation)]), corpus.meta, tokenizer


@often(12, 30)
def test_token_files_are_made_again(tmp_path, tree, small_parts, n):
    assert len(prepare(tmp_path / "cache", tree).meta["parts"]["train"]) > 4
    (directory,) = (tmp_path / "cache" / "tokens").glob("python_stdlib-*[!k]")

    def read(cache):
        return content(prepare(cache, tree))

    rng, wanted = np.random.default_rng(0), read(tmp_path / "cache")
    for _ in range(n):
        what = damage(directory, rng)
        assert outcome(lambda: read(tmp_path / "cache"), wanted) == "same", what


@often(8, 20)
def test_what_a_killed_process_has_left_of_token_files(tmp_path, tree, small_parts, monkeypatch, n):
    wanted = content(prepare(tmp_path / "other", tree))
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_install", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "cache", tree)
    kinds = {path.name.partition("-")[0] for path in (tmp_path / "cache" / "tokens").glob(".*/*")}
    assert kinds == {"scan", "part", "train", "validation", "tokenizer.json", "learned.json", "meta.json"}
    left, rng = tmp_path / "left", np.random.default_rng(0)
    shutil.copytree(tmp_path / "cache" / "tokens", left)
    for _ in range(n):
        shutil.rmtree(tmp_path / "cache" / "tokens")
        shutil.copytree(left, tmp_path / "cache" / "tokens")
        what = damage(tmp_path / "cache" / "tokens", rng)
        found = outcome(lambda: content(prepare(tmp_path / "cache", tree)), wanted)
        assert found == "same" or ".lock" in what, what  # what is no file cannot be locked


@often(8, 20)
def test_the_dataset_that_token_files_are_made_of(tmp_path, tree, n):
    wanted = content(prepare(tmp_path / "cache", tree))
    shutil.copytree(tmp_path / "cache" / "tfds", tmp_path / "whole")
    rng, counts = np.random.default_rng(0), collections.Counter()
    for _ in range(n):
        shutil.rmtree(tmp_path / "cache")
        shutil.copytree(tmp_path / "whole", tmp_path / "cache" / "tfds")
        what = damage(tmp_path / "cache" / "tfds", rng)
        try:
            counts[outcome(lambda: content(prepare(tmp_path / "cache", tree)), wanted)] += 1
        except Exception as error:
            raise AssertionError(f"after {what}") from error
    assert sum(counts.values()) == n


def test_token_files_on_an_object_store(tmp_path, tree, monkeypatch):
    url = "memory://damaged/a [b]*? c"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    made = prepare(url, tree)
    wanted, rng = content(made), np.random.default_rng(0)
    store = fsspec.filesystem("memory")
    stored = [path for path in store.find("/damaged") if made.directory.name in path]
    for name in stored:
        mine = bytearray(store.cat_file(name))
        flip(rng, mine)
        store.pipe_file(name, bytes(mine))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
        assert content(prepare(url, tree)) == wanted
        shutil.rmtree(tmp_path / "another")
        assert content(prepare(url, tree)) == wanted  # what is stored was mended, too
        shutil.rmtree(tmp_path / "another")


@pytest.mark.slow
def test_the_command_says_one_line_about_checkpoints_that_are_damaged(finished_study, tmp_path):
    shutil.copytree(finished_study[1], tmp_path / "study")
    checkpoints = sorted((tmp_path / "study").glob("runs/*/checkpoint"))
    assert len(checkpoints) == 4
    for path, pattern in zip(checkpoints, ("array_metadatas/*", "manifest.ocdbt", "ocdbt*/d/*", "d/*"), strict=True):
        for file in path.glob(pattern):
            file.write_bytes(file.read_bytes()[:50])
    arguments = [f"--workdir={tmp_path / 'study'}", "--method=rtn", "--bits=5"]
    done = forked.run("precision_scaling.ptq", arguments, forked.ROOT, timeout=120)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("quantizing")]
    assert done.code == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and "damaged" in lines[0] and "4 of the runs could not be" in lines[0]


class StopOnceThere(Stop):
    """Asks to stop when all of some patterns have a file below a directory."""

    def __init__(self, directory: Path, *patterns: str):
        super().__init__()
        self._asked = lambda: all(any(directory.glob(pattern)) for pattern in patterns)

    def asked(self) -> bool:
        return self._asked()


@pytest.fixture(scope="module")
def stopped_study(tiny_config, tmp_path_factory, quick_compile):
    """(config, workdir) of a study that was stopped: a run has its row, a branch and two checkpoints lie there."""
    one = {"sizes": ("25k",), "ptq": True}
    config = tiny_config(
        train__checkpoint_seconds=0.0,
        train__log_every=1,
        optimizer__warmup_steps=2,  # runs of one schedule share their first steps
        grid={
            "stable": {**one, "tokens": (64 * 24, 64 * 12), "precisions": ("bf16",), "schedules": ("wsd",)},
            "full": {**one, "tokens": (64 * 7, 64 * 19), "precisions": ("w4", "w3_a4_kv4")},
        },
    )
    workdir = tmp_path_factory.mktemp("stopped") / "study"
    workspace = open_workspace(config, workdir)
    stop = StopOnceThere(workdir, "runs/*/rows-trained.json", "runs/*/branch")
    with pytest.raises(Stopped), stop:
        run_missing.train_missing(workspace, stop=stop)
    assert len(list(workdir.glob("cohorts/*/*/lanes.json"))) == 2
    return config, workdir


@pytest.mark.slow
@pytest.mark.parametrize("n", [8])
def test_a_study_that_was_stopped_ends_with_the_same_rows_and_parameters(stopped_study, tmp_path, quick_compile, n):
    config, whole = stopped_study

    def read(workdir):
        workspace = open_workspace(config, workdir)
        run_missing.train_missing(workspace)
        quantize_missing(workspace, ("rtn",), (3, 4), progress=False)
        results.gather(workdir)
        parameters = [digest(workspace.parameters(run)) for run in workspace.experiment.runs]
        return (workdir / "runs.csv").read_bytes(), parameters

    counts = suffer(whole, read, n, tmp_path)
    assert counts["same"] > n / 3
