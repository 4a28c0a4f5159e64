"""Causal attention block by block, in the memory of its inputs: no array of all scores, forward or backward.

FlashAttention-2 (Dao 2023, arXiv 2307.08691) as a loop of products that every compiler takes: a running maximum and sum
for each query, scores made anew in the backward pass, and blocks of keys after a block of queries left out, half of all
scores. For exact queries and probabilities: to round a probability its normalizer must be known.

Letters are those of `model.config`. Queries that share a key stand one after the other, as if they were positions; M is
S·Q, b keys or m queries are a block.
"""

import jax
import jax.numpy as jnp

from precision_scaling.runtime.sharding import split_batch

BLOCK = 256  # positions at least, but where the whole sequence has fewer
MOST_BLOCKS = 8  # of a sequence: small ones are fast on a CPU, many of them are many launches on a GPU
_MASKED = -1e30


@jax.custom_vjp
def attend(q_BxMxGxK, k_BxSxGxK, v_BxSxGxK):
    """Values weighted by the causal softmax of the scores, (B, M, G, K); computed in float32 or wider.

    Queries are scaled already. The backward pass keeps inputs, result and a float32 for each query.
    """
    return _forward(q_BxMxGxK, k_BxSxGxK, v_BxSxGxK)[0]


def _forward(q_BxMxGxK, k_BxSxGxK, v_BxSxGxK):
    blocks = _Blocks(q_BxMxGxK, k_BxSxGxK)
    q, k, v = blocks.queries(q_BxMxGxK), blocks.keys(k_BxSxGxK), blocks.keys(v_BxSxGxK)
    width = q.shape[-1]

    def step(carry, pair):
        (o, log_z), (sums, total, largest) = carry
        i, j = pair
        first = j == 0
        sums, total = (jnp.where(first, 0, x) for x in (sums, total))
        largest = jnp.where(first, _MASKED, largest)
        score = blocks.scores(q, k, i, j)
        now = jnp.maximum(largest, jnp.max(score, axis=-1, keepdims=True))
        p, shrunk = jnp.exp(score - now), jnp.exp(largest - now)
        total = total * shrunk + jnp.sum(p, axis=-1, keepdims=True)
        sums = sums * shrunk + blocks.product(p.astype(v.dtype), blocks.take(v, j), (3, 2))
        # What is written before the last block of keys is written over.
        o = blocks.put(o, i, (sums / total).astype(o.dtype))
        log_z = blocks.put(log_z, i, now + jnp.log(total))
        return ((o, log_z), (sums, total, now)), None

    whole = _split(jnp.zeros_like(q)), blocks.zeros(q, 1)
    part = tuple(blocks.zeros(blocks.take(q, 0), size) for size in (width, 1, 1))
    ((o, log_z), _), _ = jax.lax.scan(step, (whole, part), blocks.pairs())
    o_BxMxGxK = blocks.restored(o, q_BxMxGxK)
    return o_BxMxGxK, (q_BxMxGxK, k_BxSxGxK, v_BxSxGxK, o_BxMxGxK, log_z)


def _backward(kept, g_BxMxGxK):
    q_BxMxGxK, k_BxSxGxK, v_BxSxGxK, o_BxMxGxK, log_z = kept
    blocks = _Blocks(q_BxMxGxK, k_BxSxGxK)
    q, k, v = blocks.queries(q_BxMxGxK), blocks.keys(k_BxSxGxK), blocks.keys(v_BxSxGxK)
    o, g = blocks.queries(o_BxMxGxK), blocks.queries(g_BxMxGxK)
    along = jnp.sum(o.astype(log_z.dtype) * g.astype(log_z.dtype), axis=-1, keepdims=True)

    def step(carry, pair):
        (dq, dk, dv), dq_i = carry
        i, j = pair
        q_i, k_j, v_j, g_i = blocks.take(q, i), blocks.take(k, j), blocks.take(v, j), blocks.take(g, i)
        p = jnp.exp(blocks.scores(q, k, i, j) - blocks.take(log_z, i))
        dp = blocks.product(g_i, v_j, (3, 3))
        dscore = (p * (dp - blocks.take(along, i))).astype(q.dtype)
        dq_i = jnp.where(j == 0, 0, dq_i) + blocks.product(dscore, k_j, (3, 2))
        dk = blocks.put(dk, j, blocks.take(dk, j) + blocks.product(dscore, q_i, (2, 2)))
        dv = blocks.put(dv, j, blocks.take(dv, j) + blocks.product(p.astype(g.dtype), g_i, (2, 2)))
        return ((blocks.put(dq, i, dq_i.astype(dq.dtype)), dk, dv), dq_i), None

    width = q.shape[-1]
    whole = _split(jnp.zeros_like(q)), blocks.zeros(k, width), blocks.zeros(v, width)
    part = blocks.zeros(blocks.take(q, 0), width)
    ((dq, dk, dv), _), _ = jax.lax.scan(step, (whole, part), blocks.pairs())
    inputs = zip((dq, dk, dv), (q_BxMxGxK, k_BxSxGxK, v_BxSxGxK), strict=True)
    return tuple(blocks.restored(dx, x) for dx, x in inputs)


attend.defvjp(_forward, _backward)


def _split(x):
    """Sequences and heads over the devices, nothing else: what a loop carries would be gathered in every turn."""
    return split_batch(x, ("tensor", *(None for _ in x.shape[2:])))


class _Blocks:
    """Arrays (B, G, blocks, positions of a block, ·) of queries and of keys, and what is done with a block of each."""

    def __init__(self, q_BxMxGxK, k_BxSxGxK):
        self.positions = k_BxSxGxK.shape[1]
        self.shared = q_BxMxGxK.shape[1] // self.positions
        self.number = min(MOST_BLOCKS, -(-self.positions // BLOCK))
        self.size = -(-self.positions // self.number)
        self.wide = jnp.promote_types(q_BxMxGxK.dtype, jnp.float32)

    def pairs(self):
        """Indices of all blocks of queries, and of the keys that each sees, in order."""
        found = [(i, j) for i in range(self.number) for j in range(i + 1)]
        return tuple(jnp.array(x, jnp.int32) for x in zip(*found, strict=True))

    def queries(self, x_BxMxGxK):
        return self._cut(x_BxMxGxK, self.size * self.shared)

    def keys(self, x_BxSxGxK):
        return self._cut(x_BxSxGxK, self.size)

    def _cut(self, x, size: int):
        """Padded to whole blocks: later keys, which no query sees, and queries whose gradient is zero."""
        x = jnp.pad(x, ((0, 0), (0, self.number * size - x.shape[1]), (0, 0), (0, 0)))
        return _split(x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], self.number, size, -1))

    def restored(self, x, like):
        """As it was before it was cut, of the type and shape of `like`."""
        batch, heads, _, _, width = x.shape
        return x.reshape(batch, heads, -1, width).swapaxes(1, 2)[:, : like.shape[1]].astype(like.dtype)

    def zeros(self, like, width: int):
        return _split(jnp.zeros((*like.shape[:-1], width), self.wide))

    def take(self, x, i):
        return _split(jax.lax.dynamic_index_in_dim(x, i, 2, keepdims=False))

    def put(self, x, i, block):
        return _split(jax.lax.dynamic_update_index_in_dim(x, block, i, 2))

    def product(self, x, y, contracted: tuple[int, int]):
        """Of a block each, over these axes, for all sequences and heads."""
        left, right = contracted
        numbers = (((left,), (right,)), ((0, 1), (0, 1)))
        return _split(jax.lax.dot_general(x, y, numbers, preferred_element_type=self.wide))

    def scores(self, q, k, i, j):
        """Of a block of queries and one of keys, (B, G, m, b), those of later keys masked."""
        score = self.product(self.take(q, i), self.take(k, j), (3, 3))
        query_m = (jnp.arange(self.size * self.shared) // self.shared + i * self.size)[:, None]
        seen_mxb = query_m >= (jnp.arange(self.size) + j * self.size)[None, :]
        return jnp.where(seen_mxb, score, _MASKED)
