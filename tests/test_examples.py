"""The scripts of examples/ run as they are, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()
# What each prints, among other things.
SAID = {
    "fit_and_predict.py": ("chinchilla: L = A N^-alpha", "predicted", "bits of training: loss"),
    "own_format_and_law.py": ("[ 0.125  0.375 -0.625  1.   ]", "3.46 bits: loss", "shared_exponent: L = A N^-alpha"),
    "train_and_generate.py": ("validation loss", "GPTQ at 3 bits", "measured again", "def main("),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_short_and_the_readme_links_to_it(script):
    assert len(script.read_text().splitlines()) < 60
    assert f"(examples/{script.name})" in README


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_runs(script, session_directory, tmp_path):
    arguments = [] if script.name == "fit_and_predict.py" else [str(tmp_path / "workdir")]
    own = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(session_directory), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in SAID[script.name]:
        assert text in done.stdout
