"""Signal-to-noise ratios against NumPy's, shares worked out by hand, and the command on a trained study."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling import layer_stats, quantize
from precision_scaling.config import base
from precision_scaling.model import decoder as decoder_lib
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import formats, rounding
from precision_scaling.quantize import aqt, parsing
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import static_of
from precision_scaling.study import layer_error

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = ModelConfig(23, 16, 2, 2, 24, 8, 16, 2)


def test_shares_and_ratio_of_an_operand_worked_out_by_hand():
    # At 3 bits the levels are -3 to 3, with abs-max 6 two apart; ties go to even codes: 1/2 to 0.
    x = jnp.array([6.0, -2.5, 0.9, 1.0, 0.0, -0.2])
    x_q = quantize.fake_quant(x, "int3")
    np.testing.assert_array_equal(x_q, [6.0, -2.0, 0.0, 0.0, 0.0, 0.0])
    one = layer_stats.sums(x, x_q, jnp.zeros(6, bool))
    by_hand = [5, 0, 3, 36 + 6.25 + 0.81 + 1 + 0.04, 0.25 + 1.81 + 0.04, 0, 0, 0]
    assert [float(field) for field in one] == pytest.approx(by_hand)
    assert layer_stats.snr_db(float(one.signal), float(one.error)) == pytest.approx(10 * np.log10(44.1 / 2.1))
    assert layer_stats.snr_db(44.1, 0.0) is None and layer_stats.snr_db(0.0, 0.0) is None


@pytest.mark.slow
def test_saturated_is_what_lies_beyond_the_last_level():
    # Powers of two as scales: a block's largest 7.9 gets scale 1, and e2m1 ends at 6.
    x = jnp.zeros((1, 32)).at[0, :4].set(jnp.array([7.9, -6.5, 6.0, 3.0]))
    mxfp4 = formats.parse("mxfp4")
    found = rounding.saturated(x, mxfp4.grid(), mxfp4.kind, 1)
    np.testing.assert_array_equal(found[0, :5], [True, True, False, False, False])
    # The mean magnitude as the scale: 4 of a mean of 2 is beyond ternary's 1.
    ternary = formats.parse("ternary")
    np.testing.assert_array_equal(
        rounding.saturated(jnp.array([4.0, -1.0, 1.0, 2.0]), ternary.grid(), ternary.kind), [True, False, False, False]
    )
    rng = np.random.default_rng(0)
    for name in ("int4", "e4m3", "bf16", "e8m7"):
        fmt = formats.parse(name)
        assert not rounding.saturated(jnp.asarray(rng.normal(size=100)), fmt.grid(), fmt.kind).any()


@pytest.mark.slow
def test_blocks_at_the_ends_of_their_scales_are_counted():
    # nvfp4: the largest block has 448 times 6 units; one of 6/512 units has e4m3's smallest scale, a smaller one none.
    x = np.zeros((6, 16), np.float32)
    x[:5, 0] = 448 * 6, 6 * 2.0**-9, 6 * 2.0**-12, 1.0, -448 * 6
    nvfp4 = formats.parse("nvfp4")
    found = rounding.scale_ends(jnp.asarray(x), nvfp4.grid(), nvfp4.kind, 1)
    assert [int(count) for count in found] == [5, 2, 2]
    scale = rounding.scale_of(jnp.asarray(x).reshape(6, 1, 16), nvfp4.grid(), nvfp4.kind, 2).ravel()
    np.testing.assert_allclose(scale, [448, 2.0**-9, 0, 0.171875, 448, 0], rtol=1e-6)
    # mxfp4: powers of two from 2^-126, which float32 keeps, up.
    x = np.zeros((4, 32), np.float32)
    x[:3, 0] = 3e-38, 1.0, 3e38
    mxfp4 = formats.parse("mxfp4")
    found = rounding.scale_ends(jnp.asarray(x), mxfp4.grid(), mxfp4.kind, 1)
    assert [int(count) for count in found] == [3, 1, 1]
    # With the better of two scales the largest block has 256 units, below the format's 448: none is at that end.
    better = formats.parse("nvfp4_4over6")
    x = np.zeros((2, 16), np.float32)
    x[:, 0] = 256 * 6, 6 * 2.0**-12
    found = rounding.scale_ends(jnp.asarray(x), better.grid(), better.kind, 1)
    assert [int(count) for count in found] == [2, 1, 0]
    assert rounding.scale_ends(jnp.ones((2, 32)), formats.parse("int4").grid(), formats.parse("int4").kind, 1) is None


def test_integers_of_gaussians_have_about_six_decibels_a_bit():
    x = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    ratios = {}
    for bits in (4, 6, 8):
        scale = np.abs(x).max() / (2 ** (bits - 1) - 1)
        x_q = np.round(x / scale) * scale
        one = layer_stats.sums(jnp.asarray(x), quantize.fake_quant(jnp.asarray(x), bits), jnp.zeros(x.shape, bool))
        ratios[bits] = layer_stats.snr_db(float(one.signal), float(one.error))
        by_numpy = 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((x - x_q).astype(np.float64) ** 2))
        assert ratios[bits] == pytest.approx(by_numpy, abs=0.01)
    assert ratios[8] - ratios[6] == pytest.approx(12.04, abs=0.5)


@pytest.fixture(scope="module")
def decoder():
    """(parameters, three batches of tokens) of a small decoder."""
    params = decoder_lib.init(CONFIG, jax.random.key(1))
    return params, np.random.default_rng(1).integers(0, 23, (3, 4, 8)).astype(np.int32)


def measured(decoder, text, **options):
    spec = parsing.parse(text, base.get_config().precision)
    config = dataclasses.replace(CONFIG, **options)
    static = static_of([spec], config.dtype).evaluation()
    found = layer_stats.measure(config, static, decoder[0], static.grids(spec, config.depth), decoder[1])
    return found, layer_stats.rows(spec, found, config.depth)


@pytest.mark.slow
def test_weights_of_every_layer_against_numpy(decoder):
    found, rows = measured(decoder, "w3")
    assert list(found) == [(name, "w") for name in ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")]
    block = decoder[0]["layers"]["block"]
    for (product, _), _ in found.items():
        module, name = product.split("/")
        for layer, kernel in enumerate(np.asarray(block[module][name]["kernel"], np.float64)):
            w = kernel.reshape(kernel.shape[0], -1)
            scale = np.abs(w).max(axis=0) / 3
            q = np.round(w / scale) * scale
            (row,) = (row for row in rows if (row["layer"], row["product"]) == (layer, product))
            assert row["snr_db"] == pytest.approx(10 * np.log10((w**2).sum() / ((w - q) ** 2).sum()), abs=1e-3)
            assert row["zeroed"] == pytest.approx((q == 0).mean(), abs=1e-6)
            assert (row["saturated"], row["format"], row["granularity"]) == (0, "int3", "channel")
            assert row["elements"] == 3 * w.size  # once per batch


@pytest.mark.slow
def test_operands_of_attention_are_those_the_products_see(decoder):
    found, _ = measured(decoder, "q6_k6_p6_v6")
    params, tokens_CxBxS = decoder
    block = jax.tree.map(lambda leaf: leaf[0], params["layers"]["block"])
    signal = dict.fromkeys("qkpv", 0.0)
    for tokens_BxS in tokens_CxBxS:
        # The first layer by NumPy, up to its attention; norms start with gains of one.
        x = np.asarray(params["embedding"]["embedding"], np.float64)[tokens_BxS]
        h = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + CONFIG.norm_epsilon)
        qkv = np.einsum("bld,dnk->blnk", h, np.asarray(block["attention"]["qkv"]["kernel"], np.float64))
        q, k, v = qkv[:, :, :2], qkv[:, :, 2:4], qkv[:, :, 4:]
        angle = np.arange(8)[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
        turn = np.exp(1j * angle)[:, None]
        complex_ = lambda x, turn=turn: (x[..., :4] + 1j * x[..., 4:]) * turn
        grid = lambda x: np.round(x / np.abs(x).max() * 31) * np.abs(x).max() / 31
        real = lambda z: np.concatenate([z.real, z.imag], -1)
        q, k = real(complex_(q)) / np.sqrt(8), real(complex_(k))
        scores = np.einsum("blhk,bmhk->bhlm", grid(q), grid(k))
        scores = np.where(np.tril(np.ones((8, 8), bool)), scores, -np.inf)
        p = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        for name, one in zip("qkpv", (q, k, p, v), strict=True):
            signal[name] += (one**2).sum()
    assert {name for _, name in found} == set("qkpv")
    for (_, name), one in found.items():
        assert one.signal[0] == pytest.approx(signal[name], rel=2e-3), name
    # The future has no probability: the elements are those of the lower triangles.
    assert found["attention/values", "p"].elements.tolist() == [12 * 2 * 36] * 2


@pytest.mark.slow
def test_errors_of_layers_are_those_of_kernels_quantized_by_hand(decoder):
    params, tokens_CxBxS = decoder
    spec = parsing.parse("w3", base.get_config().precision)
    static = static_of([spec], CONFIG.dtype).evaluation()
    found = layer_error.measure(CONFIG, static, params, static.grids(spec, CONFIG.depth), tokens_CxBxS)

    def on_grid(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        w = leaf.reshape(len(leaf), -1)
        scale = np.abs(w).max(axis=0) / 3
        return (np.round(w / scale) * scale).reshape(leaf.shape)

    layers = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["layers"]["block"]) for i in range(2)]
    quantized = [jax.tree_util.tree_map_with_path(on_grid, layer) for layer in layers]
    apply = jax.jit(lambda block, x: decoder_lib.Block(CONFIG).apply({"params": block}, x, Products()))
    wanted = np.zeros((2, 6))
    for tokens_BxS in tokens_CxBxS:
        x = x_q = np.asarray(params["embedding"]["embedding"])[tokens_BxS]
        for i in range(2):
            y, y_q = np.asarray(apply(layers[i], x)), np.asarray(apply(quantized[i], x_q))
            others = x, y, x_q - x, apply(layers[i], x_q) - y, apply(quantized[i], x) - y, y_q - y
            wanted[i] += [np.square(np.asarray(one, np.float64)).sum() for one in others]
            x, x_q = y, y_q
    assert found.incoming[0] == found.inherited[0] == 0 < found.own[0] == pytest.approx(found.total[0])
    np.testing.assert_allclose(np.stack(found, axis=1), wanted, rtol=1e-3)
    rows = layer_error.rows(found)
    assert rows[0]["inherited_share"] == 0
    assert rows[1]["total"] == pytest.approx(wanted[1, 5] / wanted[1, 1], rel=1e-3)
    assert rows[1]["inherited_share"] == pytest.approx(wanted[1, 3] / (wanted[1, 3] + wanted[1, 4]), rel=1e-3)


def test_looking_changes_nothing_and_sees_what_is_not_quantized_too():
    x, kernel = jnp.ones((2, 8)), jnp.full((8, 3), 0.3)
    seen = []
    with aqt.observed(lambda name, x, x_q, saturated, ends: seen.append((name, x.shape, saturated))):
        looked_at = Products().linear(x, kernel)
    np.testing.assert_array_equal(looked_at, Products().linear(x, kernel))
    assert seen == [("a", (2, 8), None), ("w", (8, 3), None)]


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_figure(finished_study, run_command, tmp_path):
    import shutil

    workspace, trained = finished_study
    workdir = tmp_path / "study"
    shutil.copytree(trained, workdir)
    done = run_command("precision_scaling.layer_stats", f"--workdir={workdir}", "--sequences=8")
    assert done.returncode == 0, done.stderr[-2000:]
    tables = {path.parent.name: path for path in workdir.glob("runs/*/layer-stats.csv")}
    assert set(tables) == {run.id for run in workspace.experiment.runs if run.precision.quantizers}
    (path,) = (path for name, path in tables.items() if "kint4" in name)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["operand"], row["format"]) for row in rows} == {
        ("w", "int3"),
        ("a", "int4"),
        ("k", "int4"),
        ("v", "int4"),
    }
    assert len(rows) == 2 * (4 + 4 + 2) and all(0 < float(row["snr_db"]) < 40 for row in rows)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with open(path.with_name("layer-errors.csv"), newline="") as file:
        errors = list(csv.DictReader(file))
    assert tuple(errors[0]) == layer_error.COLUMNS and [row["layer"] for row in errors] == ["0", "1"]
    assert float(errors[0]["inherited"]) == 0 < float(errors[1]["inherited"]) and "inherited" in done.stdout
    # Nothing but these files is new, and the runs in bf16 need a precision to be looked at.
    bf16 = next(run.id for run in workspace.experiment.runs if not run.precision.quantizers)
    done = run_command("precision_scaling.layer_stats", f"--workdir={workdir}", f"--run={bf16}")
    assert done.returncode == 2 and "--precision" in done.stderr and len(done.stderr.splitlines()) == 1
    arguments = (f"--run={bf16}", "--precision=wmxfp4", "--sequences=8")
    done = run_command("precision_scaling.layer_stats", f"--workdir={workdir}", *arguments)
    assert done.returncode == 2 and "a group that divides" in done.stderr
