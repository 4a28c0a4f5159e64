"""Floats of compressed-tensors: bytes by hand and by the library, kernels that come back, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.huggingface import compressed, compressed_floats, quantization_config
from precision_scaling.huggingface.quantization_config import FLOAT, KINDS, MXFP4, MXFP6, MXFP8, NVFP4, Grid
from precision_scaling.numerics import bit_patterns
from precision_scaling.numerics.formats import parse

FP8 = ml_dtypes.float8_e4m3fn
GRIDS = {
    "channel": Grid(8, True, 0, FLOAT),
    "grouped": Grid(8, True, 16, FLOAT),
    NVFP4: Grid(4, True, 16, NVFP4),
    MXFP4: Grid(4, True, 32, MXFP4),
    MXFP6: Grid(6, True, 32, MXFP6),
    MXFP8: Grid(8, True, 32, MXFP8),
}


def layer(grid: Grid, rows=6, columns=64):
    """(bit patterns, scales as they are stored, scale of the tensor, the kernel in float64)."""
    rng, stored = np.random.default_rng(0), compressed_floats.STORED[grid.format]
    element = parse(stored.element)
    value = rng.choice(element.values(), (rows, columns)).astype(np.float32)
    shape, tensor_scale = (rows, columns // (grid.group_size or columns)), None
    if stored.scale == "e8m0":
        scale = rng.integers(110, 135, shape).astype(np.uint8)
        exact = 2.0 ** (scale.astype(np.float64) - 127)
    elif stored.scale:
        scale, tensor_scale = rng.integers(1, 127, shape).astype(np.uint8), np.float32(0.0123)
        exact = scale.view(FP8).astype(np.float64) * tensor_scale
    else:
        scale = exact = rng.random(shape).astype(np.float32)
    kernel = value.reshape(*shape, -1) * exact[..., None]
    return bit_patterns.encode(value, element), scale, tensor_scale, kernel.reshape(rows, columns)


def tensors_of(grid: Grid):
    codes, scale, tensor_scale, _ = layer(grid)
    return compressed_floats.encoded("a", codes, scale, tensor_scale, grid)


def test_bytes_worked_out_by_hand():
    # 1 and -6 of e2m1 are 0b0010 and 0b1111, the first in the lower half; four codes of six bits are three bytes.
    pair = np.array([[0b0010, 0b1111]], np.uint8)
    found = compressed_floats.encoded("a", pair, np.array([[0x38]], np.uint8), np.float32(0.25), GRIDS[NVFP4])
    assert {name: value.tolist() for name, value in found.items()} == {
        "a.weight_packed": [[0b11110010]],
        "a.weight_scale": [[1.0]],
        "a.weight_global_scale": [4.0],
    }
    assert found["a.weight_scale"].dtype == FP8 and found["a.weight_global_scale"].dtype == np.float32
    four = np.array([[0b000001, 0b100010, 0b000011, 0b110000]], np.uint8)
    found = compressed_floats.encoded("a", four, np.array([[127]], np.uint8), None, GRIDS[MXFP6])
    assert found["a.weight_packed"].tolist() == [[0b10000001, 0b00111000, 0b11000000]]


@pytest.mark.parametrize("name", GRIDS)
def test_a_layer_comes_back_as_its_kernel(name):
    grid, tensors = GRIDS[name], {"norm.weight": np.ones(3, np.float32), **tensors_of(GRIDS[name])}
    config = quantization_config.description({grid: ["a"]})
    assert quantization_config.check(config) == [(["Linear"], grid)]
    found = compressed.decoded(config, tensors)
    assert set(found) == {"norm.weight", "a.weight"} and found["a.weight"].dtype == np.float32
    np.testing.assert_allclose(found["a.weight"], layer(grid)[3], rtol=3e-7)


@pytest.mark.parametrize("name", GRIDS)
def test_the_library_reads_the_kernel_and_writes_the_same_tensors(name):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    import torch

    grid = GRIDS[name]
    group = quantization_config.description({grid: ["a"]})["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(**group)
    compressor = compressors.BaseCompressor.get_value_from_registry(grid.format)
    ours = {key.removeprefix("a."): as_torch(value) for key, value in tensors_of(grid).items()}
    kernel = layer(grid)[3]
    found = compressor.decompress(ours, scheme)["weight"].to(torch.float32).numpy()
    # But for fp8 it makes the kernel in bfloat16, which holds those of MX.
    np.testing.assert_allclose(found, kernel, rtol=2**-8 if name == NVFP4 else 3e-7)
    scale = ours["weight_scale"]
    if scale.dtype == torch.uint8:
        scale = 2.0 ** (scale.to(torch.float32) - 127)
    state = {"weight": torch.from_numpy(kernel.astype(np.float32)), "weight_scale": scale.to(torch.float32)}
    state |= {"weight_global_scale": ours["weight_global_scale"]} if grid.format == NVFP4 else {}
    written = compressor.compress(state, scheme)
    assert set(written) == set(ours)
    for key, tensor in written.items():
        raw = lambda x: x.view(torch.uint8).numpy()
        zero = key == "weight_packed"  # of a zero it may take the sign from elsewhere
        if not zero:
            np.testing.assert_array_equal(raw(tensor), raw(ours[key]), err_msg=key)
    again = compressor.decompress(written, scheme)["weight"].to(torch.float32).numpy()
    np.testing.assert_array_equal(again, found)


def as_torch(array):
    import torch

    if array.dtype == FP8:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(array))


def test_one_scale_for_a_whole_layer_is_read():
    grid, config = Grid(8, True, -1, FLOAT), quantization_config.description({GRIDS["channel"]: ["a"]})
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    assert quantization_config.check(config) == [(["Linear"], grid)]
    codes = layer(GRIDS["channel"])[0]
    tensors = {"a.weight": codes.view(FP8), "a.weight_scale": np.float32([0.5])}
    np.testing.assert_array_equal(
        compressed.decoded(config, tensors)["a.weight"], codes.view(FP8).astype(np.float32) / 2
    )


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(part)}


def changed(**parts):
    return lambda tensors: {**tensors, **{f"a.{name}": value for name, value in parts.items()}}


U8, F32 = np.uint8, np.float32


@pytest.mark.parametrize(
    ("name", "tamper", "said"),
    [
        (NVFP4, without("weight_global_scale"), "has no weight_global_scale"),
        (NVFP4, without("weight_packed"), "has no weight_packed"),
        (NVFP4, without("weight_scale"), "has no weight_scale"),
        (NVFP4, changed(weight_global_scale=F32([0])), "not one float32 above 0"),
        (NVFP4, changed(weight_global_scale=F32([np.inf])), "not one float32 above 0"),
        (NVFP4, changed(weight_global_scale=F32([1, 1])), "not one float32 above 0"),
        (NVFP4, changed(weight_scale=np.ones((6, 4), F32)), "weight_scale is of float32"),
        (NVFP4, changed(weight_scale=np.ones((6, 2), FP8)), "not of 6 x 64 in groups of 16"),
        (NVFP4, changed(weight_packed=np.zeros((6, 16), U8)), "not of 6 x 32 in groups of 16"),
        (NVFP4, changed(weight_packed=np.zeros((6, 32), np.int32)), "weight_packed is int32"),
        (NVFP4, changed(weight_packed=np.zeros((6, 0), U8)), "not of 6 x 0"),
        (MXFP4, changed(weight_scale=np.ones((6, 2), FP8)), "weight_scale is of float8_e4m3fn, not uint8"),
        (MXFP6, changed(weight_packed=np.zeros((6, 47), U8)), "no whole codes of 6 bits"),
        (MXFP8, changed(weight=np.zeros((6, 64), U8)), "weight is uint8"),
        ("channel", changed(weight=np.zeros((6, 64), F32)), "weight is float32"),
        ("channel", changed(weight_scale=np.ones((6, 2), F32)), "not of 6 x 64"),
        ("channel", changed(weight_scale=np.ones(6, F32)), "not of 6 x 64"),
        ("channel", without("weight_scale"), "no quantized tensor"),
        ("grouped", changed(weight_scale=np.ones((6, 1), F32)), "in groups of 16"),
        ("channel", lambda tensors: {**tensors, "b.weight": np.ones((2, 2), F32)}, r"b\.weight.*lacks it"),
    ],
)
def test_a_layer_that_does_not_fit_together_is_refused_in_one_line(name, tamper, said):
    config = quantization_config.description({GRIDS[name]: ["a"]})
    with pytest.raises(UserError, match=said) as error:
        compressed.decoded(config, tamper(tensors_of(GRIDS[name])))
    assert "allowed is" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (NVFP4, {"num_bits": 8}, "num_bits = 8: allowed is 4 with nvfp4"),
        (NVFP4, {"type": "int"}, "type = 'int'"),
        (NVFP4, {"strategy": "group"}, "strategy = 'group': allowed is 'tensor_group'"),
        (NVFP4, {"group_size": 32}, "group_size = 32: allowed is 16"),
        (NVFP4, {"symmetric": False}, "symmetric = False: allowed is true"),
        (NVFP4, {"scale_dtype": "torch.uint8"}, "scale_dtype = 'torch.uint8'"),
        (MXFP4, {"strategy": "tensor_group"}, "strategy"),
        (MXFP4, {"group_size": 16}, "group_size = 16: allowed is 32"),
        (MXFP8, {"scale_dtype": "torch.float32"}, "scale_dtype"),
        ("channel", {"strategy": "block", "block_structure": [128, 128]}, "strategy = 'block'"),
        ("channel", {"num_bits": 4}, "num_bits = 4: allowed is 8"),
        ("channel", {"dynamic": True}, "dynamic"),
        ("channel", {"scale_dtype": "torch.uint8"}, "scale_dtype"),
    ],
)
def test_what_a_format_does_not_say_is_refused_with_key_value_and_allowed(name, changes, said):
    config = quantization_config.description({GRIDS[name]: ["a"]})
    config["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(UserError, match=said) as error:
        quantization_config.check(config)
    assert str(error.value).startswith("quantization_config") and "allowed is" in str(error.value)


def test_layers_of_several_formats_are_read_by_their_groups():
    grids = {name: GRIDS[name] for name in (NVFP4, "channel")}
    tensors, groups = {}, {}
    for i, (name, grid) in enumerate(grids.items()):
        layers = {key.replace("a.", f"{'ab'[i]}."): value for key, value in tensors_of(grid).items()}
        tensors |= layers
        (group,) = quantization_config.description({grid: ["a"]})["config_groups"].values()
        groups[name] = {**group, "targets": ["ab"[i]]}
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    found = compressed.decoded(config, tensors)
    for letter, grid in zip("ab", grids.values(), strict=True):
        np.testing.assert_allclose(found[f"{letter}.weight"], layer(grid)[3], rtol=3e-7)
    nameless = {name: {key: value for key, value in group.items() if key != "format"} for name, group in groups.items()}
    with pytest.raises(UserError, match="format = 'mixed-precision': allowed is one of pack-quantized"):
        quantization_config.check({**config, "config_groups": nameless})


def test_our_formats_have_the_librarys_names_or_none():
    names = {name: compressed_floats.stored_as(parse(name)) for name in ("e4m3", "e4m3fn", "nvfp4", "nvfp4_4over6")}
    assert names == {"e4m3": FLOAT, "e4m3fn": FLOAT, "nvfp4": NVFP4, "nvfp4_4over6": NVFP4}
    names = {name: compressed_floats.stored_as(parse(name)) for name in ("mxfp4", "mxfp6", "mxfp8", "mxfp8_up")}
    assert names == {"mxfp4": MXFP4, "mxfp6": MXFP6, "mxfp8": MXFP8, "mxfp8_up": MXFP8}
    others = ("e2m1", "e5m2", "nvint4", "mxint8", "mxfp6_e3m2", "mxfp8_e5m2", "ternary", "int4", "bf16")
    assert not any(compressed_floats.stored_as(parse(name)) for name in others)
    assert set(KINDS) == {"pack-quantized", *compressed_floats.STORED}
