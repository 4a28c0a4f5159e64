"""compressed-tensors: codes packed into int32 as by hand and as the library does, and what is refused when read."""

import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.huggingface import compressed, quantization_config
from precision_scaling.huggingface.quantization_config import KINDS, Grid


def description(names: dict[int, list[str]], group_size: int, symmetric: bool):
    return quantization_config.description(
        {Grid(bits, symmetric, group_size): layers for bits, layers in names.items()}
    )


CONFIG = description({4: ["a"]}, 8, True)
BITS = KINDS["pack-quantized"].bits


def test_words_worked_out_by_hand():
    # 4 bits: the first code in the lowest half-byte. 3 bits: the eleventh code straddles the first two words.
    np.testing.assert_array_equal(compressed.pack(np.array([[1, 2, 15]], np.uint8), 4), [[1 + 2 * 16 + 15 * 256]])
    codes = np.zeros((1, 12), np.uint8)
    codes[0, 10] = 0b101
    np.testing.assert_array_equal(compressed.pack(codes, 3), [[np.int32(0b01 << 30), 0b1]])
    assert compressed.pack(codes, 3).dtype == np.int32


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_what_is_packed_is_unpacked(bits, columns):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, columns)).astype(np.uint8)
    packed = compressed.pack(codes, bits)
    assert packed.shape == (5, -(-columns * bits // 32))
    np.testing.assert_array_equal(compressed.unpack(packed, bits, columns), codes)
    with pytest.raises(ValueError, match="words a row"):
        compressed.unpack(packed, bits, columns + 32)


@pytest.mark.parametrize("bits", BITS)
def test_the_library_packs_the_same_words(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    import torch

    levels = np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 50)).astype(np.int8)
    theirs = helpers.pack_to_int32(torch.from_numpy(levels), bits).numpy()
    ours = compressed.pack((levels.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8), bits)
    np.testing.assert_array_equal(ours, theirs)


def layer(symmetric: bool, bits: int = 4, groups: int = 2):
    rng = np.random.default_rng(0)
    low = -(2 ** (bits - 1)) if symmetric else 0
    codes = rng.integers(low, low + 2**bits, (6, 16)).astype(np.int8 if symmetric else np.uint8)
    scale = rng.random((6, groups)).astype(np.float32)
    zero = None if symmetric else rng.integers(0, 2**bits, (6, groups)).astype(np.uint8)
    return codes, scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_comes_back_as_its_kernel(bits, symmetric, groups):
    codes, scale, zero = layer(symmetric, bits, groups)
    tensors = {"norm.weight": np.ones(3, np.float32), **compressed.encoded("a", codes, scale, zero, bits)}
    found = compressed.decoded(description({bits: ["a"]}, 16 // groups if groups > 1 else 0, symmetric), tensors)
    offset = np.zeros((6, groups)) if zero is None else zero.astype(float)
    expected = (codes.astype(float).reshape(6, groups, -1) - offset[..., None]) * scale[..., None]
    assert set(found) == {"norm.weight", "a.weight"}
    np.testing.assert_allclose(found["a.weight"], expected.reshape(6, 16), rtol=1e-6)


def changed(**parts):
    return lambda tensors: {**tensors, **{f"a.{name}": value for name, value in parts.items()}}


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (lambda tensors: {k: v for k, v in tensors.items() if "scale" not in k}, "weight_scale"),
        (changed(weight_zero_point=np.zeros((1, 2), np.int32)), "has not the tensors"),
        (changed(weight_shape=np.array([6, 17], np.int64)), "are not of 6 x 17"),
        (changed(weight_shape=np.array([6, 32], np.int64)), "are not of 6 x 32"),
        (changed(weight_packed=np.zeros((6, 3), np.int32)), "words a row"),
        (changed(weight_shape=np.array([6], np.int64)), "weight_shape is"),
        (changed(weight_scale=np.ones((5, 2), np.float32)), "are not of 6 x 16"),
        (changed(weight_scale=np.ones((6, 3), np.float32)), "are not of 6 x 16"),
        (changed(weight_packed=np.zeros((6, 2), np.float32)), "float32"),
        (changed(weight_scale=np.ones((6, 4), np.float32)), "in groups of 8"),
        (lambda tensors: {"norm.weight": np.ones(2)}, "no quantized tensor"),
        (lambda tensors: {**tensors, "b.weight": np.ones((2, 2))}, r"b\.weight.*allowed is a packed one"),
        (lambda tensors: {"lm_head" + k[1:]: v for k, v in tensors.items()}, "lm_head.*allowed is none"),
    ],
)
def test_a_layer_that_does_not_fit_together_is_refused_in_one_line(tamper, said):
    tensors = compressed.encoded("a", *layer(True), 4)
    with pytest.raises(UserError, match=said) as error:
        compressed.decoded(CONFIG, tamper(tensors))
    assert "allowed is" in str(error.value) and "\n" not in str(error.value)


def grouped(**changes):
    return {**CONFIG, "config_groups": {"group_0": {**CONFIG["config_groups"]["group_0"], **changes}}}


def weights(**changes):
    return grouped(weights={**CONFIG["config_groups"]["group_0"]["weights"], **changes})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("int4", "an object"),
        ({**CONFIG, "quant_method": "awq"}, r"quant_method = 'awq'"),
        ({**CONFIG, "format": "marlin-24"}, "format = 'marlin-24'"),
        ({**CONFIG, "format": "int-quantized"}, "format = 'int-quantized'"),
        ({**CONFIG, "format": "float-quantized"}, r"type = 'int'.*'float' with float-quantized"),
        (grouped(format="float-quantized"), "format = 'float-quantized': allowed is 'pack-quantized'"),
        ({**CONFIG, "config_groups": {}}, "one group"),
        ({**CONFIG, "config_groups": {"a": {}}}, "a group with weights"),
        ({**CONFIG, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**CONFIG, "transform_config": {"config_groups": {}}}, "transform_config"),
        ({**CONFIG, "sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        ({**CONFIG, "rotated": False}, r"\.rotated = False"),
        ({**CONFIG, "ignore": "lm_head"}, "ignore"),
        ({**CONFIG, "ignore": ["re:(a+)+b"]}, "ignore"),
        ({**CONFIG, "ignore": ["re:.*.*.*.*x"]}, "ignore"),
        ({**CONFIG, "ignore": ["re:*a"]}, "ignore"),
        (grouped(targets=["re:.*q_proj"]), "targets"),
        (grouped(format="marlin-24"), "marlin-24"),
        (grouped(scale=2), "scale = 2"),
        (grouped(input_activations={"num_bits": 8}), "input_activations"),
        (weights(group_size=None), "group_size = None"),
        (weights(strategy="channel"), "group_size = 8"),
        (weights(block_structure=[128, 128]), "block_structure"),
        (weights(dynamic=True), "dynamic"),
        (weights(levels=3), "levels = 3"),
        (weights(type="float"), "'int'"),
        (weights(num_bits=1), "2 to 8"),
        (weights(num_bits=True), "2 to 8"),
        (weights(strategy="tensor"), "'channel' or 'group'"),
        (weights(actorder="group"), "actorder"),
        (weights(symmetric=1), "true or false"),
    ],
)
def test_other_formats_are_refused_with_key_value_and_allowed(config, said):
    with pytest.raises(UserError, match=said) as error:
        quantization_config.check(config)
    assert str(error.value).startswith("quantization_config") and "allowed is" in str(error.value)
    assert quantization_config.check(CONFIG) == [(["Linear"], (4, True, 8, "pack-quantized"))]


def test_a_layer_that_a_pattern_of_ignore_names_stays_as_it_is():
    plain = {"lm_head.weight": np.ones((3, 16)), "model.layers.1.mlp.down_proj.weight": np.ones((3, 16))}
    tensors = {**plain, **compressed.encoded("a", *layer(True), 4)}
    found = compressed.decoded({**CONFIG, "ignore": ["lm_head", r"re:.*layers\.1\..*down_proj$"]}, tensors)
    assert set(found) == {*plain, "a.weight"}


def test_layers_of_several_widths_are_told_by_name_and_one_of_none_or_two_is_refused():
    parts = {"a": 4, "b": 3}
    tensors: dict = {}
    for name, bits in parts.items():
        tensors |= compressed.encoded(name, *layer(True, bits), bits)
    config = description({bits: [name] for name, bits in parts.items()}, 8, True)
    found = compressed.decoded(config, tensors)
    for name, bits in parts.items():
        codes, scale, _ = layer(True, bits)
        expected = codes.reshape(6, 2, -1) * scale[..., None]
        np.testing.assert_allclose(found[f"{name}.weight"], expected.reshape(6, 16), rtol=1e-6)
    groups = config["config_groups"]
    for targets, said in ((["c"], "no group"), (["a", "re:b"], "2 groups"), (["Linear"], "targets"), ([], "targets")):
        changed = {**config, "config_groups": {**groups, "group_1": {**groups["group_1"], "targets": targets}}}
        with pytest.raises(UserError, match=said):
            compressed.decoded(changed, tensors)
