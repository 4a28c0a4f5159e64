"""The project installed as others install it: in directories that have an `analysis` or `configs` of their own."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = """
from {base} import base

def get_config():
    c = base.get_config()
    c.study.grid.one = base.grid(("25k",), (10_000,), ("w4",))
    return c
"""


def console_scripts() -> dict[str, str]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(line.split(" = ") for line in setup.call_args.kwargs["entry_points"]["console_scripts"])


def test_every_command_has_a_console_script():
    scripts = console_scripts()
    commands = ("train", "study", "ptq", "huggingface", "layer-stats", "loss", "sample")
    commands += ("fit", "compare", "plan", "predict", "report")
    assert set(scripts) == {f"precision-scaling-{name}" for name in commands}
    for target in scripts.values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory with the installed wheel."""
    directory = tmp_path_factory.mktemp("installed")
    try:
        importlib.import_module("setuptools.command.bdist_wheel")  # since 70.1
    except ImportError:
        pytest.importorskip("wheel")
    source = directory / "source"  # a build leaves files beside setup.py
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "precision_scaling", "analysis", "configs"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    quiet = {"check": True, "capture_output": True, "cwd": directory}
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source], **quiet)
    (wheel,) = directory.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", directory / "site", wheel], **quiet)
    return directory / "site"


@pytest.mark.slow
def test_commands_run_beside_an_analysis_and_configs_of_others(installed, tmp_path):
    for package in ("analysis", "configs"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the package of others')\n")
    for name, base in (("ours", "precision_scaling.config"), ("handed_on", "configs")):
        (tmp_path / f"{name}.py").write_text(CONFIG.format(base=base))
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    scripts = installed / "bin"
    assert "Plan by precision + ptq" in run(scripts / "precision-scaling-plan", "--fit=paper", "--flops=1e21")
    study = ("--dry_run", "--workdir=w")
    plan = run(scripts / "precision-scaling-study", "--config=ours.py", *study)
    assert "1 runs in" in plan or "1 run in" in plan
    assert run(scripts / "precision-scaling-study", "--config=handed_on.py", *study) == plan
    assert run(sys.executable, "-m", "precision_scaling.study", "--config=ours.py", *study) == plan
    for script in console_scripts():
        assert "Options:" in run(scripts / script, "--help")
