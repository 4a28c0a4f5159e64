"""A Hugging Face model directory (config.json, safetensors) as a decoder and its parameters, and back.

Between what names mean (`architectures`, `config_json`), the files (`files`, `safetensors`) and the commands.
"""

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.huggingface import architectures, compressed, config_json, reading, safetensors
from precision_scaling.huggingface.reading import shown
from precision_scaling.model import decoder, rope
from precision_scaling.model.config import ModelConfig
from precision_scaling.runtime import files
from precision_scaling.runtime.progress import progress_bar
from precision_scaling.training.blocks import Stacked

# Some writers keep the rotary embedding's frequencies, which follow from config.json.
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_PIECE = 1 << 24  # elements that are looked at together


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model directory that was found to be one our decoder computes. tensors: mapped from its files, by name.

    config: its config.json, with `tie_word_embeddings` as the tensors have it.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def options(self) -> dict[str, Any]:
        """Values of the options of `config.model`, see `config_json.model_options`."""
        return config_json.model_options(self.config)

    def model(self, sequence_length: int, dtype: str = "float32") -> ModelConfig:
        """The decoder, with depth-µP's multipliers all 1. UserError for a length that the model was not made for."""
        limit, key = config_json.longest_sequence(self.config) or (sequence_length, "")
        if sequence_length > limit:
            raise UserError(f"--sequence_length={sequence_length}: allowed is up to {key}, {limit}")
        own = self.options
        base = {"base_width": own["width"], "base_depth": own["depth"]}
        return ModelConfig(sequence_length=sequence_length, dtype=dtype, **base, **own)

    @property
    def depth(self) -> int:
        """Blocks that there are: a directory is a source of `training.blocks.Blocks`."""
        return self.model(1).depth

    def top(self) -> Any:
        """The parameters outside of the blocks, in float32, as NumPy arrays."""
        model = self.model(1)
        return self._filled(Stacked(decoder.abstract(model)).top(), architectures.top_places(model))

    def block(self, layer: int) -> Any:
        """The parameters of a block."""
        model = self.model(1)
        layers = decoder.abstract(model)["layers"]
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), layers)
        places = (place._replace(layer=0) for place in architectures.block_places(model, layer))
        return jax.tree.map(lambda leaf: leaf[0], self._filled({"layers": one}, places)["layers"]["block"])

    def params(self) -> Any:
        """The parameters as a whole, blocks on a leading axis."""
        model = self.model(1)
        places = _shown_as(architectures.places(model), "reading", len(self.tensors))
        return self._filled(decoder.abstract(model), places)

    def _filled(self, shapes: Any, places: Iterable[architectures.Place]) -> Any:
        # Memory is used only where values are set.
        params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        for place in places:
            architectures.view(params, place)[...] = self.tensors[place.name]
        return params

    @property
    def fingerprint(self) -> str:
        """Name of the directory and eight characters that stand for the content of its tensors.

        Raises UserError for a tensor that has something in it that is no number: nothing could be measured with it.
        """
        checksum = 0
        for name in _shown_as(sorted(self.tensors), "checking", len(self.tensors)):
            for piece in _pieces(self.tensors[name]):
                checksum = zlib.crc32(piece.view(np.uint8).data, checksum)
                with np.errstate(over="ignore"):
                    numbers = np.isfinite(piece.astype(np.float32)).all()
                if not numbers:
                    raise UserError(f"{self.directory}: tensor {shown(name)} holds NaN or infinity; allowed is numbers")
        return f"{self.directory.name}@{checksum:08x}"


def open_pretrained(directory: Path) -> Pretrained:
    """Reads a directory's config.json and the headers of its safetensors, and checks them against each other.

    Raises UserError, one line, for what is missing, of another architecture, or has an option our decoder lacks.
    """
    config = reading.read_json(directory / "config.json")
    found = Pretrained(directory.absolute(), config, {})
    found.model(1)  # says what our decoder lacks before any file is looked for
    if os.path.lexists(directory / "adapter_config.json"):
        raise UserError(
            f"{directory}: adapter_config.json: allowed is a model whose adapter is merged into its weights"
        )
    found.tensors.update(_tensors(directory))
    if (quantization := config.get("quantization_config")) is not None:
        try:
            found = dataclasses.replace(found, tensors=compressed.decoded(quantization, found.tensors))
        except UserError as error:
            raise UserError(f"{directory}: {error}") from None
    found = _untied(found)
    _check_tensors(found)
    return found


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, from the files that the index names where there is one."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not os.path.lexists(index):
        return safetensors.read(single)
    weight_map = reading.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map = {shown(weight_map)}: allowed is an object of tensor names and files")
    for file in weight_map.values():
        # A path could lead out of the directory.
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or not file.isprintable():
            raise UserError(f"{index}: the file {shown(file)}: allowed is the name of a file beside the index")
    parts = {file: safetensors.read(directory / file) for file in sorted(set(weight_map.values()))}
    if single.name not in parts and os.path.lexists(single):
        raise UserError(f"{index}: does not name {single.name}, which is there, too; allowed is one model")
    for name, file in weight_map.items():
        if name not in parts[file]:
            raise UserError(f"{index}: tensor {shown(name)} is not in {file}; allowed is the file that holds it")
    for file, tensors in parts.items():
        if unnamed := [name for name in tensors if name not in weight_map]:
            raise UserError(f"{index}: does not name tensor {shown(unnamed[0])} of {file}; allowed is all tensors")
    return {name: parts[file][name] for name, file in weight_map.items()}


def _untied(found: Pretrained) -> Pretrained:
    """The model with its own head where the files hold one that is not the embedding, whatever config.json says.

    So does transformers 5: who writes both means both.
    """
    head, embedding = (found.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    tied = found.options["tie_embeddings"]
    if not tied or head is None or embedding is None or _same(head, embedding):
        return found
    return dataclasses.replace(found, config={**found.config, "tie_word_embeddings": False})


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors are the same, bit by bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    pairs = zip(_pieces(a), _pieces(b), strict=True)
    return all(np.array_equal(one.view(np.uint8), other.view(np.uint8)) for one, other in pairs)


def _check_tensors(found: Pretrained) -> None:
    """Every tensor that config.json asks for is there in its shape, and no other."""
    directory, architecture = found.directory, found.config["architectures"][0]
    model, wanted, parameters = found.model(1), set(), 0
    for place in architectures.places(model):
        if place.name not in found.tensors:
            allowed = f"all tensors that {architecture} has by config.json"
            raise UserError(f"{directory}: no tensor {place.name}; allowed is {allowed}")
        if (shape := found.tensors[place.name].shape) != place.shape:
            shapes = f"is of shape {shape}; allowed is {place.shape}, by config.json"
            raise UserError(f"{directory}: tensor {place.name} {shapes}")
        if (dtype := found.tensors[place.name].dtype).kind in "iu" or dtype.itemsize < 2:
            raise UserError(f"{directory}: tensor {place.name} is of {dtype}; allowed is floating point of 16 bits up")
        wanted.add(place.name)
        parameters += math.prod(place.shape)
    for name in sorted(set(found.tensors) - wanted):
        if model.tie_embeddings and name == "lm_head.weight":
            continue  # it is the embedding
        if not _FREQUENCIES.search(name):
            allowed = f"the tensors that {architecture} has by config.json"
            raise UserError(f"{directory}: tensor {shown(name)}: allowed is {allowed}")
        expected = np.asarray(rope.frequencies(model.head_dim, model.rope_theta, model.rope_scaling))
        tensor = found.tensors[name].astype(np.float32)
        if tensor.shape != expected.shape or not np.allclose(tensor, expected, rtol=0.01, atol=1e-6):
            raise UserError(f"{directory}: tensor {shown(name)}: allowed is what config.json says of rotary embeddings")
    # What every command holds at once: the parameters outside of the blocks, or those of one block.
    outside = model.vocab_size * model.width * (1 if model.tie_embeddings else 2)
    need, memory = 4 * max(outside, parameters // model.depth), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > memory:
        size = f"{need / 1e9:.1f} GB of embedding, head or one block in float32"
        raise UserError(f"{directory}: {size}; allowed is what fits into this machine's {memory / 1e9:.1f} GB")


def _pieces(tensor: np.ndarray) -> Iterable[np.ndarray]:
    flat = tensor.reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))


def _shown_as(values: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    """The same, with a progress bar while it takes time."""
    return progress_bar(values, desc=title, unit=" tensors", total=total, leave=False)


def write_pretrained(directory: Path, model: ModelConfig, params: Any, dtype: str = "float32", **more: Any) -> None:
    """Writes a decoder as config.json and model.safetensors that `transformers` loads.

    dtype: "float32" or "bfloat16". more: further keys of config.json. Raises UserError where no Hugging Face
    architecture computes what the decoder does.
    """
    model, params = architectures.standardized(model, jax.tree.map(np.asarray, params))
    tensors = architectures.views(model, params)
    if dtype != "float32":
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    write_tensors(directory, model, tensors, dtype, **more)


def write_tensors(
    directory: Path, model: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: str, **more: Any
) -> None:
    """Writes tensors as a directory of that model, whose multipliers are 1; see `write_pretrained`."""
    config = config_json.described(model, dtype=dtype, torch_dtype=dtype, **more)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # No reader takes a directory without config.json for a model, so it comes last.
        safetensors.write(directory / "model.safetensors", tensors)
        files.atomic_write(directory / "config.json", json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; allowed is a directory that can be written") from None
