"""The decoder: OLMo-style Transformer++ in Flax, every projection and attention product through `quantize`.

Stands between `quantize` (how a dot_general is computed at a precision) and `train` (how the parameters are found).
Shape letters: B sequences, L and M positions, D width, H heads, K head dimension, F width inside the MLP, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from precision_scaling import quantize


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything static about a decoder; hashable, so that it keys compiled programs.

    `base_width` and `base_depth` name the shape at which depth-µP (Yang et al. 2023, arXiv 2310.02244) equals the
    standard parametrization: wider and deeper models scale their rates, residual branches and logits from there.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    hidden: int
    sequence_length: int
    base_width: int
    base_depth: int
    dtype: str = "float32"
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    remat: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

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


class Linear(nn.Module):
    """Quantized projection of the last axis. The kernel has shape (in, *features).

    names: of input and kernel in the program. fan_in: 1 / sqrt of it is the initial deviation; 0 is the input's width.
    """

    features: tuple[int, ...]
    program: quantize.Program
    names: tuple[str, str] = ("a", "w")
    fan_in: int = 0

    @nn.compact
    def __call__(self, x, table, key=None):
        deviation = 1 / math.sqrt(self.fan_in or x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(deviation), (x.shape[-1], *self.features), jnp.float32)
        return quantize.linear(x, kernel.astype(x.dtype), self.program, table, key, self.names)


def rotary(x_BxLxHxK, theta: float):
    """Rotary position embedding (Su et al., arXiv 2104.09864) on the two halves of the head dimension."""
    length, head_dim = x_BxLxHxK.shape[1], x_BxLxHxK.shape[-1]
    frequency_k = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_Lx1xk = (jnp.arange(length, dtype=jnp.float32)[:, None] * frequency_k)[:, None, :]
    cos, sin = jnp.cos(angle_Lx1xk), jnp.sin(angle_Lx1xk)
    first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxLxHxK.dtype)


class Attention(nn.Module):
    """Causal self-attention; q, k, v and the probabilities are each quantized as the program says."""

    config: ModelConfig
    program: quantize.Program

    def setup(self):
        c = self.config
        self.qkv = Linear((3, c.heads, c.head_dim), self.program)
        self.out = Linear((c.width,), self.program)

    def __call__(self, x_BxLxD, table, key=None):
        # Every product of a layer has a key of its own, by the number it goes by here.
        keys = [quantize.fold_in(key, i) for i in range(4)]
        return self.out(self.mix(self.qkv(x_BxLxD, table, keys[0]), table, keys[1], keys[2]), table, keys[3])

    def mix(self, qkv_BxLx3xHxK, table, score_key=None, value_key=None):
        """What the heads read, side by side: (B, L, D)."""
        c = self.config
        batch, length = qkv_BxLx3xHxK.shape[:2]
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (qkv_BxLx3xHxK[:, :, i] for i in range(3))
        q_BxLxHxK = rotary(q_BxLxHxK, c.rope_theta) * (1 / math.sqrt(c.head_dim))
        k_BxLxHxK = rotary(k_BxLxHxK, c.rope_theta)
        score_BxHxLxM = quantize.attention_scores(q_BxLxHxK, k_BxLxHxK, self.program, table, score_key)
        score_BxHxLxM = score_BxHxLxM.astype(jnp.float32)
        causal_LxM = jnp.tril(jnp.ones((length, length), bool))
        p_BxHxLxM = jax.nn.softmax(jnp.where(causal_LxM, score_BxHxLxM, -1e30), axis=-1).astype(v_BxLxHxK.dtype)
        o_BxLxHxK = quantize.attention_values(p_BxHxLxM, v_BxLxHxK, self.program, table, value_key)
        return o_BxLxHxK.reshape(batch, length, -1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    config: ModelConfig
    program: quantize.Program

    def setup(self):
        self.gate_up = Linear((2, self.config.hidden), self.program)
        self.down = Linear((self.config.width,), self.program)

    def __call__(self, x_BxLxD, table, key=None):
        up_key, down_key = (quantize.fold_in(key, i) for i in range(2))
        return self.down(self.activate(self.gate_up(x_BxLxD, table, up_key)), table, down_key)

    def activate(self, gate_up_BxLx2xF):
        """silu(gate) * up: (B, L, F)."""
        return jax.nn.silu(gate_up_BxLx2xF[:, :, 0]) * gate_up_BxLx2xF[:, :, 1]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), branches scaled by depth-µP.

    The methods below are the same computation cut at the inputs of its four projections, for post-training
    quantization, which replaces one projection after the other.
    """

    config: ModelConfig
    program: quantize.Program

    def setup(self):
        c = self.config
        self.attention_norm, self.mlp_norm = RMSNorm(c.norm_epsilon), RMSNorm(c.norm_epsilon)
        self.attention, self.mlp = Attention(c, self.program), MLP(c, self.program)

    def __call__(self, x_BxLxD, table, key=None):
        attention_key, mlp_key = (quantize.fold_in(key, i) for i in range(2))
        h_BxLxD = self.attention(self.attention_norm(x_BxLxD), table, attention_key)
        x_BxLxD = x_BxLxD + self.config.residual_scale * h_BxLxD
        return x_BxLxD + self.config.residual_scale * self.mlp(self.mlp_norm(x_BxLxD), table, mlp_key)

    def before_qkv(self, x_BxLxD):
        """Input of the qkv projection."""
        return self.attention_norm(x_BxLxD)

    def before_out(self, h_BxLxD, table):
        """Input of attention's out projection, from that of qkv."""
        return self.attention.mix(self.attention.qkv(h_BxLxD, table), table)

    def before_gate_up(self, x_BxLxD, o_BxLxD, table):
        """The residual stream after attention and the input of the gate_up projection, from that of out."""
        x_BxLxD = x_BxLxD + self.config.residual_scale * self.attention.out(o_BxLxD, table)
        return x_BxLxD, self.mlp_norm(x_BxLxD)

    def before_down(self, h_BxLxD, table):
        """Input of the down projection, from that of gate_up."""
        return self.mlp.activate(self.mlp.gate_up(h_BxLxD, table))

    def after_down(self, x_BxLxD, h_BxLxF, table):
        """The block's output, from the residual stream after attention and the input of down."""
        return x_BxLxD + self.config.residual_scale * self.mlp.down(h_BxLxF, table)


class _ScannedBlock(nn.Module):
    """Block in the (carry, out) form that nn.scan wants."""

    config: ModelConfig
    program: quantize.Program

    @nn.compact
    def __call__(self, x_BxLxD, table, key):
        block = nn.remat(Block) if self.config.remat else Block
        return block(self.config, self.program, name="block")(x_BxLxD, table, key), None


class Decoder(nn.Module):
    """Token ids to logits; layers are stacked on a leading axis and scanned.

    Embedding and head are quantized only where the program names their own operands. key: for programs that round at
    random, one per step.
    """

    config: ModelConfig
    program: quantize.Program = quantize.UNQUANTIZED

    def setup(self):
        c = self.config
        self.embedding = nn.Embed(
            c.vocab_size, c.width, embedding_init=nn.initializers.normal(1.0), dtype=jnp.dtype(c.dtype)
        )
        self.layers = nn.scan(
            _ScannedBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.depth,
        )(c, self.program)
        self.final_norm = RMSNorm(c.norm_epsilon)
        self.head = Linear((c.vocab_size,), self.program, ("head_a", "head_w"), fan_in=c.base_width)

    def embed(self, tokens_BxL, table=None, key=None):
        """Residual stream before the first block, (B, L, D)."""
        if self.program.get("e") is None:
            return self.embedding(tokens_BxL)
        embedding_VxD = quantize.embedding_table(self.embedding.embedding, self.program, table, key)
        return jnp.take(embedding_VxD, tokens_BxL, axis=0).astype(self.config.dtype)

    def unembed(self, x_BxLxD, table=None, key=None):
        """Logits in float32, (B, L, V)."""
        logits_BxLxV = self.head(self.final_norm(x_BxLxD), table, key)
        return (logits_BxLxV * self.config.logit_scale).astype(jnp.float32)

    def __call__(self, tokens_BxL, table=None, key=None):
        embed_key, head_key, layers_key = (quantize.fold_in(key, i) for i in range(3))
        layer_keys = None if key is None else jax.random.split(layers_key, self.config.depth)
        x_BxLxD, _ = self.layers(self.embed(tokens_BxL, table, embed_key), table, layer_keys)
        return self.unembed(x_BxLxD, table, head_key)


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
    outer = 2 * config.vocab_size * config.width
    return total - outer, total


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward FLOPs of one token: 6 per parameter of every matmul (head included), 12·depth·width·length
    for the two attention products (full, not causal, as PaLM's appendix B counts them)."""
    non_embedding, _ = count_parameters(config)
    matmul = non_embedding + config.vocab_size * config.width
    return 6 * matmul + 12 * config.depth * config.width * config.sequence_length
