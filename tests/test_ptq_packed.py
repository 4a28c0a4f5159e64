"""Quantized checkpoints: bits packed without gaps, the same kernels after reading, and the size that was predicted."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import init as init_model
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import apply, codes, packed, rtn
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer
from precision_scaling.runtime import files, paths
from precision_scaling.runtime.sharding import local_layout
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import StepConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(
    vocab_size=31, width=16, depth=2, heads=2, mlp_width=24, sequence_length=8, base_width=16, base_depth=2
)
PROGRAM = StaticPrecision((("a", StaticQuantizer(parse("int4").kind, "tensor")),))
STATIC = StepConfig(MODEL, PROGRAM, OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1))
SCHEMES = {
    "gptq": scheme_of("gptq"),
    "awq": scheme_of("awq", group_size=8),
    "rtn": scheme_of("rtn", group_size=4, symmetric=False),
    "full_range": scheme_of("rtn", group_size=8, full_range=True),
    "act_order": scheme_of("gptq", group_size=7, symmetric=False, act_order=True, clip=True),
}
SLOW = pytest.mark.slow
EACH = ["rtn", *(pytest.param(name, marks=SLOW) for name in ("gptq", "awq", "full_range", "act_order"))]


@pytest.fixture(scope="module")
def quantized():
    @functools.cache
    def at(name):
        params = jax.jit(lambda: init_model(MODEL, jax.random.key(0)))()
        tokens = np.random.default_rng(0).integers(0, 31, (6, 8)).astype(np.int32)
        grids = {"a": parse(16).grid()}
        options = {"scheme": SCHEMES[name], "batch_size": 6, "layout": local_layout()}
        models, _ = apply.quantize_model(STATIC, params, grids, tokens, (3, 4), 0.01, **options)
        return dict(zip((3, 4), models, strict=True))

    return at


def test_two_int4_share_a_byte_and_three_bits_leave_no_gap():
    # By hand: 0b0010 and -1 = 0b1111; then 001, 110, 011 of -2 and 3 from the lowest bit up.
    np.testing.assert_array_equal(packed.pack(np.array([2, -1, 7], np.int8), 4), [0b11110010, 0b0111])
    np.testing.assert_array_equal(packed.pack(np.array([1, -2, 3], np.int8), 3), [0b11_110_001, 0b0])
    np.testing.assert_array_equal(packed.pack(np.array([255, 0, 128], np.uint8), 8), [255, 0, 128])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_every_integer_comes_back_from_the_fewest_bytes(bits, dtype):
    low = -(2 ** (bits - 1)) if dtype == np.int8 else 0
    values = np.random.default_rng(bits).integers(low, low + 2**bits, (13, 5, 3)).astype(dtype)
    stream = packed.pack(values, bits)
    assert stream.dtype == np.uint8 and stream.shape == (math.ceil(13 * 5 * 3 * bits / 8),)
    found = packed.unpack(stream, bits, values.shape, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_kernels_are_the_same_bit_for_bit_after_reading(name, quantized, tmp_path):
    model = quantized(name)[3]
    packed.save(tmp_path / "q", model, name, 3, ("a",))
    loaded = packed.load(tmp_path / "q")
    assert (loaded.method, loaded.bits, loaded.operands) == (name, 3, ("a",))
    before, after = codes.parameters(model), codes.parameters(loaded.model)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert jax.tree.structure(before) == jax.tree.structure(after)


@pytest.mark.parametrize("name", EACH)
def test_stored_integers_need_no_more_than_their_bits(name, quantized):
    symmetric = SCHEMES[name].symmetric
    for bits, model in quantized(name).items():
        for found in jax.tree.leaves(model.kernels, is_leaf=lambda x: isinstance(x, codes.Codes)):
            values = np.asarray(found.codes)
            assert values.dtype == (np.int8 if symmetric else np.uint8)
            lowest = -(2 ** (bits - 1)) + (not SCHEMES[name].full_range) if symmetric else 0
            assert values.min() >= lowest and values.max() <= (2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)
            assert not SCHEMES[name].full_range or values.min() == lowest
            assert symmetric == (found.zeros is None)
            assert symmetric or np.max(found.zeros) <= 2**bits - 1


def test_size_is_worked_out_from_bits_groups_and_shapes(quantized):
    width, hidden, layers = 16, 24, 2
    weights = {"qkv": (width, 3 * width), "out": (width, width)}
    weights |= {"gate_up": (width, 2 * hidden), "down": (hidden, width)}
    kept = 4 * (2 * 31 * width + width + layers * 2 * width)  # embedding, head and norms in float32
    for bits in (3, 4):
        channel = sum(math.ceil(i * o * bits / 8) + 4 * o for i, o in weights.values())
        assert packed.packed_bytes(quantized("gptq")[bits], bits) == kept + layers * channel
        grouped = sum(
            math.ceil(i * o * bits / 8) + i // 4 * o * 4 + math.ceil(i // 4 * o * bits / 8) for i, o in weights.values()
        )
        assert packed.packed_bytes(quantized("rtn")[bits], bits) == kept + layers * grouped
    parameters = sum(i * o for i, o in weights.values())
    outputs = sum(o for _, o in weights.values())
    assert codes.stored_bits(quantized("gptq")[4], 4) == pytest.approx(4 + 32 * outputs / parameters)
    # A group of 4 has a scale of 32 bits and a zero of 4 bits.
    assert codes.stored_bits(quantized("rtn")[4], 4) == pytest.approx(4 + (32 + 4) / 4)


# Options of the scheme, bits of a code, bytes of a scale and of the tensor's.
FORMATS = {
    "e4m3": ({}, 8, 4, 0),
    "e2m1": ({"group_size": 24}, 4, 4, 0),  # of 64 inputs the last group has 16
    "nvfp4": ({}, 4, 1, 4),
    "nvfp4_4over6": ({}, 4, 1, 4),
    "nvint4": ({}, 4, 1, 4),
    "mxfp4": ({}, 4, 1, 0),
    "mxfp6": ({}, 6, 1, 0),
    "mxint8": ({}, 8, 1, 0),
    "ternary": ({}, 2, 4, 0),
    "int4": ({}, 4, 4, 0),
}


@functools.cache
def in_format(name):
    """A model of two kernels of two layers, one of them with a block that underflows and a block of zeros."""
    rng, scheme, fmt = np.random.default_rng(0), scheme_of("rtn", **FORMATS[name][0]), parse(name)

    def rounded(kernel):
        found = rtn.solve(kernel.reshape(64, -1), fmt.grid(), fmt.kind, scheme, None)
        arrays = found.code_IxO, found.scale_GxO, found.zero_GxO, True, kernel.shape, None
        return codes.encode(*arrays, fmt.family == "int", scheme.group_size)

    kernels = {}
    for projection, features in (("gate_up", (2, 24)), ("down", (32,))):
        kernel = rng.normal(size=(2, 64, *features)).astype(np.float32)
        kernel[0, :32] *= 1e-7
        kernel[1, :32] = 0
        kernels[projection] = jax.vmap(rounded)(kernel)
    rest = {"layers": {"block": {"norm": np.ones((2, 64), np.float32)}}}
    return codes.QuantizedModel({"mlp": kernels}, rest)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["e4m3", "nvfp4", *(pytest.param(name, marks=SLOW) for name in FORMATS if name not in ("e4m3", "nvfp4"))]
)
def test_every_format_comes_back_bit_for_bit_and_takes_its_bits(name, tmp_path):
    model = in_format(name)
    packed.save(tmp_path / "q", model, f"rtn-{name}", 4 if name == "int4" else name)
    loaded = packed.load(tmp_path / "q")
    assert loaded.bits == (4 if name == "int4" else name)
    before, after = (codes.parameters(one)["layers"]["block"]["mlp"] for one in (model, loaded.model))
    # Formats that have one zero keep no sign of it.
    bits = np.asarray if name in ("mxint8", "nvint4") else lambda x: np.asarray(x).view(np.uint32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), before, after)
    _, code, scale, tensor = FORMATS[name]
    sizes = [(64 * 48, model.kernels["mlp"]["gate_up"]), (64 * 32, model.kernels["mlp"]["down"])]
    extra = sum(2 * tensor + scale * found.scales.size + 8 * (found.group_size is not None) for _, found in sizes)
    assert packed.packed_bytes(model, loaded.bits) == 4 * 2 * 64 + sum(2 * n * code // 8 for n, _ in sizes) + extra
    groups = sum(8 * (2 * tensor + scale * found.scales.size) for _, found in sizes)
    assert codes.stored_bits(model, loaded.bits) == pytest.approx(code + groups / (2 * 64 * 80))
    described = files.read_sealed(tmp_path / "q" / paths.DESCRIPTION)
    assert described["version"] == (1 if name == "int4" else 3)  # what was written of integers before is as it was
    arrays = described["arrays"]["kernels"]["mlp"]["down"]
    assert arrays["codes"] == f"uint8[2, {64 * 32 * code // 8}]"
    assert ("tensor_scale" in arrays) == bool(tensor) and arrays["scales"].startswith("uint8") == (scale == 1)


def test_formats_by_projection_and_those_that_cannot_be_packed(tmp_path):
    kernels = {
        "gate_up": in_format("nvfp4").kernels["mlp"]["gate_up"],
        "down": in_format("int4").kernels["mlp"]["down"],
    }
    wanted = {("mlp", "gate_up"): parse("nvfp4"), ("mlp", "down"): parse(4)}
    layer = lambda i: {"mlp": jax.tree.map(lambda x: np.asarray(x[i]), kernels)}
    blocks = [packed.pack_block(layer(i), {"norm": np.ones(64, np.float32)}, wanted) for i in (0, 1)]
    packed.save_blocks(tmp_path / "q", blocks, {}, "rtn", (wanted, wanted))
    loaded = packed.load(tmp_path / "q")
    assert loaded.bits == {"mlp": {"gate_up": ["nvfp4"] * 2, "down": [4] * 2}}
    for name, expected in kernels.items():
        found = loaded.model.kernels["mlp"][name]
        jax.tree.map(np.testing.assert_array_equal, *(jax.vmap(codes.dequantize)(one) for one in (found, expected)))
    with pytest.raises(UserError, match="a kernel in e2m1 has values that are none of e2m1"):
        packed.save(tmp_path / "r", in_format("e4m3"), "rtn", "e2m1")


def random_model(bits, width=256):
    """Codes and weights that no compression makes smaller."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**bits, (2, width, width)).astype(np.uint8)
    scales = rng.integers(1, 2**31, (2, width // 32, width)).astype(np.uint32).view(np.float32)
    zeros = rng.integers(0, 2**bits, (2, width // 32, width)).astype(np.uint8)
    rest = {"layers": {"block": {"norm": np.ones((2, width), np.float32)}}}
    return codes.QuantizedModel({"mlp": {"down": codes.Codes(values, scales, zeros)}}, rest)


@pytest.mark.parametrize("bits", [3, 8])
def test_size_on_disk_is_what_was_predicted_and_what_orbax_adds_to_any_checkpoint(bits, tmp_path):
    model = random_model(bits)
    packed.save(tmp_path / "q", model, "rtn-group32-asymmetric", bits)
    predicted = packed.packed_bytes(model, bits)
    assert abs(packed.bytes_on_disk(tmp_path / "q") - predicted) < 8_000 + 0.01 * predicted


def test_size_on_disk_is_at_most_what_was_predicted_for_real_kernels(quantized, tmp_path):
    model = quantized("rtn")[3]
    packed.save(tmp_path / "q", model, "rtn", 3)
    names = 1_000 * len(jax.tree.leaves(model))  # what is written about each array
    # Orbax's own files: 2 to 5 kB, by how its threads share the arrays.
    assert packed.bytes_on_disk(tmp_path / "q") < packed.packed_bytes(model, 3) + 6_000 + names


def test_what_cannot_be_read_is_one_line(quantized, tmp_path):
    with pytest.raises(UserError, match="no quantized model there"):
        packed.load(tmp_path / "nothing")
    path = tmp_path / "q"
    packed.save(path, quantized("rtn")[3], "rtn", 3)
    description = path / paths.DESCRIPTION
    text, record = description.read_text(), files.read_sealed(description)
    files.write_sealed(description, {**record, "version": 99})
    with pytest.raises(UserError, match="version 99"):
        packed.load(path)
    for broken in ("{", "[]", "{}", text.replace("uint8", "cheese")):
        description.write_text(broken)
        with pytest.raises(UserError, match="not the description") as raised:
            packed.load(path)
        assert "\n" not in str(raised.value)
    files.write_sealed(description, json.loads(json.dumps(record).replace("uint8", "cheese")))
    with pytest.raises(UserError, match="not the description"):
        packed.load(path)
    description.write_text(text)
    for file in (path / "arrays").glob("**/d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(UserError, match="damaged"):
        packed.load(path)
