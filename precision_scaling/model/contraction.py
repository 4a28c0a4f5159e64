"""Whether the groups, the rotation and the layers of a precision fit the shapes of a decoder."""

from precision_scaling.errors import ConfigError
from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize import layers, operands
from precision_scaling.quantize.operands import OPTIONS
from precision_scaling.quantize.precision import Precision


def check_shape(precision: Precision, model: ModelConfig, tokens_per_part: int) -> None:
    """Raises ConfigError where groups, a rotation or rules by layer do not fit a decoder; before anything is compiled.

    tokens_per_part: tokens of a microbatch, over which weight gradients contract.
    """
    for stage in precision.stages:
        _check_stage(stage, model, tokens_per_part)


def _check_stage(precision: Precision, model: ModelConfig, tokens_per_part: int) -> None:
    features = {"model.width": model.width, "model.mlp_width": model.mlp_width}
    features["the heads together"] = model.heads * model.head_dim
    qkv = (model.heads + 2 * model.key_heads) * model.head_dim
    outputs = {"queries, keys and values": qkv, "2 × model.mlp_width": 2 * model.mlp_width, "model.width": model.width}
    contracted = (
        (("w", "a"), features),
        (("head_w", "head_a", "e"), {"model.width": model.width}),
        (("q", "k", "g_p", "s_p"), {"the head dimension": model.head_dim}),
        (("p", "v", "g_q", "s_q", "g_k", "s_k", "g_v", "s_v"), {"model.sequence_length": model.sequence_length}),
        (("g_a", "s_a"), outputs),
        (("g_w", "s_w"), {"the tokens of a microbatch": tokens_per_part}),
    )
    for name, quantizer in precision.quantizers:
        size = operands.group_size(quantizer.granularity)
        lengths = next(lengths for names, lengths in contracted if name in names)
        if quantizer.granularity.startswith("tile:"):
            lengths = {**lengths, **(outputs if name == "w" else {"the vocabulary": model.vocab_size})}
        for what, length in lengths.items():
            if size and length % size:
                raise ConfigError(
                    f"precision.{OPTIONS[name]}",
                    f"{quantizer.format.name}/{quantizer.granularity}",
                    f"a group that divides {what}, {length}",
                )
    for rule in precision.layers:
        held = layers.covered(rule.layers, model.depth)
        if len(held) and not (held[0] >= 0 and held[-1] < model.depth):
            raise ConfigError("precision.layers", str(rule), f"layers that there are, 0 to {model.depth - 1}")
    for name, width in precision.gradient_rotations:
        target = {"a": "activations", "w": "weights"}[name]
        lengths = next(lengths for names, lengths in contracted if f"g_{name}" in names)
        for what, length in lengths.items():
            if length % width:
                raise ConfigError(
                    f"precision.backward.{target}_rotation",
                    f"hadamard:{width}",
                    f"a width that divides {what}, {length}",
                )
    if precision.rotated:
        for what, length in features.items():
            if length % 2:
                raise ConfigError("precision.rotation", "hadamard", f"none where {what} ({length}) is odd")
