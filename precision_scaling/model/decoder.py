"""The decoder: OLMo-style Transformer++ in Flax, every projection and attention product through `quantize`.

Stands between `quantize` (how a dot_general is computed at a precision) and `train` (how the parameters are found).
Shape letters: B sequences, L and M positions, D width, H heads, G key and value heads, R query heads for each of them,
K head dimension, F width inside the MLP, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from precision_scaling.model import rope
from precision_scaling.quantize import aqt, products
from precision_scaling.quantize.static import UNQUANTIZED, StaticPrecision
from precision_scaling.runtime.sharding import split_batch

NORM_PLACEMENTS = ("pre", "post")
NORM_TYPES = ("rms", "layer")
QK_NORMS = ("none", "projection", "head")
# What the backward pass keeps of a block instead of recomputing it; "none": everything.
REMATS = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
_HEAD = ("head_a", "head_w")  # operands of the last product


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything static about a decoder; hashable, so that it keys compiled programs.

    `base_width` and `base_depth` name the shape at which depth-µP (Yang et al. 2023, arXiv 2310.02244) equals the
    standard parametrization: wider and deeper models scale their rates, residual branches and logits from there.

    kv_heads: heads of keys and values, each shared by heads / kv_heads queries (arXiv 2305.13245); 0 is `heads`.
    head_width: head dimension; 0 is width / heads. norm_placement: "pre" normalizes what a branch reads, "post" what it
    adds (OLMo 2, arXiv 2501.00656). norm_type: "rms" with gains, or "layer" without any parameters (OLMo, arXiv
    2402.00838). qk_norm: of queries and keys before they are rotated, over the "projection" (OLMo 2) or each "head".
    tie_embeddings: the head multiplies by the embedding's table. rope_scaling: how the rotary embedding's wavelengths
    are stretched, see `rope`. qkv_bias: biases of queries, keys and values (Qwen 2, arXiv 2407.10671).

    remat: of REMATS. "full" recomputes each block from its input in the backward pass; "dots" keeps the results of the
    projections, and recomputes attention, norms and quantization.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int = dataclasses.field(metadata={"digest": "hidden"})
    sequence_length: int
    base_width: int
    base_depth: int
    dtype: str = "float32"
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    remat: str = "none"
    kv_heads: int = 0
    head_width: int = 0
    norm_placement: str = "pre"
    norm_type: str = "rms"
    qk_norm: str = "none"
    tie_embeddings: bool = False
    rope_scaling: str = ""
    qkv_bias: bool = False

    @property
    def head_dim(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.kv_heads or self.heads

    @property
    def residual_scale(self) -> float:
        """Multiplier of each residual branch, sqrt(base_depth / depth)."""
        return math.sqrt(self.base_depth / self.depth)

    @property
    def logit_scale(self) -> float:
        """Multiplier of the logits, base_width / width."""
        return self.base_width / self.width


class RMSNorm(nn.Module):
    """x / rms(x) times a learned gain; computed in float32 whatever the compute dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x), without parameters; computed in float32 whatever the compute dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype)


def _norm(config: ModelConfig) -> nn.Module:
    return {"rms": RMSNorm, "layer": LayerNorm}[config.norm_type](config.norm_epsilon)


class Linear(nn.Module):
    """Quantized projection of the last axis. The kernel has shape (in, *features).

    names: of input and kernel in `static`. fan_in: 1 / sqrt of it is the initial deviation; 0 is the input's width.
    """

    features: tuple[int, ...]
    static: StaticPrecision
    names: tuple[str, str] = ("a", "w")
    fan_in: int = 0

    @nn.compact
    def __call__(self, x, grids, key=None):
        deviation = 1 / math.sqrt(self.fan_in or x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(deviation), (x.shape[-1], *self.features), jnp.float32)
        return products.linear(x, kernel.astype(x.dtype), self.static, grids, key, self.names)


def rotary(x_BxLxHxK, theta: float, scaling: str = ""):
    """Rotary position embedding (Su et al., arXiv 2104.09864) on the two halves of the head dimension."""
    length, head_dim = x_BxLxHxK.shape[1], x_BxLxHxK.shape[-1]
    frequency_k = rope.frequencies(head_dim, theta, scaling)
    angle_Lx1xk = (jnp.arange(length, dtype=jnp.float32)[:, None] * frequency_k)[:, None, :]
    cos, sin = jnp.cos(angle_Lx1xk), jnp.sin(angle_Lx1xk)
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxLxHxK.dtype)


class Attention(nn.Module):
    """Causal self-attention; q, k, v and the probabilities are each quantized as `static` says."""

    config: ModelConfig
    static: StaticPrecision

    def setup(self):
        c = self.config
        # Queries, keys and values, head by head, from one product.
        self.qkv = Linear((c.heads + 2 * c.key_heads, c.head_dim), self.static)
        self.out = Linear((c.width,), self.static)
        if c.qk_norm != "none":
            self.q_norm, self.k_norm = _norm(c), _norm(c)
        if c.qkv_bias:
            shape = (c.heads + 2 * c.key_heads, c.head_dim)
            self.qkv_bias = self.param("qkv_bias", nn.initializers.zeros, shape, jnp.float32)

    def __call__(self, x_BxLxD, grids, key=None):
        # Every product of a layer has a key of its own, by the number it goes by here.
        keys = [aqt.fold_in(key, i) for i in range(4)]
        return self.out(self.mix(self.qkv(x_BxLxD, grids, keys[0]), grids, keys[1], keys[2]), grids, keys[3])

    def mix(self, qkv_BxLxNxK, grids, score_key=None, value_key=None):
        """What the heads read, side by side: (B, L, H·K). N: heads of queries, then of keys, then of values."""
        c = self.config
        batch, length = qkv_BxLxNxK.shape[:2]
        if c.qkv_bias:
            qkv_BxLxNxK = qkv_BxLxNxK + self.qkv_bias.astype(qkv_BxLxNxK.dtype)
        q_BxLxHxK, k_BxLxGxK, v_BxLxGxK = jnp.split(qkv_BxLxNxK, (c.heads, c.heads + c.key_heads), axis=2)
        if c.qk_norm != "none":
            q_BxLxHxK, k_BxLxGxK = self._normalized(self.q_norm, q_BxLxHxK), self._normalized(self.k_norm, k_BxLxGxK)
        q_BxLxHxK = rotary(q_BxLxHxK, c.rope_theta, c.rope_scaling) * (1 / math.sqrt(c.head_dim))
        k_BxLxGxK = rotary(k_BxLxGxK, c.rope_theta, c.rope_scaling)
        # Queries that share a key stand one after the other, as if they were positions: keys and values are quantized
        # and multiplied as they are, never repeated.
        shared = c.heads // c.key_heads
        q_BxLxGxRxK = q_BxLxHxK.reshape(batch, length, c.key_heads, shared, c.head_dim)
        q_BxLRxGxK = q_BxLxGxRxK.swapaxes(2, 3).reshape(batch, length * shared, c.key_heads, c.head_dim)
        score_BxGxLRxM = products.attention_scores(q_BxLRxGxK, k_BxLxGxK, self.static, grids, score_key)
        score_BxGxLRxM = score_BxGxLRxM.astype(jnp.float32)
        causal_LRxM = jnp.repeat(jnp.tril(jnp.ones((length, length), bool)), shared, axis=0)
        p_BxGxLRxM = jax.nn.softmax(jnp.where(causal_LRxM, score_BxGxLRxM, -1e30), axis=-1).astype(v_BxLxGxK.dtype)
        o_BxLRxGxK = products.attention_values(p_BxGxLRxM, v_BxLxGxK, self.static, grids, value_key)
        o_BxLxRxGxK = o_BxLRxGxK.reshape(batch, length, shared, c.key_heads, c.head_dim)
        return o_BxLxRxGxK.swapaxes(2, 3).reshape(batch, length, -1)

    def _normalized(self, norm, x_BxLxHxK):
        if self.config.qk_norm == "head":
            return norm(x_BxLxHxK)
        return norm(x_BxLxHxK.reshape(*x_BxLxHxK.shape[:2], -1)).reshape(x_BxLxHxK.shape)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    config: ModelConfig
    static: StaticPrecision

    def setup(self):
        self.gate_up = Linear((2, self.config.mlp_width), self.static)
        self.down = Linear((self.config.width,), self.static)

    def __call__(self, x_BxLxD, grids, key=None):
        up_key, down_key = (aqt.fold_in(key, i) for i in range(2))
        return self.down(self.activate(self.gate_up(x_BxLxD, grids, up_key)), grids, down_key)

    def activate(self, gate_up_BxLx2xF):
        """silu(gate) * up: (B, L, F)."""
        return jax.nn.silu(gate_up_BxLx2xF[:, :, 0]) * gate_up_BxLx2xF[:, :, 1]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), branches scaled by depth-µP.

    With norms placed "post": x + norm(attention(x)), then x + norm(mlp(x)). The methods below are the same computation
    cut at the inputs of its four projections, for post-training quantization, which replaces one projection after the
    other.
    """

    config: ModelConfig
    static: StaticPrecision

    def setup(self):
        c = self.config
        self.attention_norm, self.mlp_norm = _norm(c), _norm(c)
        self.attention, self.mlp = Attention(c, self.static), MLP(c, self.static)

    def __call__(self, x_BxLxD, grids, key=None):
        attention_key, mlp_key = (aqt.fold_in(key, i) for i in range(2))
        h_BxLxD = self.attention(self._read(self.attention_norm, x_BxLxD), grids, attention_key)
        x_BxLxD = self._add(self.attention_norm, x_BxLxD, h_BxLxD)
        h_BxLxD = self.mlp(self._read(self.mlp_norm, x_BxLxD), grids, mlp_key)
        return self._add(self.mlp_norm, x_BxLxD, h_BxLxD)

    def before_qkv(self, x_BxLxD):
        """Input of the qkv projection."""
        return self._read(self.attention_norm, x_BxLxD)

    def before_out(self, h_BxLxD, grids):
        """Input of attention's out projection, from that of qkv."""
        return self.attention.mix(self.attention.qkv(h_BxLxD, grids), grids)

    def before_gate_up(self, x_BxLxD, o_BxLxO, grids):
        """The residual stream after attention and the input of the gate_up projection, from that of out."""
        x_BxLxD = self._add(self.attention_norm, x_BxLxD, self.attention.out(o_BxLxO, grids))
        return x_BxLxD, self._read(self.mlp_norm, x_BxLxD)

    def before_down(self, h_BxLxD, grids):
        """Input of the down projection, from that of gate_up."""
        return self.mlp.activate(self.mlp.gate_up(h_BxLxD, grids))

    def after_down(self, x_BxLxD, h_BxLxF, grids):
        """The block's output, from the residual stream after attention and the input of down."""
        return self._add(self.mlp_norm, x_BxLxD, self.mlp.down(h_BxLxF, grids))

    def _read(self, norm, x_BxLxD):
        return norm(x_BxLxD) if self.config.norm_placement == "pre" else x_BxLxD

    def _add(self, norm, x_BxLxD, h_BxLxD):
        h_BxLxD = norm(h_BxLxD) if self.config.norm_placement == "post" else h_BxLxD
        return x_BxLxD + self.config.residual_scale * h_BxLxD


class _ScannedBlock(nn.Module):
    """Block in the (carry, out) form that nn.scan wants."""

    config: ModelConfig
    static: StaticPrecision

    @nn.compact
    def __call__(self, x_BxLxD, grids, key):
        policy, block = REMATS[self.config.remat], Block
        if policy is not None:
            # The scan over layers keeps the recomputation from being merged with the forward pass, without barriers.
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        return block(self.config, self.static, name="block")(split_batch(x_BxLxD), grids, key), None


class Decoder(nn.Module):
    """Token ids to logits; layers are stacked on a leading axis and scanned.

    Embedding and head are quantized only where `static` names their own operands. key: for stochastic rounding, one per
    step.
    """

    config: ModelConfig
    static: StaticPrecision = UNQUANTIZED

    def setup(self):
        c = self.config
        # A table that is the head's kernel, too, starts as that.
        initial = nn.initializers.normal(1 / math.sqrt(c.base_width) if c.tie_embeddings else 1.0)
        self.embedding = nn.Embed(c.vocab_size, c.width, embedding_init=initial, dtype=jnp.dtype(c.dtype))
        self.layers = nn.scan(
            _ScannedBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.depth,
        )(c, self.static)
        self.final_norm = _norm(c)
        if not c.tie_embeddings:
            self.head = Linear((c.vocab_size,), self.static, _HEAD, fan_in=c.base_width)

    def embed(self, tokens_BxL, grids=None, key=None):
        """Residual stream before the first block, (B, L, D)."""
        if self.static.get("e") is None:
            return self.embedding(tokens_BxL)
        embedding_VxD = products.embedding_table(self.embedding.embedding, self.static, grids, key)
        return jnp.take(embedding_VxD, tokens_BxL, axis=0).astype(self.config.dtype)

    def unembed(self, x_BxLxD, grids=None, key=None):
        """Logits in float32, (B, L, V)."""
        h_BxLxD = self.final_norm(x_BxLxD)
        if self.config.tie_embeddings:
            kernel_DxV = self.embedding.embedding.T.astype(h_BxLxD.dtype)
            logits_BxLxV = products.linear(h_BxLxD, kernel_DxV, self.static, grids, key, _HEAD)
        else:
            logits_BxLxV = self.head(h_BxLxD, grids, key)
        return split_batch(logits_BxLxV * self.config.logit_scale).astype(jnp.float32)

    def __call__(self, tokens_BxL, grids=None, key=None):
        embed_key, head_key, layers_key = (aqt.fold_in(key, i) for i in range(3))
        layer_keys = None if key is None else jax.random.split(layers_key, self.config.depth)
        x_BxLxD, _ = self.layers(self.embed(tokens_BxL, grids, embed_key), grids, layer_keys)
        return self.unembed(x_BxLxD, grids, head_key)


def cross_entropy(logits_BxLxV, targets_BxL):
    """Nats per token at every position, (B, L)."""
    log_z_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    return log_z_BxL - jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]


def init(config: ModelConfig, key) -> Any:
    """Parameters in float32 from one random key."""
    return Decoder(config).init(key, jnp.zeros((1, config.sequence_length), jnp.int32))["params"]


@functools.cache
def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(non-embedding, all) parameter counts; embedding and head are what "non-embedding" leaves out."""
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    grids_of_runs = 1 if config.tie_embeddings else 2
    return total - grids_of_runs * config.vocab_size * config.width, total


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward FLOPs of one token: 6 per parameter of every matmul (head included), 12·depth·heads·head
    dimension·length for the two attention products (full, not causal, as PaLM's appendix B counts them)."""
    non_embedding, _ = count_parameters(config)
    matmul = non_embedding + config.vocab_size * config.width
    return 6 * matmul + 12 * config.depth * config.heads * config.head_dim * config.sequence_length
