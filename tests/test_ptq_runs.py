"""Rows, packed models and reports of a workdir: schemes stand beside each other and nothing is measured twice."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.model import decoder
from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import __main__, apply, codes, layers, packed
from precision_scaling.ptq.projection import Report
from precision_scaling.ptq.registry import of_method, scheme_of
from precision_scaling.ptq.scheme import LINEARS
from precision_scaling.quantize import fake_quant
from precision_scaling.runtime import paths
from precision_scaling.study import evaluate as evaluate_lib
from precision_scaling.study import ptq, results
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.training import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def one_run(finished_study, tmp_path):
    """(workspace of a copy of the study with one run alone, that run)."""
    workspace, workdir = finished_study
    shutil.copytree(workdir / "runs", tmp_path / "runs")
    group = workspace.experiment.cohorts[0]
    run = next(run for run in group.runs if run.ptq)
    group = dataclasses.replace(group, runs=(run,))
    experiment = dataclasses.replace(workspace.experiment, runs=(run,), cohorts=(group,))
    return dataclasses.replace(workspace, experiment=experiment, workdir=tmp_path), run


def times(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_other_options_make_other_rows_and_leave_those_that_were_there(one_run):
    workspace, run = one_run
    before = times(workspace.directory(run))
    options = {"group_size": 8, "symmetric": False}
    assert quantize_missing(workspace, ("rtn",), (3,), options=options) == []
    assert quantize_missing(workspace, ("kv_cache",), (3,)) == []
    after = times(workspace.directory(run))
    added = {path.name for path in set(after) - set(before)}
    assert added == {"rows-rtn-group8-asymmetric.json", "rows-kv_cache.json"}
    assert {path: after[path] for path in before} == before
    results.gather(workspace.workdir)
    with open(workspace.workdir / "runs.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == run.id and row["P_post"] in ("", "3")]
    by_method = {row["method"]: row for row in rows}
    assert set(by_method) == {"", "rtn", "rtn-group8-asymmetric", "kv_cache"}
    told = ("ptq_granularity", "ptq_options", "post_parts")
    assert [by_method["rtn"][name] for name in told] == ["channel", "", "w"]
    grouped = by_method["rtn-group8-asymmetric"]
    assert [grouped[name] for name in told] == ["group:8", "group8 asymmetric", "w"]
    # Every eight weights of 3 bits have a scale of 32 bits and a zero of 3.
    assert float(grouped["stored_bits"]) == pytest.approx(3 + 35 / 8)
    cache = by_method["kv_cache"]
    assert [cache[name] for name in told] == ["tensor", "", "kv"] and cache["stored_bits"] == ""
    assert len({row["loss"] for row in rows}) == 4
    again = times(workspace.directory(run))
    assert (
        quantize_missing(workspace, ("rtn",), (3,), options=options) == [] and times(workspace.directory(run)) == again
    )


# By hand, from the magnitudes (group, inputs, outputs) of a kernel: max over the last level, the mean, a power of two.
SCALES = {
    "e2m1": lambda magnitude: magnitude.max(1) / 6,
    "e3m0": lambda magnitude: magnitude.max(1) / 16,
    "ternary": lambda magnitude: magnitude.mean(1),
    "mxfp4_of_8": lambda magnitude: 2 ** (np.floor(np.log2(magnitude.max(1))) - 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_formats_of_equal_bits_have_rows_of_their_own_and_kernels_on_their_grids(one_run, method, monkeypatch):
    workspace, run = one_run
    kept, quantize = {}, apply.BlockQuantizer.quantize

    def keeping(quantizer, *arguments):
        found = quantize(quantizer, *arguments)
        kept.setdefault(quantizer.scheme.name, codes.block_parameters(found.kernels, found.rest))  # the first block
        return found

    monkeypatch.setattr(apply.BlockQuantizer, "quantize", keeping)
    block = formats.block("mxfp4_of_8", formats.floating(2, 1), 8, "e8m0")
    monkeypatch.setitem(formats._REGISTRY, block.name, block)
    assert quantize_missing(workspace, (method,), (), formats=tuple(SCALES)) == []
    trained, losses = workspace.parameters(run)["layers"]["block"], set()
    for name, scale_of in SCALES.items():
        fmt = parse(name)
        (row,) = results.read_rows(workspace.directory(run), f"{method}-{name}")
        assert (row["P_post"], row["post_format"]) == (fmt.bits, name)
        losses.add(row["loss"])
        for module, projection in LINEARS:
            kernels = kept[f"{method}-{name}"][module][projection]["kernel"], trained[module][projection]["kernel"][0]
            kernel, before = (np.asarray(x).reshape(len(x), -1) for x in kernels)
            if method == "rtn":
                np.testing.assert_array_equal(kernel, fake_quant(before, name, axis=0))
            grouped = (-1, fmt.block_size or len(kernel), kernel.shape[1])
            scale = scale_of(np.abs(before).reshape(grouped))[:, None]
            level = kernel.reshape(grouped) / scale
            assert np.abs(level[..., None] - fmt.values()).min(-1).max() < 1e-4
            assert len(np.unique(np.rint(4 * level))) > 2
    assert len(losses) == len(SCALES)
    assert row["stored_bits"] == 5  # with 8 bits of scale for every 8 weights


@pytest.mark.parametrize(
    ("method", "options", "formats", "message"),
    [
        ("awq", {}, ("e2m1",), "ptq.formats = 'e2m1': allowed is none with awq"),
        ("kv_cache", {}, ("e2m1",), "none with kv_cache"),
        ("rtn", {"symmetric": False}, ("e2m1",), "ptq.symmetric"),
        ("rtn", {"clip": True}, ("mxfp4",), "ptq.clip"),
        ("rtn", {"group_size": 8}, ("nvfp4",), "ptq.group_size"),
        ("gptq", {}, ("mxfp4",), "formats whose blocks divide"),
        ("gptq", {}, ("int4",), "other than an integer"),
        ("gptq", {}, ("bf16",), "other than an integer"),
        ("gptq", {}, ("nonsense",), "other than an integer"),
    ],
)
def test_formats_that_do_not_go_with_a_method_are_refused_in_one_line(one_run, method, options, formats, message):
    with pytest.raises(UserError, match=message) as raised:
        quantize_missing(one_run[0], (method,), (3,), options=options, formats=formats)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="--save with the format e5m6: e5m6 cannot be packed"):
        quantize_missing(one_run[0], ("rtn",), (), formats=("e5m6",), save=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_command_that_was_killed_goes_on_behind_the_blocks_that_are_done(one_run, method, monkeypatch):
    workspace, run = one_run
    directory, path = workspace.directory(run), paths.packed(workspace.directory(run), method, 4)
    shutil.rmtree(directory / "quantized", ignore_errors=True)
    paths.rows(directory, method).unlink(missing_ok=True)
    monkeypatch.setattr(ptq, "PART_SECONDS", -1.0)  # a block of this size would not be worth a file
    assert quantize_missing(workspace, (method,), (4,), save=True) == []
    rows, arrays = results.read_rows(directory, method), packed.load(path)
    shutil.rmtree(path)
    paths.rows(directory, method).unlink()
    quantize, done = apply.BlockQuantizer.quantize, []

    def killed(quantizer, *arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return quantize(quantizer, *arguments)

    monkeypatch.setattr(apply.BlockQuantizer, "quantize", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_missing(workspace, (method,), (4,), save=True)
    parts = paths.parts(directory, method, 4)
    assert [part.name for part in parts.iterdir()] == ["0000.npz"] and not path.exists()
    again = []
    monkeypatch.setattr(apply.BlockQuantizer, "quantize", lambda *args: again.append(1) or quantize(*args))
    assert quantize_missing(workspace, (method,), (4,), save=True) == []
    assert len(again) == 1 and not parts.exists()  # of the two blocks, the second
    assert results.read_rows(directory, method) == rows
    jax.tree.map(np.testing.assert_array_equal, packed.load(path).model, arrays.model)


@pytest.mark.slow
def test_packed_model_has_the_loss_of_its_row(one_run):
    workspace, run = one_run
    (group,) = workspace.experiment.cohorts
    row = next(row for row in results.read_rows(workspace.directory(run), "rtn") if row["P_post"] == 3)
    quantize_missing(workspace, ("rtn",), (3,), save=True)  # the row is there, the model is not
    assert row in results.read_rows(workspace.directory(run), "rtn")
    path = paths.packed(workspace.directory(run), "rtn", 3)
    loaded = packed.load(path)
    assert (loaded.method, loaded.bits, loaded.operands) == ("rtn", 3, ())
    static = scheme_of("rtn").static(group.static)
    evaluate = evaluate_lib.evaluator(workspace, group.shape, static)
    grids = static.grids(run.precision, run.shape.model.depth, w=parse("bf16"))
    assert evaluate(codes.parameters(loaded.model), grids) == row["loss"]
    assert np.mean(np.asarray(loaded.model.kernels["mlp"]["down"].codes) != 0) > 0.5
    saved = times(workspace.directory(run))
    quantize_missing(workspace, ("rtn",), (3,), save=True)
    assert times(workspace.directory(run)) == saved
    (line,) = __main__._sizes(workspace, scheme_of("rtn"))
    assert str(path) in line and f"{packed.packed_bytes(loaded.model, 3):,} of packed arrays" in line


@pytest.mark.slow
def test_packed_models_of_other_formats_have_the_loss_of_their_rows(one_run, monkeypatch):
    workspace, run = one_run
    (group,) = workspace.experiment.cohorts
    block = formats.block("nvfp4_of_8", formats.floating(2, 1), 8, "e4m3fn")
    monkeypatch.setitem(formats._REGISTRY, block.name, block)
    quantize_missing(workspace, ("gptq",), (), formats=("e4m3", block.name), save=True)
    static = scheme_of("gptq").static(group.static)
    evaluate = evaluate_lib.evaluator(workspace, group.shape, static)
    grids = static.grids(run.precision, run.shape.model.depth, w=parse("bf16"))
    for name, bits in (("e4m3", 8), (block.name, 5)):
        (row,) = results.read_rows(workspace.directory(run), f"gptq-{name}")
        path = paths.packed(workspace.directory(run), f"gptq-{name}", float(bits) if name == block.name else bits)
        loaded = packed.load(path)
        assert loaded.bits == name and evaluate(codes.parameters(loaded.model), grids) == row["loss"]
        assert row["stored_bits"] == pytest.approx(codes.stored_bits(loaded.model, name), abs=1e-4)
        (line,) = __main__._sizes(workspace, scheme_of("gptq", format=name))
        assert f"{packed.packed_bytes(loaded.model, name):,} of packed arrays" in line


@pytest.mark.slow
def test_weights_and_activations_are_quantized_and_every_layer_reported(one_run):
    workspace, run = one_run
    quantize_missing(workspace, ("smoothquant",), (4,), save=True)
    (row,) = results.read_rows(workspace.directory(run), "smoothquant")
    assert row["post_parts"] == "wa" and row["P_post"] == 4
    loaded = packed.load(paths.packed(workspace.directory(run), scheme_of("smoothquant").name, 4))
    assert loaded.operands == ("a",)
    (group,) = workspace.experiment.cohorts
    static = scheme_of("smoothquant").static(group.static)
    evaluate = evaluate_lib.evaluator(workspace, group.shape, static)
    grids = {**static.grids(run.precision, run.shape.model.depth, w=parse("bf16")), "a": parse(4).grid()}
    assert evaluate(codes.parameters(loaded.model), grids) == row["loss"]
    assert evaluate(codes.parameters(loaded.model), {**grids, "a": parse(16).grid()}) != row["loss"]
    found = json.loads(paths.layer_errors(workspace.directory(run), "smoothquant").read_text())
    assert found["projections"] == ["attention/qkv", "attention/out", "mlp/gate_up", "mlp/down"]
    errors = np.array(found["bits"]["4"]["error"])
    assert errors.shape == (2, 4) and np.all((errors > 1e-4) & (errors < 0.1))
    figure = layers.draw(workspace.directory(run), "smoothquant")
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.name == "layers-smoothquant.png"


@pytest.mark.slow
def test_layers_that_no_input_reaches_are_rounded_to_nearest_and_named(one_run):
    workspace, run = one_run
    path = workspace.directory(run) / "checkpoint"
    params = checkpoint.restore(path, jax.eval_shape(lambda: decoder.init(run.shape.model, jax.random.key(0))))
    gains = params["layers"]["block"]["attention_norm"]
    gains["scale"] = gains["scale"].at[1].set(0)
    checkpoint.save(path, params)
    warnings = quantize_missing(workspace, ("gptq",), (3,))
    told = "was rounded to nearest, its calibration is unusable"
    names = ("attention/qkv of layer 1", "attention/out of layer 1")
    assert warnings == [f"{run.id} at 3 bits: {name} {told}" for name in names]
    (row,) = results.read_rows(workspace.directory(run), "gptq")
    assert row["fallback_layers"] == 2
    found = json.loads(paths.layer_errors(workspace.directory(run), "gptq").read_text())["bits"]["3"]
    assert found["fell_back"] == [[False] * 4, [True, True, False, False]]
    assert found["error"][1][:2] == [0, 0] and min(found["error"][0]) > 0


def test_what_does_not_fit_is_told_before_anything_is_quantized(one_run):
    workspace, run = one_run
    before = times(workspace.directory(run))
    for methods, changed, message in (
        (("kv_cache",), {"save": True}, "methods that quantize weights"),
        (("rtn",), {"options": {"group_size": 1000}}, "0, or at most"),
        (("magic",), {}, "one of gptq"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            quantize_missing(workspace, methods, (3,), **changed)
        assert "\n" not in str(raised.value)
    assert times(workspace.directory(run)) == before


def test_flags_are_options_in_place_of_the_configs_and_must_be_the_methods_own(one_run):
    options = dict(one_run[0].experiment.config.ptq)
    assert __main__._scheme("gptq", options, {}) == scheme_of("gptq")
    config = {**options, "clip": True, "act_order": True}
    assert __main__._scheme("gptq", config, {"clip": False}) == scheme_of("gptq", act_order=True)
    assert __main__._scheme("rtn", config, {}) == of_method("rtn", config) == scheme_of("rtn", clip=True)
    for method, given in (("rtn", {"act_order": True}), ("kv_cache", {"group_size": 8}), ("gptq", {"smoothing": 0.8})):
        with pytest.raises(UserError, match="it has no such option"):
            __main__._scheme(method, options, given)


def report(widths, error):
    shape = (widths, 3, len(LINEARS))
    errors = np.full(shape, error)
    return Report(np.zeros(shape, bool), np.full(shape, np.nan), errors, 2 * errors, *[errors * np.nan] * 2)


def test_reports_at_other_bits_are_added_and_at_the_same_replaced(tmp_path):
    layers.write(tmp_path, "gptq", (4, 3), report(2, 0.5))
    layers.write(tmp_path, "gptq", (8, 4), report(2, 0.25))
    bits = json.loads(paths.layer_errors(tmp_path, "gptq").read_text())["bits"]
    assert {b: values["error"][2][3] for b, values in bits.items()} == {"3": 0.5, "4": 0.25, "8": 0.25}
    assert list(bits) == ["3", "4", "8"]
    assert bits["3"]["damping"][0] == [None] * 4 and bits["3"]["rtn_error"][0] == [1.0] * 4


def test_figure_is_drawn_when_the_report_is_new(tmp_path):
    assert layers.draw(tmp_path, "gptq") is None
    fallen = report(1, 0.5)
    fallen.fell_back[0, 1] = True
    layers.write(tmp_path, "gptq", (3,), fallen)
    figure = layers.draw(tmp_path, "gptq")
    first = figure.read_bytes()
    written = figure.stat().st_mtime_ns
    assert layers.draw(tmp_path, "gptq").stat().st_mtime_ns == written
    layers.write(tmp_path, "gptq", (4,), report(1, 0.1))
    assert layers.draw(tmp_path, "gptq").read_bytes() != first
    paths.layer_errors(tmp_path, "gptq").write_text("{}")
    with pytest.raises(UserError, match="not a file of errors by layer"):
        layers.write(tmp_path, "gptq", (5,), report(1, 0.1))


@pytest.mark.slow
def test_command_stores_models_and_says_what_they_take(finished_study, tmp_path, run_command):
    _, workdir = finished_study
    shutil.copytree(workdir, tmp_path / "study")
    command_line = ("precision_scaling.ptq", f"--workdir={tmp_path / 'study'}", "--method=rtn", "--bits=3")
    done = run_command(*command_line, "--group_size=8", "--asymmetric", "--save")
    assert done.returncode == 0, done.stderr
    with open(workdir / "runs.csv") as file:
        runs = sum(row["status"] == "ok" for row in csv.DictReader(file) if not row["P_post"])
    stored = [line for line in done.stdout.splitlines() if "of packed arrays" in line]
    assert len(stored) == runs and all("/quantized/rtn-group8-asymmetric-3: " in line for line in stored)
    refused = run_command(*command_line, "--act_order")
    assert refused.returncode == 2 and "it has no such option" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
