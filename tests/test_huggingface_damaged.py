"""Directories that are damaged, odd or hostile: each is refused in one line, at once, and nothing is written."""

import dataclasses
import json
import os
import shutil
import signal
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.errors import UserError
from precision_scaling.huggingface import config_json, safetensors
from precision_scaling.huggingface.architectures import places
from precision_scaling.huggingface.directory import open_pretrained
from precision_scaling.huggingface.workdir import _tokenizer_of, export_run, import_model
from precision_scaling.model.config import ModelConfig
from precision_scaling.study import results
from precision_scaling.study.evaluate import evaluator
from precision_scaling.study.ptq import quantize_missing
from precision_scaling.study.workspace import reopen_workspace

MODEL = ModelConfig(
    vocab_size=29,
    width=16,
    depth=2,
    heads=4,
    mlp_width=24,
    sequence_length=16,
    base_width=16,
    base_depth=2,
    kv_heads=2,
)
NAME = "model.layers.1.mlp.down_proj.weight"
MAP = {place.name: "model.safetensors" for place in places(MODEL)}


def random_tensors(model=MODEL, seed=0):
    rng = np.random.default_rng(seed)
    return {place.name: rng.normal(size=place.shape).astype(np.float32) for place in places(model)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory that is as it should be."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json.described(MODEL, eos_token_id=3)))
    safetensors.write(directory / "model.safetensors", random_tensors())
    words = {word: i for i, word in enumerate(("a", "b", "c", "<|endoftext|>", "<end>"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


# What is done to that directory; each returns the function that does it.


def config(**changes):
    """Keys of config.json with other values."""

    def damage(directory):
        found = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**found, **changes}))

    return damage


def content(name, data):
    """A file with other bytes."""

    def damage(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())

    return damage


def index(weight_map, **files):
    """An index, and files beside it with those tensors."""

    def damage(directory):
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for name, tensors in files.items():
            safetensors.write(directory / f"{name}.safetensors", tensors)

    return damage


def tensors(**changes):
    """Tensors with other values, None leaves one out; "__" stands for the dot."""

    def damage(directory):
        found = random_tensors() | {name.replace("__", "."): value for name, value in changes.items()}
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        safetensors.write(directory / "model.safetensors", kept)

    return damage


def header(change):
    """The safetensors file with a header that `change` has been at; it returns the new one, an object or bytes."""

    def damage(directory):
        data = (directory / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        new = change(json.loads(data[8 : 8 + length]))
        new = new if isinstance(new, bytes) else json.dumps(new).encode()
        (directory / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return damage


def entry(**changes):
    """The safetensors file with another entry of one tensor in its header."""
    return header(lambda found: {**found, NAME: {**found[NAME], **changes}})


def special(name, make):
    """Another kind of file in the place of one."""

    def damage(directory):
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return damage


def cut(name, size):
    """A file that ends after so many bytes, or with a negative number so many bytes before its end."""

    def damage(directory):
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[:size])

    return damage


def both(*damages):
    return lambda directory: [damage(directory) for damage in damages]


def shifted(found):
    """All tensors four bytes further on."""
    for name in found.keys() - {"__metadata__"}:
        found[name]["data_offsets"] = [place + 4 for place in found[name]["data_offsets"]]
    return found


def twice(found):
    text = json.dumps(found)
    return (text[:-1] + f', "{NAME}": {json.dumps(found[NAME])}' + "}").encode()


def with_nan(value, dtype=np.float32):
    tensor = np.ones((16, 24), dtype)
    tensor[3, 4] = value
    return tensor


DEEP = b"[" * 200_000
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
DAMAGED = {
    # config.json
    "no config.json": (lambda directory: (directory / "config.json").unlink(), "No such file"),
    "empty config.json": (content("config.json", b""), "not JSON"),
    "config.json is cut": (cut("config.json", -5), "not JSON"),
    "config.json is a list": (content("config.json", []), "not an object"),
    "config.json is a number": (content("config.json", 3), "not an object"),
    "config.json is not UTF-8": (content("config.json", b'{"a": "\xff"}'), "not UTF-8"),
    "config.json has 200,000 brackets": (content("config.json", b'{"a":' + DEEP), "nested too deeply"),
    "config.json has a number of 5,000 digits": (content("config.json", b'{"a":' + b"9" * 5000 + b"}"), "config.json"),
    "config.json has a key twice": (content("config.json", b'{"vocab_size": 1, "vocab_size": 2}'), "twice"),
    "config.json is a pipe": (special("config.json", os.mkfifo), "allowed is a regular file"),
    "config.json is a directory": (special("config.json", os.mkdir), "allowed is a regular file"),
    "config.json is a device": (special("config.json", lambda path: path.symlink_to("/dev/zero")), "is a device"),
    "config.json leads to itself": (special("config.json", lambda path: path.symlink_to(path)), "config.json"),
    "config.json leads nowhere": (special("config.json", lambda path: path.symlink_to("gone")), "No such file"),
    "config.json of a terabyte": (special("config.json", lambda path: os.truncate(_made(path), 10**12)), "bytes"),
    "a billion layers": (config(num_hidden_layers=10**9), "no tensor model.layers.2."),
    "layers without end": (config(num_hidden_layers=10**30), "num_hidden_layers"),
    "a width without end": (config(hidden_size=2**30), "shape"),
    "a vocabulary without end": (config(vocab_size=2**31 - 1), "shape"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers = 0"),
    "layers as text": (config(num_hidden_layers="2"), "num_hidden_layers = '2'"),
    "layers as a fraction": (config(num_hidden_layers=2.0), "num_hidden_layers = 2.0"),
    "layers as true": (config(num_hidden_layers=True), "num_hidden_layers = True"),
    "no head dimension": (config(head_dim=0), "head_dim = 0"),
    "negative heads": (config(num_attention_heads=-4), "num_attention_heads = -4"),
    "heads of keys that do not divide": (config(num_key_value_heads=3), "num_key_value_heads = 3"),
    "no epsilon": (config(rms_norm_eps=None), "rms_norm_eps"),
    "an epsilon that is no number": (config(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "a negative base of wavelengths": (config(rope_theta=-1.0), "rope_theta"),
    "two bases of wavelengths": (config(rope_parameters={"rope_theta": 5.0}), "rope_theta = 10000"),
    "two scalings": (config(rope_scaling=LLAMA3, rope_parameters={"rope_type": "default"}), "rope_scaling"),
    "a scaling that is a list": (config(rope_scaling=[1]), "rope_scaling"),
    "a scaling that is not ours": (config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "dynamic"),
    "a scaling by text": (config(rope_scaling={**LLAMA3, "factor": "8"}), "factor"),
    "a scaling whose factors cross": (config(rope_scaling={**LLAMA3, "low_freq_factor": 9}), "low_freq_factor"),
    "a scaling with more to it": (config(rope_scaling={**LLAMA3, "beta": 1}), "beta"),
    "half the rotation": (config(rope_scaling={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    "tied or not": (config(tie_word_embeddings="yes"), "tie_word_embeddings = 'yes'"),
    "an unknown key": (config(logit_scale=2.0), "logit_scale = 2.0"),
    "an unknown key with a line break": (config(**{"a\nb": 1}), r"'a\\nb'"),
    "an unknown key of a megabyte": (config(**{"a" * 10**6: "b" * 10**6}), "allowed is"),
    "code of its own": (config(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "quantized already": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "no architecture": (config(architectures=None), "architectures"),
    "an architecture as text": (config(architectures="LlamaForCausalLM"), "architectures"),
    "two architectures": (config(architectures=["LlamaForCausalLM", "Qwen3ForCausalLM"]), "architectures"),
    "an architecture in a list in a list": (config(architectures=[["LlamaForCausalLM"]]), "architectures"),
    "another architecture's name": (config(model_type="qwen3"), "model_type = 'qwen3'"),
    "positions as text": (config(max_position_embeddings="many"), "max_position_embeddings"),
    "an end of text past the vocabulary": (config(eos_token_id=29), "eos_token_id = 29"),
    "an end of text as text": (config(eos_token_id="</s>"), "eos_token_id"),
    "an end of text that the tokenizer lacks": (config(eos_token_id=7), "no token has the id 7"),
    # The index
    "the index is a list": (content("model.safetensors.index.json", []), "not an object"),
    "the index is empty": (content("model.safetensors.index.json", b""), "not JSON"),
    "the index is a pipe": (special("model.safetensors.index.json", os.mkfifo), "allowed is a regular file"),
    "the index leads nowhere": (special("model.safetensors.index.json", lambda p: p.symlink_to("no")), "No such file"),
    "the index has no map": (content("model.safetensors.index.json", {}), "weight_map"),
    "the map is a list": (index(["model.safetensors"]), "weight_map"),
    "the map is empty": (index({}), "weight_map"),
    "the map names numbers": (index({NAME: 3}), "the file 3"),
    "the map leads up": (index({NAME: "../whole/model.safetensors"}), "../whole"),
    "the map leads to the root": (index({NAME: "/etc/passwd"}), "/etc/passwd"),
    "the map leads to the directory": (index({NAME: "."}), "the file '.'"),
    "the map leads above it": (index({NAME: ".."}), "the file '..'"),
    "the map has a name with a line break": (index({NAME: "a\nb"}), r"'a\\nb'"),
    "the map has a name with a zero byte": (index({NAME: "a\0b"}), "the file"),
    "the map names a file that is not there": (index({**MAP, NAME: "gone.safetensors"}), "gone.safetensors"),
    "the map names another file for all": (index(dict.fromkeys(MAP, "b.safetensors"), b=random_tensors()), "one model"),
    "the map names a tensor that is not there": (index({**MAP, "x": "model.safetensors"}), "'x' is not in"),
    "the map leaves a tensor out": (index({k: v for k, v in MAP.items() if k != NAME}), f"name tensor '{NAME[:20]}"),
    "the map names a tensor of another file": (index({**MAP, NAME: "b.safetensors"}, b={"x": np.ones(1)}), "is not in"),
    # The file
    "no file": (lambda directory: (directory / "model.safetensors").unlink(), "No such file"),
    "an empty file": (content("model.safetensors", b""), "header"),
    "a file of four bytes": (content("model.safetensors", b"1234"), "header"),
    "the file is cut": (cut("model.safetensors", -1), "lies at bytes"),
    "the file is cut in its header": (cut("model.safetensors", 100), "header"),
    "a pickle": (content("model.safetensors", b"\x80\x02}q\x00." + bytes(100)), "header"),
    "the file is a pipe": (special("model.safetensors", os.mkfifo), "allowed is a regular file"),
    "the file is a device": (special("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "is a device"),
    "the file is a directory": (special("model.safetensors", os.mkdir), "allowed is a regular file"),
    "a header of 2^64 bytes": (content("model.safetensors", struct.pack("<Q", 2**64 - 1) + b"{}"), "header"),
    "a header of a gigabyte": (content("model.safetensors", struct.pack("<Q", 10**9) + b"{}"), "header"),
    "a header of 200,000 brackets": (header(lambda found: b'{"a":' + DEEP), "nested too deeply"),
    "a header that is a list": (header(lambda found: [1]), "not an object"),
    "a header that is no JSON": (header(lambda found: b"{,}"), "not JSON"),
    "a header with a name twice": (header(twice), "twice"),
    "a header with metadata of numbers": (header(lambda found: {**found, "__metadata__": {"a": 1}}), "__metadata__"),
    "a file of another framework": (header(lambda found: {**found, "__metadata__": {"format": "flax"}}), "flax"),
    "an entry that is a number": (header(lambda found: {**found, NAME: 3}), NAME[:20]),
    "an entry without a type": (header(lambda found: {**found, NAME: {"shape": [1]}}), "dtype"),
    "integers": (entry(dtype="I32"), "is of int32; allowed is floating point"),
    "short integers": (entry(dtype="I16"), "I16"),
    "eight bits": (entry(dtype="F8_E5M2"), "F8_E5M2"),
    "half as many bits": (entry(dtype="BF16"), "lies at bytes"),
    "a type in a list": (entry(dtype=["F32"]), "F32"),
    "a negative shape": (entry(shape=[-16, -24]), "shape"),
    "a shape without end": (entry(shape=[2**62, 2**62]), "lies at bytes"),
    "a shape of 40 dimensions": (entry(shape=[16, 24] + [1] * 38), "shape"),
    "a shape of fractions": (entry(shape=[16.0, 24.0]), "shape"),
    "another shape": (entry(shape=[24, 16]), r"\(24, 16\); allowed is \(16, 24\)"),
    "no dimensions": (tensors(**{NAME.replace(".", "__"): np.float32(1)}), r"shape \(\)"),
    "places that overlap": (entry(data_offsets=[0, 1536]), "bytes"),
    "places past the end": (entry(data_offsets=[10**9, 10**9 + 1536]), "lies at bytes"),
    "places that go back": (entry(data_offsets=[1536, 0]), "lies at bytes"),
    "places below zero": (entry(data_offsets=[-1536, 0]), "data_offsets"),
    "three places": (entry(data_offsets=[0, 1, 2]), "data_offsets"),
    "a hole in the file": (both(header(shifted), lambda d: _longer(d, 4)), "the end of another"),
    "more than its tensors": (lambda directory: _longer(directory, 4), "of "),
    # The tensors
    "a tensor is missing": (tensors(**{NAME.replace(".", "__"): None}), f"no tensor {NAME}"),
    "a tensor too many": (tensors(model__layers__2__mlp__down_proj__weight=np.ones((16, 24), np.float32)), "layers.2"),
    "a bias": (tensors(model__layers__0__self_attn__q_proj__bias=np.ones(16, np.float32)), "q_proj.bias"),
    "a name with a line break": (tensors(**{"a\nb": np.ones(1, np.float32)}), r"'a\\nb'"),
    "NaN": (tensors(**{NAME.replace(".", "__"): with_nan(np.nan)}), f"'{NAME}' holds NaN"),
    "infinity in bfloat16": (tensors(**{NAME.replace(".", "__"): with_nan(np.inf, ml_dtypes.bfloat16)}), "infinity"),
    "more than float32 can hold": (tensors(**{NAME.replace(".", "__"): with_nan(1e300, np.float64)}), "infinity"),
    "other frequencies": (tensors(model__rotary_emb__inv_freq=np.ones(2, np.float32)), "inv_freq"),
    "an adapter": (content("adapter_config.json", {}), "adapter"),
    # The tokenizer
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), "No such file"),
    "an empty tokenizer": (content("tokenizer.json", b""), "tokenizer.json"),
    "a tokenizer of 200,000 brackets": (content("tokenizer.json", b'{"a":' + DEEP), "tokenizer.json"),
    "a tokenizer without a model": (content("tokenizer.json", {"version": "1.0"}), "tokenizer.json"),
    "the tokenizer is a pipe": (special("tokenizer.json", os.mkfifo), "allowed is a regular file"),
    "a tokenizer of more words": (lambda directory: _tokenizer(directory, 40), "vocab_size"),
}


def _made(path):
    path.touch()
    return path


def _longer(directory, size):
    with open(directory / "model.safetensors", "ab") as file:
        file.write(bytes(size))


def _tokenizer(directory, size):
    words = {f"w{i}": i for i in range(size)} | {"<|endoftext|>": 3}
    words.pop("w3")
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))


@pytest.fixture
def at_once():
    """Ends a test that hangs."""

    def stop(*_):
        raise TimeoutError("this should have been refused at once")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_refused_in_one_line_and_nothing_is_written(case, whole, tiny_config, tmp_path, at_once):
    damage, said = DAMAGED[case]
    shutil.copytree(whole, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=said) as error:
        import_model(tmp_path / "model", tmp_path / "w", 1e6, tiny_config(data__cache_dir=str(tmp_path / "cache")))
    message = str(error.value)
    assert "\n" not in message and len(message) < 1500 and "allowed" in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path, at_once):
    """Its file is a hole of 10 TB that takes no room on the disk."""
    width = 2**20
    model = ModelConfig(**{**MODEL.__dict__, "width": width, "mlp_width": 2**19, "depth": 1, "base_width": width})
    (tmp_path / "config.json").write_text(json.dumps(config_json.described(model)))
    found, place = {}, 0
    for tensor in places(model):
        size = int(np.prod(tensor.shape, dtype=object)) * 2
        found[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(found).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    try:
        os.truncate(tmp_path / "model.safetensors", 8 + len(text) + place)
    except OSError:
        pytest.skip("this file system has no files of 10 TB")
    with pytest.raises(UserError, match="GB of embedding, head or one block in float32; allowed is what fits"):
        open_pretrained(tmp_path)


# Odd, and right


def test_files_behind_symbolic_links_are_read_as_the_cache_of_hugging_face_keeps_them(whole, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(whole, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    found = open_pretrained(snapshot)
    assert found.tensors.keys() == MAP.keys()


def test_the_index_says_which_of_two_tensors_of_one_name_counts(whole, tmp_path):
    first, second = random_tensors(seed=1), random_tensors(seed=2)
    for chosen in ("a.safetensors", "b.safetensors"):
        directory = tmp_path / chosen
        shutil.copytree(whole, directory)
        (directory / "model.safetensors").unlink()
        half = dict.fromkeys(list(MAP)[::2], "a.safetensors") | dict.fromkeys(list(MAP)[1::2], "b.safetensors")
        index({**half, NAME: chosen}, a=first, b=second)(directory)
        kernel = open_pretrained(directory).params()["layers"]["block"]["mlp"]["down"]["kernel"][1]
        np.testing.assert_array_equal(kernel, (first if chosen[0] == "a" else second)[NAME].T)


def test_a_tied_head_counts_where_it_is_not_the_embedding(whole, tmp_path):
    own = random_tensors()["lm_head.weight"]
    for head, tied in ((None, True), (random_tensors()["model.embed_tokens.weight"], True), (own, False)):
        directory = tmp_path / f"{tied}-{head is None}"
        shutil.copytree(whole, directory)
        both(config(tie_word_embeddings=True), tensors(lm_head__weight=head))(directory)
        found = open_pretrained(directory)
        assert found.model(1).tie_embeddings == tied and found.options["tie_embeddings"] == tied
        if not tied:
            np.testing.assert_array_equal(found.params()["head"]["kernel"], own.T)


def test_frequencies_that_follow_from_config_json_may_stand_beside_the_weights(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    right = (1e4 ** -np.array([0, 0.5])).astype(np.float16)  # of a head of 4
    tensors(model__layers__0__self_attn__rotary_emb__inv_freq=right)(tmp_path / "model")
    assert open_pretrained(tmp_path / "model").model(1) == ModelConfig(**{**MODEL.__dict__, "sequence_length": 1})


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_text_ends_with_the_token_that_config_json_names(whole, tiny_config, tmp_path):
    # Of several the one with a usual name of an end of text, or else the first; without one that name tells.
    for number, (given, expected) in enumerate(((4, 4), ([4, 3], 3), ([4, 2], 4), (None, 3))):
        directory, workdir = tmp_path / f"model {number}", tmp_path / str(number)
        shutil.copytree(whole, directory)
        config(eos_token_id=given)(directory)
        import_model(directory, workdir, 1e6, tiny_config())
        corpus = reopen_workspace(workdir).corpus
        assert corpus.end_of_text == corpus.validation[-1] == expected
        assert corpus.load_tokenizer().end_of_text == expected
        export_run(workdir, tmp_path / f"out {number}")
        assert json.loads((tmp_path / f"out {number}" / "config.json").read_text())["eos_token_id"] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_an_imported_model_is_evaluated_within_documents(whole, tiny_config, tmp_path):
    rows = {}
    for within in (False, True):
        run = import_model(whole, tmp_path / str(within), 1e6, tiny_config(data__within_documents=within))
        (rows[within],) = results.read_rows(tmp_path / str(within) / "runs" / run.id, "trained")
        workspace = reopen_workspace(tmp_path / str(within))
        (group,) = workspace.experiment.cohorts
        assert group.shape.model.document_token == (workspace.corpus.end_of_text if within else -1)
        # Block by block it is the loss of the model as a whole.
        static = group.static.evaluation()
        loss = evaluator(workspace, group.shape, static)(workspace.parameters(run), static.grids(run.precision, 2))
        np.testing.assert_allclose(rows[within]["loss"], loss, rtol=1e-5)
    assert rows[True]["loss"] != rows[False]["loss"] and rows[True]["within_documents"] == "yes"


def test_the_end_of_text_that_is_asked_for_goes_before_the_one_of_config_json(whole, tmp_path):
    found = open_pretrained(whole)
    assert _tokenizer_of(found, "<end>") == f"file:{whole / 'tokenizer.json'}?end_of_text=<end>"
    assert tokenizers.given(_tokenizer_of(found, "<end>")).end_of_text == 4
    with pytest.raises(UserError, match=r"^--end_of_text=<eot>: data\.tokenizer=.*allowed"):
        _tokenizer_of(found, "<eot>")


@pytest.mark.parametrize("given", ["", "x", "-1", "1.5", "99", str(2**40)])
def test_an_end_of_text_that_is_no_id_is_refused(given, whole):
    spec = f"file:{whole / 'tokenizer.json'}?end_of_text={given}"
    with pytest.raises(UserError, match="end_of_text") as error:
        tokenizers.from_file(*tokenizers.split_file(spec)[:1], spec)
    assert "allowed" in str(error.value)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_biases_are_there_after_quantization(whole, tiny_config, tmp_path):
    model = dataclasses.replace(MODEL, qkv_bias=True, rope_scaling="llama3:8,1,4,8")
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_json.described(model, eos_token_id=3)))
    safetensors.write(tmp_path / "model" / "model.safetensors", random_tensors(model))
    run = import_model(tmp_path / "model", tmp_path / "w", 1e6, tiny_config())
    (imported,) = results.read_rows(tmp_path / "w" / "runs" / run.id, "trained")
    quantize_missing(reopen_workspace(tmp_path / "w"), ("rtn", "gptq"), (8,))
    for method in ("rtn", "gptq"):
        (row,) = results.read_rows(tmp_path / "w" / "runs" / run.id, method)
        assert abs(row["loss"] - imported["loss"]) < 0.01 * imported["loss"]
    # Without them the model is another.
    parameters = reopen_workspace(tmp_path / "w").parameters(run)
    assert np.std(parameters["layers"]["block"]["attention"]["qkv_bias"]) > 0.5
