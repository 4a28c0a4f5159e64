"""A decoder with a rotated residual stream computes what it computed."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.errors import ConfigError
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Decoder
from precision_scaling.ptq import packed, registry, rotation
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.runtime import paths
from precision_scaling.study import results, text_loss
from precision_scaling.study.evaluate import evaluator
from precision_scaling.study.ptq import _evaluated, quantize_missing
from precision_scaling.training.blocks import Stacked, stack
from precision_scaling.training.run import Shard

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(31, 24, 2, 4, 40, 8, 24, 2, kv_heads=2, qkv_bias=True)
TOKENS = np.random.default_rng(0).integers(0, 31, (3, 8)).astype(np.int32)


def random_parameters(model):
    """With gains and biases away from where they begin."""
    params = Decoder(model).init(jax.random.key(0), TOKENS)["params"]
    keys = iter(jax.random.split(jax.random.key(1), 100))
    shifted = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape)
    return jax.tree.map(shifted, params)


@pytest.mark.parametrize("width", [2, 24, 64, 576])
def test_the_matrix_is_orthogonal_and_mixes_every_feature(width):
    r = rotation.matrix(width)
    np.testing.assert_allclose(r @ r.T, np.eye(width), atol=1e-12)
    assert np.all(np.abs(r) > 1e-8) and np.max(np.abs(r)) < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_logits_are_the_same_and_the_stream_is_rotated(tied, whole):
    model = dataclasses.replace(MODEL, tie_embeddings=tied, base_width=8, base_depth=1)
    params = random_parameters(model)
    blocks = Stacked(params)
    if not whole:  # as those of a large model, one by one
        one_by_one = dataclasses.make_dataclass("OneByOne", [])
        for name in ("depth", "top", "block"):
            setattr(one_by_one, name, getattr(blocks, name))
        blocks = one_by_one()
    found = stack(rotation.rotated(blocks, model))
    expected = Decoder(model).apply({"params": params}, TOKENS)
    np.testing.assert_allclose(Decoder(rotation.decoder(model)).apply({"params": found}, TOKENS), expected, atol=3e-5)
    table = np.asarray(params["embedding"]["embedding"], np.float64)
    np.testing.assert_allclose(found["embedding"]["embedding"], table @ rotation.matrix(24), atol=1e-5)
    assert np.all(np.asarray(found["layers"]["block"]["mlp_norm"]["scale"]) == 1)


def test_weights_with_an_outlier_lose_less_when_they_are_rotated_and_gaussian_ones_do_not():
    params = jax.tree.map(np.array, random_parameters(dataclasses.replace(MODEL, qkv_bias=False)))
    params["layers"]["block"]["mlp"]["gate_up"]["kernel"][:, 5] *= 20  # an input with large weights in all layers
    model, change = dataclasses.replace(MODEL, qkv_bias=False), {}
    for name, of in (("as it is", Stacked(params)), ("rotated", rotation.rotated(Stacked(params), model))):
        kernel = jnp.asarray(of.block(0)["mlp"]["gate_up"]["kernel"]).reshape(24, -1)
        error = kernel - registry.rtn.quantize_kernel(kernel, 4)
        change[name] = float(jnp.sum(error**2) / jnp.sum(kernel**2))
    assert change["rotated"] < 0.6 * change["as it is"]


@pytest.mark.slow
def test_a_rotated_model_is_quantized_evaluated_and_kept(finished_study, tmp_path):
    workspace, workdir = finished_study
    shutil.copytree(workdir, tmp_path / "study")
    workspace = dataclasses.replace(workspace, workdir=tmp_path / "study")
    (group, *_), run = workspace.experiment.cohorts, workspace.experiment.cohorts[0].runs[0]
    one = Shard(only=f"^{re.escape(run.id)}$")
    quantize_missing(
        workspace, ["rtn"], (8, 3), one, everything=True, options={"rotate": True}, save=True, progress=False
    )
    found = {row["P_post"]: row for row in results.read_rows(workspace.directory(run), "rtn-rotate")}
    (trained,) = results.read_rows(workspace.directory(run), "trained")
    assert abs(found[8]["loss"] - trained["loss"]) < 0.02 and found[3]["ptq_options"] == "rotate"
    loaded = packed.load(paths.packed(workspace.directory(run), "rtn-rotate", 3))
    model = text_loss.model_of(workspace, group, run, "rtn-rotate-3")
    shape = dataclasses.replace(group.shape, model=packed.decoder(run.shape.model, loaded))
    loss = evaluator(workspace, shape, scheme_of("rtn").static(group.static))(model.params, model.grids)
    assert loss == pytest.approx(found[3]["loss"], abs=1e-5)


def test_a_decoder_whose_norms_pass_no_rotation_on_is_refused():
    for change in ({"norm_placement": "post"}, {"norm_type": "layer"}):
        with pytest.raises(ConfigError, match=r"ptq\.rotate = 'True with .*pre norms of type rms"):
            scheme_of("gptq", rotate=True).check_model(dataclasses.replace(MODEL, **change))


def test_the_plan_of_a_rotated_model_is_of_one_with_a_head_of_its_own(finished_study):
    workspace, _ = finished_study
    group = workspace.experiment.cohorts[0]
    tied = dataclasses.replace(group.shape, model=dataclasses.replace(group.shape.model, tie_embeddings=True))
    group = dataclasses.replace(group, shape=tied)
    for rotate in (False, True):
        found = _evaluated(workspace, scheme_of("rtn", rotate=rotate), group, group.runs[0], 4)
        assert found.shape.model == found.step_config.model
        assert found.shape.model.tie_embeddings is not rotate
