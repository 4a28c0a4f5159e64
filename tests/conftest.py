"""What several tests share: a small corpus of Python sources, a tiny config on it, and a way to run the commands."""

import contextlib
import fcntl
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src import compiler

import precision_scaling  # noqa: F401  before SciPy, for which it sets the number of threads
from precision_scaling.config import base
from tests.simple_loops import KNOWN, OPTION

# An operand of lower rank is broadcast where the code says so, and nowhere else.
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parent.parent
LONGEST = ("test_sharding", "test_hosts", "test_report", "test_launch_tpu", "test_checkpoint", "test_bucket")
_WORDS = ("alpha", "beta", "count", "data", "edge", "field", "graph", "hash", "index", "join", "key", "line")


def _source(rng: np.random.Generator) -> str:
    """A module of plausible sources: regular enough to be learned, with enough choice that it never is entirely."""
    lines = []
    for _ in range(rng.integers(8, 20)):
        name, first, second = rng.choice(_WORDS, 3)
        lines += [f"def {name}_{rng.integers(100)}({first}, {second}):", f"    return {first} + {rng.integers(10)}", ""]
    return "\n".join(lines)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin first: at the end one process would run them alone, or wait for what another makes."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def no_url_is_a_directory():
    """Fails a test that leaves a directory of the name "gs:" where commands run: a URL was taken for a path."""
    yield
    found = [place / scheme for place in {ROOT, Path.cwd()} for scheme in ("gs:", "s3:")]
    assert not any(map(os.path.lexists, found)), f"one of {', '.join(map(str, found))} is there"


@pytest.fixture(scope="session")
def session_directory(tmp_path_factory) -> Path:
    """A directory that all test processes of this session share."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "session"
    directory.mkdir(exist_ok=True)
    return directory


@contextlib.contextmanager
def once(directory: Path):
    """Whether this process is the first to make what belongs into a directory; others wait until it is there."""
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = Path(f"{directory}.done")
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def transformers():
    """The library, told to be quiet; tests that ask for it are skipped where it or torch is missing."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
    found.utils.logging.disable_progress_bar()
    found.utils.logging.set_verbosity_error()
    return found


@pytest.fixture(scope="session")
def data_options(session_directory) -> dict[str, object]:
    """Options of config.data: a corpus of 60 small modules, cached for this session alone."""
    root = session_directory / "sources"
    with once(root) as first:
        if first:
            root.mkdir()
            rng = np.random.default_rng(0)
            for i in range(60):
                (root / f"module_{i:02d}.py").write_text(_source(rng))
    return {"root": str(root), "cache_dir": str(session_directory / "cache"), "validation_fraction": 0.2}


@pytest.fixture(scope="session")
def compilation_cache(session_directory) -> str:
    """Compiled programs of this session, shared with the processes it starts."""
    return str(session_directory / "xla")


@pytest.fixture(scope="session")
def tiny_config(data_options, compilation_cache):
    """Makes the config of a very small study; keyword arguments are options, "__" for the dot.

    One step is 4 sequences of 16 tokens, 64 tokens.
    """

    def make(**options):
        config = base.get_config()
        config.data.update(data_options)
        config.update_from_flattened_dict(
            {
                "compilation_cache": compilation_cache,
                "model.width": 16,
                "model.depth": 2,
                "model.heads": 2,
                "model.mlp_width": 24,
                "model.sequence_length": 16,
                "train.batch_size": 4,
                "train.tokens": 64 * 12,
                "train.log_every": 2,
                "train.steps_per_dispatch": 4,
                "evaluate.sequences": 8,
                "evaluate.batch_size": 4,
                "ptq.methods": ("rtn",),
                "ptq.bits": (3, 4),
                "ptq.calibration_sequences": 8,
                "study.lanes": 2,
            }
        )
        for name, value in options.items():
            if name == "grid":
                for part, entries in value.items():
                    config.study.grid[part] = base.grid(**entries)
            else:
                config.update_from_flattened_dict({name.replace("__", "."): value})
        return config

    return make


@pytest.fixture(scope="session")
def study_config(tiny_config):
    """Four runs of one shape: bf16 at two lengths, low precision of the weights and of all parts; three ask for PTQ."""
    one = {"sizes": ("25k",)}
    return tiny_config(
        train__log_every=1,
        grid={
            "full": {**one, "tokens": (64 * 12, 64 * 7 + 20), "precisions": ("bf16",), "ptq": True},
            "low": {**one, "tokens": (64 * 12,), "precisions": ("w4", "w3_a4_kv4")},
            "again": {**one, "tokens": (64 * 12 + 1,), "precisions": ("w4", "wint4", "bf16"), "ptq": True},
        },
    )


@pytest.fixture(scope="session")
def finished_study(study_config, session_directory):
    """(workspace, workdir) of that study, trained, quantized by rounding to nearest and gathered. Leave it as it is."""
    from precision_scaling.study import results, run_missing
    from precision_scaling.study.ptq import quantize_missing
    from precision_scaling.study.workspace import open_workspace

    workdir = session_directory / "study"
    with once(workdir) as first, _few_optimizations():
        workspace = open_workspace(study_config, workdir)
        if first:
            run_missing.train_missing(workspace)
            quantize_missing(workspace, study_config.ptq.methods, study_config.ptq.bits)
            results.gather(workdir)
    return workspace, workdir


@pytest.fixture(scope="session")
def run_command(data_options, compilation_cache):
    """Runs `python -m MODULE ARGUMENTS` from the project's root; with `data`, on the small corpus."""

    def run(module: str, *arguments: str, data: bool = False, **options) -> subprocess.CompletedProcess:
        if data:
            chosen = {f"data.{key}": value for key, value in data_options.items()}
            chosen["compilation_cache"] = compilation_cache
            arguments += tuple(f"--config.{key}={value}" for key, value in chosen.items())
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, **options
        )

    return run


@contextlib.contextmanager
def _simple_loops():
    """`tests.simple_loops` in one part of a process: operations that are called one by one take it, too."""
    options_of = compiler.get_compile_options

    def options(*arguments, env_options_overrides=None, **others):
        overrides = {**(env_options_overrides or {}), OPTION: False}
        return options_of(*arguments, env_options_overrides=overrides, **others)

    with pytest.MonkeyPatch.context() as patch:
        if KNOWN:
            patch.setattr(compiler, "get_compile_options", options)
        yield


@contextlib.contextmanager
def _few_optimizations():
    from precision_scaling.runtime import compilation

    with pytest.MonkeyPatch.context() as patch, _simple_loops():
        patch.setattr(
            compilation, "jit", lambda function, level=0, platform=None, **options: jax.jit(function, **options)
        )
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles with few optimizations: the programs of these tests take seconds to compile and no time to run."""
    with _few_optimizations():
        yield


@pytest.fixture(scope="module")
def simple_loops():
    """Compiles in less time programs that take as long to run as to compile, such as fits."""
    with _simple_loops():
        yield
