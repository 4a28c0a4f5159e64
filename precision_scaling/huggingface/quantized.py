"""A packed model of a run as the tensors and the `quantization_config` of a Hugging Face directory.

Between `ptq` (codes and scales of each kernel) and `compressed` (how that library stores them).
"""

from typing import Any

import jax
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.huggingface import architectures, compressed
from precision_scaling.huggingface.architectures import Place
from precision_scaling.model.config import ModelConfig
from precision_scaling.ptq import codes as codes_lib
from precision_scaling.ptq.codes import Codes
from precision_scaling.ptq.packed import Loaded, bits_of

_SCALED = (("attention", "out"), ("mlp", "down"))  # kernels that take over the multiplier of a residual branch


def check(loaded: Loaded, name: str) -> None:
    """UserError, one line, for a packed model that compressed-tensors cannot hold; before anything is made of it."""
    if loaded.operands:
        raise UserError(
            f"--quantized={name}: quantizes {', '.join(loaded.operands)} while it runs; allowed are models whose "
            "weights alone are quantized"
        )
    found = codes_lib.each(loaded.model.kernels)
    if any(codes.group_size is not None for codes in found):
        raise UserError(
            f"--quantized={name}: has groups with a shorter last one, which {compressed.FORMAT} cannot hold; allowed "
            "are group sizes that divide the inputs of every projection"
        )
    if not isinstance(loaded.bits, int) and any(codes.zeros is not None for codes in found):
        raise UserError(
            f"--quantized={name}: has several widths, asymmetric; allowed are symmetric grids, or one width: "
            "transformers reads zero points at one width alone"
        )
    if any(codes.row_scales is not None for codes in found):
        raise UserError(
            f"--quantized={name}: its inputs have scales of their own, which {compressed.FORMAT} cannot hold; allowed "
            "are methods without them, such as gptq and rtn"
        )


def tensors(
    model: ModelConfig, loaded: Loaded, dtype: Any = np.float32
) -> tuple[ModelConfig, dict[str, np.ndarray], dict[str, Any]]:
    """(decoder without depth-µP's multipliers, tensors by name, quantization_config) of a packed model.

    dtype: of scales and of what is not quantized. A residual multiplier goes into scales, so that codes stay.
    """
    params = jax.tree.map(np.asarray, codes_lib.parameters(loaded.model))
    plain, params = architectures.standardized(model, params)
    kernels: dict[tuple[str, str], Codes] = {
        (module, name): jax.tree.map(np.asarray, codes)
        for module, names in loaded.model.kernels.items()
        for name, codes in names.items()
    }
    if model.norm_placement == "pre":
        for kernel in _SCALED:
            scale = np.float32(model.residual_scale)
            kernels[kernel] = kernels[kernel]._replace(scales=kernels[kernel].scales * scale)
    found: dict[str, np.ndarray] = {}
    names: dict[int, list[str]] = {}
    for place in architectures.places(plain):
        codes = (
            kernels.get((place.path[2], place.path[3]))
            if place.path[-1] == "kernel" and place.layer is not None
            else None
        )
        if codes is not None:
            bits = bits_of(loaded.bits, place.path[2], place.path[3], place.layer or 0)
            names.setdefault(bits, []).append(place.name.removesuffix(".weight"))
            found |= _of_place(place, codes, bits, dtype)
        else:
            found[place.name] = architectures.view(params, place).astype(dtype)
    some = next(iter(kernels.values()))
    inputs, groups = some.codes.shape[1], some.scales.shape[1]
    group_size = inputs // groups if groups > 1 or _grouped(loaded.method) else 0
    return plain, found, compressed.description(names, group_size, some.zeros is None)


def _grouped(method: str) -> bool:
    """Whether a scheme of that name has groups, of which a kernel may happen to hold one."""
    return any(part.startswith("group") for part in method.split("-"))


def _of_place(place: Place, codes: Codes, bits: int, dtype: Any) -> dict[str, np.ndarray]:
    def outputs_first(array):
        one = np.asarray(array)[place.layer]
        return one.reshape(one.shape[0], -1)[:, place.columns].T

    zero = None if codes.zeros is None else outputs_first(codes.zeros)
    scale = np.ascontiguousarray(outputs_first(codes.scales)).astype(dtype)
    return compressed.encoded(place.name.removesuffix(".weight"), outputs_first(codes.codes), scale, zero, bits)
