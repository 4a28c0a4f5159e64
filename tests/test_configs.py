"""The configs that come with the project: they resolve, their grids are what they say, defaults do not drift."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from precision_scaling.config import base, experiment
from precision_scaling.model import sizes
from precision_scaling.model.accounting import count_parameters
from precision_scaling.model.config import ModelConfig

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
GOLDEN = Path(__file__).parent / "golden" / "base.json"
GOLDEN_STUDIES = Path(__file__).parent / "golden" / "studies.json"


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_resolves_and_has_the_options_of_base_alone(name):
    config = load(name)
    resolved = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
    assert resolved.runs and resolved.cohorts
    described, default = experiment.describe(config), experiment.describe(base.get_config())

    def options(tree, prefix=""):
        if isinstance(tree, dict) and prefix != ".study.grid":
            return {name for key, value in tree.items() for name in options(value, f"{prefix}.{key}")}
        return {prefix}

    assert options(described) == options(default)


def test_a_misspelt_option_is_an_error_in_a_config_file_too():
    for section, option in (("model", "widht"), ("study", "lane")):
        with pytest.raises((AttributeError, KeyError), match=option):
            base.get_config()[section][option] = 3
    with pytest.raises((AttributeError, KeyError)):
        base.get_config().trian = {}


def leaves(tree, prefix=""):
    """{name: value} of the options of a described config; a part of the grid is one value."""
    found = {}
    for key, value in tree.items():
        inside = isinstance(value, dict) and prefix != "study.grid."
        found |= leaves(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return found


def studies():
    """By config: what it sets to other values than base, with the numbers of runs and of tokens that follow."""
    default, found = leaves(experiment.describe(base.get_config())), {}
    for name in NAMES:
        config = load(name)
        resolved = experiment.resolve(config, experiment.vocab_size(config.data.tokenizer))
        options = leaves(experiment.describe(config))
        found[name] = {
            "runs": len(resolved.runs),
            "tokens": sum(run.tokens for run in resolved.runs),
            **{key: value for key, value in options.items() if key not in default or default[key] != value},
        }
    return found


def test_configs_are_those_of_the_golden_files():
    """After an option was changed on purpose: python -m tests.test_configs."""
    assert experiment.describe(base.get_config()) == json.loads(GOLDEN.read_text())
    assert json.loads(json.dumps(studies())) == json.loads(GOLDEN_STUDIES.read_text())


@pytest.mark.slow
def test_every_size_is_about_the_parameters_in_its_name():
    for name, size in sizes.SIZES.items():
        shape = ModelConfig(257, size.width, size.depth, size.heads, size.mlp_width, 64, 32, 2)
        count, _ = count_parameters(shape)
        number = float(name[:-1]) * {"k": 1e3, "M": 1e6, "B": 1e9}[name[-1]]
        assert count == pytest.approx(number, rel=0.12), name
        assert size.width % size.heads == 0 and (size.width // size.heads) % 2 == 0


def test_the_papers_grid_is_counted_as_by_hand():
    config = load("paper")
    resolved = experiment.resolve(config, 32768)
    sizes_, tokens = ("30M", "60M", "110M", "220M"), (1.5e9, 3e9, 6e9, 13e9, 26e9)
    points = set(itertools.product(sizes_, tokens, ["bf16"]))
    for part in ("w", "a", "kv"):
        points |= set(itertools.product(sizes_, tokens[:4], [f"{part}{bits}" for bits in range(3, 13)]))
    points |= set(itertools.product(sizes_, tokens[:2], [f"all{bits}" for bits in (4, 5, 6, 7, 8, 12)]))
    assert len(points) == 20 + 3 * 160 + 48 == 548
    assert len(resolved.runs) == len({run.id for run in resolved.runs}) == 548
    assert sum(run.ptq for run in resolved.runs) == 20 + 160 + 48
    assert {run.shape.size for run in resolved.runs} == set(sizes_)
    per_step = 256 * 1024
    total = sum(int(tokens) // per_step * per_step for _, tokens, _ in points)
    assert sum(run.tokens for run in resolved.runs) == total
    assert resolved.optimizer == resolved.optimizer.__class__(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)
    for run in resolved.runs:
        assert run.peak_lr == 6e-4 and run.warmup_steps == round(0.1 * run.steps)
        assert run.shape.batch_size == 256 and run.shape.model.sequence_length == 1024
        # Weights per output channel, activations and attention per tensor; only these are ever quantized.
        assert run.bits("q", "p") == 16
    for cohort in resolved.cohorts:
        granularity = {name: found.granularity for name, found in cohort.static.quantizers}
        assert granularity.items() <= {"w": "channel", "a": "tensor", "k": "tensor", "v": "tensor"}.items()


def test_the_first_study_has_three_sizes_four_budgets_and_every_part():
    resolved = experiment.resolve(load("study_cpu"), 257)
    full = [run for run in resolved.runs if run.bits("w", "a", "k", "v") == 16]
    assert len({run.shape.size for run in full}) >= 3 and len(full) >= 12
    assert all(run.ptq for run in full)
    for part in (("w",), ("a",), ("k", "v")):
        assert len({run.bits(*part) for run in resolved.runs}) >= 3


@pytest.mark.slow
def test_the_papers_first_cohort_starts_to_train(data_options, tmp_path):
    """The real config with everything that costs time made small; steps, precisions and dtype stay as they are."""
    small = {
        "data.tokenizer": "bpe:300",
        "model.base_size": "25k",
        "model.width": 32,
        "model.depth": 1,
        "model.heads": 2,
        "model.sequence_length": 32,
        "train.batch_size": 4,
        "train.microbatches": 2,
        "train.steps_per_dispatch": 1,
        "train.log_every": 1,
        "evaluate.sequences": 8,
        "ptq.calibration_sequences": 8,
        "compilation_cache": "none",
        **{f"data.{key}": value for key, value in data_options.items()},
    }
    script = (
        "import os, sys, json, threading, time, glob\n"
        "def stop():\n"
        f"    pattern = {str(tmp_path / 'w/runs/*/metrics.jsonl')!r}\n"
        "    while not any(open(path).read().count('\\n') >= 2 for path in glob.glob(pattern)):\n"
        "        time.sleep(0.1)\n"
        "    os._exit(77)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "import runpy; runpy.run_module('precision_scaling.study', run_name='__main__', alter_sys=True)\n"
    )
    (tmp_path / "start.py").write_text(script)
    arguments = [f"--config.{key}={value}" for key, value in small.items()]
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py", "--config=configs/paper.py", f"--workdir={tmp_path / 'w'}", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 77, done.stderr[-3000:]
    (path,) = (tmp_path / "w").glob("runs/*/metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()[:2]]
    assert all(4 < loss < 8 for loss in losses)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(experiment.describe(base.get_config()), indent=1) + "\n")
    lines = [
        f' "{name}": {{\n' + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in study.items()) + "\n }"
        for name, study in studies().items()
    ]
    GOLDEN_STUDIES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
