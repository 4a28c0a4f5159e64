"""Files of a shared directory: whole or not at all, never through a link, never from a pipe, sealed and checked."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from precision_scaling.errors import ConfigError, UserError
from precision_scaling.runtime import compilation, files, paths, patterns
from precision_scaling.study import locks, results
from precision_scaling.training import metrics_log, step

ROOT = Path(__file__).parent.parent


def test_a_write_never_goes_through_a_link_and_what_it_pointed_to_stays(tmp_path, monkeypatch):
    victim = tmp_path / "of another user"
    victim.write_text("kept")
    target = tmp_path / "workdir" / "rows.json"
    target.parent.mkdir()
    target.symlink_to(victim)
    files.atomic_write(target, "new")
    assert victim.read_text() == "kept" and target.read_text() == "new" and not target.is_symlink()
    # Even a name that was foreseen is not written through.
    names = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(names))
    (target.parent / f".rows.json.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.atomic_write(target, "newer")
    assert victim.read_text() == "kept" and target.read_text() == "new"
    metrics = tmp_path / "workdir" / paths.METRICS
    metrics.symlink_to(victim)
    with pytest.raises(files.NotAFile, match="is a link"), files.appending(metrics):
        pass
    (tmp_path / "workdir" / "locks").mkdir()
    (tmp_path / "workdir" / "locks" / "0of1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(files.NotAFile, match="is a link"), locks.hold(tmp_path / "workdir", (0, 1)):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    files.atomic_write(path, "before")
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


WRITER = """
import sys, time
from pathlib import Path
from precision_scaling.runtime import files
with files.replacing(Path(sys.argv[1])) as file:
    file.write(b"much")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    path = tmp_path / "table.csv"
    command = [sys.executable, "-c", WRITER, str(path)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    living, killed = running
    assert [process.stdout.readline() for process in running] == ["writing\n"] * 2
    temporaries = {int(p.stat().st_ino) for p in tmp_path.iterdir()}
    assert len(temporaries) == 2
    killed.kill()
    killed.communicate()
    files.atomic_write(path, "a")
    assert len(list(tmp_path.iterdir())) == 3  # a fresh one may be written to on another machine
    old = time.time() - 2 * 3600
    for temporary in tmp_path.glob(".*.tmp"):
        os.utime(temporary, (old, old))
    files.atomic_write(path, "b")
    (left,) = tmp_path.glob(".*.tmp")
    assert path.read_text() == "b" and left.stat().st_ino in temporaries
    living.kill()
    living.communicate()
    files.atomic_write(path, "c")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def odd(tmp_path):
    """Makes something that is no file at a path."""
    made = {"pipe": os.mkfifo, "directory": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}

    def socket_at(path):
        os.chdir(tmp_path)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path, tmp_path))

    before = os.getcwd()
    yield made | {"socket": socket_at}
    os.chdir(before)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "socket"])
def test_what_is_no_file_is_refused_at_once(odd, tmp_path, kind):
    path = tmp_path / "it"
    odd[kind](path)
    began = time.monotonic()
    for use in (files.read, files.read_sealed, lambda path: files.copy(path, tmp_path / "copy")):
        with pytest.raises(files.NotAFile, match=rf"it: is a {kind}; allowed is a regular file"):
            use(path)
    for write in (files.appending, files.replacing, files.open_lock):
        if kind == "device" and write is files.replacing:
            continue  # a link is replaced itself
        with pytest.raises(files.NotAFile), write(path):
            pass
    assert time.monotonic() - began < 1 and not (tmp_path / "copy").exists()


def test_a_sealed_record_comes_back_and_any_other_value_in_it_is_refused(tmp_path):
    path = tmp_path / "record.json"
    record = {"loss": 3.0517578125e-05, "rows": [{"P_post": None, "N": 10**20}], "names": ("é", "b")}
    files.write_sealed(path, record)
    plain = {**record, "names": ["é", "b"]}
    assert files.read_sealed(path) == plain
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), indent=4, sort_keys=True))  # another layout is the same record
    assert files.read_sealed(path) == plain
    for broken in (text.replace("578", "579"), text.replace("null", "4"), text.replace("rows", "cols"), "[]", "7", ""):
        path.write_text(broken)
        with pytest.raises(ValueError):
            files.read_sealed(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        files.read_sealed(path)
    path.write_text('{"old": 1}')
    with pytest.raises(ValueError, match="no fingerprint"):
        files.read_sealed(path)
    assert files.read_sealed(path, older=lambda found: set(found) == {"old"}) == {"old": 1}


def test_a_write_to_a_full_disk_names_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = step.StepMetrics([1.0] * 100, [1.0] * 100, [1.0] * 100)
    writes = {
        "rows-trained.json": lambda: files.atomic_write(tmp_path / "rows-trained.json", "x" * 10_000),
        "metrics.jsonl": lambda: metrics_log.MetricsLog().append(tmp_path / "metrics.jsonl", found, 1, 100, 1, 64, {}),
    }
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
        for name, write in writes.items():
            with pytest.raises(OSError) as error:
                write()
            assert error.value.filename == str(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_cache_is_where_xdg_says_or_at_home_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.user_cache("data.cache_dir") == tmp_path / "precision_scaling"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert files.user_cache("data.cache_dir") == Path("/home/someone/.cache/precision_scaling")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
    with pytest.raises(UserError, match=r"config.data.cache_dir = '': there is no home directory.*XDG_CACHE_HOME"):
        files.user_cache("data.cache_dir")
    with pytest.raises(UserError, match=r"config.compilation_cache = '': there is no home"):
        compilation.use_cache("")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"config.compilation_cache = .*file/xla.*Not a directory"):
        compilation.use_cache(str(tmp_path / "file" / "xla"))
    for path in ("~/x", "~nobody_of_this_name/x"):
        with pytest.raises(UserError, match=r"--workdir=~.*no such home directory"):
            files.expanded(path, "--workdir")
    with pytest.raises(UserError, match=r"--workdir='a\\nb'.*line breaks"):
        files.expanded("a\nb", "--workdir")


def test_odd_files_among_the_locks_are_left_alone(tmp_path):
    directory = tmp_path / "locks"
    directory.mkdir()
    for name in ("of", "1of0", "xofy", "0of1of2", "00of1", "-1of2", "notes of mine"):
        (directory / name).write_text("")
    with locks.hold(tmp_path, (0, 1)):
        pass
    os.mkfifo(directory / "0of2")
    with pytest.raises(files.NotAFile, match="0of2: is a pipe"), locks.hold(tmp_path, (0, 1)):
        pass
    with locks.hold(tmp_path, (1, 2)):  # it shares no run with that one
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row | {"run": "another"}, "run is 'another', 'a' where it lies"),
        (lambda row: row | {"method": "rtn"}, "method is 'rtn', '' where it lies"),
        (lambda row: row | {"loss": "3"}, "loss is '3'"),
        (lambda row: row | {"loss": float("nan")}, "loss is nan"),
        (lambda row: row | {"N": None}, "N is None"),
        (lambda row: row | {"D": True}, "D is True"),
        (lambda row: {name: value for name, value in row.items() if name != "P_post"}, "no 'P_post'"),
        (lambda row: [row], "no list of rows"),
        (lambda row: 3, "no list of rows"),
    ],
)
def test_rows_of_another_structure_or_place_are_one_line(tmp_path, change, words):
    row = {"run": "a", "N": 100, "D": 10, "P_post": None, "loss": 2.5, "method": ""}
    path = tmp_path / "runs" / "a" / "rows-trained.json"
    older = lambda rows: path.write_text(json.dumps(rows))
    for write in (lambda rows: files.write_sealed(path, {"rows": rows}), older):
        write([row])
        assert results.read_rows(path.parent, "trained") == [row]
        write([change(row)])
        with pytest.raises(UserError, match=words) as error:
            results.gather(tmp_path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    files.write_sealed(path, {"rows": [row, row]})
    with pytest.raises(UserError, match="two rows of one measurement"):
        results.gather(tmp_path)


def test_a_pattern_that_never_ends_is_refused_in_time_and_others_are_searched():
    patterns.check("--only", "^100k-.*-s1-", ["100k-D768-bf16-s1-a6f122"] * 1000)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"--only=\(\[.*takes more than 2 s"):
        patterns.check("--only", r"([\w-]+)+!", ["25k-D768-wint3_aint4_kint4_vint4-s0-fe15ee"])
    assert time.monotonic() - began < 10
    for pattern in ("(", "a{99999999999}", "(" * 5000 + ")" * 5000):
        with pytest.raises(UserError, match="allowed is a regular expression") as error:
            patterns.check("--only", pattern)
        assert "\n" not in str(error.value)
