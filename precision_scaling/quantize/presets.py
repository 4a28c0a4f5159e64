"""Named values of the config's `precision` section."""

from precision_scaling.quantize.operands import BACKWARD, FORWARD, OPTIONS

MODES = ("simulated", "native")
ROTATIONS = ("none", "hadamard")
GROUPS = {
    "w": "weights",
    "a": "activations",
    **dict.fromkeys("qkvp", "attention"),
    "e": "embedding",
    "head_w": "weights",
    "head_a": "activations",
    **{name: f"backward.{'gradient' if name.startswith('g_') else 'saved'}" for name in BACKWARD},
}
SOURCES = ("forward", "exact")

_UNQUANTIZED = {
    **{OPTIONS[name]: "bf16" for name in FORWARD},
    **{OPTIONS[name]: "forward" if name.startswith("s_") else "bf16" for name in BACKWARD},
    **{f"{group}_granularity": "tensor" for group in GROUPS.values()},
    **{f"{group}_rounding": "nearest" for group in GROUPS.values()},
    "weights_granularity": "channel",
    "embedding_granularity": "token",
    "layers": "none",
    "switches": "none",
    "backward.weights_rotation": "none",
    "backward.activations_rotation": "none",
    "rotation": "none",
    "mode": "simulated",
}
# Presets by name: every option's value. Each starts from the paper's, in which nothing is quantized yet.
PRESETS = {
    "paper": _UNQUANTIZED,
    # Weights only, forward only (the paper's quantization-aware training).
    "qat": {**_UNQUANTIZED, "weights": "int4"},
    # Weights, activations and the KV cache, forward only (the paper's low-precision training).
    "low_precision": {**_UNQUANTIZED, "weights": "int8", "activations": "int8", "k": "int8", "v": "int8"},
    # Projections in fp8 with a scale per tensor (arXiv 2209.05433): e4m3 forward, e5m2 for the incoming gradient.
    "fp8": {
        **_UNQUANTIZED,
        **dict.fromkeys(("weights", "activations"), "e4m3fn"),
        **dict.fromkeys(("backward.activations_gradient", "backward.weights_gradient"), "e5m2"),
        "weights_granularity": "tensor",
    },
    # All three products of a projection in int8, a scale per vector of each, gradients rounded at random.
    "int8_full": {
        **_UNQUANTIZED,
        **dict.fromkeys(("weights", "activations"), "int8"),
        **{f"backward.{x}_{side}": "int8" for x in ("weights", "activations") for side in ("gradient", "saved")},
        "activations_granularity": "token",
        "backward.gradient_granularity": "vector",
        "backward.saved_granularity": "vector",
        "backward.gradient_rounding": "stochastic",
    },
    # All three products of a projection in 4-bit blocks, gradients rounded at random (arXiv 2502.20586, 2509.25149).
    **{
        name: {
            **_UNQUANTIZED,
            **dict.fromkeys(("weights", "activations"), name),
            **{f"backward.{x}_{side}": name for x in ("weights", "activations") for side in ("gradient", "saved")},
            "backward.gradient_rounding": "stochastic",
        }
        for name in ("mxfp4", "nvfp4")
    },
    # NVFP4 as it is trained (arXiv 2509.25149): tiles of weights, which the backward pass transposes; gradients alone
    # rounded at random; the operands of the weight gradient rotated; the last layers in bf16.
    "nvfp4_train": {
        **_UNQUANTIZED,
        **dict.fromkeys(("weights", "activations", "backward.weights_saved"), "nvfp4"),
        **dict.fromkeys(("backward.activations_gradient", "backward.weights_gradient"), "nvfp4"),
        "weights_granularity": "tile:16",
        "backward.gradient_rounding": "stochastic",
        "backward.weights_rotation": "hadamard:16",
        "layers": "last:15%=bf16",
    },
    # MXFP8 as it is trained (arXiv 2506.08027): e4m3 everywhere, blocks along each product's own contraction, scales
    # rounded up, all to nearest.
    "mxfp8_train": {
        **_UNQUANTIZED,
        **dict.fromkeys(("weights", "activations"), "mxfp8_up"),
        **{f"backward.{x}_{side}": "mxfp8_up" for x in ("weights", "activations") for side in ("gradient", "saved")},
    },
}
