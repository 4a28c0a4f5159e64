"""Packed models as compressed-tensors directories: our logits from the codes, transformers' from the directory."""

import dataclasses

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
from precision_scaling.ptq import codes, kernel_grid, rtn
from precision_scaling.ptq.apply import LINEARS
from precision_scaling.ptq.packed import Bits, Loaded, bits_of
from precision_scaling.ptq.scheme import Scheme

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = ModelConfig(61, 32, 2, 4, 48, 16, 32, 2, kv_heads=2)
VARIANTS = {
    "llama": MODEL,
    "multipliers": dataclasses.replace(MODEL, base_width=8, base_depth=1),
    "tied": dataclasses.replace(MODEL, tie_embeddings=True),
    "olmo2": dataclasses.replace(MODEL, norm_placement="post", qk_norm="projection", kv_heads=0, base_width=8),
    "qwen2": dataclasses.replace(MODEL, qkv_bias=True),
}
TOKENS = np.random.default_rng(3).integers(0, 61, (2, 16)).astype(np.int32)


MIXED = {"attention": {"qkv": [8, 4], "out": [2, 4]}, "mlp": {"gate_up": [3, 3], "down": [4, 5]}}


def packed_model(model: ModelConfig, bits: Bits, group_size: int, symmetric: bool) -> Loaded:
    """A random decoder rounded to nearest."""
    params = jax.tree.map(np.asarray, decoder.init(model, jax.random.key(0)))
    block = {name: dict(module) for name, module in params["layers"]["block"].items()}
    kernels: dict = {}
    scheme = Scheme(rtn.METHOD, group_size=group_size, symmetric=symmetric)
    for module, name in LINEARS:
        kernel = block[module].pop(name)["kernel"]
        flat = jnp.asarray(kernel).reshape(*kernel.shape[:2], -1)

        levels = kernel_grid.integer_levels([bits_of(bits, module, name, layer) for layer in range(model.depth)])

        def rounded(matrix, levels, shape=kernel.shape[1:]):
            found = rtn.solve(matrix, levels, kernel_grid.INTEGER, scheme, None)
            return codes.encode(
                found.code_IxO, found.scale_GxO, found.zero_GxO, symmetric, shape, group_size=group_size
            )

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
    quantized.check(loaded, "x")
    plain, tensors, config = quantized.tensors(model, loaded)
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    write_tensors(directory, plain, tensors, "float32", quantization_config=config, **ends)
    return logits(model, loaded)


CASES = [("llama", bits, 16, True) for bits in range(2, 9)] + [
    *(("llama", bits, size, symmetric) for bits in (3, 4) for size in (0, 16) for symmetric in (True, False)),
    *((name, 4, 0, True) for name in VARIANTS),
    *(("llama", MIXED, size, True) for size in (0, 16)),
]


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
    assert down.dtype == np.int32 and down.shape == (32, -(-48 * bits_of(bits, "mlp", "down", 1) // 32))


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


# A model that the library itself compresses and writes; only scales and zero points are from here.
@pytest.mark.slow
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, False), (8, True)])
def test_a_directory_that_the_library_wrote_gives_its_logits_here(transformers, tmp_path, bits, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    import torch

    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, initializer_range=0.2))
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights}
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], format="pack-quantized"
    )
    quantization.apply_quantization_config(theirs, config)
    top = 2 ** (bits - 1)
    for module in theirs.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.reshape(module.weight.shape[0], -1, 16)
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            module.weight_scale.data = groups.abs().amax(-1) / (top - 1) if symmetric else (high - low) / (2 * top - 1)
            if not symmetric:
                zero = torch.round(-low / module.weight_scale.data) - top
                module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(TOKENS).long()).logits.numpy()
    compressor = compressors.ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    theirs.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    found = open_pretrained(tmp_path)
    ours = np.asarray(Decoder(found.model(16)).apply({"params": found.params()}, jnp.asarray(TOKENS)))
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_what_the_format_cannot_hold_is_refused_by_name():
    loaded = packed_model(MODEL, 4, 0, True)
    with pytest.raises(UserError, match=r"--quantized=smoothquant-4: quantizes a while it runs"):
        quantized.check(loaded._replace(operands=("a",)), "smoothquant-4")
    scaled = jax.tree.map(
        lambda one: one._replace(row_scales=np.ones(one.codes.shape[:2], np.float32)),
        loaded.model.kernels,
        is_leaf=codes.is_codes,
    )
    with pytest.raises(UserError, match=r"--quantized=awq-4: its inputs have scales of their own"):
        quantized.check(loaded._replace(model=loaded.model._replace(kernels=scaled)), "awq-4")


def test_a_shorter_last_group_is_refused_as_the_format_has_none():
    with pytest.raises(UserError, match="--quantized=x: has groups with a shorter last one"):
        quantized.check(packed_model(MODEL, 4, 20, True), "x")


def test_several_widths_with_zero_points_are_refused_as_no_library_here_reads_them():
    with pytest.raises(UserError, match="--quantized=x: has several widths, asymmetric; allowed are"):
        quantized.check(packed_model(MODEL, MIXED, 0, False), "x")
