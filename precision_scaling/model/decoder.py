"""The decoder: OLMo-style Transformer++ in Flax, every projection and attention product through `quantize`.

Stands between `quantize` (how a dot_general is computed at a precision) and `training` (how the parameters are found).
The letters of its shapes are those of `model.config`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from precision_scaling.model import attention, cross_entropy, documents, lean, rope
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import rounding
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED, Grids, StaticPrecision, by_layer
from precision_scaling.runtime import sharding

# What the backward pass keeps of a block instead of recomputing it; "none": everything. Devices would have to agree
# again on a scale that they share.
_SCALES = jax.checkpoint_policies.save_only_these_names(rounding.SCALE)
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMATS = {"none": None, "dots": jax.checkpoint_policies.save_from_both_policies(_DOTS, _SCALES), "full": _SCALES}
_WRITTEN_OUT = 16  # layers at most
_HEAD = ("head_a", "head_w")  # operands of the last product


class RMSNorm(nn.Module):
    """x / rms(x) times a learned gain; computed in float32 whatever the compute dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return lean.rms_norm(self.epsilon)(x, scale)


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x), without parameters; computed in float32 whatever the compute dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        return lean.layer_norm(self.epsilon)(x)


def _norm(config: ModelConfig) -> nn.Module:
    return {"rms": RMSNorm, "layer": LayerNorm}[config.norm_type](config.norm_epsilon)


class Linear(nn.Module):
    """Quantized projection of the last axis. The kernel has shape (in, *features).

    names: of the operands input and kernel; the module's own name is the place where they meet. fan_in: 1 / sqrt of it
    is the initial deviation; 0 is the input's width.
    """

    features: tuple[int, ...]
    names: tuple[str, str] = ("a", "w")
    fan_in: int = 0

    @nn.compact
    def __call__(self, x, products: Products):
        deviation = 1 / math.sqrt(self.fan_in or x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(deviation), (x.shape[-1], *self.features), jnp.float32)
        return products.linear(x, kernel.astype(x.dtype), self.names, place=str(self.name))


def rotary(x_BxSxHxK, theta: float, scaling: str = "", positions_BxS=None):
    """Rotary position embedding (Su et al., arXiv 2104.09864) on the two halves of the head dimension.

    positions_BxS: 0 to S - 1 where none are given.
    """
    length, head_dim = x_BxSxHxK.shape[1], x_BxSxHxK.shape[-1]
    frequency_k = rope.frequencies(head_dim, theta, scaling)
    position_BxS = jnp.arange(length)[None] if positions_BxS is None else positions_BxS
    angle_BxSxk = position_BxS.astype(jnp.float32)[:, :, None] * frequency_k[None, None, :]
    cos, sin = (wave(angle_BxSxk)[:, :, None, :] for wave in (jnp.cos, jnp.sin))
    if (amplitude := rope.amplitude(scaling)) != 1:
        cos, sin = cos * amplitude, sin * amplitude
    first, second = jnp.split(x_BxSxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxSxHxK.dtype)


class Attention(nn.Module):
    """Causal self-attention; q, k, v and the probabilities are each quantized as `products` says.

    starts_BxS: of the documents that it stays in, of `documents.starts`.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        # Queries, keys and values, head by head, from one product.
        self.qkv = Linear((c.heads + 2 * c.key_heads, c.head_dim))
        self.out = Linear((c.width,))
        if c.qk_norm != "none":
            self.q_norm, self.k_norm = _norm(c), _norm(c)
        if c.qkv_bias:
            shape = (c.heads + 2 * c.key_heads, c.head_dim)
            self.qkv_bias = self.param("qkv_bias", nn.initializers.zeros, shape, jnp.float32)

    def __call__(self, x_BxSxD, products: Products, starts_BxS=None):
        mixed_BxSxO = self.mix(self.qkv(x_BxSxD, products.part(0)), products, starts_BxS)
        return self.out(mixed_BxSxO, products.part(3))

    def mix(self, qkv_BxSxAxK, products: Products, starts_BxS=None):
        """What the heads read, side by side: (B, S, H·K). A: heads of queries, then of keys, then of values."""
        c = self.config
        if c.qkv_bias:
            qkv_BxSxAxK = qkv_BxSxAxK + self.qkv_bias.astype(qkv_BxSxAxK.dtype)[None, None]
        q_BxSxHxK, k_BxSxGxK, v_BxSxGxK = jnp.split(qkv_BxSxAxK, (c.heads, c.heads + c.key_heads), axis=2)
        if c.qk_norm != "none":
            q_BxSxHxK, k_BxSxGxK = self._normalized(self.q_norm, q_BxSxHxK), self._normalized(self.k_norm, k_BxSxGxK)
        positions_BxS = None if starts_BxS is None else documents.positions(starts_BxS)
        q_BxSxHxK = rotary(q_BxSxHxK, c.rope_theta, c.rope_scaling, positions_BxS) * (1 / math.sqrt(c.head_dim))
        k_BxSxGxK = rotary(k_BxSxGxK, c.rope_theta, c.rope_scaling, positions_BxS)
        return attention.attend(q_BxSxHxK, k_BxSxGxK, v_BxSxGxK, products, c, starts_BxS)

    def _normalized(self, norm, x_BxSxHxK):
        if self.config.qk_norm == "head":
            return norm(x_BxSxHxK)
        return norm(x_BxSxHxK.reshape(*x_BxSxHxK.shape[:2], -1)).reshape(x_BxSxHxK.shape)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    config: ModelConfig

    def setup(self):
        self.gate_up = Linear((2, self.config.mlp_width))
        self.down = Linear((self.config.width,))

    def __call__(self, x_BxSxD, products: Products):
        return self.down(self.activate(self.gate_up(x_BxSxD, products.part(0))), products.part(1))

    def activate(self, gate_up_BxSx2xF):
        """silu(gate) * up: (B, S, F)."""
        return lean.swiglu(gate_up_BxSx2xF)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), branches scaled by depth-µP.

    With norms placed "post": x + norm(attention(x)), then x + norm(mlp(x)). The methods below are the same computation
    cut at the inputs of its four projections, for post-training quantization, which replaces one projection after the
    other.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.attention_norm, self.mlp_norm = _norm(c), _norm(c)
        self.attention, self.mlp = Attention(c), MLP(c)

    def __call__(self, x_BxSxD, products: Products, starts_BxS=None):
        h_BxSxD = self.attention(self._read(self.attention_norm, x_BxSxD), products.part(0), starts_BxS)
        x_BxSxD = self._add(self.attention_norm, x_BxSxD, h_BxSxD)
        h_BxSxD = self.mlp(self._read(self.mlp_norm, x_BxSxD), products.part(1))
        return self._add(self.mlp_norm, x_BxSxD, h_BxSxD)

    def before_qkv(self, x_BxSxD):
        """Input of the qkv projection."""
        return self._read(self.attention_norm, x_BxSxD)

    def before_out(self, h_BxSxD, products: Products, starts_BxS=None):
        """Input of attention's out projection, from that of qkv."""
        return self.attention.mix(self.attention.qkv(h_BxSxD, products), products, starts_BxS)

    def after_out(self, x_BxSxD, o_BxSxO, products: Products):
        """The residual stream after attention, from the one before and the input of out."""
        return self._add(self.attention_norm, x_BxSxD, self.attention.out(o_BxSxO, products))

    def before_gate_up(self, x_BxSxD):
        """Input of the gate_up projection, from the residual stream after attention."""
        return self._read(self.mlp_norm, x_BxSxD)

    def before_down(self, h_BxSxD, products: Products):
        """Input of the down projection, from that of gate_up."""
        return self.mlp.activate(self.mlp.gate_up(h_BxSxD, products))

    def after_down(self, x_BxSxD, h_BxSxF, products: Products):
        """The block's output, from the residual stream after attention and the input of down."""
        return self._add(self.mlp_norm, x_BxSxD, self.mlp.down(h_BxSxF, products))

    def _read(self, norm, x_BxSxD):
        return norm(x_BxSxD) if self.config.norm_placement == "pre" else x_BxSxD

    def _add(self, norm, x_BxSxD, h_BxSxD):
        h_BxSxD = norm(h_BxSxD) if self.config.norm_placement == "post" else h_BxSxD
        return x_BxSxD + self.config.residual_scale * h_BxSxD


class _ScannedBlock(nn.Module):
    """Block in the (carry, out) form that nn.scan wants."""

    config: ModelConfig
    static: StaticPrecision

    @nn.compact
    def __call__(self, x_BxSxD, grids, key, starts_BxS):
        policy, block = REMATS[self.config.remat], Block
        if policy is not None:
            # The scan over layers keeps the recomputation from being merged with the forward pass, without barriers.
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        products = Products(self.static, grids, key)
        return block(self.config, name="block")(sharding.split_batch(x_BxSxD), products, starts_BxS), None


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
            in_axes=(0, 0, nn.broadcast),
            length=c.depth,
            unroll=_layers_at_once(c, self.static),
        )(c, self.static)
        self.final_norm = _norm(c)
        if not c.tie_embeddings:
            self.head = Linear((c.vocab_size,), _HEAD, fan_in=c.base_width)

    def embed(self, tokens_BxS, products: Products):
        """Residual stream before the first block, (B, S, D)."""
        if products.static.get("e") is None and not sharding.sums_in_float32():
            return sharding.looked_up(self.embedding, tokens_BxS)
        embedding_VxD = products.embedding_table(self.embedding.embedding)
        rows = lambda tokens_BxS: jnp.take(embedding_VxD, tokens_BxS, axis=0).astype(self.config.dtype)
        return sharding.looked_up(rows, tokens_BxS)

    def unembed(self, x_BxSxD, products: Products):
        """Logits in float32, (B, S, V)."""
        h_BxSxD = self.final_norm(x_BxSxD)
        if self.config.tie_embeddings:
            kernel_DxV = self.embedding.embedding.T.astype(h_BxSxD.dtype)
            logits_BxSxV = products.linear(h_BxSxD, kernel_DxV, _HEAD)
        else:
            logits_BxSxV = self.head(h_BxSxD, products)
        return sharding.split_batch(logits_BxSxV * self.config.logit_scale).astype(jnp.float32)

    def __call__(self, tokens_BxS, grids: Grids | None = None, key: jax.Array | None = None):
        """Logits in float32, (B, S, V). grids: of the operands that `static` names, the same or by layer."""
        products = Products(self.static, grids or {}, key)
        return self.unembed(self._blocks(tokens_BxS, products), products.part(1))

    def losses(self, tokens_BxS1, grids: Grids, key: jax.Array | None = None, z_loss: float = 0.0):
        """(what is minimized, mean cross-entropy in nats per token) of predicting each token from those before it.

        z_loss: weight of mean(log² Z) in the first, Z the softmax's normalizer.
        """
        c, targets_BxS = self.config, tokens_BxS1[:, 1:]
        products = Products(self.static, grids, key)
        x_BxSxD = self._blocks(tokens_BxS1[:, :-1], products)
        batch, positions = targets_BxS.shape
        length = cross_entropy.chunk_length(batch, positions, c.vocab_size)
        # A scale of the head's input is that of the whole array.
        if length == positions or any(self.static.get(name) for name in _HEAD):
            return cross_entropy.of_logits(self.unembed(x_BxSxD, products.part(1)), targets_BxS, z_loss)
        kernel_DxV = self.embedding.embedding.T if c.tie_embeddings else self.head.get_variable("params", "kernel")
        head = cross_entropy.Head(c.logit_scale, z_loss, length)
        return cross_entropy.of_inputs(self.final_norm(x_BxSxD), kernel_DxV, targets_BxS, head)

    def _blocks(self, tokens_BxS, products: Products):
        """The residual stream after the last block, (B, S, D)."""
        x_BxSxD = self.embed(tokens_BxS, products.part(0))
        layers_key = products.part(2).key
        layer_keys = None if layers_key is None else jax.random.split(layers_key, self.config.depth)
        starts_BxS = documents.starts(self.config, tokens_BxS)
        x_BxSxD, _ = self.layers(x_BxSxD, by_layer(products.grids, self.config.depth), layer_keys, starts_BxS)
        return x_BxSxD


def _layers_at_once(config: ModelConfig, static: StaticPrecision) -> int:
    """Layers in one turn of the loop over them. All on a CPU: what a loop keeps for the backward pass it copies into
    arrays of all layers and out again, which took a fifth of a small model's step. One elsewhere; where layers are
    recomputed, which the loop keeps from being merged; and with blocks, whose compilation would take thrice the time
    and whose steps are no faster."""
    blocks = any(quantizer.kind.family == "block" for _, quantizer in static.quantizers)
    all_ = sharding.on_one_cpu() and config.remat == "none" and not blocks and config.depth <= _WRITTEN_OUT
    return config.depth if all_ else 1


def init(config: ModelConfig, key) -> Any:
    """Parameters in float32 from one random key."""
    return Decoder(config).init(key, jnp.zeros((1, config.sequence_length), jnp.int32))["params"]


@functools.partial(jax.jit, static_argnums=0)
def initial(config: ModelConfig, key) -> Any:
    """As `init`, traced once for all programs that begin with it and all that ask for shapes."""
    return init(config, key)


@functools.lru_cache(maxsize=64)
def abstract(config: ModelConfig) -> Any:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(functools.partial(initial, config), jax.random.key(0))
