"""A Hugging Face model directory (config.json, safetensors) as a decoder and its parameters, and back.

Between the map of names (`architectures`), the files (`safetensors`) and the commands.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from precision_scaling import files
from precision_scaling import model as model_lib
from precision_scaling.errors import UserError
from precision_scaling.huggingface import architectures, safetensors
from precision_scaling.model import ModelConfig

# Tensors that hold nothing a model must be told: some writers keep what follows from config.json.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model directory that was found to be one our decoder computes. tensors: mapped from its files, by name."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def options(self) -> dict[str, Any]:
        """Values of the options of `config.model`, see `architectures.model_options`."""
        return architectures.model_options(self.config)

    def model(self, sequence_length: int, dtype: str = "float32") -> ModelConfig:
        """The decoder, with depth-µP's multipliers all 1."""
        own = self.options
        base = {"base_width": own["width"], "base_depth": own["depth"]}
        return ModelConfig(sequence_length=sequence_length, dtype=dtype, **base, **own)

    def params(self) -> Any:
        """Its parameters in float32, as NumPy arrays."""
        params = _empty(self.model(1))
        for name, view in architectures.views(self.model(1), params).items():
            view[...] = self.tensors[name]
        return params

    @property
    def fingerprint(self) -> str:
        """Name of the directory and eight characters that stand for the content of its tensors."""
        checksum = 0
        for name in sorted(self.tensors):
            checksum = zlib.crc32(np.ascontiguousarray(self.tensors[name]).view(np.uint8), checksum)
        return f"{self.directory.name}@{checksum:08x}"


def open_pretrained(directory: Path) -> Pretrained:
    """Reads a directory's config.json and the headers of its safetensors, and checks them against each other.

    Raises UserError, one line, for what is missing, of another architecture, or has an option our decoder lacks.
    """
    config = _json(directory / "config.json")
    index = directory / "model.safetensors.index.json"
    files = [directory / "model.safetensors"]
    if index.exists():
        files = [directory / part for part in sorted(set(_json(index).get("weight_map", {}).values()))]
    found = Pretrained(directory.absolute(), config, {})
    model = found.model(1)  # says what our decoder lacks before any file is looked for
    architecture = config["architectures"][0]
    for path in files:
        found.tensors.update(safetensors.read(path))
    wanted = {name: view.shape for name, view in architectures.views(model, _empty(model)).items()}
    for name, tensor in found.tensors.items():
        # A tied head is the embedding, whether or not it was written a second time.
        derived = _DERIVED.search(name) or (model.tie_embeddings and name == "lm_head.weight")
        if name not in wanted and not derived:
            raise UserError(f"{directory}: tensor {name} is not one of {architecture} as it is read here")
        if not derived and tensor.shape != wanted[name]:
            shapes = f"is of shape {tensor.shape}; allowed is {wanted[name]}, by config.json"
            raise UserError(f"{directory}: tensor {name} {shapes}")
    if missing := [name for name in wanted if name not in found.tensors]:
        raise UserError(f"{directory}: no tensor {missing[0]}, which {architecture} has")
    return found


def write_pretrained(directory: Path, model: ModelConfig, params: Any, **more: Any) -> None:
    """Writes a decoder as config.json and model.safetensors (float32) that `transformers` loads.

    more: further keys of config.json. Raises UserError where no Hugging Face architecture computes what it does.
    """
    model, params = architectures.standardized(model, jax.tree.map(np.asarray, params))
    config = architectures.config_json(model, dtype="float32", torch_dtype="float32", **more)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # No reader takes a directory without config.json for a model, so it comes last.
        safetensors.write(directory / "model.safetensors", architectures.views(model, params))
        files.atomic_write(directory / "config.json", json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; allowed is a directory that can be written") from None


def _empty(model: ModelConfig) -> Any:
    """Parameters of a decoder whose values are not yet set; memory is used only where they are."""
    shapes = jax.eval_shape(lambda key: model_lib.init(model, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; allowed is a Hugging Face model directory") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; allowed is a Hugging Face model directory") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not an object; allowed is a Hugging Face model directory")
    return found
