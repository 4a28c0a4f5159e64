"""A packed model of a run as the tensors and the `quantization_config` of a Hugging Face directory.

Between `ptq` (codes and scales of each kernel) and `compressed` (how that library stores them).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.huggingface import architectures, compressed, compressed_floats, quantization_config
from precision_scaling.huggingface.architectures import Place
from precision_scaling.huggingface.quantization_config import PACK, Grid
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import bit_patterns
from precision_scaling.numerics.formats import POWERS_OF_TWO, Format
from precision_scaling.ptq import codes as codes_lib
from precision_scaling.ptq.codes import Codes
from precision_scaling.ptq.packed import Loaded, format_of

_SCALED = (("attention", "out"), ("mlp", "down"))  # kernels that take over the multiplier of a residual branch


def check(loaded: Loaded, name: str, model: ModelConfig) -> None:
    """UserError, one line, for a packed model that compressed-tensors cannot hold; before anything is made of it."""
    if loaded.operands:
        raise UserError(
            f"--quantized={name}: quantizes {', '.join(loaded.operands)} while it runs; allowed are models whose "
            "weights alone are quantized"
        )
    found = codes_lib.each(loaded.model.kernels)
    _check_formats(loaded, name, model)
    if any(codes.group_size is not None for codes in found):
        raise UserError(
            f"--quantized={name}: has groups with a shorter last one, which compressed-tensors cannot hold; allowed "
            "are group sizes that divide the inputs of every projection"
        )
    if not isinstance(loaded.bits, int) and any(codes.zeros is not None for codes in found):
        raise UserError(
            f"--quantized={name}: has several widths, asymmetric; allowed are symmetric grids, or one width: "
            "transformers reads zero points at one width alone"
        )
    if any(codes.row_scales is not None for codes in found):
        raise UserError(
            f"--quantized={name}: its inputs have scales of their own, which compressed-tensors cannot hold; allowed "
            "are methods without them, such as gptq and rtn"
        )


def _check_formats(loaded: Loaded, name: str, model: ModelConfig) -> None:
    used = {
        format_of(loaded.bits, module, kernel, layer)
        for module, kernel, codes in codes_lib.named(loaded.model.kernels)
        for layer in range(codes.codes.shape[0])
    }
    others = sorted((fmt for fmt in used if fmt.family != "int"), key=lambda fmt: fmt.name)
    for fmt in others:
        if compressed_floats.stored_as(fmt) is None:
            raise UserError(
                f"--quantized={name}: its format {fmt.name} is none that compressed-tensors can hold; allowed are "
                f"{compressed_floats.ALLOWED}"
            )
        factor = _multiplier(model)
        if fmt.block_scale in POWERS_OF_TWO and math.frexp(factor)[0] != 0.5:
            raise UserError(
                f"--quantized={name}: the scales of {fmt.name} are powers of two, which cannot take up the multiplier "
                f"{factor:.4g} of residual branches (depth-µP); allowed are models without one, such as imported ones"
            )
    if others and len(used) > 1:
        names = ", ".join(sorted(fmt.name for fmt in used))
        raise UserError(
            f"--quantized={name}: has the formats {names}; allowed is one, or integers of several widths: "
            "transformers dequantizes one format alone"
        )


def _multiplier(model: ModelConfig) -> float:
    """Of residual branches, which goes into scales."""
    return float(np.float32(model.residual_scale)) if model.norm_placement == "pre" else 1.0


def tensors(
    model: ModelConfig, loaded: Loaded, dtype: Any = np.float32
) -> tuple[ModelConfig, dict[str, np.ndarray], dict[str, Any]]:
    """(decoder without depth-µP's multipliers, tensors by name, quantization_config) of a packed model.

    dtype: of scales, but those of blocks, and of what is not quantized. A residual multiplier goes into scales, so that
    codes stay.
    """
    params = jax.tree.map(np.asarray, codes_lib.parameters(loaded.model))
    plain, params = architectures.standardized(model, params)
    kernels = {}
    for module, name, codes in codes_lib.named(loaded.model.kernels):
        formats = [format_of(loaded.bits, module, name, layer) for layer in range(codes.codes.shape[0])]
        factor = np.float32(_multiplier(model) if (module, name) in _SCALED else 1)
        kernels[module, name] = _encoded(codes, formats, factor)
    _, name, some = codes_lib.named(loaded.model.kernels)[0]
    inputs, groups = some.codes.shape[1], some.scales.shape[1]
    group_size = inputs // groups if groups > 1 or _grouped(loaded.method) else 0
    found: dict[str, np.ndarray] = {}
    grids: dict[Grid, list[str]] = {}
    for place in architectures.places(plain):
        kernel = place.path[2:4] if place.path[-1] == "kernel" and place.layer is not None else ()
        if kernel not in kernels:
            found[place.name] = architectures.view(params, place).astype(dtype)
            continue
        own = kernels[kernel][place.layer or 0]
        stored = compressed_floats.stored_as(own.fmt) or PACK
        kind = quantization_config.KINDS[stored]
        bits = int(own.fmt.bits) if own.fmt.family == "int" else kind.bits[0]
        grid = Grid(bits, some.zeros is None, kind.group_size or group_size, stored)
        layer = place.name.removesuffix(".weight")
        grids.setdefault(grid, []).append(layer)
        found |= _of_place(layer, own, grid, _outputs_first(place), dtype)
    return plain, found, quantization_config.description(grids)


class _Kernel(NamedTuple):
    """Of one layer (in, *features): codes of integers as they are, of other formats as bit patterns."""

    fmt: Format
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    tensor_scale: np.float32 | None


def _encoded(codes: Codes, formats: list[Format], factor: np.float32) -> list[_Kernel]:
    """The kernel of each layer, its scales times a factor."""
    found = []
    for layer, fmt in enumerate(formats):
        code, scale, tensor_scale = np.asarray(codes.codes[layer]), np.asarray(codes.scales[layer]), None
        zeros = None if codes.zeros is None else np.asarray(codes.zeros[layer])
        if fmt.family != "int":
            code = bit_patterns.encode(code, fmt)
        if fmt.family != "block":
            scale = scale * factor
        else:
            scale, tensor_scale = bit_patterns.encode_scales(scale, fmt)
            if tensor_scale is None:
                exponent = math.frexp(factor)[1] - 1  # beyond the ends are blocks of zeros, and what rounds to them
                scale = np.clip(scale.astype(np.int16) + exponent, 0, 254).astype(np.uint8)
            else:
                tensor_scale = tensor_scale * factor
        found.append(_Kernel(fmt, code, scale, zeros, tensor_scale))
    return found


def _grouped(method: str) -> bool:
    """Whether a scheme of that name has groups, of which a kernel may happen to hold one."""
    return any(part.startswith("group") for part in method.split("-"))


def _outputs_first(place: Place) -> Callable[[np.ndarray], np.ndarray]:
    """(rows, *features) of a kernel -> (outputs of the place, rows)."""
    return lambda array: array.reshape(array.shape[0], -1)[:, place.columns].T


def _of_place(
    layer: str, kernel: _Kernel, grid: Grid, outputs_first: Callable[[np.ndarray], np.ndarray], dtype: Any
) -> dict[str, np.ndarray]:
    code, scale = outputs_first(kernel.codes), np.ascontiguousarray(outputs_first(kernel.scales))
    scale = scale if kernel.fmt.family == "block" else scale.astype(dtype)
    if grid.format != PACK:
        return compressed_floats.encoded(layer, code, scale, kernel.tensor_scale, grid)
    zero = None if kernel.zeros is None else outputs_first(kernel.zeros)
    return compressed.encoded(layer, code, scale, zero, grid.bits)
