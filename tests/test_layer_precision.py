"""Formats by layer and projection: rules as they are written, models quantized by hand, the mean in the table."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from analysis import laws
from analysis.laws import derived
from analysis.laws.steps import relative_step
from analysis.table.columns import mixture as cell_mixture
from precision_scaling.config import base, experiment
from precision_scaling.errors import ConfigError
from precision_scaling.model import decoder, mixture
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block, Decoder
from precision_scaling.numerics.formats import parse as parse_format
from precision_scaling.quantize.parsing import from_options, parse
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import static_of, static_of_one
from precision_scaling.study import evaluate, results

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = ModelConfig(23, 16, 4, 2, 24, 8, 16, 4)
KERNELS = {"qkv": "attention", "out": "attention", "gate_up": "mlp", "down": "mlp"}


def options(**leaves):
    config = base.get_config().precision
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in leaves.items()})
    return config


def names(precision, operand, depth=4):
    return [[fmt.name for fmt in row] for row in precision.by_place(operand, depth)]


def test_rules_name_layers_and_places_and_the_first_counts():
    precision = parse("w4_a4_kv8 first:1=bf16, 2-3.[gd]*=w3 *.down=e4m3 last:1.attention=v6", options())
    four, eight = "int4", "int8"
    assert names(precision, "w") == [["bf16"] * 4, [four] * 3 + ["e4m3"], *[[four] * 2 + ["int3"] * 2] * 2]
    assert names(precision, "a") == [["bf16"] * 4, *[[four] * 3 + ["e4m3"]] * 3]
    assert names(precision, "v") == [["bf16"], [eight], [eight], ["int6"]] and names(precision, "k")[3] == [eight]
    assert precision.rules == "first:1=bf16,2-3.[gd]*=wint3,*.down=e4m3,last:1.attention=vint6"
    # What is quantized in some layers alone; the backward pass with the forward one.
    assert names(parse("bf16 1.out=a5", options()), "a")[1] == ["bf16", "int5", "bf16", "bf16"]
    fp8 = parse("fp8 last:2=bf16", options())
    assert names(fp8, "g_w") == [["e5m2"] * 4] * 2 + [["bf16"] * 4] * 2
    assert names(parse("w4 last:15%=bf16", options()), "w", 6)[-1] == ["bf16"] * 4
    assert names(parse("w4 last:15%=bf16", options()), "w", 2) == [[four] * 4] * 2
    # A grid's rules take the place of the section's; "bf16" is nothing quantized at all.
    section = options(layers="first:1=bf16")
    assert parse("w4", section).rules == "first:1=bf16" and parse("w4 none", section).rules == ""
    assert parse("w4 *.down=e4m3", section).rules == "*.down=e4m3" and parse("bf16", section).describe() == "bf16"
    assert from_options(options(weights="int4", layers="*.attention=bf16")).rules == ""  # nothing is quantized there


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("w4 first=bf16", ("precision.layers", "'first=bf16'", "first:N")),
        ("w4 *.up=bf16", ("'*.up=bf16'", "gate_up")),
        ("w4 3-1=bf16", ("'3-1=bf16'",)),
        ("w4 *.down=e9m9", ("precision.layers", "'e9m9'", "parts with formats")),
        ("w4 *.down=kv4", ("'*.down=kv4'", "parts in down")),
        ("w4 *=w4_w5", ("'*.*=w4_w5'", "once")),
        ("w4 *=w4/tensor", ("formats alone",)),
        ("w4 *.down=wmxfp4", ("int4, mxfp4", "one kind for weights")),
        ("bf16 *.down=e4m3", ("*.down=e4m3", "a part with the format, such as w4")),
        ("int8_full *.down=bf16", ("mode native",)),
    ),
)
def test_mistakes_in_rules_are_one_line(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text, options(mode="native") if "native" in words[-1] else options())
    message = str(caught.value)
    assert "\n" not in message and "allowed is" in message and all(word in message for word in words), message


def test_layers_that_a_model_does_not_have_are_refused():
    for rule in ("first:3=bf16", "2=bf16", "last:3=bf16"):
        config = base.get_config()
        config.study.grid.some = base.grid(("25k",), (100_000,), (f"w4 {rule}",))
        with pytest.raises(ConfigError, match=r"precision.layers = .*layers that there are, 0 to 1"):
            experiment.resolve(config, 256)


def test_one_cohort_serves_formats_by_layer_and_without():
    config = base.get_config()
    texts = ("bf16", "w4", "w4 first:1=bf16", "w4_a4 *.down=e4m3 last:1=bf16", "bf16 0.qkv=w3_a3", "kv4 last:1=kv8")
    config.study.grid.some = base.grid(("25k",), (100_000,), texts)
    resolved = experiment.resolve(config, 256)
    assert len(resolved.cohorts) == 1 and len({run.id for run in resolved.runs}) == len(texts)
    tables = [resolved.cohorts[0].static.grids(run.precision, 2) for run in resolved.runs]
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(table)) for table in tables}
    assert len(shapes) == 1


def test_weights_by_layer_equal_kernels_rounded_by_hand():
    # Looped over; layers that are written out are fused with their neighbours, differently in two programs.
    config = dataclasses.replace(CONFIG, remat="full")
    precision = parse("w4 first:1=bf16 2.down=w2 *.[dg]*=w3", options())
    bits = [[16] * 4, [4, 4, 3, 3], [4, 4, 3, 2], [4, 4, 3, 3]]
    params = jax.jit(lambda: decoder.init(config, jax.random.key(0)))()
    block = jax.tree.map(np.asarray, params["layers"]["block"])
    for layer, of_layer in enumerate(bits):
        for (name, module), b in zip(KERNELS.items(), of_layer, strict=True):
            if b < 16:
                kernel = np.array(block[module][name]["kernel"])
                flat = kernel[layer].reshape(kernel.shape[1], -1)
                scale = np.abs(flat).max(axis=0) / np.float32(2 ** (b - 1) - 1)
                kernel[layer] = (np.rint(flat / scale) * scale).reshape(kernel.shape[1:])
                block[module][name]["kernel"] = kernel
    tokens = np.random.default_rng(0).integers(0, 23, (2, 8))
    static = static_of_one(precision, "float32")
    quantized = jax.jit(lambda grids: Decoder(config, static).apply({"params": params}, tokens, grids))
    plain = jax.jit(lambda params: Decoder(config).apply({"params": params}, tokens))
    by_hand = {**params, "layers": {"block": block}}
    np.testing.assert_allclose(quantized(static.grids(precision, 4)), plain(by_hand), atol=2e-5)
    # A layer left in bf16 is exact to the bit.
    nothing = static.grids(parse("w4 *=bf16", options()), 4)
    np.testing.assert_array_equal(quantized(nothing), plain(params))
    assert quantized._cache_size() == 1


@pytest.mark.slow
def test_losses_and_gradients_equal_those_of_blocks_each_at_its_own_precision():
    """The scanned model against blocks called one after the other, each compiled for a precision of its own."""
    config = dataclasses.replace(CONFIG, depth=3)
    precision = parse("w4_a5_kv4_g8 first:1=bf16 2=w3_a3_g4_kv8 *=kv6", options())
    texts = ("bf16", "w4_a5_kv6_g8", "w3_a3_kv8_g4")
    params = jax.jit(lambda: decoder.init(config, jax.random.key(0)))()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 8)))
    static = static_of_one(precision, "float32")
    model = Decoder(config, static)
    of = [parse(text, options()) for text in texts]
    quantizers = [static_of_one(one, "float32") for one in of]

    def by_hand(params):
        x = Decoder(config).apply({"params": params}, tokens, Products(), method=Decoder.embed)
        for layer, (one, quantizer) in enumerate(zip(of, quantizers, strict=True)):
            grids = {name: one.format(name).grid() for name, _ in quantizer.quantizers}
            block = jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"]["block"])
            x = Block(config).apply({"params": block}, x, Products(quantizer, grids))
        return jnp.mean(jnp.sin(Decoder(config).apply({"params": params}, x, Products(), method=Decoder.unembed)))

    def scanned(params):
        return jnp.mean(jnp.sin(model.apply({"params": params}, tokens, static.grids(precision, 3))))

    ours, theirs = (jax.jit(jax.value_and_grad(loss))(params) for loss in (scanned, by_hand))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


def test_the_mean_is_that_of_the_noise_and_of_one_format_its_own_bits():
    four, eight, full = map(parse_format, ("int4", "int8", "bf16"))
    assert mixture.bits(((four, 1.0),)) == 4 and mixture.bits(((parse_format("mxfp4"), 1.0),)) == 4.25
    assert mixture.bits(((full, 0.5), (parse_format("fp32"), 0.5))) == 16
    assert mixture.bits(((parse_format("ternary"), 1.0),)) == math.log2(3)
    # Half at a seventh: a step of 1/(7 √2), so 7 √2 levels.
    assert mixture.bits(((four, 0.5), (full, 0.5))) == pytest.approx(1 + math.log2(1 + 7 * math.sqrt(2)), abs=1e-6)
    mixed = mixture.bits(((four, 0.25), (eight, 0.75)))
    assert 4 < mixed < 5 < 7  # far below the mean of the bits
    # 16 x 16 x 3, 16 x 16, 16 x 48, 24 x 16 parameters: projections count by theirs.
    found = mixture.shares(parse("w4 *.down=bf16 first:1=bf16", options()), "w", CONFIG)
    down = 24 * 16 / (16 * 16 * 4 + 24 * 16 * 3)
    assert dict(found)[four] == pytest.approx((1 - down) * 3 / 4)
    assert sum(share for _, share in found) == pytest.approx(1)
    assert mixture.text(mixture.shares(parse("kv4 first:1=bf16", options()), "k", CONFIG)) == "int4:0.75+bf16:0.25"


def test_the_table_has_the_mean_and_laws_read_the_mixture():
    config = base.get_config()
    config.study.grid.some = base.grid(("25k",), (100_000,), ("w4_a8 first:1=bf16 *.down=a6",))
    (run,) = experiment.resolve(config, 256).runs
    assert run.bits("w") == pytest.approx(1 + math.log2(1 + 7 * math.sqrt(2)), abs=1e-6)
    assert run.bits("a") < 8 and run.bits("k", "v") == 16 and "_by.layer" in run.id
    row = results.setting_columns(config, run)
    assert row["layers"] == "first:1=bf16,*.down=aint6" and row["w_format"] in ("bf16:0.5+int4:0.5",)
    assert "layers=first:1=bf16,*.down=aint6" in row["precision"]
    assert cell_mixture(row["w_format"]) == (("bf16", 0.5), ("int4", 0.5)) and cell_mixture("e4m3") == (("e4m3", 1),)
    columns = {"w_format": np.array(["bf16:0.5+int4:0.5", "int4", "bf16"]), "P_w": np.array([4.4, 4.0, 16.0])}
    steps = derived.column("s_w", columns)
    step = relative_step("int4")
    np.testing.assert_allclose(steps, [step / math.sqrt(2), step, 0])
    errors = derived.column("gmse_w", columns)
    assert errors[0] == pytest.approx(errors[1] / 2) and errors[2] == 0
    with pytest.raises(laws.law.LawError, match="int4:2"):
        derived.column("s_w", {**columns, "w_format": np.array(["int4:2", "", ""])})


def test_precisions_that_differ_by_layer_alone_are_served_by_one_static_precision():
    one, other = (parse(f"w4_a4{rules}", options()) for rules in ("", " last:1=bf16 *.down=e4m3"))
    kinds = {quantizer.kind.family for _, quantizer in static_of([one, other], "float32").quantizers}
    assert kinds == {"float"}  # on whose path integers have the same bits
    wide = functools.partial(static_of, dtype="bfloat16")
    assert wide([parse("w4 first:1=w12", options())]).wide == ("a",)


@pytest.mark.slow
def test_a_model_by_blocks_has_the_formats_of_each_layer_as_the_whole_has(finished_study):
    workspace, _ = finished_study
    (group,) = workspace.experiment.cohorts
    static = group.static.evaluation()
    blocks = workspace.blocks(group.runs[0])
    losses = {}
    for text in ("a3_w4 first:1=bf16 *.down=a8", "a3_w4 last:1=bf16 *.down=a8", "a3_w4"):
        grids = static.grids(parse(text, options()), 2)
        for kind in (evaluate.WholeLoss, evaluate.BlockwiseLoss):
            held_out = kind(workspace, group.shape, static, grids, blocks.top())
            for layer in range(2):
                held_out.advance(blocks.block(layer))
            losses.setdefault(text, []).append(held_out.loss())
    for whole, by_block in losses.values():
        assert whole == pytest.approx(by_block, rel=1e-6)
    assert len({round(whole, 5) for whole, _ in losses.values()}) == 3
