"""How attention is computed: with an array of all scores, block by block, or by cuDNN; which of them a model takes.

Stands between `decoder`, which asks, and `blockwise`, `lean` and `quantize`, which compute. The letters of shapes are
those of `model.config`.
"""

import jax

from precision_scaling.errors import ConfigError
from precision_scaling.model import blockwise, documents, lean
from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize.precision import Precision
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import StaticPrecision, static_of_one

WAYS = ("auto", "whole", "blocks", "cudnn")
BLOCKS_FROM = 1024  # positions, where both can be and none is asked for
_CUDNN_HEAD_DIM = 128


def way(config: ModelConfig, static: StaticPrecision, length: int) -> str:
    """Of `WAYS` but "auto": how a sequence of that length is computed."""
    if config.attention != "auto":
        return config.attention
    exact = static.exact_attention and config.document_token < 0
    return "blocks" if length >= BLOCKS_FROM and exact else "whole"


def described(config: ModelConfig, static: StaticPrecision) -> str:
    """In a few words, for logs and plans."""
    chosen = way(config, static, config.sequence_length)
    words = {"whole": "with all scores at once", "blocks": "block by block", "cudnn": "by cuDNN"}[chosen]
    if config.attention != "auto":
        why = f"model.attention={config.attention}"
    elif config.document_token >= 0:
        why = "within documents"
    else:
        why = f"length {config.sequence_length}" if static.exact_attention else "quantized queries or probabilities"
    return f"attention {words} ({why})"


def check(config: ModelConfig, precision: Precision) -> None:
    """Raises ConfigError for a way that a precision or a shape does not allow."""
    if config.attention in ("auto", "whole"):
        return
    if config.document_token >= 0:
        raise ConfigError("model.attention", config.attention, "auto or whole with data.within_documents")
    if not static_of_one(precision, config.dtype).exact_attention:
        raise ConfigError(
            "model.attention",
            config.attention,
            f"auto or whole for {precision.short}: queries and probabilities that are exact, in both passes, and keys "
            "and values that are rounded to what the compute dtype holds, before their products",
        )
    if config.attention == "cudnn" and (config.dtype != "bfloat16" or config.head_dim % 8):
        found = f"cudnn with {config.dtype} and heads of {config.head_dim}"
        raise ConfigError("model.attention", found, "model.dtype bfloat16 and a multiple of 8")
    if config.attention == "cudnn" and config.head_dim > _CUDNN_HEAD_DIM:
        raise ConfigError("model.attention", f"cudnn with heads of {config.head_dim}", f"heads of {_CUDNN_HEAD_DIM}")


def check_device(config: ModelConfig, device: jax.Device | None = None) -> None:
    """Raises ConfigError where a device does not have what `model.attention` asks for."""
    device = device or jax.devices()[0]
    if config.attention == "cudnn" and device.platform != "gpu":
        raise ConfigError("model.attention", "cudnn", f"auto, whole or blocks on {device.platform}")


def attend(q_BxSxHxK, k_BxSxGxK, v_BxSxGxK, products: Products, config: ModelConfig, starts_BxS=None):
    """Values weighted by the causal softmax of the scores, (B, S, H·K). Queries are scaled already.

    starts_BxS: of the documents that it stays in, of `documents.starts`; all scores are then computed.
    Keys and values are quantized and multiplied as they are, never repeated for the queries that share them.
    """
    batch, length = q_BxSxHxK.shape[:2]
    chosen = way(config, products.static, length)
    if products.observed:
        chosen = "whole"  # of which every operand can be shown
    if chosen != "whole":
        k_BxSxGxK = products.part(1).key_or_value(k_BxSxGxK, "k")
        v_BxSxGxK = products.part(2).key_or_value(v_BxSxGxK, "v")
    if chosen == "cudnn":
        o_BxSxHxK = jax.nn.dot_product_attention(
            q_BxSxHxK, k_BxSxGxK, v_BxSxGxK, scale=1.0, is_causal=True, implementation="cudnn"
        )
        return o_BxSxHxK.reshape(batch, length, -1)
    heads = k_BxSxGxK.shape[2]
    shared = q_BxSxHxK.shape[2] // heads
    # Queries that share a key stand one after the other, as if they were positions.
    q_BxSxGxQxK = q_BxSxHxK.reshape(batch, length, heads, shared, -1)
    q_BxSQxGxK = q_BxSxGxQxK.swapaxes(2, 3).reshape(batch, length * shared, heads, -1)
    if chosen == "blocks":
        o_BxSQxGxK = blockwise.attend(q_BxSQxGxK, k_BxSxGxK, v_BxSxGxK)
    else:
        score_BxGxSQxS = products.part(1).attention_scores(q_BxSQxGxK, k_BxSxGxK)
        visible = documents.visible(length, shared, starts_BxS)
        p_BxGxSQxS = lean.causal_softmax(score_BxGxSQxS, visible, v_BxSxGxK.dtype.name)
        o_BxSQxGxK = products.part(2).attention_values(p_BxGxSQxS, v_BxSxGxK)
    o_BxSxQxGxK = o_BxSQxGxK.reshape(batch, length, shared, heads, -1)
    return o_BxSxQxGxK.swapaxes(2, 3).reshape(batch, length, -1)
