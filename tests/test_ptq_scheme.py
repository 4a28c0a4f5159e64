"""Schemes: names that tell one way of quantizing from another, and options that are checked before anything runs."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from precision_scaling.config import base
from precision_scaling.config.options import check_ptq
from precision_scaling.errors import ConfigError
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq.registry import METHODS, of_method, scheme_of
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, mlp_width=24, sequence_length=8, base_width=16, base_depth=2
)


def options(**changed):
    return {**base.get_config().ptq, **changed}


def test_a_method_with_the_default_options_goes_by_its_own_name():
    assert [of_method(method, options()).name for method in METHODS] == list(METHODS)


def test_every_option_of_a_method_is_in_its_name_and_the_others_are_not():
    everything = {"group_size": 8, "symmetric": False, "act_order": True, "clip": True, "smoothing": 0.75}
    everything = options(**everything, granularity="token")
    assert {method: of_method(method, everything).name for method in METHODS} == {
        "gptq": "gptq-group8-asymmetric-act_order-clip",
        "awq": "awq-group8-asymmetric",
        "rtn": "rtn-group8-asymmetric-clip",
        "smoothquant": "smoothquant-group8-asymmetric-clip-smoothing0.75-token",
        "kv_cache": "kv_cache-token",
    }


def test_all_levels_are_named_where_they_are_symmetric_integers():
    assert scheme_of("gptq", full_range=True, act_order=True).name == "gptq-full_range-act_order"
    assert scheme_of("rtn", full_range=True).columns["ptq_options"] == "full_range"
    for changed in ({"symmetric": False}, {"format": "e2m1"}):
        scheme = scheme_of("rtn", full_range=True, **changed)
        assert scheme.name == scheme_of("rtn", **changed).name
        assert not scheme.has_full_range(parse(changed.get("format", "int4")).kind)


def test_the_table_says_what_was_quantized():
    parts = {method: METHODS[method].parts for method in METHODS}
    assert parts == {"gptq": "w", "awq": "w", "rtn": "w", "smoothquant": "wa", "kv_cache": "kv"}
    granularity = {method: of_method(method, options(group_size=8)).weight_granularity for method in METHODS}
    assert granularity == {**dict.fromkeys(METHODS, "group:8"), "kv_cache": ""}


def test_operands_take_the_place_of_those_of_training():
    trained = StaticPrecision(
        (("w", StaticQuantizer(parse("int4").kind, "channel")), ("a", StaticQuantizer(parse("e4m3").kind, "token")))
    )
    static = scheme_of("smoothquant").static(trained)
    assert static.get("w") == trained.get("w")
    assert static.get("a") == StaticQuantizer(parse("int4").kind, "tensor")
    static = scheme_of("kv_cache", granularity="token").static(trained)
    assert static.get("a") == trained.get("a")
    assert static.get("k") == static.get("v") == StaticQuantizer(parse("int4").kind, "token")
    assert scheme_of("gptq").static(trained) == trained


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"methods": ("gptq", "magic")}, "ptq.methods"),
        ({"group_size": 1}, "ptq.group_size"),
        ({"group_size": -8}, "ptq.group_size"),
        ({"group_size": 8.0}, "ptq.group_size"),
        ({"smoothing": 1.5}, "ptq.smoothing"),
        ({"granularity": "channel"}, "ptq.granularity"),
    ],
)
def test_values_that_are_not_allowed_are_one_line(changed, key):
    with pytest.raises(ConfigError, match=key) as raised:
        check_ptq(options(**changed))
    assert "allowed is" in str(raised.value) and "\n" not in str(raised.value)


def test_groups_fit_the_inputs_of_every_projection_and_smoothing_needs_gains_to_change():
    scheme_of("gptq", group_size=8).check_model(MODEL)
    scheme_of("gptq", group_size=16).check_model(MODEL)  # the last group of 24 inputs has 8
    with pytest.raises(ConfigError, match=r"0, or at most model\.width, 16"):
        scheme_of("gptq", group_size=17).check_model(MODEL)
    with pytest.raises(ConfigError, match=r"a divisor of model\.mlp_width, 24"):  # the scale is a mean over the group
        scheme_of("rtn", group_size=16, format="ternary").check_model(MODEL)
    scheme_of("smoothquant").check_model(MODEL)
    for changed in ({"norm_placement": "post"}, {"norm_type": "layer"}):
        with pytest.raises(ConfigError, match="smoothquant with"):
            scheme_of("smoothquant").check_model(dataclasses.replace(MODEL, **changed))
        scheme_of("gptq").check_model(dataclasses.replace(MODEL, **changed))


def test_what_a_scheme_is_described_by_is_the_same_in_another_process():
    """Blocks that a killed process left are found by it."""
    scheme = scheme_of("gptq", group_size=32, clip=True)
    program = (
        "from precision_scaling.ptq.registry import scheme_of\n"
        "print(scheme_of('gptq', group_size=32, clip=True).described)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == scheme.described
    for field in dataclasses.fields(scheme):
        other = scheme_of("rtn").method if field.name == "method" else "another"
        assert dataclasses.replace(scheme, **{field.name: other}).described != scheme.described
