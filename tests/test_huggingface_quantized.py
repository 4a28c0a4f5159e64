"""Packed models as compressed-tensors directories: our logits from the codes, transformers' from the directory."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.huggingface import quantized, safetensors
from precision_scaling.huggingface.directory import open_pretrained, write_tensors
from precision_scaling.model import decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Decoder
from precision_scaling.numerics import bit_patterns
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import codes, rtn
from precision_scaling.ptq.packed import Bits, Loaded, format_of
from precision_scaling.ptq.scheme import LINEARS, Scheme

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(61, 32, 2, 4, 48, 16, 32, 2, kv_heads=2)
VARIANTS = {
    "llama": MODEL,
    "multipliers": dataclasses.replace(MODEL, base_width=8, base_depth=1),
    "tied": dataclasses.replace(MODEL, tie_embeddings=True),
    "olmo2": dataclasses.replace(MODEL, norm_placement="post", qk_norm="projection", kv_heads=0, base_width=8),
    "qwen2": dataclasses.replace(MODEL, qkv_bias=True),
    # Inputs that blocks of 32 divide.
    "blocks": dataclasses.replace(MODEL, mlp_width=64),
    "scaled_blocks": dataclasses.replace(MODEL, mlp_width=64, base_width=8, base_depth=1),
}
TOKENS = np.random.default_rng(3).integers(0, 61, (2, 16)).astype(np.int32)


MIXED = {"attention": {"qkv": [8, 4], "out": [2, 4]}, "mlp": {"gate_up": [3, 3], "down": [4, 5]}}


def packed_model(model: ModelConfig, bits: Bits, group_size: int, symmetric: bool) -> Loaded:
    """A random decoder rounded to nearest."""
    params = jax.tree.map(np.asarray, decoder.init(model, jax.random.key(0)))
    block = {name: dict(module) for name, module in params["layers"]["block"].items()}
    kernels: dict = {}
    scheme, depth = Scheme(rtn.METHOD, group_size=group_size, symmetric=symmetric), range(model.depth)
    for module, name in LINEARS:
        kernel = block[module].pop(name)["kernel"]
        flat = jnp.asarray(kernel).reshape(*kernel.shape[:2], -1)
        formats = [format_of(bits, module, name, layer) for layer in depth]
        levels = jax.tree.map(lambda *x: jnp.stack(x), *(fmt.grid() for fmt in formats))
        kind = formats[0].kind

        def rounded(matrix, levels, shape=kernel.shape[1:], kind=kind):
            found = rtn.solve(matrix, levels, kind, scheme.of_kind(kind), None)
            arrays = found.code_IxO, found.scale_GxO, found.zero_GxO
            return codes.encode(*arrays, symmetric, shape, None, kind.family == "int", group_size)

        kernels.setdefault(module, {})[name] = jax.vmap(rounded)(flat, levels)
    rest = {**params, "layers": {"block": {name: module for name, module in block.items() if module}}}
    return Loaded(codes.QuantizedModel(kernels, rest), scheme.name, bits, ())


def logits(model: ModelConfig, loaded: Loaded):
    return logits_of(model, codes.parameters(loaded.model))


def logits_of(model: ModelConfig, params):
    return np.asarray(jax.jit(lambda params: Decoder(model).apply({"params": params}, jnp.asarray(TOKENS)))(params))


def exported(directory, name: str, bits: Bits, group_size: int, symmetric: bool):
    """(our logits) of a model that is written to the directory."""
    model = VARIANTS[name]
    loaded = packed_model(model, bits, group_size, symmetric)
    quantized.check(loaded, "x", model)
    plain, tensors, config = quantized.tensors(model, loaded)
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    write_tensors(directory, plain, tensors, "float32", quantization_config=config, **ends)
    return logits(model, loaded)


CASES = [("llama", bits, 16, True) for bits in range(2, 9)] + [
    *(("llama", bits, size, symmetric) for bits in (3, 4) for size in (0, 16) for symmetric in (True, False)),
    *((name, 4, 0, True) for name in VARIANTS),
    *(("llama", MIXED, size, True) for size in (0, 16)),
]

# Formats of floats, in groups of so many inputs (0: a scale for an output, or blocks of the format's own).
FORMATS = [
    *(
        ("multipliers", "e4m3", 0),
        ("blocks", "e4m3fn", 16),
        ("scaled_blocks", "nvfp4", 0),
        ("blocks", "nvfp4_4over6", 0),
    ),
    *(("blocks", name, 0) for name in ("nvfp4", "mxfp4", "mxfp6", "mxfp8", "mxfp8_up")),
]
_QUICK = FORMATS[2], FORMATS[5]


@pytest.mark.parametrize(
    ("name", "fmt", "group_size"),
    [case if case in _QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in FORMATS],
)
def test_our_reader_gives_the_kernels_of_other_formats_back(tmp_path, name, fmt, group_size):
    ours = exported(tmp_path, name, fmt, group_size, True)
    found = open_pretrained(tmp_path)
    np.testing.assert_allclose(logits_of(found.model(16), found.params()), ours, atol=2e-5)
    tensors = safetensors.read(tmp_path / "model.safetensors")
    down = {part: tensors.get(f"model.layers.1.mlp.down_proj.{part}") for part in ("weight", "weight_packed")}
    codes_of = down["weight"] if down["weight_packed"] is None else down["weight_packed"]
    mlp_width = VARIANTS[name].mlp_width
    assert codes_of.itemsize == 1 and codes_of.nbytes == 32 * mlp_width * packed_bits(fmt) // 8


def packed_bits(fmt):
    return bit_patterns.layout(parse(fmt)).bits


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("weight_global_scale", lambda x: x * 0, "not one float32 above 0"),
        ("weight_scale", lambda x: x[:, :1], "is not of 32 x 64"),
        ("weight_packed", lambda x: x[:, :16], "is not of 32 x 32"),
        ("weight_packed", lambda x: x[:16], "is not of 16 x 64"),
        ("weight_packed", lambda x: x.astype(np.int32), "not uint8"),
        ("weight_scale", lambda x: x.view(np.uint8), "is of uint8"),
        ("weight_scale", lambda x: None, "has no weight_scale"),
        ("bias", lambda x: np.ones(32, np.float32), "allowed is the tensors that"),
    ],
)
def test_a_tampered_directory_is_refused(tmp_path, part, change, said):
    exported(tmp_path, "blocks", "nvfp4", 0, True)
    tensors, name = safetensors.read(tmp_path / "model.safetensors"), f"model.layers.1.mlp.down_proj.{part}"
    tampered = {**tensors, name: change(tensors.get(name))}
    written = {key: np.array(value) for key, value in tampered.items() if value is not None}
    safetensors.write(tmp_path / "model.safetensors", written)
    with pytest.raises(UserError, match=said) as error:
        open_pretrained(tmp_path)
    assert "\n" not in str(error.value) and "allowed is" in str(error.value)


def test_eight_bits_that_config_json_does_not_speak_of_are_refused(tmp_path):
    exported(tmp_path, "blocks", "e4m3", 0, True)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = safetensors.read(tmp_path / "model.safetensors")
    plain = {name: np.array(value) for name, value in tensors.items() if not name.endswith("_scale")}
    safetensors.write(tmp_path / "model.safetensors", plain)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(UserError, match="is of float8_e4m3fn; allowed is floating point of 16 bits up"):
        open_pretrained(tmp_path)


def test_a_full_disk_leaves_nothing_that_looks_like_a_model(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="File too large; allowed is a directory that can be written") as error:
            exported(tmp_path / "model", "blocks", "nvfp4", 0, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize(
    ("name", "fmt", "said"),
    [
        ("blocks", "e2m1", "its format e2m1 is none that compressed-tensors can hold; allowed are integers, e4m3"),
        ("blocks", "nvint4", "its format nvint4"),
        ("scaled_blocks", "mxfp4", "mxfp4 are powers of two, which cannot take up the multiplier"),
        (
            "blocks",
            {"attention": {"qkv": [4, 4], "out": ["e4m3", "e4m3"]}},
            "has the formats e4m3, int4; allowed is one",
        ),
    ],
)
def test_formats_that_the_library_cannot_hold_are_refused_by_name(name, fmt, said):
    mixed = fmt if isinstance(fmt, str) else {**fmt, "mlp": {"gate_up": [4, 4], "down": [4, 4]}}
    with pytest.raises(UserError, match=f"--quantized=x: .*{said}") as error:
        quantized.check(packed_model(VARIANTS[name], mixed, 0, True), "x", VARIANTS[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "symmetric"),
    [
        *(("multipliers", 3, 8, False), ("llama", MIXED, 16, True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (CASES[2], CASES[8])),
    ],
)
def test_our_reader_gives_the_kernels_back(tmp_path, name, bits, group_size, symmetric):
    ours = exported(tmp_path, name, bits, group_size, symmetric)
    found = open_pretrained(tmp_path)
    model = found.model(16)
    np.testing.assert_allclose(logits_of(model, found.params()), ours, atol=2e-5)
    tensors = safetensors.read(tmp_path / "model.safetensors")
    down = tensors["model.layers.1.mlp.down_proj.weight_packed"]
    # Codes, not floats.
    assert down.dtype == np.int32 and down.shape == (32, -(-48 * int(format_of(bits, "mlp", "down", 1).bits) // 32))


# The option is the only one that has asymmetric layers read on a CPU; the directory's own config counts, as it says.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits", "group_size", "symmetric"), CASES)
def test_transformers_loads_it_with_our_logits(transformers, tmp_path, name, bits, group_size, symmetric):
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import CompressedTensorsConfig

    ours = exported(tmp_path, name, bits, group_size, symmetric)
    # It takes one grid for all layers then.
    option = {} if isinstance(bits, dict) else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **option)
    with torch.no_grad():
        found = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    assert np.std(ours) > 0.01 and np.max(np.abs(found - ours)) <= 1e-4


def in_bfloat16(loaded: Loaded):
    """The parameters with quantized kernels rounded to bfloat16."""
    params = codes.parameters(loaded.model)
    rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    block = params["layers"]["block"]
    for module, name in LINEARS:
        block = {**block, module: {**block[module], name: {"kernel": rounded(block[module][name]["kernel"])}}}
    return {**params, "layers": {"block": block}}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "fmt", "group_size"), FORMATS)
def test_transformers_loads_other_formats_with_our_logits(
    transformers, tmp_path, name, fmt, group_size, monkeypatch, record_property
):
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.nvfp4 import base
    from transformers import CompressedTensorsConfig

    ours = exported(tmp_path, name, fmt, group_size, True)
    loaded = packed_model(VARIANTS[name], fmt, group_size, True)
    option = {"quantization_config": CompressedTensorsConfig(dequantize=True)}

    def theirs(**option):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **option)
        with torch.no_grad():
            return model(torch.from_numpy(TOKENS).long()).logits.numpy()

    assert np.std(ours) > 0.01
    found = theirs(**option)
    if fmt.startswith("nvfp4"):
        # The library makes these kernels in bfloat16, so does our evaluation of the same; then it may not.
        plain, _, _ = quantized.tensors(VARIANTS[name], loaded)
        rounded = logits_of(VARIANTS[name], in_bfloat16(loaded)) if VARIANTS[name] == plain else None
        record_property("bfloat16", float(np.max(np.abs(found - ours))))
        assert rounded is None or np.max(np.abs(found - rounded)) <= 1e-4
        unpack = base.unpack_fp4_from_uint8
        monkeypatch.setattr(base, "unpack_fp4_from_uint8", lambda *args: unpack(*args, dtype=torch.float32))
        found = theirs(**option)
    record_property("difference", float(np.max(np.abs(found - ours))))
    print(f"{fmt}, {name}: {np.max(np.abs(found - ours)):.1e} of {np.std(ours):.2f}")
    assert np.max(np.abs(found - ours)) <= 1e-4
    if fmt.startswith("e4m3"):  # on a CPU only these run without the option in float32
        assert np.max(np.abs(theirs() - ours)) <= 1e-4


# Models that the library itself compresses and writes; only scales and zero points are from here.
@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, False), (8, True)])
def test_a_directory_that_the_library_wrote_gives_its_logits_here(transformers, tmp_path, bits, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    import torch

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 16}
    group = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    top = 2 ** (bits - 1)

    def calibrate(module):
        groups = module.weight.data.reshape(module.weight.shape[0], -1, 16)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        module.weight_scale.data = groups.abs().amax(-1) / (top - 1) if symmetric else (high - low) / (2 * top - 1)
        if not symmetric:
            zero = torch.round(-low / module.weight_scale.data) - top
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)

    _compare_with_the_library(transformers, tmp_path, group, calibrate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W8A16_FP8", "NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"])
def test_floats_that_the_library_wrote_give_its_logits_here(transformers, tmp_path, name):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    import torch

    if name == "W8A16_FP8":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
        group = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    else:
        group = quantization.preset_name_to_scheme(name, ["Linear"])
    most = {8: 448.0, 6: 7.5, 4: 6.0}[group.weights.num_bits]

    def calibrate(module):
        groups = module.weight.data.reshape(module.weight.shape[0], -1, group.weights.group_size or module.in_features)
        scale = groups.abs().amax(-1) / most
        if name == "NVFP4A16":
            module.weight_global_scale.data = 448 / scale.max().reshape(1)
            scale = (scale * module.weight_global_scale).to(torch.float8_e4m3fn).to(torch.float32)
        elif group.weights.group_size:
            scale = 2.0 ** torch.ceil(torch.log2(scale))
        module.weight_scale.data = scale

    written = _compare_with_the_library(transformers, tmp_path, group, calibrate)
    formats = {"W8": "naive-quantized", "NV": "nvfp4-pack-quantized", "MX": f"mxfp{name[4]}-pack-quantized"}
    assert written == ("mxfp8-quantized" if name == "MXFP8A16" else formats[name[:2]])


def _compare_with_the_library(transformers, directory, group, calibrate) -> str:
    """The format that the library gives a model of one group of layers."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    import torch

    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, initializer_range=0.2))
    config = quantization.QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    quantization.apply_quantization_config(theirs, config)
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            calibrate(module)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()
    compressor = compressors.ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(directory)
    compressor.update_config(directory)
    found = open_pretrained(directory)
    ours = np.asarray(Decoder(found.model(16)).apply({"params": found.params()}, jnp.asarray(TOKENS)))
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    return found.config["quantization_config"]["format"]


def test_what_the_format_cannot_hold_is_refused_by_name():
    loaded = packed_model(MODEL, 4, 0, True)
    with pytest.raises(UserError, match=r"--quantized=smoothquant-4: quantizes a while it runs"):
        quantized.check(loaded._replace(operands=("a",)), "smoothquant-4", MODEL)
    scaled = jax.tree.map(
        lambda one: one._replace(row_scales=np.ones(one.codes.shape[:2], np.float32)),
        loaded.model.kernels,
        is_leaf=codes.is_codes,
    )
    with pytest.raises(UserError, match=r"--quantized=awq-4: its inputs have scales of their own"):
        quantized.check(loaded._replace(model=loaded.model._replace(kernels=scaled)), "awq-4", MODEL)


@pytest.mark.slow
def test_a_shorter_last_group_is_refused_as_the_format_has_none():
    with pytest.raises(UserError, match="--quantized=x: has groups with a shorter last one"):
        quantized.check(packed_model(MODEL, 4, 20, True), "x", MODEL)


def test_several_widths_with_zero_points_are_refused_as_no_library_here_reads_them():
    with pytest.raises(UserError, match="--quantized=x: has several widths, asymmetric; allowed are"):
        quantized.check(packed_model(MODEL, MIXED, 0, False), "x", MODEL)
