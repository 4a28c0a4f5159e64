"""A method that the registry is given goes the whole way of the command, without a change anywhere else."""

import csv
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.ptq import codes, kernel_grid, packed, registry
from precision_scaling.ptq.scheme import Method, Rounded

ROOT = Path(__file__).parent.parent


def solve(kernel_IxO, levels, kind, scheme, calibration):
    """Rounds toward zero."""
    grid = kernel_grid.find(kernel_IxO, levels, kind, group_size=scheme.group_size or None)
    size = kernel_IxO.shape[0] // grid.scale_GxO.shape[0]
    level_IxO = jnp.trunc(kernel_IxO / jnp.repeat(grid.scale_GxO, size, axis=0))
    return Rounded(level_IxO, grid.scale_GxO, grid.zero_GxO)


TOWARD_ZERO = Method("toward_zero", solve=solve, options=("group_size",))


@pytest.mark.slow
def test_a_method_of_ones_own_is_a_module_and_an_entry(finished_study, tmp_path):
    workspace, workdir = finished_study
    shutil.copytree(workdir, tmp_path / "study")
    command = [sys.executable, __file__, f"--workdir={tmp_path / 'study'}", "--method=toward_zero", "--bits=3"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--group_size=8", "--save"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "study" / "runs.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "toward_zero-group8"]
    runs = {run.id: run for run in workspace.experiment.runs}
    assert sorted(row["run"] for row in rows) == sorted(runs)
    assert {(row["P_post"], row["post_parts"]) for row in rows} == {("3", "w")}
    run = runs[rows[0]["run"]]
    directory = tmp_path / "study" / "runs" / run.id / "quantized" / "toward_zero-group8-3"
    found = codes.parameters(packed.load(directory).model)["layers"]["block"]["mlp"]["down"]["kernel"]
    before = workspace.parameters(run)["layers"]["block"]["mlp"]["down"]["kernel"]
    assert np.all(np.abs(found) <= np.abs(before) * (1 + 1e-5)) and np.any(found)
    refused = subprocess.run([*command, "--act_order"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "it has no such option" in refused.stderr


if __name__ == "__main__":
    registry.METHODS[TOWARD_ZERO.name] = TOWARD_ZERO
    runpy.run_module("precision_scaling.ptq", run_name="__main__", alter_sys=True)
