"""The project from Python: `import precision_scaling as ps`."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import precision_scaling as ps
from analysis import laws
from analysis.laws import predict
from precision_scaling.errors import UserError
from precision_scaling.model.decoder import Decoder
from precision_scaling.study.generate import sample

ROOT = Path(__file__).parent.parent


def test_the_import_loads_nothing_and_every_name_is_there():
    program = "import sys, precision_scaling; assert not {'jax', 'numpy', 'analysis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    for name in ps.__all__:
        assert callable(getattr(ps, name)) and name in dir(ps)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        ps.nothing_of_this_name  # noqa: B018


# Models


def test_options_are_set_by_name_and_a_mistake_is_one_line():
    config = ps.load_config(
        ROOT / "configs" / "base.py", {"train.tokens": 1e6, "ptq.bits": [3, 4], "optimizer.beta1": 0}
    )
    assert (config.train.tokens, config.ptq.bits, config.optimizer.beta1) == (1_000_000, (3, 4), 0.0)
    config.study.grid.mine = ps.grid(sizes=("25k",), tokens=(1_000,))
    for options, said in (
        ({"model.szie": "25k"}, "did you mean config.model.size"),
        ({"size": "25k"}, "there is no such option"),
        ({"modle.size": "25k"}, "there is no such option"),
        ({"train.tokens": 1.5}, "config.train.tokens = 1.5: allowed is"),
        ({"model.size": "25q"}, "config.model.size = '25q': allowed is"),
        ({"precision.weights": "int99"}, "config.precision.weights"),
    ):
        with pytest.raises(UserError, match=said) as error:
            ps.load_config(options=options)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_model_is_trained_evaluated_quantized_and_found_again(tiny_config, tmp_path, quick_compile):
    config = tiny_config(precision__weights="int8")
    row = ps.train_model(config, tmp_path)
    assert row["status"] == "ok" and ps.train_model(config, tmp_path) == row
    assert ps.evaluate(tmp_path) == pytest.approx(row["loss"], rel=1e-6)
    table = ps.quantize_model(tmp_path, "rtn", bits=(3,), group_size=8)
    assert table["P_post"].tolist()[1:] == [3] and table["loss"][0] == pytest.approx(row["loss"])
    assert table["method"][1] == "rtn-group8"
    with pytest.raises(
        UserError, match=r"ptq\.gruop_size: there is no such option; did you mean config\.ptq\.group_size"
    ):
        ps.quantize_model(tmp_path, "rtn", gruop_size=8)
    with pytest.raises(UserError, match="run_study"):
        ps.train_model(tiny_config(grid={"all": {"sizes": ("25k",), "tokens": (64,)}}), tmp_path / "other")


def test_a_study_returns_its_table(finished_study, study_config):
    _, workdir = finished_study
    pd.testing.assert_frame_equal(ps.run_study(study_config, workdir), pd.read_csv(workdir / "runs.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "w3_a4_kv4"])
def test_greedy_text_takes_the_likeliest_token_of_a_full_pass_at_each_step(finished_study, quantized):
    workspace, workdir = finished_study
    run = next(run for run in workspace.experiment.runs if (run.precision.bits("a") < 16) == quantized)
    static, params = workspace.experiment.cohorts[0].static.evaluation(), workspace.parameters(run)
    grids = static.grids(run.precision, run.shape.model.depth)
    apply = jax.jit(lambda tokens: Decoder(run.shape.model, static).apply({"params": params}, tokens, grids))
    seen = [workspace.corpus.end_of_text, *b"def alpha"]
    for _ in range(10):  # beyond the 16 positions of the model
        window = seen[-16:]
        padded = (window * 16)[:16]  # where a tensor shares one scale, what fills the window up has a part in it
        seen.append(int(jnp.argmax(apply(jnp.asarray([padded]))[0, len(window) - 1])))
    assert ps.generate(workdir, "def alpha", tokens=10, run=run.id) == bytes(seen[10:]).decode("utf-8", "replace")


def test_text_is_sampled_by_its_seed_and_a_run_must_be_named(finished_study):
    workspace, workdir = finished_study
    run = workspace.experiment.runs[0].id
    sampled = [ps.generate(workdir, "x", 12, temperature=1.0, seed=seed, run=run) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    for arguments, said in (({"temperature": -1, "run": run}, "temperature=-1"), ({}, "--run=: allowed is one of")):
        with pytest.raises(UserError, match=said):
            ps.generate(workdir, "x", **arguments)


def test_samples_follow_the_logits_at_their_temperature_and_end_with_the_document():
    p = np.array([0.5, 0.3, 0.2])
    draw = lambda temperature: sample(lambda ids: np.log(p), [0], 4000, end_of_text=3, temperature=temperature, seed=1)
    for temperature in (1.0, 0.5):
        expected = p ** (1 / temperature) / np.sum(p ** (1 / temperature))
        shares = np.bincount(list(draw(temperature)), minlength=3) / 4000
        np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / 4000**0.5)
    assert set(draw(1e-3)) == {0}
    counting = lambda ids: np.eye(5)[len(ids)]  # the next id is the number of those before
    assert list(sample(counting, [0], 4, end_of_text=3)) == [1, 2]


# Tables


@pytest.fixture(scope="module")
def chinchilla():
    """(constants, a table that they made)."""
    constants = {"A": 400.0, "alpha": 0.35, "B": 4000.0, "beta": 0.5, "E": 1.7}
    n, d = (axis.ravel() for axis in np.meshgrid([1e6, 4e6, 16e6, 64e6], [1e8, 4e8, 16e8, 64e8]))
    return constants, pd.DataFrame({"N": n, "D": d, "loss": predict("chinchilla", constants, N=n, D=d)})


def test_a_table_is_fitted_and_runs_that_nobody_made_are_predicted(chinchilla):
    constants, table = chinchilla
    fit = ps.fit("chinchilla", table)
    assert fit.params == pytest.approx(constants, rel=1e-3)
    assert ps.fit("chinchilla", table.to_dict("list"), fixed={"E": 1.7}).params["E"] == 1.7
    planned = ps.predict(fit, {"N": [1e9], "D": [2e10]})
    assert planned["predicted"][0] == pytest.approx(predict("chinchilla", constants, N=1e9, D=2e10), rel=1e-4)
    assert "alpha" in ps.summary(fit)
    with pytest.raises(UserError, match="loss"):
        ps.fit("chinchilla", table[["N", "D"]])


def test_a_plan_spends_its_budget():
    plan = ps.plan("paper", flops=1e21, serve_bits=4)
    assert plan.best.flops == pytest.approx(1e21, rel=1e-6)
    assert ps.plan("paper", flops=1e21, precision="fp8").best.p == 8
    assert ps.summary(plan).startswith("Plan by precision + ptq")


def test_a_law_of_ones_own_is_known_by_its_name_and_takes_no_other_laws(monkeypatch):
    own = dataclasses.replace(laws.get("chinchilla"), name="mine")
    monkeypatch.setattr(laws, "LAWS", dict(laws.LAWS))
    assert ps.register_law(own) is laws.get("mine")
    with pytest.raises(UserError, match="'ptq' is there already"):
        ps.register_law(dataclasses.replace(own, name="ptq"))
