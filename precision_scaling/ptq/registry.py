"""The methods of post-training quantization, by name: the one line that a new method's module adds itself to."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from precision_scaling.model import mixture
from precision_scaling.model.accounting import count_parameters, projection_parameters
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import formats
from precision_scaling.ptq import allotment, awq, by_layer, gptq, kv_cache, rtn, smoothquant
from precision_scaling.ptq.by_layer import ByLayer
from precision_scaling.ptq.scheme import LINEARS, Linear, Scheme

METHODS = {module.METHOD.name: module.METHOD for module in (gptq, awq, rtn, smoothquant, kv_cache)}


def scheme_of(method: str, **options: Any) -> Scheme:
    """The scheme of a method with these options, the others at their defaults."""
    return Scheme(METHODS[method], **options)


def of_method(method: str, options: Mapping[str, Any]) -> Scheme:
    """The scheme of one method under the config's `ptq` section, values that `config.options.check_ptq` passed."""
    return scheme_of(method, **{name: options[name] for name in METHODS[method].options})


def planned(options: Mapping[str, Any]) -> tuple[tuple[Scheme, tuple[float, ...]], ...]:
    """The schemes of the config's `ptq` section, each with the P_post of its rows.

    All bit-widths of a method are one scheme; each format is a scheme of its own, as its bits may be those of another.
    With formats by layer these are the bits that the others keep, see `bits_post`; with a target it is that, the bits
    are the widths to choose among.
    """
    found: list[tuple[Scheme, tuple[float, ...]]] = []
    for method in options["methods"]:
        scheme = of_method(method, options)
        if scheme.target_bits:
            widths = tuple(sorted(set(options["bits"])))
            found.append((dataclasses.replace(scheme, widths=widths), (scheme.target_bits,)))
            continue
        if options["bits"]:
            found.append((scheme, tuple(dict.fromkeys(options["bits"]))))
        for fmt in dict.fromkeys(map(formats.parse, options["formats"])):
            # Formats whose scales are given have no range to search; who asks for it is told before.
            clip = scheme.clip and fmt.family not in ("block", "wide")
            found.append((dataclasses.replace(scheme, format=fmt.name, clip=clip), (fmt.bits,)))
    return tuple(found)


def by_layer_of(scheme: Scheme, bits: float, model: ModelConfig) -> ByLayer:
    """The formats of a scheme without a target. ConfigError for layers that the model has not."""
    return by_layer.parse(scheme.layers, formats.parse(scheme.format or bits), model.depth)


def allotted(scheme: Scheme, cost_LxPxK: np.ndarray, model: ModelConfig) -> ByLayer:
    """The formats of a scheme with a target: cost_LxPxK as `sensitivity.measure` has it."""
    weights = [sizes(model)[linear] for linear in LINEARS] * model.depth
    cost_IxK = cost_LxPxK.reshape(-1, cost_LxPxK.shape[-1])
    widths = iter(allotment.allot(cost_IxK, scheme.widths, weights, scheme.target_bits))
    return tuple({linear: formats.parse(next(widths)) for linear in LINEARS} for _ in range(model.depth))


def bits_post(scheme: Scheme, bits: float, model: ModelConfig) -> float:
    """P_post of the row of a scheme without a target: the bits, or those of the mean noise where layers differ."""
    return effective_bits(by_layer_of(scheme, bits, model), model) if scheme.layers else bits


def effective_bits(formats_by_layer: ByLayer, model: ModelConfig) -> float:
    """Those of the format where there is one, else those of the mean noise over all weights, as P_w has them."""
    weights = sizes(model)
    weighted = ((fmt, weights[linear]) for wanted in formats_by_layer for linear, fmt in wanted.items())
    return mixture.bits(mixture.of_weights(weighted))


def sizes(model: ModelConfig) -> dict[Linear, int]:
    """Weights of each projection of a block."""
    found = projection_parameters(model)
    return {linear: found[linear[1]] for linear in LINEARS}


def target_bits(scheme: Scheme, model: ModelConfig, size: float) -> tuple[float, float]:
    """(bits per weight of a model of that many bytes, its bytes at 2 bits): scales, and what is not quantized, in 16
    bits; zero points left out."""
    per_block = sizes(model)
    inputs = dict.fromkeys(LINEARS, model.width)
    inputs |= {("attention", "out"): model.heads * model.head_dim, ("mlp", "down"): model.mlp_width}
    scales = sum(
        per_block[linear] // inputs[linear] * (-(-inputs[linear] // scheme.group_size) if scheme.group_size else 1)
        for linear in LINEARS
    )
    weights = sum(per_block.values()) * model.depth
    non_embedding, embedding = count_parameters(model)
    fixed = 2 * (non_embedding + embedding - weights + scales * model.depth)
    # Rounded down: the model is no larger than that.
    return math.floor((size - fixed) * 8 / weights * 1e4) / 1e4, fixed + weights / 4
