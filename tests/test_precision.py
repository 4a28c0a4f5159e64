"""Precision specs: presets and overrides, shorthand, contradictions in one line, and what splits a cohort."""

import jax
import pytest

from precision_scaling.config import base, experiment
from precision_scaling.errors import ConfigError
from precision_scaling.quantize import native as native_lib
from precision_scaling.quantize import parsing, presets, static
from precision_scaling.quantize.parsing import from_options, parse
from precision_scaling.quantize.static import UNQUANTIZED, static_of


def options(**leaves):
    config = base.get_config().precision
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in leaves.items()})
    return config


def resolve(*precisions, **leaves):
    config = base.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in leaves.items()})
    config.study.grid.some = base.grid(("300k",), (100_000,), precisions)
    return experiment.resolve(config, 256)


def statics(*precisions, **leaves):
    return [
        sorted(run.precision.describe() for run in cohort.runs) for cohort in resolve(*precisions, **leaves).cohorts
    ]


PAPER = {"w": "int4/channel/nearest", "a": "int4/tensor/nearest", "k": "int4/tensor/nearest"}


def test_the_default_is_the_papers_setting_with_nothing_quantized():
    precision = from_options(options())
    assert (
        precision == from_options(options(preset="paper"))
        and precision.describe() == "bf16"
        and precision.bits("w", "a") == 16
    )
    assert static_of([precision], "float32") == UNQUANTIZED
    precision = from_options(options(weights="int4", activations="4", k=" INT4 "))
    assert {name: str(setting) for name, setting in precision.quantizers} == PAPER
    assert not precision.exact and not precision.native and not precision.rotated


def test_presets_say_what_their_names_say():
    described = {name: from_options(options(preset=name)).describe() for name in presets.PRESETS}
    assert described["qat"] == "w=int4/channel/nearest"
    assert described["low_precision"].split() == ["w=int8/channel/nearest"] + [
        f"{name}=int8/tensor/nearest" for name in "akv"
    ]
    per_tensor = "w=e4m3fn/tensor/nearest a=e4m3fn/tensor/nearest g_w=e5m2/tensor/nearest g_a=e5m2/tensor/nearest"
    assert described["fp8"] == per_tensor
    assert described["int8_full"].split()[:3] == [
        "w=int8/channel/nearest",
        "a=int8/token/nearest",
        "g_w=int8/vector/stochastic",
    ]
    for name, size in (("mxfp4", 32), ("nvfp4", 16)):
        words = dict(word.split("=") for word in described[name].split())
        assert set(words) == {"w", "a", "g_w", "s_w", "g_a", "s_a"}
        assert all(word.startswith(f"{name}/group:{size}/") for word in words.values())
        assert {side for side, word in words.items() if word.endswith("stochastic")} == {"g_w", "g_a"}


def test_leaves_override_presets_one_by_one():
    precision = from_options(options(preset="fp8", weights="bf16", backward__weights_gradient="int6/vector/stochastic"))
    assert precision.describe().split() == [
        "a=e4m3fn/tensor/nearest",
        "g_w=int6/vector/stochastic",
        "g_a=e5m2/tensor/nearest",
    ]
    precision = from_options(options(preset="qat", weights_granularity="group:32", weights_rounding="stochastic"))
    assert precision.describe() == "w=int4/group:32/stochastic"
    precision = from_options(options(attention_granularity="token", q="int8", v="e4m3/channel", mode="simulated"))
    assert precision.describe() == "q=int8/token/nearest v=e4m3/channel/nearest"


def test_shorthand_names_parts_presets_and_details():
    default = options()
    assert parse("w4_a8_kv3", default).describe().split() == [
        "w=int4/channel/nearest",
        "a=int8/tensor/nearest",
        "k=int3/tensor/nearest",
        "v=int3/tensor/nearest",
    ]
    assert parse("we2m1/group:16_p6", default).describe() == "w=e2m1/group:16/nearest p=int6/tensor/nearest"
    assert parse("a8/token/stochastic", default).describe() == "a=int8/token/stochastic"
    assert parse("int8_full", default) == from_options(options(preset="int8_full"))
    assert parse("low_precision_kv4_w3", default).bits("k", "v") == 4
    assert parse("low_precision_kv4_w3", default).bits("w") == 3
    assert parse("g5", default).describe() == "g_w=int5/tensor/nearest g_a=int5/tensor/nearest"
    # What shorthand leaves out is as the config has it; "bf16" is nothing quantized at all.
    assert parse("a8", options(weights="int4")).bits("w") == 4
    assert parse("bf16", options(preset="fp8", embedding="int8")).describe() == "bf16"


def test_head_and_embedding_are_parts_of_their_own():
    precision = from_options(options(weights="int4", embedding="int8", head_weights="int6"))
    assert precision.describe() == "w=int4/channel/nearest e=int8/token/nearest head_w=int6/channel/nearest"
    assert static_of([precision], "float32").get("e").granularity == "token"


def test_the_saved_operand_is_the_forward_one_the_exact_one_or_has_a_format():
    for value, described in (("forward", ""), ("exact", " s_a=exact"), ("int6", " s_a=int6/tensor/nearest")):
        precision = from_options(options(weights="int4", backward__activations_saved=value))
        assert precision.describe() == "w=int4/channel/nearest" + described
    # The exact operand is the forward one where that is not quantized.
    assert from_options(options(weights="int4", backward__weights_saved="exact")).exact == ()


@pytest.mark.parametrize(
    ("leaves", "words"),
    (
        ({"preset": "fp9"}, ("precision.preset", "fp9", "int8_full")),
        ({"weights": "e9m9"}, ("precision.weights", "e9m9", "eXmY")),
        ({"weights": "int1"}, ("precision.weights", "int1", "2 to 15")),
        ({"k": "int0"}, ("precision.k", "int0")),
        ({"weights": "int4/row"}, ("precision.weights", "int4/row", "channel", "group:g")),
        ({"weights": "int4/token"}, ("precision.weights", "int4/token", "channel")),
        ({"weights": "int4/group:0"}, ("precision.weights", "group:0")),
        ({"weights": "int4/tensor/channel"}, ("precision.weights", "int4/tensor/channel")),
        ({"weights_granularity": "token"}, ("precision.weights_granularity", "token", "channel")),
        ({"attention_granularity": "block"}, ("precision.attention_granularity", "block", "tensor")),
        ({"activations_rounding": "up"}, ("precision.activations_rounding", "up", "stochastic")),
        ({"weights": "mxfp4", "weights_granularity": "group:16"}, ("mxfp4", "group:16", "group:32")),
        ({"weights": "mxfp4/channel"}, ("precision.weights", "mxfp4", "channel", "group:32")),
        ({"backward__q_gradient": "forward"}, ("precision.backward.q_gradient", "forward")),
        ({"backward__q_saved": "none"}, ("precision.backward.q_saved", "none")),
        ({"rotation": "yes"}, ("precision.rotation", "yes", "hadamard")),
        ({"mode": "fast"}, ("precision.mode", "fast", "native")),
        ({"weights": "int4", "mode": "native"}, ("precision.mode", "native", "activations = bf16")),
        ({"preset": "mxfp4", "mode": "native"}, ("precision.mode", "weights = mxfp4", "int8")),
        ({"preset": "low_precision", "k": "bf16", "v": "bf16", "weights": "int12", "mode": "native"}, ("int12",)),
        ({"preset": "fp8", "activations": "int8", "mode": "native"}, ("two kinds", "both fp8")),
        (
            {"weights": "int8/group:32", "activations": "int8", "mode": "native"},
            ("weights = int8/group:32", "constant along the contraction"),
        ),
        (
            {"weights": "int8", "activations": "int8", "backward__activations_gradient": "int8", "mode": "native"},
            ("activations_saved = forward", "granularity tensor for weights"),
        ),
        ({"embedding": "int8", "mode": "native"}, ("embedding", "look-up")),
    ),
)
def test_mistakes_are_one_line_with_key_value_and_what_is_allowed(leaves, words):
    with pytest.raises(ConfigError) as caught:
        from_options(options(**leaves))
    message = str(caught.value)
    assert "\n" not in message and "allowed is" in message
    assert all(word in message for word in words), message


def test_a_part_is_named_once_beside_what_a_preset_says():
    default = options()
    for text in ("w4_w5", "kv4_k3", "k3_kv4", "g4_g8", "qat_w5_w6"):
        with pytest.raises(ConfigError, match="twice"):
            parse(text, default)
    assert parse("qat_w5", default).describe() == "w=int5/channel/nearest"
    assert parse("w5", options(preset="qat", weights="int3")).describe() == "w=int5/channel/nearest"
    assert parse("k3_v4", default).describe() == "k=int3/tensor/nearest v=int4/tensor/nearest"
    assert parse("wmxfp6_e3m2_a8", default).describe() == "w=mxfp6_e3m2/group:32/nearest a=int8/tensor/nearest"


@pytest.mark.parametrize("text", ("x4", "w", "w4__a4", "fp8x", "w4_", "", "_w4", "wint1", "fp8_", "w4/token"))
def test_shorthand_that_says_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="allowed is"):
        parse(text, options())


@pytest.mark.parametrize(
    ("leaves", "key", "words"),
    (
        ({"weights": "int4/group:64"}, "precision.weights", ("group:64", "model.width, 96")),
        ({"activations": "mxfp4", "size": "1M"}, "precision.activations", ("group:32", "model.width, 144")),
        ({"k": "int4/group:24"}, "precision.k", ("the head dimension, 32",)),
        ({"v": "int4/group:24"}, "precision.v", ("model.sequence_length, 64",)),
        (
            {"backward__activations_gradient": "int8/group:64"},
            "activations_gradient",
            ("queries, keys and values, 288",),
        ),
        ({"backward__weights_saved": "int8/group:100"}, "weights_saved", ("tokens of a microbatch, 512",)),
        ({"embedding": "int8/group:5"}, "precision.embedding", ("model.width, 96",)),
    ),
)
def test_groups_that_do_not_divide_are_refused_before_anything_compiles(leaves, key, words):
    config = base.get_config()
    config.model.size = leaves.pop("size", "300k")
    config.train.microbatches = 2
    config.precision.update_from_flattened_dict({name.replace("__", "."): value for name, value in leaves.items()})
    with pytest.raises(ConfigError) as caught:
        experiment.resolve(config, 256)
    assert key in str(caught.value) and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_formats_of_one_family_share_a_cohort_and_what_is_static_splits_it():
    together = statics("bf16", "w4", "w8", "a3", "kv6", "we3m2", "w4_a4_kv4")
    assert len(together) == 1 and len(together[0]) == 7
    assert len(statics("w4", "wmxfp4")) == 2  # kinds of format
    assert len(statics("wmxfp4", "wmxfp8", "bf16")) == 1
    assert len(statics("w4", "w4/group:32")) == 2  # granularity
    assert len(statics("a4", "a4/tensor/stochastic")) == 2  # rounding
    assert len(statics("w4", "fp8")) == 2  # a scale per channel, and per tensor
    assert len(statics("wternary", "wbinary")) == 2
    assert len(statics("w4", "w8", precision__mode="native", precision__activations="int8")) == 1
    assert len(statics("bf16", "w8_a8", precision__mode="native")) == 2  # nothing passes through a native product


def test_runs_that_save_other_operands_are_never_compiled_together():
    own = parse("w4", options(backward__activations_saved="int6"))
    exact = parse("w4", options(backward__activations_saved="exact"))
    forward, nothing = parse("w4", options()), parse("bf16", options())
    for one, other in ((own, exact), (own, forward), (exact, forward)):
        assert static_of([one, other], "float32") is None
    for one in (own, exact, forward):
        assert static_of([one, nothing], "float32") is not None


def test_long_significands_get_float32_products_in_bf16_models_alone():
    assert len(statics("w4", "w8", "w9", "w12", "bf16")) == 1
    split = statics("w4", "w8", "w9", "w12", "bf16", model__dtype="bfloat16")
    assert sorted(map(len, split)) == [2, 3]
    wide = static_of([parse("kv10", options())], "bfloat16")
    assert wide.wide == ("q", "p")
    assert [
        fmt for fmt in ("int8", "int9", "e5m6", "e4m7", "mxint8") if static.is_wide(parsing.formats.parse(fmt))
    ] == [
        "int9",
        "e4m7",
    ]


def test_cohorts_do_not_depend_on_the_order_of_the_grid():
    texts = ["w4", "bf16", "wmxfp4", "a3", "w4/group:32", "fp8"]
    assert sorted(statics(*texts)) == sorted(statics(*reversed(texts)))


def test_runs_that_differ_in_precision_alone_have_names_of_their_own():
    texts = ("bf16", "w4", "w4/group:32", "w4/channel/stochastic", "a4", "fp8", "int8_full", "w4_g8", "mxfp4")
    runs = resolve(*texts).runs
    assert len({run.id for run in runs}) == len(texts)
    assert all("/" not in run.id and " " not in run.id for run in runs)
    assert len(resolve("w4", "wint4", "w4/channel").runs) == 1
    # What has no effect changes no name.
    assert resolve("bf16").runs[0].id == resolve("bf16", precision__weights_granularity="tensor").runs[0].id


def test_tables_hold_the_grids_of_the_program_and_let_formats_be_replaced():
    precision = parse("w4_a8", options())
    static = static_of([precision, parse("k3", options())], "float32")
    table = static.grids(precision, 3)
    assert {name: grid.max_value.shape for name, grid in table.items()} == {"w": (3, 4), "a": (3, 4), "k": (3, 1)}
    assert (table["w"].max_value == 7).all() and (table["a"].max_value == 127).all()
    assert (table["k"].passthrough == 1).all()
    assert (static.grids(precision, 3, w="bf16")["w"].passthrough == 1).all()


def test_native_fp8_names_the_device_that_has_none():
    precision = from_options(options(preset="fp8", mode="native"))
    with pytest.raises(ConfigError) as caught:
        native_lib.check_device(precision, jax.devices("cpu")[0])
    assert all(word in str(caught.value) for word in ("precision.mode", "e4m3fn", "cpu", "8.9"))
    native_lib.check_device(from_options(options(preset="int8_full", mode="native")), jax.devices("cpu")[0])
    native_lib.check_device(from_options(options(preset="fp8")), jax.devices("cpu")[0])


def test_every_preset_resolves_and_its_native_form_where_there_is_one():
    for name in presets.PRESETS:
        assert resolve(name).cohorts
    native = {name for name in presets.PRESETS if name != "paper" and _is_native(name)}
    assert native == {"fp8", "int8_full", "nvfp4", "mxfp8_train"}


def _is_native(preset):
    try:
        return from_options(options(preset=preset, mode="native")).native
    except ConfigError:
        return False


@pytest.mark.slow
def test_commands_take_presets_and_leaves_and_show_the_split(run_command, tmp_path):
    path = tmp_path / "study.py"
    path.write_text(
        "from configs import base\n"
        "def get_config():\n"
        "    c = base.get_config()\n"
        "    c.study.grid.all = base.grid(('300k',), (100_000,), ('bf16', 'w4', 'fp8', 'mxfp4'))\n"
        "    return c\n"
    )
    command = ("precision_scaling.study", f"--config={path}", f"--workdir={tmp_path}", "--dry_run")
    done = run_command(*command, "--config.precision.backward.weights_gradient=int8/vector/stochastic")
    assert done.returncode == 0, done.stderr
    assert "4 runs in 3 cohorts" in done.stdout
    assert "g_w (int, vector, stochastic)" in done.stdout and "w (block, group:32)" in done.stdout
    for option, words in (
        ("--config.precision.preset=int4", ("precision.preset", "'int4'", "mxfp4")),
        ("--config.precision.weights=e9m9", ("precision.weights", "e9m9")),
    ):
        failed = run_command(*command, option)
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1
        assert all(word in failed.stderr for word in words), failed.stderr
