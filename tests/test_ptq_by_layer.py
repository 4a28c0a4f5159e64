"""Formats by layer and projection: what a user's words say, what a budget of bits buys, and what a model of them is."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis import laws
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.model import decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import formats
from precision_scaling.ptq import (
    allotment,
    apply,
    by_layer,
    codes,
    gptq,
    packed,
    projection,
    registry,
    rtn,
    sensitivity,
)
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.ptq.scheme import LINEARS
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import paths
from precision_scaling.runtime.sharding import local_layout
from precision_scaling.study import results
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.training import step
from precision_scaling.training.blocks import Stacked
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.run import Shard
from precision_scaling.training.step import StepConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, mlp_width=24, sequence_length=8, base_width=16, base_depth=2
)
STATIC = StepConfig(MODEL, UNQUANTIZED, OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1))
QKV, OUT, GATE_UP, DOWN = LINEARS


def bits(text, base=4, depth=6):
    return [
        [int(wanted[linear].bits) for linear in LINEARS] for wanted in by_layer.parse(text, formats.parse(base), depth)
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", [[4, 4, 4, 4]] * 6),
        ("first:1=8, last:2=6", [[8] * 4, *[[4] * 4] * 3, [6] * 4, [6] * 4]),
        ("2.qkv=2,1-2=5,*.down=3", [[4, 4, 4, 3], [5] * 4, [2, 5, 5, 5], *[[4, 4, 4, 3]] * 3]),
        ("*=2, first:2.*=8", [[2] * 4] * 6),
        ("last:50%.[qo]*=6", [[4] * 4] * 3 + [[6, 6, 4, 4]] * 3),
    ],
)
def test_of_two_rules_for_a_projection_the_first_counts(text, expected):
    assert bits(text) == expected
    said = by_layer.describe(by_layer.parse(text, formats.parse(4), 6))
    assert bits(said or text) == expected  # what is said of it says the same


@pytest.mark.parametrize(
    "text",
    [
        *("6=4", "4-2=4", "first:7=4", "first:0=4", "down=4", "*.head=4", "*.down=1"),
        *("*=9bits", "*=bf16", "*:4", "*.attention=4", "*=99"),
    ],
)
def test_what_a_decoder_has_not_is_refused_by_its_rule(text):
    with pytest.raises(ConfigError, match=r"ptq\.layers = "):
        by_layer.parse(text, formats.parse(4), 6)


def test_the_least_loss_for_a_budget_is_found():
    rng = np.random.default_rng(0)
    widths, missed = (2, 3, 4, 6), []
    for _ in range(40):
        weights = rng.integers(1, 4, 5)
        # About 4^-bits, at times with a width that is no better than the one before.
        cost = rng.lognormal(0, 1.5, (5, 1)) * 4.0 ** -np.array(widths) * rng.lognormal(0, 0.5, (5, 4))
        budget = rng.uniform(2, 6)
        found = allotment.allot(cost, widths, weights, budget)
        assert np.dot(found, weights) <= budget * weights.sum() + 1e-9
        every = [c for c in itertools.product(widths, repeat=5) if np.dot(c, weights) <= budget * weights.sum() + 1e-9]
        costs = [cost[np.arange(5), [widths.index(width) for width in chosen]].sum() for chosen in every]
        missed.append(costs[every.index(tuple(found))] / min(costs))
    assert np.median(missed) < 1.02 and max(missed) < 2


def test_at_a_budget_that_a_price_spends_the_allotment_is_the_optimum():
    rng, widths, weights = np.random.default_rng(1), (2, 3, 4, 5), np.array([3, 1, 2, 2])
    cost = rng.lognormal(0, 2, (4, 1)) * 4.0 ** -np.array(widths, float)
    for price in np.geomspace(1e-4, 1, 30):
        chosen = np.array(widths)[np.argmin(cost + price * np.outer(weights, widths), axis=1)].tolist()
        assert allotment.allot(cost, widths, weights, np.dot(chosen, weights) / weights.sum()) == chosen


def test_a_budget_below_all_widths_and_a_cost_that_is_no_number_are_refused():
    with pytest.raises(UserError, match=r"ptq.target_bits = 2: allowed is at least the smallest of ptq.bits, 3"):
        allotment.allot(np.ones((2, 2)), (3, 4), (1, 1), 2.0)
    with pytest.raises(UserError, match="no finite cost"):
        allotment.allot(np.full((2, 2), np.nan), (3, 4), (1, 1), 3.0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: step.init_state(STATIC, 0).params)()


@pytest.fixture(scope="module")
def tokens_CxBxS1():
    return np.random.default_rng(0).integers(0, 31, (2, 3, 9)).astype(np.int32)


def logits_with(params, layer, linear, noise, tokens_BxS):
    """Of a decoder written out, with noise added to the outputs of one projection."""
    x = params["embedding"]["embedding"][tokens_BxS]
    call = lambda block, method, *args: decoder.Block(MODEL).apply({"params": block}, *args, method=method)
    products = decoder.Products(UNQUANTIZED, {})
    mix = lambda module, y: module.attention.mix(y, products)

    def project(i, name, h):
        found = jnp.einsum("bsi,i...->bs...", h, projection.kernel_of(Stacked(params).block(i), name))
        return found + noise if (i, name) == (layer, linear) else found

    for i in range(MODEL.depth):
        block = Stacked(params).block(i)
        y = project(i, QKV, call(block, decoder.Block.before_qkv, x))
        x = x + MODEL.residual_scale * project(i, OUT, call(block, mix, y))
        y = project(i, GATE_UP, call(block, decoder.Block.before_gate_up, x))
        gate, up = y[..., 0, :], y[..., 1, :]
        x = x + MODEL.residual_scale * project(i, DOWN, jax.nn.silu(gate) * up)
    return decoder.Decoder(MODEL).apply({"params": params}, x, products, method=decoder.Decoder.unembed)


@pytest.mark.slow
@pytest.mark.parametrize("linear", LINEARS)
def test_the_expected_loss_is_that_of_gradients_taken_one_by_one(params, tokens_CxBxS1, linear):
    scheme = dataclasses.replace(scheme_of("gptq"), widths=(3, 8))
    arguments = scheme, local_layout(), Stacked(params), tokens_CxBxS1, 0.01, np.inf
    cost_LxPxK = sensitivity.measure(STATIC, *arguments, lambda: None)
    layer, tokens_NxS1 = 1, tokens_CxBxS1.reshape(6, 9)
    kernel = projection.kernel_of(jax.tree.map(lambda leaf: leaf[layer], params["layers"]["block"]), linear)

    def total(noise):
        logits = logits_with(params, layer, linear, noise, tokens_NxS1[:, :-1])
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens_NxS1[:, 1:, None], 2))

    gradient = np.asarray(jax.grad(total)(jnp.zeros((6, 8, *kernel.shape[1:]))), np.float64).reshape(48, -1)
    h = inputs_of(params, layer, linear, tokens_NxS1[:, :-1])
    hessian = h.T @ h
    for k, width in enumerate(scheme.widths):
        quantized = gptq.quantize_kernel(projection.flat(kernel), hessian, width)
        output_error = h @ np.asarray(projection.flat(kernel) - quantized, np.float64)
        expected = 0.5 * np.sum(np.mean(gradient**2, axis=0) * np.sum(output_error**2, axis=0)) / 48
        np.testing.assert_allclose(cost_LxPxK[layer, LINEARS.index(linear), k], expected, rtol=2e-3)


def inputs_of(params, layer, linear, tokens_BxS):
    """(tokens, I) in float64: the inputs of a projection, block by block."""
    forward = apply.forward(STATIC, local_layout())
    x = forward.embed({"embedding": params["embedding"]}, {}, tokens_BxS)
    for i in range(layer + 1):
        block = Stacked(params).block(i)
        h = {QKV: forward.before_qkv(block, {}, x)}
        h[OUT] = forward.before_out(block, {}, h[QKV], None)
        after = forward.after_out(block, {}, x, h[OUT])
        h[GATE_UP] = forward.before_gate_up(block, {}, after)
        h[DOWN] = forward.before_down(block, {}, h[GATE_UP])
        x = forward.after_down(block, {}, after, h[DOWN])
    found = np.asarray(h[linear], np.float64)
    return found.reshape(-1, found.shape[-1])


def test_a_model_of_formats_by_layer_has_each_kernel_as_alone_and_comes_back_from_disk(finished_study, tmp_path):
    workspace, workdir = finished_study
    shutil.copytree(workdir, tmp_path / "study")
    workspace = dataclasses.replace(workspace, workdir=tmp_path / "study")
    run = workspace.experiment.runs[0]
    depth, directory = run.shape.model.depth, workspace.directory(run)
    text = f"0.qkv=8, *.down=2, last:{depth}.out=5"
    quantize_missing(workspace, ["rtn"], [4], everything=True, options={"layers": text}, save=True, progress=False)
    scheme = dataclasses.replace(scheme_of("rtn"), layers=text)
    (row,) = results.read_rows(directory, scheme.name)
    formats_found = registry.by_layer_of(scheme, 4, run.shape.model)
    sizes = {linear: projection.kernel_of(params_of(workspace, run), linear)[0].size for linear in LINEARS}
    # Bits of the mean noise: of the squares of the relative steps.
    steps = [[1 / (2 ** (wanted[linear].bits - 1) - 1) for linear in LINEARS] for wanted in formats_found]
    noise = np.dot(np.mean(np.square(steps), axis=0), list(sizes.values())) / sum(sizes.values())
    assert row["P_post"] == pytest.approx(1 + np.log2(1 + noise**-0.5), abs=1e-6)
    (step,) = laws.derived.column("s_post", {"P_post": np.array([row["P_post"]])})
    assert step == pytest.approx(noise**0.5, rel=1e-5)
    assert bits(row["post_layers"], depth=depth) == bits(text, depth=depth)
    loaded = packed.load(paths.packed(directory, scheme.name, row["P_post"]))
    found = codes.parameters(loaded.model)["layers"]["block"]
    for layer, wanted in enumerate(formats_found):
        for linear in LINEARS:
            kernel = projection.kernel_of(params_of(workspace, run), linear)[layer]
            alone = rtn.quantize_kernel(projection.flat(kernel), int(wanted[linear].bits))
            np.testing.assert_array_equal(projection.flat(projection.kernel_of(found, linear)[layer]), alone)
    # What it takes: every kernel at its own width.
    weights = sum(-(-sizes[linear] * int(wanted[linear].bits) // 8) for wanted in formats_found for linear in LINEARS)
    scales = 4 * sum(c.scales.size for c in codes.each(loaded.model.kernels))
    rest = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.model.rest))
    assert packed.packed_bytes(loaded.model, loaded.bits) == weights + scales + rest


def params_of(workspace, run):
    return workspace.parameters(run)["layers"]["block"]


@pytest.mark.slow
def test_a_target_is_met_and_costs_less_than_fewer_bits_everywhere(finished_study, tmp_path):
    workspace, workdir = finished_study
    shutil.copytree(workdir, tmp_path / "study")
    workspace, widths = dataclasses.replace(workspace, workdir=tmp_path / "study"), (2, 3, 4, 6)
    run = workspace.experiment.runs[0]
    one = Shard(only=f"^{re.escape(run.id)}$")
    directory, options = workspace.directory(run), {"everything": True, "progress": False}
    quantize_missing(workspace, ["gptq"], widths, one, options={"target_bits": 3.4}, save=True, **options)
    (row,) = results.read_rows(directory, "gptq-target3.4-of2.3.4.6")
    cost_LxPxK = np.asarray(json.loads((directory / "sensitivity-gptq.json").read_text())["loss"])
    found = bits(row["post_layers"], depth=run.shape.model.depth)
    mean = np.average(found, axis=1, weights=list(registry.sizes(run.shape.model).values())).mean()
    assert row["P_post"] < 3.2 < mean <= 3.4  # the noise is that of the fewest bits
    chosen = [[cost_LxPxK[i, j, widths.index(b)] for j, b in enumerate(row)] for i, row in enumerate(found)]
    assert np.sum(chosen) < cost_LxPxK[..., 1].sum()  # 3 bits everywhere
    packed.load(paths.packed(directory, "gptq-target3.4-of2.3.4.6", row["P_post"]))
    # Another target takes the measurement that is kept, and the same one nothing.
    before = (directory / "sensitivity-gptq.json").stat().st_mtime_ns
    for target in (3.4, 2.5):
        quantize_missing(workspace, ["gptq"], widths, one, options={"target_bits": target}, **options)
    assert (directory / "sensitivity-gptq.json").stat().st_mtime_ns == before
    assert len(results.read_rows(directory, "gptq-target2.5-of2.3.4.6")) == 1
