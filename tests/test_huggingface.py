"""Hugging Face directories: what config.json means, files byte by byte, tensors there and back, workdirs of them."""

import dataclasses
import json
import resource
import struct
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_scaling.config import experiment
from precision_scaling.errors import ConfigError, UserError
from precision_scaling.huggingface import architectures, config_json, safetensors
from precision_scaling.huggingface.directory import open_pretrained, write_pretrained
from precision_scaling.huggingface.workdir import export_run, import_model
from precision_scaling.model import decoder as decoder_lib
from precision_scaling.model.accounting import count_parameters
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Decoder
from precision_scaling.ptq import codes, packed
from precision_scaling.study import evaluate as evaluate_lib
from precision_scaling.study import results, run_missing
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import open_workspace, reopen_workspace
from precision_scaling.training import checkpoint
from precision_scaling.training.cohort import Finished

pytestmark = pytest.mark.usefixtures("quick_compile")

SHAPE = {"vocab_size": 29, "width": 16, "depth": 2, "heads": 4, "mlp_width": 24, "sequence_length": 12}
MODELS = {
    "OlmoForCausalLM": {"norm_type": "layer", "tie_embeddings": True},
    "Olmo2ForCausalLM": {"norm_placement": "post", "qk_norm": "projection", "kv_heads": 2, "rope_theta": 500.0},
    "LlamaForCausalLM": {
        "kv_heads": 1,
        "head_width": 6,
        "norm_epsilon": 1e-3,
        "rope_theta": 50.0,
        "rope_scaling": "llama3:8,1,4,12",
    },
    "Qwen2ForCausalLM": {"kv_heads": 2, "qkv_bias": True, "rope_scaling": "linear:2.5"},
    "Qwen3ForCausalLM": {
        "kv_heads": 2,
        "head_width": 10,
        "qk_norm": "head",
        "tie_embeddings": True,
        "rope_theta": 50.0,
        "rope_scaling": "yarn:4,64,8,1,1.3",
    },
}


def decoder(name, base_width=16, base_depth=2):
    return ModelConfig(**SHAPE, **MODELS[name], base_width=base_width, base_depth=base_depth)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: decoder_lib.init(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: (1 + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32) / 4, shapes)


# config.json


OLMO_2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}


def of_family(name):
    """That config.json in another family, which must have the same keys."""
    return {**OLMO_2, "architectures": [name], "model_type": architectures.ARCHITECTURES[name].model_type}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_a_config_json_as_olmo_2_has_it_and_one_of_llama():
    options = config_json.model_options(OLMO_2)
    assert options == {
        "vocab_size": 100352,
        "width": 2048,
        "depth": 16,
        "heads": 16,
        "mlp_width": 8192,
        "kv_heads": 0,
        "head_width": 0,
        "rope_theta": 500_000.0,
        "rope_scaling": "",
        "norm_epsilon": 1e-6,
        "norm_placement": "post",
        "norm_type": "rms",
        "qk_norm": "projection",
        "qkv_bias": False,
        "tie_embeddings": False,
    }
    # 16 layers of 4·2048² + 3·2048·8192, gains of 2 norms, of q and of k, and the last one.
    config = ModelConfig(**options, sequence_length=64, base_width=2048, base_depth=16)
    assert count_parameters(config)[0] == 16 * (4 * 2048**2 + 3 * 2048 * 8192 + 4 * 2048) + 2048
    llama = {
        **of_family("LlamaForCausalLM"),
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    del llama["rope_theta"]
    changed = {"kv_heads": 4, "head_width": 64, "tie_embeddings": True, "rope_theta": 1e6}
    assert config_json.model_options(llama) == {**options, **changed, "norm_placement": "pre", "qk_norm": "none"}
    # OLMo's norm has its epsilon in the code, and Qwen 3 a head dimension that is not the quotient.
    olmo = config_json.model_options(without(of_family("OlmoForCausalLM"), "rms_norm_eps"))
    assert olmo["norm_epsilon"] == 1e-5 and olmo["norm_type"] == "layer"
    assert config_json.model_options(of_family("Qwen3ForCausalLM"))["head_width"] == 0
    narrow = {**of_family("Qwen3ForCausalLM"), "hidden_size": 1024, "num_key_value_heads": 8}
    assert config_json.model_options(narrow)["head_width"] == 128


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "None"),
        ({"clip_qkv": 8.0}, "8.0"),
        ({"attention_bias": True}, "True"),
        ({"mlp_bias": True}, "True"),
        ({"use_sliding_window": True}, "True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "0"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "mscale": 0.7}}, "mscale"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "None"),
        ({"partial_rotary_factor": 0.5}, "0.5"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_size": None}, "None"),
        ({"num_hidden_layers": "16"}, "'16'"),
        ({"num_key_value_heads": 5}, "5"),
        ({"head_dim": 33}, "33"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_what_our_decoder_lacks_is_one_line_with_key_value_and_allowed(changed, value):
    with pytest.raises(UserError) as error:
        config_json.model_options({**OLMO_2, **changed})
    message = str(error.value)
    assert next(iter(changed)) in message and value in message and "allowed is" in message and "\n" not in message


@pytest.mark.parametrize("name", MODELS)
def test_config_json_of_a_decoder_gives_it_back(name):
    config = decoder(name)
    assert architectures.architecture_of(config) == name
    described = json.loads(json.dumps(config_json.described(config)))
    again = ModelConfig(**config_json.model_options(described), sequence_length=12, base_width=16, base_depth=2)
    assert again == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm_placement": "post"}, "norm_placement"),
        ({"norm_type": "layer", "norm_epsilon": 1e-6}, "norm_epsilon"),
        ({**MODELS["Olmo2ForCausalLM"], "head_width": 6}, "head_width"),
    ],
)
def test_a_decoder_that_no_architecture_computes_is_not_written(options, said, tmp_path):
    config = ModelConfig(**SHAPE, **options, base_width=16, base_depth=2)
    with pytest.raises(UserError, match=said) as error:
        write_pretrained(tmp_path / "out", config, random_params(config))
    assert "allowed is" in str(error.value) and not (tmp_path / "out").exists()


# Files


def file_bytes(header, data):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def test_a_file_put_together_by_hand_is_read_in_each_type(tmp_path):
    values = [1.0, -2.5, 0.15625]  # exact in every type
    half = np.array(values, np.float16).tobytes()
    brain = b"".join(struct.pack("<f", value)[2:] for value in values)  # the upper half of a float32
    single = struct.pack("<3f", *values)
    header = {
        "__metadata__": {"format": "pt"},
        "half": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]},
        "brain": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [6, 12]},
        "single": {"dtype": "F32", "shape": [1, 3], "data_offsets": [12, 24]},
    }
    (tmp_path / "x.safetensors").write_bytes(file_bytes(header, half + brain + single))
    found = safetensors.read(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {"half": (3,), "brain": (3, 1), "single": (1, 3)}
    for tensor in found.values():
        np.testing.assert_array_equal(tensor.astype(np.float64).ravel(), values)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    good = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    for content, said in (
        (b"", "header"),
        (struct.pack("<Q", 10**12) + b"{}", "header"),
        (file_bytes(good, b"1234"), "bytes 0 to 8 of 4"),
        (file_bytes({"x": {**good["x"], "shape": [3]}}, bytes(8)), "shape"),
        (file_bytes({"x": {**good["x"], "dtype": "I16"}}, bytes(8)), "I16"),
        (file_bytes({"x": {}}, b""), "dtype"),
        (file_bytes([1], b""), "whole"),
        (struct.pack("<Q", 3) + b"{,}", "whole"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            safetensors.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        safetensors.read(tmp_path / "none")


def test_a_written_file_has_an_aligned_header_and_gives_its_tensors_back(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 2)).astype(np.float32).T, "b": rng.normal(size=5).astype(ml_dtypes.bfloat16)}
    safetensors.write(tmp_path / "x", tensors)
    assert struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0] % 8 == 0
    found = safetensors.read(tmp_path / "x")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# Directories


@pytest.fixture
def written(tmp_path):
    """Writes a model and returns its directory and parameters."""

    def write(name):
        params = random_params(decoder(name))
        write_pretrained(tmp_path / "model", decoder(name), params)
        return tmp_path / "model", params

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_comes_back_as_it_was_written(name, written):
    directory, params = written(name)
    found = open_pretrained(directory)
    assert found.model(12) == decoder(name)
    jax.tree.map(np.testing.assert_array_equal, params, found.params())


def test_parts_named_by_an_index_are_read_and_halves_of_a_head_stay_in_order(written):
    directory, params = written("LlamaForCausalLM")
    tensors = safetensors.read(directory / "model.safetensors")
    kernel = params["layers"]["block"]["attention"]["qkv"]["kernel"][1]  # (width, 4 of q, 1 of k, 1 of v, 6)
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert q.shape == (24, 16)
    for head in range(4):
        np.testing.assert_array_equal(q[6 * head : 6 * head + 6], kernel[:, head].T)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.v_proj.weight"], kernel[:, 5].T)

    names = sorted(tensors)
    index = {"weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        as_brain = {name: np.ascontiguousarray(tensors[name]).astype(ml_dtypes.bfloat16) for name in part}
        safetensors.write(directory / file, as_brain)
        index["weight_map"] |= dict.fromkeys(part, file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_pretrained(directory).params()
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, rounded, found)


def test_directories_that_do_not_fit_their_config_are_refused(written, tmp_path):
    directory, _ = written("Olmo2ForCausalLM")
    path = directory / "model.safetensors"
    tensors = safetensors.read(path)
    name = "model.layers.1.self_attn.q_norm.weight"

    def refused(changed, said):
        safetensors.write(path, {key: np.array(value) for key, value in changed.items()})
        with pytest.raises(UserError, match=said) as error:
            open_pretrained(directory)
        assert "\n" not in str(error.value)

    refused({key: value for key, value in tensors.items() if key != name}, f"no tensor {name}")
    refused({**tensors, name: np.zeros(4, np.float32)}, r"is of shape \(4,\); allowed is \(16,\)")
    refused({**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}, "q_proj.bias")
    # What follows from config.json may stand there, and nothing else.
    frequencies = np.array([1, 500**-0.5], np.float32)
    refused({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": 2 * frequencies}, "inv_freq")
    safetensors.write(path, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})
    before = open_pretrained(directory).fingerprint
    safetensors.write(path, {**tensors, name: tensors[name] * np.float32(1.001)})
    assert open_pretrained(directory).fingerprint != before
    for content, said in (("{", "not JSON"), ("[]", "not an object")):
        (directory / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            open_pretrained(directory)
    with pytest.raises(UserError, match="No such file"):
        open_pretrained(tmp_path / "nowhere")


# Workdirs


def test_a_model_from_outside_may_have_seen_more_tokens_than_could_be_trained_on_here(tiny_config):
    tokens = 36_000_000_000_000  # Qwen 3
    (run,) = experiment.resolve(tiny_config(train__tokens=tokens, model__imported="x", train__batch_size=1), 257).runs
    assert run.tokens == tokens
    with pytest.raises(ConfigError, match=r"train\.tokens"):
        experiment.resolve(tiny_config(train__tokens=tokens, train__batch_size=1), 257)


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """(workdir, run, row) of a run in the shape of OLMo 2 as it ends, with depth-µP's multipliers away from 1; to save
    time its parameters are the first ones."""
    workdir = tmp_path_factory.mktemp("trained")
    options = {f"model__{name}": value for name, value in MODELS["Olmo2ForCausalLM"].items()}
    config = tiny_config(data__tokenizer="bpe:300", model__heads=4, model__base_size="7k", **options)
    workspace = open_workspace(config, workdir)
    (group,) = workspace.experiment.cohorts
    (run,) = group.runs
    assert run.shape.model.residual_scale != 1 and run.shape.model.logit_scale != 1
    params = jax.jit(lambda: decoder_lib.init(run.shape.model, jax.random.key(0)))()
    program = group.static.evaluation()
    evaluate = evaluate_lib.evaluator(workspace, group.shape, program)
    run_missing._record(workspace, program, evaluate, [], Finished(run, params, None))()
    (row,) = results.read_rows(workspace.directory(run), "trained")
    return workdir, run, row


@pytest.mark.slow
def test_a_run_that_was_exported_is_imported_with_its_loss_and_quantized(trained, tiny_config, tmp_path):
    workdir, run, row = trained
    assert export_run(workdir, tmp_path / "model").id == run.id
    config = tiny_config(precision__preset="paper", ptq__methods=("rtn", "gptq"))
    imported = import_model(tmp_path / "model", tmp_path / "w", 3e6, config, sequence_length=16)
    (found,) = results.read_rows(tmp_path / "w" / "runs" / imported.id, "trained")
    assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert found["N"] == row["N"] and found["D"] == 3_000_000 // 16 * 16
    assert found["P_w"] == 16 and found["P_post"] is None and found["status"] == "ok"
    assert found["imported"].startswith("model@") and found["peak_rate"] is found["epochs"] is None
    # Once more is nothing to do, and the commands that follow read the workdir as train's.
    assert import_model(tmp_path / "model", tmp_path / "w", 3e6, config, 16).id == imported.id
    workspace = reopen_workspace(tmp_path / "w")
    quantize_missing(workspace, ("rtn",), (3, 8))
    losses = {
        entry["P_post"]: entry["loss"] for entry in results.read_rows(tmp_path / "w" / "runs" / imported.id, "rtn")
    }
    assert abs(losses[8] - found["loss"]) < 0.01 < abs(losses[3] - found["loss"])
    # Training it here would be training from scratch under its name.
    with pytest.raises(ConfigError, match=r"model\.imported"):
        other = open_workspace(workspace.experiment.config, tmp_path / "other")
        run_missing.train_missing(other)


@pytest.mark.slow
def test_what_cannot_be_imported_or_exported_leaves_no_workdir(trained, tiny_config, tmp_path):
    workdir, run, _ = trained
    export_run(workdir, tmp_path / "model", run.id)
    new = tmp_path / "new"
    for arguments, options, said in (
        ((5.0,), {}, "--tokens=5"),
        ((float("inf"),), {}, "--tokens=inf"),
        ((1e6, 17), {}, "--sequence_length=17: allowed is up to max_position_embeddings, 16"),
        ((1e6,), {"precision__weights": "int4"}, "precision = "),
        ((1e6,), {"grid": {"one": {"sizes": ("25k",), "tokens": (1000,)}}}, "study.grid"),
    ):
        tokens, *length = arguments
        with pytest.raises(UserError, match=said) as error:
            import_model(tmp_path / "model", new, tokens, tiny_config(**options), *length)
        assert "\n" not in str(error.value) and not new.exists()
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        import_model(tmp_path / "model", new, 1e6, tiny_config())
    with pytest.raises(UserError, match="--out="):
        export_run(workdir, tmp_path / "model")
    with pytest.raises(UserError, match=run.id):
        export_run(workdir, new, "none")
    assert not new.exists()


@pytest.mark.slow
@pytest.mark.parametrize("existed", [True, False])
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, existed):
    workdir, run, _ = trained
    out = tmp_path / "model"
    if existed:
        out.mkdir()
    for limit in (4_000, 40_000):  # within the tokenizer, within the tensors
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match="File too large; allowed is a directory that can be written") as error:
                export_run(workdir, out, run.id)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(out) in str(error.value) and "\n" not in str(error.value)
        assert out.exists() == existed and not (existed and list(out.iterdir()))
    export_run(workdir, out, run.id)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert 4_000 < sizes["tokenizer.json"] < 40_000 < sizes["model.safetensors"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 kB."""
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(where)], capture_output=True).returncode:
        pytest.skip("only root mounts file systems")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.slow
def test_a_quantized_export_to_a_full_disk_is_one_line_and_leaves_nothing(trained, small_disk):
    workdir, run, _ = trained
    workspace = reopen_workspace(workdir)
    quantize_missing(workspace, ("rtn",), (), formats=("e4m3",), save=True)
    saved = workspace.directory(run) / "quantized" / "rtn-e4m3-8"
    for out in (small_disk, small_disk / "model"):
        with pytest.raises(UserError, match="No space left on device; allowed is a directory that can be") as error:
            export_run(workdir, out, quantized=saved.name)
        assert str(out) in str(error.value) and "\n" not in str(error.value) and not list(small_disk.iterdir())


@pytest.mark.slow
def test_commands_that_are_wrong_or_incomplete_are_told_in_one_line(run_command, tmp_path):
    for arguments, said in (
        (("pull",), "import or export"),
        (("import", f"--model={tmp_path}", f"--workdir={tmp_path / 'w'}"), "--tokens is missing"),
    ):
        done = run_command("precision_scaling.huggingface", *arguments)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


# Against transformers


TOKENS = np.random.default_rng(1).integers(0, 29, (2, 12)).astype(np.int32)


def logits_of_theirs(theirs):
    import torch

    with torch.no_grad():
        return theirs.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def logits_of_ours(config, params):
    return np.asarray(jax.jit(lambda p: Decoder(config).apply({"params": p}, jnp.asarray(TOKENS)))(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_model_made_by_transformers_are_the_same_here(name, transformers, tmp_path):
    import torch

    torch.manual_seed(0)
    ours = config_json.described(decoder(name), initializer_range=0.3, bos_token_id=None, eos_token_id=0)
    # Only what a user would write; max_position_embeddings and defaults are transformers'.
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**{**ours, "pad_token_id": None})
    theirs = getattr(transformers, name)(config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "norm" in key:  # gains away from 1, so that each is found in its place
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size="5KB" if name == "Olmo2ForCausalLM" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (name == "Olmo2ForCausalLM")
    found = open_pretrained(tmp_path)
    assert found.model(12) == decoder(name)
    expected = logits_of_theirs(theirs)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(logits_of_ours(found.model(12), found.params()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_is_written_with_the_same_logits(name, transformers, tmp_path):
    # Multipliers away from 1: they must be found in the weights.
    config = decoder(name, base_width=8, base_depth=1)
    params = random_params(config)
    write_pretrained(tmp_path, config, params, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == name
    assert not any(told.values()), told
    expected = logits_of_ours(config, params)
    assert np.std(expected) > 0.03
    np.testing.assert_allclose(logits_of_theirs(theirs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_transformers_reads_the_tokenizer_of_an_exported_run(trained, transformers, tmp_path):
    workdir, run, _ = trained
    export_run(workdir, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    corpus = reopen_workspace(workdir).corpus
    text = "def alpha_3(beta, count):\n    return beta + 7\n"
    (ours,) = corpus.load_tokenizer().encode([text.encode()])
    assert tokenizer(text)["input_ids"] == ours.tolist()
    assert tokenizer.eos_token_id == corpus.end_of_text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    params = open_pretrained(tmp_path / "model").params()
    restored = checkpoint.restore(
        workdir / "runs" / run.id / "checkpoint",
        jax.eval_shape(lambda: decoder_lib.init(run.shape.model, jax.random.key(0))),
    )
    plain = dataclasses.replace(run.shape.model, base_width=16, base_depth=2)
    np.testing.assert_allclose(
        logits_of_ours(plain, params), logits_of_ours(run.shape.model, restored), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(logits_of_theirs(theirs), logits_of_ours(plain, params), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_packed_model_is_exported_with_the_logits_that_were_evaluated(trained, transformers, tmp_path, dtype):
    pytest.importorskip("compressed_tensors")
    import torch

    workdir, run, _ = trained
    workspace = reopen_workspace(workdir)
    quantize_missing(workspace, ("rtn",), (4,), save=True)
    (saved,) = (workspace.directory(run) / "quantized").iterdir()
    with pytest.raises(UserError, match=f"--quantized=none: allowed is one of {saved.name}"):
        export_run(workdir, tmp_path / "model", quantized="none")
    assert not (tmp_path / "model").exists()
    export_run(workdir, tmp_path / "model", quantized=saved.name, dtype=dtype)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    tensors = safetensors.read(tmp_path / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"int32", "int64", dtype}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert theirs.generation_config.eos_token_id == workspace.corpus.end_of_text
    expected = logits_of_ours(run.shape.model, codes.parameters(packed.load(saved).model))
    atol = 1e-4 if dtype == "float32" else 0.02 * np.max(np.abs(expected))
    np.testing.assert_allclose(logits_of_theirs(theirs), expected, rtol=0, atol=atol)
