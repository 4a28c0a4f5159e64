"""Where documents begin within a window of text, for attention and positions that stay within them.

The token that ends a text stands between two documents and opens the second: what follows it sees it, and nothing
before it. Every token is then predicted from its own document alone, the first of one from the end of text, as it is in
`generate`; none is predicted across a border, so that every position counts in the loss as it does otherwise. A window
begins with what is left of a document.
"""

import jax
import jax.numpy as jnp

from precision_scaling.model.config import ModelConfig


def starts(config: ModelConfig, tokens_BxS):
    """The position in its window at which the document of each position begins, int32 (B, S); None where windows are
    read as a whole."""
    if config.document_token < 0:
        return None
    positions_S = jnp.arange(tokens_BxS.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(tokens_BxS == config.document_token, positions_S[None], 0), axis=1)


def positions(starts_BxS):
    """Of each position in its own document, (B, S): the rotary embedding is that of the document alone, and so are the
    queries and keys that are quantized after it."""
    return jnp.arange(starts_BxS.shape[1], dtype=jnp.int32)[None] - starts_BxS


def visible(length: int, shared: int, starts_BxS=None):
    """What each query sees: itself and what is before it, in its document where `starts_BxS` is given.

    (S·Q, S), or (B, 1, S·Q, S) with documents: the `shared` queries of a position, Q, stand one after the other.
    """
    causal_SQxS = jnp.repeat(jnp.tril(jnp.ones((length, length), bool)), shared, axis=0)
    if starts_BxS is None:
        return causal_SQxS
    first_BxSQ = jnp.repeat(starts_BxS, shared, axis=1)
    within_BxSQxS = jnp.arange(length)[None, None] >= first_BxSQ[:, :, None]
    return (causal_SQxS[None] & within_BxSQxS)[:, None]
