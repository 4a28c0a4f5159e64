"""Cross-entropy of the next tokens from the head's input, its logits made in chunks of positions.

For a vocabulary of 50k the logits are the largest arrays of a step: in the compute dtype, in float32, and their
gradients. Here a chunk of positions is multiplied by the head's kernel, its losses are taken, and where gradients are
asked for, its gradients, too, in the forward pass: those of a mean are known by then but for a factor. So nothing is
computed twice, as chunks of the vocabulary would have to (the normalizer of a softmax is known only after the last).
The letters of shapes are those of `model.config`; s positions are a chunk, P shards of the batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from precision_scaling.runtime import sharding

CHUNK_BYTES = 2**27  # of a device's float32 logits, above which they are made in chunks of at most so many


@dataclasses.dataclass(frozen=True)
class Head:
    """What is done to the product of input and kernel, and to the logits.

    scale: factor of the logits. z_loss: weight of mean(log² Z) in what is minimized, Z the softmax's normalizer.
    length: positions of a chunk.
    """

    scale: float
    z_loss: float
    length: int


def chunk_length(batch: int, positions: int, vocabulary: int) -> int:
    """Positions of a chunk, the same for all but the last; `positions` where one chunk has them all."""
    of_a_position = 4 * vocabulary * batch // sharding.batch_parts(batch)
    most = max(1, CHUNK_BYTES // of_a_position)
    return -(-positions // -(-positions // most))


def of_logits(logits_BxSxV, targets_BxS, z_loss: float):
    """(what is minimized, mean cross-entropy in nats per token) of logits in float32."""
    losses, log_z = _losses(logits_BxSxV, targets_BxS, z_loss)
    return _means(losses, log_z, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def of_inputs(h_BxSxD, kernel_DxV, targets_BxS, head: Head):
    """(what is minimized, mean cross-entropy in nats per token) of the head's input and its kernel in float32.

    The product is computed in the input's dtype, the kernel's gradient is summed in float32. The second result has no
    gradient where z_loss is not 0.
    """
    kernel_DxV = sharding.gathered(kernel_DxV.astype(h_BxSxD.dtype), (None, "tensor"))

    def losses_of(_, h_BxsxD, targets_Bxs):
        return None, _losses(_logits(h_BxsxD, kernel_DxV, head), targets_Bxs, head.z_loss)

    _, (losses, log_z) = _in_chunks(losses_of, None, h_BxSxD, targets_BxS, head.length)
    return _means(losses, log_z, head.z_loss)


def _forward(h_BxSxD, kernel_DxV, targets_BxS, head: Head):
    batch, positions, width = h_BxSxD.shape
    vocabulary = kernel_DxV.shape[1]
    narrow_DxV = sharding.gathered(kernel_DxV.astype(h_BxSxD.dtype), (None, "tensor"))
    # One sum for each shard of the batch, so that devices add theirs up once instead of after every chunk.
    shards = sharding.batch_parts(batch)
    by_shard = lambda x: sharding.split_batch(x.reshape(shards, -1, x.shape[-1]))

    def chunk(dkernel_PxDxV, h_BxsxD, targets_Bxs):
        logits_BxsxV = _logits(h_BxsxD, narrow_DxV, head)
        losses, log_z = _losses(logits_BxsxV, targets_Bxs, head.z_loss)
        log_z_Bxsx1 = jax.nn.logsumexp(logits_BxsxV, axis=-1, keepdims=True)
        p_BxsxV = jnp.exp(logits_BxsxV - log_z_Bxsx1)
        if head.z_loss:
            p_BxsxV = p_BxsxV * (1 + 2 * head.z_loss * log_z_Bxsx1)
        target_BxsxV = jax.nn.one_hot(targets_Bxs, vocabulary, dtype=p_BxsxV.dtype)
        g_BxsxV = ((p_BxsxV - target_BxsxV) / (batch * positions)).astype(h_BxsxD.dtype) * head.scale
        dh_BxsxD = jax.lax.dot_general(g_BxsxV, narrow_DxV, (((2,), (1,)), ((), ())))
        dkernel_PxDxV += jax.lax.dot_general(
            by_shard(h_BxsxD),
            by_shard(g_BxsxV),
            (((1,), (1,)), ((0,), (0,))),
            preferred_element_type=dkernel_PxDxV.dtype,
        )
        return sharding.split_batch(dkernel_PxDxV), (losses, log_z, dh_BxsxD)

    zero_PxDxV = sharding.split_batch(jnp.zeros((shards, width, vocabulary), kernel_DxV.dtype))
    dkernel_PxDxV, (losses, log_z, dh_BxSxD) = _in_chunks(chunk, zero_PxDxV, h_BxSxD, targets_BxS, head.length)
    if shards > 1 and not sharding.sums_in_float32():
        dkernel_PxDxV = dkernel_PxDxV.astype(h_BxSxD.dtype)
    dkernel_DxV = sharding.summed_parts(dkernel_PxDxV, ("fsdp", "tensor")).astype(kernel_DxV.dtype)
    return _means(losses, log_z, head.z_loss), (dh_BxSxD, dkernel_DxV)


def _backward(head: Head, kept, g):
    dh_BxSxD, dkernel_DxV = kept
    factor = g[0] if head.z_loss else g[0] + g[1]
    return (dh_BxSxD * factor).astype(dh_BxSxD.dtype), dkernel_DxV * factor.astype(dkernel_DxV.dtype), None


of_inputs.defvjp(_forward, _backward)


def _logits(h_BxsxD, kernel_DxV, head: Head):
    """In float32 or wider, (B, s, V)."""
    # A product of matrices: XLA's CPU backend is 1.5 times slower on the higher-rank form.
    product = (h_BxsxD.reshape(-1, h_BxsxD.shape[-1]) @ kernel_DxV).reshape(*h_BxsxD.shape[:2], -1)
    logits_BxsxV = sharding.split_batch(product * head.scale)
    return logits_BxsxV.astype(jnp.promote_types(logits_BxsxV.dtype, jnp.float32))


def _losses(logits_BxsxV, targets_Bxs, z_loss: float):
    """Of each position: its cross-entropy, and log Z where z_loss is not 0."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxsxV, targets_Bxs)
    return losses, jax.nn.logsumexp(logits_BxsxV, axis=-1) if z_loss else None


def _means(losses_BxS, log_z_BxS, z_loss: float):
    loss = jnp.mean(losses_BxS)
    return (loss + z_loss * jnp.mean(jnp.square(log_z_BxS)) if z_loss else loss), loss


def _in_chunks(function, carry, h_BxSxD, targets_BxS, length: int):
    """function(carry, h, targets) -> (carry, arrays by position), over chunks of positions, the last one shorter."""
    batch, positions = targets_BxS.shape
    whole = positions // length * length

    def cut(x_BxS):
        chunks = x_BxS[:, :whole].reshape(batch, -1, length, *x_BxS.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)

    def join(x_CxBxs):
        return jnp.moveaxis(x_CxBxs, 0, 1).reshape(batch, whole, *x_CxBxs.shape[3:])

    carry, out = jax.lax.scan(lambda carry, part: function(carry, *part), carry, (cut(h_BxSxD), cut(targets_BxS)))
    out = jax.tree.map(join, out)
    if whole == positions:
        return carry, out
    carry, rest = function(carry, h_BxSxD[:, whole:], targets_BxS[:, whole:])
    return carry, jax.tree.map(lambda one, other: jnp.concatenate([one, other], axis=1), out, rest)
