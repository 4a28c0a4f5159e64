"""Averages of the parameters against sums in NumPy, in cohorts that are stopped, and as rows of a study."""

import csv

import jax
import numpy as np
import pytest

from precision_scaling.config import experiment
from precision_scaling.errors import UserError
from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import paths
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.study import evaluate, generate, results, run_missing
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import open_workspace
from precision_scaling.training import average, schedule, step
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import RunInputs, StepConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

DECAYS = (0.5, 0.9)


def test_averages_are_weighted_means_written_out():
    rng, decays = np.random.default_rng(0), (0.1, 0.9, 0.9999)
    steps = [
        {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)} for _ in "x" * 9
    ]
    found = average.init(decays, {"a": np.full((3, 2), 1e3, np.float32), "b": np.full(4, -1e3, np.float32)})
    update = jax.jit(average.update, static_argnums=0)
    for t, params in enumerate(steps, start=1):
        found = update(decays, found, params, t)
        for decay, tree in zip(decays, found, strict=True):
            weights = np.array([decay ** (t - i) for i in range(1, t + 1)])
            for name in "ab":
                wanted = np.einsum("t,t...->...", weights / weights.sum(), [one[name] for one in steps[:t]])
                np.testing.assert_allclose(tree[name], wanted, rtol=2e-5, atol=2e-4, err_msg=f"{decay} {t}")


@pytest.mark.slow
def test_averages_follow_the_training():
    model = ModelConfig(31, 16, 2, 2, 24, 8, 16, 2)
    config = StepConfig(model, UNQUANTIZED, OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1, ema=DECAYS))
    inputs = RunInputs({}, schedule.of("cosine", 1e-2, 10, 1, 0))
    tokens_TxBxS1 = np.random.default_rng(0).integers(0, 31, (4, 4, 9)).astype(np.int32)
    train_step, initialize = jax.jit(step.train_step, static_argnums=0), jax.jit(step.init_state, static_argnums=0)
    state, seen = initialize(config, 0), []
    for tokens_BxS1 in tokens_TxBxS1:
        state, _ = train_step(config, state, inputs, tokens_BxS1)
        seen.append(jax.tree.map(np.float64, state.params))
    assert len(state.averages) == 2
    for decay, tree in zip(DECAYS, state.averages, strict=True):
        weights = decay ** np.arange(len(seen) - 1, -1, -1)
        wanted = jax.tree.map(lambda *x, w=weights: np.einsum("t,t...->...", w / w.sum(), x), *seen)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), tree, wanted)


def test_an_average_is_a_run_of_its_own_beside_its_run(tiny_config):
    resolved = experiment.resolve(tiny_config(optimizer__ema=DECAYS), 257)
    (run,) = resolved.runs
    assert [model.id for model in resolved.models(resolved.runs)] == [run.id, f"{run.id}-ema0.5", f"{run.id}-ema0.9"]
    assert {model.trunk for model in resolved.models(resolved.runs)} == {run.trunk}
    # The run is the one that it is without averages.
    assert experiment.resolve(tiny_config(), 257).runs == (run,)
    for value in (0.0, 1.0, "0.5", (0.5, 0.5), (1,)):
        with pytest.raises(UserError, match=r"config.optimizer.ema = .*above 0 and below 1"):
            experiment.resolve(tiny_config(optimizer__ema=value if isinstance(value, tuple) else (value,)), 257)


@pytest.fixture(scope="module")
def averaged(tiny_config, tmp_path_factory, quick_compile):
    """{name: workdir} of a study with Muon, averages and two lengths of one trunk: done at once, and stopped."""
    options = {"optimizer__name": "muon", "optimizer__ema": DECAYS, "optimizer__warmup_steps": 2}
    grid = {"sizes": ("25k",), "tokens": (768, 448), "precisions": ("bf16", "w4"), "schedules": ("wsd",), "ptq": True}
    config = tiny_config(**options, ptq__bits=(3,), train__log_every=1, grid={"all": grid})
    found = {}
    for name in ("whole", "stopped"):
        found[name] = workdir = tmp_path_factory.mktemp("averages") / name
        workspace = open_workspace(config, workdir)
        for _ in range(3 if name == "stopped" else 0):
            with pytest.raises(Stopped):
                run_missing.train_missing(workspace, stop=Stop(minutes=1e-6))
        run_missing.train_missing(workspace)
        quantize_missing(workspace, config.ptq.methods, config.ptq.bits)
        results.gather(workdir)
    return workspace, found


@pytest.mark.slow
def test_rows_of_averages_keep_the_contract_and_survive_a_stop_to_the_bit(averaged):
    workspace, workdirs = averaged
    texts = [(workdir / paths.TABLE).read_bytes() for workdir in workdirs.values()]
    assert texts[0] == texts[1]
    with open(workdirs["whole"] / paths.TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 2 and {row["optimizer"] for row in rows} == {"muon"}
    # One loss before PTQ for each run, and one after.
    assert all(sum(row["run"] == other["run"] for other in rows) == 2 for row in rows)
    before = {row["run"]: row for row in rows if not row["P_post"]}
    assert len(before) == 12 and {row["average"] for row in rows} == {"", "ema0.5", "ema0.9"}
    for run in workspace.experiment.runs:
        losses = {float(before[model.id]["loss"]) for model in workspace.experiment.models([run])}
        assert len(losses) == 3 and max(losses) - min(losses) < 0.5


@pytest.mark.slow
def test_the_row_of_an_average_is_the_loss_of_its_checkpoint(averaged):
    workspace, _ = averaged
    group, run = generate.trained_run(workspace, f"{workspace.experiment.runs[0].id}-ema0.9")
    static = group.static.evaluation()
    loss = evaluate.evaluator(workspace, group.shape, static)(
        workspace.parameters(run), static.grids(run.precision, run.shape.model.depth)
    )
    (row,) = results.read_rows(workspace.directory(run), "trained")
    assert run.ema == 0.9 and row["loss"] == loss
