"""A random walk over config.json and files of each family, against transformers: equal logits, or a refusal."""

import functools
import json
import random
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.huggingface import safetensors
from precision_scaling.huggingface.architectures import ARCHITECTURES
from precision_scaling.huggingface.directory import open_pretrained
from precision_scaling.model.decoder import Decoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

STEPS = 60  # for each family
LENGTH = 12
ABSENT = object()
BASE = {
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 29,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = (
    ABSENT,
    None,
    {},
    {"type": "default"},
    {"rope_type": "default", "rope_theta": 30.0},
    {"rope_theta": 70.0},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 3.0, "rope_theta": 90.0},
    {**LLAMA3, "original_max_position_embeddings": 8},
    {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 20.0},
    LLAMA3,
    {**LLAMA3, "high_freq_factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 2.0], "long_factor": [1.0, 3.0]},
    {"rope_type": "default", "rope_theta": 40.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "foo": 1.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 60.0}},
    {kind: {"rope_type": "default", "rope_theta": 60.0} for kind in ("full_attention", "sliding_attention")},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}},
)
# Values that a key may have, good and bad; ABSENT leaves it out.
POOL = {
    "vocab_size": (29, 31),
    "hidden_size": (16, 24, ABSENT),
    "intermediate_size": (20, 7),
    "num_hidden_layers": (1, 2, 3),
    "num_attention_heads": (4, 2, 1),
    "num_key_value_heads": (1, 2, 4, None, ABSENT, 3),
    "head_dim": (4, 6, 8, None, ABSENT, 3),
    "rms_norm_eps": (1e-6, 1e-3, 0.5, ABSENT),
    "max_position_embeddings": (32, 16, 12, 8, ABSENT),
    "rope_theta": (ABSENT, 50.0, 100, 1e4, 5e5, None),
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "tie_word_embeddings": (True, False, ABSENT, None),
    "hidden_act": ("silu", "silu", "gelu", "relu"),
    "attention_bias": (False, True, ABSENT),
    "mlp_bias": (False, True, ABSENT),
    "clip_qkv": (None, 0.1, ABSENT),
    "sliding_window": (None, 3, 6, 100, ABSENT),
    "use_sliding_window": (True, False, ABSENT),
    "max_window_layers": (0, 1, 2, ABSENT),
    "layer_types": (
        ABSENT,
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["sliding_attention", "full_attention"],
        ["full_attention"],
    ),
    "partial_rotary_factor": (0.5, 1.0, ABSENT),
    "original_max_position_embeddings": (8, ABSENT),
    "is_causal": (False, True, ABSENT),
    "per_layer_config": ({"0": {"intermediate_size": 12}}, ABSENT),
    "eos_token_id": (0, [1, 2], None, ABSENT, -1, 29),
    "pad_token_id": (0, 3, None, ABSENT),
    "attention_dropout": (0.0, 0.5, ABSENT),
    "initializer_range": (0.02, 0.5),
    "pretraining_tp": (1, 2, ABSENT),
    "torch_dtype": ("float32", "bfloat16", ABSENT),
    "dtype": ("bfloat16", ABSENT),
    "chunk_size_feed_forward": (0, 2, ABSENT),
    "pruned_heads": ({"0": [1]}, ABSENT),
    "temperature": (0.7, ABSENT),
    "num_labels": (3, ABSENT),
    "return_dict": (False, True, ABSENT),
    "use_cache": (True, False),
    "logit_scale": (2.0, ABSENT),
    "model_type": ("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3"),
}


def generic(rng, key, default):
    """Another value of a key that the family has and the pool does not name."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + rng.choice((1, 2))
    if isinstance(default, float):
        return default * 0.5 + 0.1
    return ABSENT


def changed(rng, family, config, theirs):
    """One key with another value."""
    own = {field.name: field.default for field in fields(theirs) if not field.name.startswith("_")}
    key = rng.choice(sorted({*POOL, *own}))
    if key in ("architectures", "transformers_version") or (key == "model_type" and rng.random() < 0.8):
        return config
    value = rng.choice(POOL[key]) if key in POOL else generic(rng, key, own[key])
    if key == "layer_types" and isinstance(value, list) and rng.random() < 0.8:
        value = [value[i % len(value)] for i in range(config.get("num_hidden_layers", 1))]
    config = {name: old for name, old in config.items() if name != key}
    return config if value is ABSENT else {**config, key: value}


def tensors_of(theirs, rng, tied_head):
    """Random tensors under the names of a model; of a tied head: left out, the same, or one of its own."""
    found = {}
    for name, tensor in theirs.state_dict().items():
        gain = 1.0 if "norm" in name else 0.0
        found[name] = (gain + 0.3 * rng.normal(size=tuple(tensor.shape))).astype(np.float32)
    if theirs.config.tie_word_embeddings:
        if tied_head == "none":
            found.pop("lm_head.weight", None)
        elif tied_head == "same":
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def write_files(directory, tensors, shards):
    """One file, or two with an index; a name in both counts from the one that the index names."""
    for path in directory.glob("model*"):
        path.unlink()
    if not shards:
        safetensors.write(directory / "model.safetensors", tensors)
        return
    names, files = sorted(tensors), ("model-1.safetensors", "model-2.safetensors")
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        safetensors.write(directory / file, {name: tensors[name] for name in names if weight_map[name] == file})
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


@functools.cache
def compiled(model):
    return jax.jit(lambda params, tokens: Decoder(model).apply({"params": params}, tokens))


def logits_of_ours(pretrained, tokens):
    model = pretrained.model(tokens.shape[1])
    return np.asarray(compiled(model)(pretrained.params(), jnp.asarray(tokens)))


def longest(pretrained):
    """Positions that can be compared."""
    for length in range(LENGTH, 0, -1):
        try:
            pretrained.model(length)
            return length
        except UserError:
            continue
    raise AssertionError("no length is allowed")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_step_gives_the_logits_of_transformers_or_is_refused(name, transformers, tmp_path):
    import torch

    rng, counts = random.Random(f"{name} 0"), {"equal": 0, "refused": 0, "theirs fails": 0}
    config = {**BASE, "architectures": [name], "model_type": ARCHITECTURES[name].model_type}
    if name == "OlmoForCausalLM":
        del config["rms_norm_eps"]
    theirs_config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    for step in range(STEPS):
        candidate = changed(rng, ARCHITECTURES[name], config, theirs_config) if step else config
        (tmp_path / "config.json").write_text(json.dumps(candidate))
        tied_head, shards, values = rng.choice(("none", "same", "own")), rng.random() < 0.3, np.random.default_rng(step)
        try:
            blank = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
            write_files(tmp_path, tensors_of(blank, values, tied_head), shards)
        except Exception:
            blank = None
        try:
            ours = open_pretrained(tmp_path)
            tokens = values.integers(0, candidate["vocab_size"], (2, longest(ours))).astype(np.int32)
        except UserError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
            continue
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
            with torch.no_grad():
                expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        except Exception:
            counts["theirs fails"] += 1
            continue
        told = f"step {step}, {tied_head}, {candidate}"
        np.testing.assert_allclose(logits_of_ours(ours, tokens), expected, rtol=1e-4, atol=1e-4, err_msg=told)
        counts["equal"] += 1
        config = candidate
    print(name, counts)
    # Neither all is refused nor all is taken.
    assert counts["equal"] > STEPS / 4 and counts["refused"] > STEPS / 10, counts


def mutated(rng, header, data):
    """A file whose header or data has one thing changed."""
    header = json.loads(json.dumps(header))
    entry, kind = header[rng.choice(("a", "b", "c"))], rng.randrange(9)
    if kind == 0:
        entry["dtype"] = rng.choice(("F32", "F16", "BF16", "F64", "I32", "F99", 3, None))
    elif kind == 1:
        entry["shape"] = rng.choice(([2], [3], [2, 1], [], [0], [-2], [2.0], [True], "2", None, [2**62, 4], [1] * 3))
    elif kind == 2:
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(([start + 4, stop + 4], [stop, start], [start], [-4, 4], [0, 8], "x"))
    elif kind == 3:
        entry[rng.choice(("dtype", "shape", "data_offsets", "more"))] = rng.choice((1, "F32", [2]))
    elif kind == 4:
        header["__metadata__"] = rng.choice(({}, {"format": "pt"}, {"a": 1}, [], None, {"a": "b"}))
    elif kind == 5:
        data = rng.choice((data[:-1], data + b"x", b"", data[4:]))
    text = json.dumps(header)
    if kind == 6:
        text = rng.choice((text[:-1], text + " ", text + "{}", "[" + text, text.replace("[", "[[", 1), "[" * 5000))
    if kind == 7:
        text = text.replace('"b"', '"a"')
    encoded = text.encode()
    length = len(encoded) + (rng.choice((-1, 1, 1000, 2**40)) if kind == 8 else 0)
    return length.to_bytes(8, "little") + encoded + data


def test_a_file_is_read_as_the_formats_own_package_reads_it_or_is_refused(tmp_path):
    own = pytest.importorskip("safetensors")
    rng, counts, path = random.Random(0), {"read": 0, "refused": 0, "refused here alone": 0}, tmp_path / "x.safetensors"
    data = np.arange(7, dtype=np.float32).tobytes()
    header = {
        name: {"dtype": "F32", "shape": [size], "data_offsets": [4 * start, 4 * (start + size)]}
        for name, start, size in (("a", 0, 2), ("b", 2, 2), ("c", 4, 3))
    }
    for _ in range(1000):
        path.write_bytes(mutated(rng, header, data))
        try:
            with own.safe_open(path, framework="np") as file:
                expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception:
            expected = None
        try:
            found = safetensors.read(path)
        except UserError as error:
            message = str(error)
            assert "\n" not in message and "allowed" in message
            # Types that no weight has, and keys that the format does not know.
            stricter = "has the type" in message or "dtype, shape and data_offsets" in message
            assert expected is None or stricter, message
            counts["refused" if expected is None else "refused here alone"] += 1
            continue
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            np.testing.assert_array_equal(found[name], tensor)
        counts["read"] += 1
    assert all(counts.values()), counts
