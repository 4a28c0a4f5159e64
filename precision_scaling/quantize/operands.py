"""The operands that can be quantized: their names, the products they meet in, and what may share a scale in each."""

# Operands of the forward pass. "w" and "a" meet in every projection; "q", "k" in the scores; "p" (the attention
# probabilities) and "v" in the values.
OPERANDS = ("w", "a", "q", "k", "v", "p")
# Operands outside the blocks: the embedding's table, and the head's weights and inputs.
OUTER = ("e", "head_w", "head_a")
# Operands of the backward pass. The gradient of operand x is a product of "g_x", the incoming gradient, and "s_x", the
# saved other operand of the forward product: dx = dy·wᵀ multiplies g_a and s_a (which is w), dw = xᵀ·dy g_w and s_w.
BACKWARD = tuple(f"{side}_{name}" for name in OPERANDS for side in "gs")
PRODUCTS = (("a", "w"), ("q", "k"), ("p", "v"), ("head_a", "head_w"))
INDEX = {name: i for i, name in enumerate((*OPERANDS, *OUTER, *BACKWARD))}

# Axes that share a scale, by operand, in the shapes that `linear` and the attention products multiply: one scale per
# token (and head), or one per channel. "tensor" is all axes; "vector" and "group:g" go along the contraction.
SCALE_AXES = {
    "a": {"token": (1,), "channel": (0,)},
    "w": {"channel": (0,)},
    **{name: {"token": (3,), "channel": (1,)} for name in "qkv"},
    "p": {"token": (3,), "channel": (2,)},
    "e": {"token": (1,)},
    "head_a": {"token": (1,), "channel": (0,)},
    "head_w": {"channel": (0,)},
    **{name: {} for name in BACKWARD},
}
# The granularity whose scale is constant along the contraction, so that it can be applied to the product of codes.
_OUTPUT_SCALED = {"a": "token", "w": "channel", "q": "token", "k": "token", "p": "token", "v": "channel"}
_OUTPUT_SCALED |= {"head_a": "token", "head_w": "channel"} | dict.fromkeys(BACKWARD, "vector")


TILED = ("w", "head_w")  # operands that have tiles


def granularities(name: str) -> tuple[str, ...]:
    """What may share a scale in that operand; 'group:g' is g elements along the contraction, 'tile:g' a square of g by
    g weights, which their transpose has, too."""
    own = ("vector",) if name in BACKWARD else ()
    return ("tensor", *SCALE_AXES[name], *own, "group:g", *(("tile:g",) if name in TILED else ()))


def output_scaled(name: str, granularity: str) -> bool:
    """Whether scales of that granularity are constant along the contraction, as native products need."""
    return granularity in ("tensor", _OUTPUT_SCALED.get(name))


def group_size(granularity: str) -> int | None:
    """g of 'group:g' and 'tile:g'; None for the others."""
    kind, _, size = granularity.partition(":")
    return int(size) if kind in ("group", "tile") else None


# What the paper's P_w, P_a and P_kv stand for, part by part, and the gradients that meet the projections.
PARTS = {"w": ("w",), "a": ("a",), "kv": ("k", "v"), "g": ("g_a", "g_w")}
FORWARD = OPERANDS + OUTER

# The option that holds an operand's format, and those that say what shares a scale and how it rounds where the format
# itself does not.
_TARGETS = {"a": "activations", "w": "weights", "q": "q", "k": "k", "p": "p", "v": "v"}
OPTIONS = {
    "w": "weights",
    "a": "activations",
    **{name: name for name in "qkvp"},
    "e": "embedding",
    "head_w": "head_weights",
    "head_a": "head_activations",
    **{f"g_{name}": f"backward.{target}_gradient" for name, target in _TARGETS.items()},
    **{f"s_{name}": f"backward.{target}_saved" for name, target in _TARGETS.items()},
}


def partner(name: str) -> str:
    """The other operand of the forward product."""
    return next(b if name == a else a for a, b in PRODUCTS if name in (a, b))
