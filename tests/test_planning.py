"""What a plan says beside its optimum: formats, memory of serving, other laws, extrapolation; by hand and by search."""

import dataclasses
import json

import numpy as np
import pytest

from analysis import laws
from analysis.fitting import provenance
from analysis.fitting.fit import Fit
from analysis.laws.steps import relative_step
from analysis.plan import FLAGS, command
from analysis.planning import fitted, surface
from analysis.planning.cost import CostModel, bits_of_format, named_format
from analysis.planning.memory import Layout, Serving, ServingError, bytes_label, parse_bytes
from analysis.planning.minimize import Budget
from analysis.planning.plan import plan
from analysis.planning.text import describe
from analysis.table import from_columns
from precision_scaling.model.sizes import SIZES
from precision_scaling.numerics import formats

NOISE = {"A": 240.0, "alpha": 0.602, "B": 50100.0, "beta": 0.84, "E": 0.793, "g": 0.427, "d": 0.194, "q": 0.622}
NOISE |= {"c_w": 0.00182, "c_a": 0.0716, "c_kv": 0.00762}
PTQ_NOISE = {"C": 1e-2, "gamma_D": 0.5, "gamma_N": 0.4, "p": 2.0}
SEEN = {"w": ["bf16", "int4", "int8"], "a": ["bf16", "int4", "int8"], "kv": ["bf16", "int4", "e4m3fn"]}
RANGES = {"N": [1e4, 1e5], "D": [2e5, 8e6], "C": [1e9, 5e12]}
RANGES |= {"P_w": [2.0, 16.0], "P_a": [3.0, 16.0], "P_kv": [5.0, 16.0]}


def of(law, params, **reported):
    fit = Fit.from_json(json.dumps({"law": law, "params": params}))
    return dataclasses.replace(fit, reporting=reported)


@pytest.fixture(scope="module")
def noise_fits():
    ranges = {**RANGES, "P_post": [3.0, 6.0]}
    return [of("noise", NOISE, ranges=ranges, formats=SEEN), of("ptq_noise", PTQ_NOISE, ranges=ranges)]


@pytest.fixture(scope="module")
def served_in_four(noise_fits):
    return plan(noise_fits, Budget(flops=1e12, serve_bits=4.0))


def row_of(found, name):
    return next(row for row in found.formats if row["format"] == name)


# --- formats that exist


def grid_optimum(fmt, flops, serve_bits=None, memory=np.inf):
    """(loss, N, D) of the best point in a format on a grid of N and of the share of the tokens that is used."""
    n, share = np.meshgrid(np.geomspace(1e3, 1e7, 4000), np.linspace(0.3, 1.0, 41), indexing="ij")
    d = share * flops * 16 / (6 * n * fmt.bits)
    steps = {"s_w": "channel", "s_a": "tensor", "s_kv": "tensor"}
    steps = {name: relative_step(fmt.name, usual=granularity) for name, granularity in steps.items()}
    loss = laws.predict("noise", NOISE, N=n, D=d, **steps)
    rounded = serve_bits is not None and int(fmt.bits) > serve_bits
    if rounded:
        loss = loss + PTQ_NOISE["C"] * d**0.5 / n**0.4 / (2 ** (serve_bits - 1) - 1) ** 2
    bits = serve_bits if rounded else fmt.bits
    loss = np.where(n * bits / 8 <= memory, loss, np.inf)
    at = np.unravel_index(np.argmin(loss), loss.shape)
    return loss[at], n[at], d[at]


@pytest.mark.parametrize("name", ["int4", "e2m1", "mxfp4", "nvfp4", "e4m3fn", "int8", "mxfp8"])
def test_every_format_has_the_plan_that_a_grid_finds(noise_fits, served_in_four, name):
    fmt = formats.parse(name)
    loss, n, _ = grid_optimum(fmt, 1e12, 4.0)
    row = row_of(served_in_four, name)
    assert row["P"] == fmt.bits and row["flops"] == pytest.approx(1e12, rel=1e-6)
    assert loss - 2e-5 < row["loss"] <= loss + 1e-12
    assert row["N"] == pytest.approx(n, rel=0.03)
    assert row["served"] == (4.0 if int(fmt.bits) > 4 else "as trained")


def test_the_best_format_is_that_of_the_grid(served_in_four):
    found = {row["format"]: row["loss"] for row in served_in_four.formats}
    searched = {name: grid_optimum(formats.parse(name), 1e12, 4.0)[0] for name in found}
    assert min(found, key=found.get) == min(searched, key=searched.get)
    assert {"int4", "e2m1", "mxfp4", "nvfp4", "int8", "e4m3fn", "mxfp8", "bf16"} <= set(found)
    assert not {"int7", "int12", "fp32", "binary"} & set(found)


def test_laws_that_read_bits_take_the_nominal_ones_and_say_so():
    found = plan(fitted.load("paper"), Budget(flops=1e21))
    assert row_of(found, "int8")["loss"] == row_of(found, "e4m3fn")["loss"] == row_of(found, "e5m2")["loss"]
    constants = ((2.6745, 0.3037), (2.2102, 1.4072), (0.9578, 2.4185))
    f = lambda p: np.prod([1 - np.exp(-p / gamma + n) for gamma, n in constants])
    assert row_of(found, "int4")["N_factor"] == pytest.approx(5.20, abs=6e-3)
    assert row_of(found, "mxfp4")["capacity"] == pytest.approx(f(4.25))
    assert "law precision reads the nominal bits alone" in describe(found)


def test_formats_that_the_table_never_saw_are_marked(served_in_four):
    seen = {row["format"]: row["seen"] for row in served_in_four.formats}
    assert seen["int4"] and seen["bf16"]
    assert seen["e4m3fn"] is False  # the cache alone was trained in it
    assert seen["int8"] is False and seen["nvfp4"] is False
    assert "not in the fit's table" in describe(served_in_four)
    paper = plan(fitted.load("paper"), Budget(flops=1e20))
    assert row_of(paper, "int8")["seen"] and not row_of(paper, "mxfp8")["seen"]
    silent = plan([of("noise", NOISE)], Budget(flops=1e12))
    assert row_of(silent, "int4")["seen"] is None and "are not on record" in describe(silent)


def test_a_fit_tells_the_formats_and_costs_of_its_rows():
    columns = {"N": [1e6, 2e6], "D": [1e7, 2e7], "loss": [3.0, 2.9], "P_w": [8.0, 16.0], "P_a": [4.0, 16.0]}
    named = {"w_format": ["float8_e4m3fn", "bf16"], "k_format": ["INT4", ""], "v_format": ["own", ""]}
    rows = from_columns({**columns, **named})
    assert provenance.trained_formats(rows) == {"w": ["bf16", "e4m3fn"], "kv": ["int4", "own"]}
    assert provenance._ranges(rows)["C"] == pytest.approx((6e13 * 28 / 48, 6 * 4e13))


def test_measured_speeds_hold_for_the_formats_of_their_kind():
    cost = CostModel.parse("bf16:1,fp8:1.6,mxfp4:3,5:2")
    has = lambda name: cost.has(formats.parse(name))
    assert [name for name in ("e4m3fn", "e5m2", "int8", "mxfp4", "nvfp4", "int5", "e2m2", "bf16") if has(name)] == [
        "e4m3fn",
        "e5m2",
        "mxfp4",
        "int5",
        "e2m2",
        "bf16",
    ]
    found = plan([of("noise", NOISE)], Budget(flops=1e12, cost=cost))
    assert {row["format"] for row in found.formats} >= {"e4m3fn", "e5m2", "bf16"}
    assert row_of(found, "e5m2")["loss"] > row_of(found, "e4m3fn")["loss"]


@pytest.mark.parametrize(
    ("name", "bits", "fmt"),
    [
        ("nvfp4", 4.5, "nvfp4"),
        ("mxfp8", 8.25, "mxfp8"),
        ("FP8", 8, "e4m3fn"),
        ("fp4", 4, "e2m1"),
        ("7", 7, None),
        ("fp12", 12, None),
    ],
)
def test_names_of_formats(name, bits, fmt):
    assert bits_of_format(name) == bits
    found = named_format(name)
    assert (found and found.name) == fmt


def test_a_plan_in_one_format_takes_its_step(noise_fits):
    fmt = formats.parse("nvfp4")
    found = plan(noise_fits, Budget(flops=1e12, p=4.5), fmt=fmt)
    assert found.best.loss == pytest.approx(grid_optimum(fmt, 1e12)[0], abs=2e-5)
    assert json.loads(found.to_json())["format"] == "nvfp4"
    assert any("no run trained in nvfp4" in warning for warning in found.warnings)


def test_intervals_of_a_format_and_of_its_loss_above_the_plan():
    rng = np.random.default_rng(0)
    draws = {"E": tuple(NOISE["E"] + rng.normal(0, 0.01, 100)), "c_a": (NOISE["c_a"],) * 100}
    found = plan([dataclasses.replace(of("noise", NOISE), n=50, samples=draws)], Budget(flops=1e12))
    for row in (row_of(found, "nvfp4"), row_of(found, "int8"), found.alternatives[0]):
        assert row["extra_loss_ci"] == pytest.approx([row["extra_loss"]] * 2, abs=1e-12)  # E moves all alike
        assert np.diff(row["loss_ci"])[0] == pytest.approx(0.039, abs=0.01)


# --- memory


LLAMA_N = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # Llama 2 7B, without embeddings and norms


def test_memory_of_a_llama_by_hand():
    serving = Serving(context=4096, batch=1, group_size=128, vocabulary=32000, layout=Layout.parse("32x32x128"))
    assert serving.cache(LLAMA_N, 16.0) == 2 * 1024**3  # 2 · 32 layers · 4096 values · 4096 tokens · 2 bytes
    assert serving.weights(LLAMA_N, 4.0) == pytest.approx(LLAMA_N * 4.125 / 8)
    assert serving.embeddings(LLAMA_N) == pytest.approx(2 * 32000 * 4096 * 2, rel=3e-3)
    by_channel = dataclasses.replace(serving, group_size=0)
    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert by_channel.weights(LLAMA_N, 4.0) - LLAMA_N / 2 == pytest.approx(2 * outputs, rel=3e-3)
    assert serving.weights(LLAMA_N, 16.0) == LLAMA_N * 2
    grouped = Serving(context=8192, batch=8, kv_bits=8.0, layout=Layout.parse("32x8x128"))
    assert grouped.cache(7e9, 16.0) == 4 * 1024**3  # eight heads of keys, Llama 3 8B
    assert serving.total(LLAMA_N, 4.0, 16.0) == pytest.approx(3.339e9 + 2.147e9 + 0.524e9, rel=1e-3)


@pytest.mark.parametrize("name", ["30M", "60M", "110M", "220M", "1.7B"])
def test_the_standard_shape_is_near_those_of_named_sizes(name):
    size = SIZES[name]
    width, depth = Serving().shape(12 * size.depth * size.width**2)
    assert width == pytest.approx(size.width, rel=0.1) and depth == pytest.approx(size.depth, rel=0.17)
    assert width == pytest.approx(100 * depth)


@pytest.mark.parametrize(
    "serving",
    [
        Serving(),
        Serving(context=4096, batch=4),
        Serving(context=2048, vocabulary=50000, group_size=64),
        Serving(context=1e5, layout=Layout(32, 8, 128), kv_bits=4.0),
        Serving(context=512, cache_trained_low=True),
    ],
)
def test_the_largest_model_fills_the_memory(serving):
    bits = np.array([3.0, 4.0, 8.0, 16.0])
    n = serving.most_parameters(24e9, bits, bits)
    np.testing.assert_allclose(serving.total(n, bits, bits), 24e9, rtol=1e-9)
    assert np.all(np.diff(n) < 0)
    assert serving.most_parameters(1e-3, 4.0, 4.0) == 0


def test_bits_to_serve_in_under_a_memory_are_those_of_a_grid(noise_fits):
    serving, limit = Serving(context=64, batch=4, kv_bits=16.0), 4e4
    found = plan(noise_fits, Budget(flops=1e12, memory_bytes=limit, serving=serving))
    axes = np.geomspace(3e3, 1.2e5, 500), np.linspace(2, 16, 141), np.linspace(0.2, 1.0, 9)
    n, p, share = np.meshgrid(*axes, indexing="ij")
    for bits in (3.0, 4.0, 5.0, 6.0, None):
        d = share * 1e12 * 16 / (6 * n * p)
        loss = laws.predict("noise", NOISE, N=n, D=d, P_w=p, P_a=p, P_kv=p)
        if bits is not None:
            loss = loss + np.where(p > bits, PTQ_NOISE["C"] * d**0.5 / n**0.4 / (2 ** (bits - 1) - 1) ** 2, 0)
        width = np.sqrt(n / 12)  # of one layer, as N is below 120k
        served = np.minimum(p, bits or 16)
        weights = n * (served + np.where(served < 16, 16 * 31 / 36 / width, 0)) / 8
        loss = np.where(weights + 2 * 64 * 4 * 2 * width <= limit, loss, np.inf)
        option = next(option for option in found.serving if option.budget.serve_bits == bits)
        assert loss.min() - 4e-3 < option.point.loss <= loss.min() + 1e-9
        assert option.memory <= limit * (1 + 1e-9)
    assert [option.budget.serve_bits for option in found.serving] == [3.0, 4.0, 5.0, 6.0, None]
    best = min(found.serving, key=lambda option: option.point.loss)
    assert best.budget.serve_bits is not None and "best" in describe(found)
    raw = json.loads(found.to_json())
    assert raw["memory"]["fits"] and raw["memory"]["total_bytes"] <= limit * (1 + 1e-9)
    assert raw["memory"]["kv_cache_bytes"] > raw["memory"]["weights_bytes"] * 0.3
    assert row_of(found, "bf16")["fills_memory"]


def test_formats_that_do_not_fit_are_named(noise_fits):
    found = plan(noise_fits, Budget(n=1e5, d=1e6, p=4.0, memory_bytes=7e4), columns=None)
    listed = {row["format"] for row in found.formats}
    assert "int4" in listed and "int8" not in listed
    assert any("there is no plan in" in warning and "int8" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 * 2**30),
        ("80 GB", 80e9),
        ("1.5MB", 1.5e6),
        ("512KiB", 2**19),
        ("2e3B", 2e3),
        ("1TiB", 2**40),
    ],
)
def test_sizes_of_memory(text, value):
    assert parse_bytes(text) == value


def test_bytes_are_said_in_powers_of_1000():
    assert [bytes_label(x) for x in (13.47e9, 999.99e6, 512.0)] == ["13.5 GB", "1 GB", "512 B"]
    with pytest.raises(ServingError, match="want a number and a unit"):
        parse_bytes("24")


def test_a_model_of_fewer_bits_than_those_of_serving_is_served_as_trained(noise_fits):
    at = plan(noise_fits, Budget(n=1e5, d=1e6, p=3.0, serve_bits=4.0))
    assert at.best.delta == 0 and at.chosen.bits == 3.0


# --- other laws


@pytest.fixture(scope="module")
def other_laws():
    precision = of("precision", laws.published("precision"), ranges=fitted.PAPER_RANGES)
    power = {name: laws.published("precision")[name] for name in ("A", "alpha", "B", "beta", "E")}
    power |= {"C_w": 3.0, "rho_w": 3.0, "C_a": 3.0, "rho_a": 3.0, "C_kv": 1.0, "rho_kv": 3.0}
    return [precision, of("power_laws", power), of("chinchilla", laws.published("chinchilla"))]


def test_other_laws_are_heard_on_the_plan_of_the_first(other_laws):
    found = plan(other_laws, Budget(flops=1e21))
    alone = plan(other_laws[:1], Budget(flops=1e21))
    assert found.best == alone.best and alone.opinions == []
    power, chinchilla = found.opinions
    n, d, p = found.best.n, found.best.d, found.best.p
    expected = laws.predict("power_laws", other_laws[1].values, N=n, D=d, P_w=p, P_a=p, P_kv=p)
    assert power.loss == pytest.approx(float(expected), abs=1e-12)
    assert power.own == plan(other_laws[1:2], Budget(flops=1e21)).best
    assert chinchilla.loss is None and chinchilla.own.p == 16.0 and "16 bits only" in chinchilla.why
    raw = json.loads(found.to_json())["model_spread"]
    assert raw["loss"] == sorted([found.best.loss, power.loss]) and raw["P"] == [found.best.p, 16.0]
    assert "Model spread" in describe(found) and "power_laws" in describe(found)


def test_the_law_of_delta_goes_with_every_law_of_the_loss(other_laws):
    ptq = of("ptq", laws.published("ptq"))
    found = plan([*other_laws[:2], ptq], Budget(flops=1e21, serve_bits=4.0))
    at, own = found.best, found.opinions[0]
    loss = laws.predict("power_laws", other_laws[1].values, N=at.n, D=at.d, P_w=at.p, P_a=at.p, P_kv=at.p)
    delta = laws.predict("ptq", ptq.values, N=at.n, D=at.d, P_post=4.0)
    assert own.loss - loss == pytest.approx(float(delta), rel=1e-6)


def test_fits_that_do_not_go_together_are_refused(other_laws):
    precision, ptq = other_laws[0], of("ptq", laws.published("ptq"))
    refused = (([precision] * 2, "twice"), ([ptq], "no law of the loss"), ([precision, ptq, ptq], "more than one"))
    for given, why in refused:
        with pytest.raises(surface.SurfaceError, match=why):
            plan(given, Budget(flops=1e21))


def test_a_law_of_losses_after_ptq_is_not_given_ptq_again(other_laws):
    served = dataclasses.replace(other_laws[0], serve_bits=4.0)
    found = plan([served], Budget(flops=1e21))
    assert any("losses after PTQ to 4 bits" in warning for warning in found.warnings)
    with pytest.raises(surface.SurfaceError, match="was fitted to losses after PTQ"):
        plan([served, of("ptq", laws.published("ptq"))], Budget(flops=1e21, serve_bits=4.0))


# --- extrapolation


def test_extrapolation_is_marked_in_text_and_json(noise_fits):
    found = plan(noise_fits, Budget(flops=1e13, serve_bits=2.0, n=3e5))
    raw = json.loads(found.to_json())["extrapolation"]
    assert raw["N"] == {"value": 3e5, "data": [1e4, 1e5], "outside": True, "factor": pytest.approx(3.0)}
    assert raw["budget"]["outside"] and raw["budget"]["factor"] == pytest.approx(2.0)
    assert raw["P"]["data"] == [5.0, 16.0]  # the cache was never trained in fewer
    assert raw["P_post"]["outside"] and set(raw) == {"N", "D", "P", "budget", "P_post"}
    text = describe(found)
    assert "300k* parameters" in text and "1e+13* FLOP" in text and "* outside the fit's table" in text
    assert "2 bits*" in text
    inside = plan(noise_fits, Budget(n=5e4, d=1e6, p=8.0))
    assert not any(entry["outside"] for entry in json.loads(inside.to_json())["extrapolation"].values())
    assert "*" not in describe(inside).split("Formats")[0]
    assert {row["format"]: row["outside"] for row in inside.formats}["int4"] == ["P"]


def test_a_fit_without_its_costs_on_record_is_judged_by_its_largest_n_and_d():
    found = plan(fitted.load("paper"), Budget(flops=1e21))
    budget = json.loads(found.to_json())["extrapolation"]["budget"]
    assert budget["data"][1] == pytest.approx(6 * 1.7e9 * 26e9)
    assert any("budget = 1e+21 FLOPs is 3.77 times above" in w and "combined" in w for w in found.warnings)


def test_the_command_takes_a_format_a_layout_and_a_memory(capsys, tmp_path):
    saved, out = FLAGS.flag_values_dict(), tmp_path / "plan.json"
    options = ["--fit=paper", "--flops=1e21", "--precision=mxfp8", "--memory=24GiB", "--context=4096", "--batch=8"]
    options += ["--layout=32x8x128", "--kv-bits=fp8", "--vocab=32000", "--serve-bits=4", "--serve-group=128"]
    options += [f"--out={out}"]
    try:
        assert command(["plan", *options]) == 0
    finally:
        for name, value in saved.items():
            FLAGS[name].value = value
    raw = json.loads(out.read_text())
    assert (raw["format"], raw["P"], raw["memory"]["stored_bits"]) == ("mxfp8", 8.25, pytest.approx(4.125))
    assert raw["memory"]["kv_cache_bytes"] == 2 * 32 * 8 * 128 * 4096 * 8
    assert raw["memory"]["limit_bytes"] == 24 * 2**30 and raw["memory"]["fits"]
    told = capsys.readouterr().out
    assert "8 KV heads of 128" in told and "rounding the cache to 8 bits" in told
