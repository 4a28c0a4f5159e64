"""A decoder with a rotated residual stream, which computes the same: weights lose outliers before they are rounded.

With an orthogonal R (D, D) the stream x becomes x R. RMS norms without gains pass a rotation on, so gains γ go into
what reads them: kernels that read are Rᵀ diag(γ) W, kernels that write W R, the embedding E R, and the head
Rᵀ diag(γ) W, a kernel of its own even where it was the embedding's table. That is R1 of SpinQuant (Liu et al., arXiv
2405.16406) with the fixed rotation of QuaRot (Ashkboos et al., arXiv 2404.00456): nothing is left to do when the model
runs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import hadamard
from precision_scaling.ptq.scheme import LINEARS, NORMS
from precision_scaling.training.blocks import Blocks, Stacked

SEED = 0  # of signs and of the odd part; one rotation for all models of a width


@functools.lru_cache(maxsize=2)
def matrix(width: int) -> np.ndarray:
    """R, orthogonal (D, D) in float64: random signs, a Hadamard matrix of the largest power of two in D, and a random
    rotation of what is left of D (9 for 576), so that every feature meets every other."""
    rng = np.random.default_rng(SEED)
    power = width & -width
    odd, _ = np.linalg.qr(rng.normal(size=(width // power,) * 2))
    return np.kron(odd, hadamard.matrix(power)) * rng.choice([-1.0, 1.0], width)[:, None]


def decoder(model: ModelConfig) -> ModelConfig:
    """The decoder of what `rotated` gives."""
    return dataclasses.replace(model, tie_embeddings=False)


def rotated(blocks: Blocks, model: ModelConfig) -> Blocks:
    """The parameters of the same function with a rotated stream, block by block as they were; norms are pre and rms."""
    if not isinstance(blocks, Stacked):
        return _Rotated(blocks, model)
    block = jax.vmap(_block, in_axes=(0, None))(blocks.params["layers"]["block"], _float32(model.width))
    return Stacked({**_top(blocks.top(), model), "layers": {"block": block}})


@dataclasses.dataclass(frozen=True)
class _Rotated:
    blocks: Blocks
    model: ModelConfig

    @property
    def depth(self) -> int:
        """Blocks that there are."""
        return self.blocks.depth

    def top(self) -> Any:
        """See `Blocks`."""
        return _top(self.blocks.top(), self.model)

    def block(self, layer: int) -> Any:
        """See `Blocks`."""
        return jax.jit(_block)(self.blocks.block(layer), _float32(self.model.width))


def _float32(width: int) -> jax.Array:
    return jnp.asarray(matrix(width), jnp.float32)


def _times(a, b):
    return jnp.matmul(a, b, precision="highest")


def _block(block: Any, r_DxD) -> Any:
    found = {module: dict(parameters) for module, parameters in block.items()}
    for module, name in LINEARS:
        kernel = block[module][name]["kernel"]
        if (module, name) in NORMS:
            gain_D = block[NORMS[module, name]]["scale"]
            flat_DxO = kernel.reshape(len(kernel), -1) * gain_D[:, None]
            kernel = _times(r_DxD.T, flat_DxO).reshape(kernel.shape)
            found[NORMS[module, name]] = {"scale": jnp.ones_like(gain_D)}
        else:
            kernel = _times(kernel, r_DxD)
        found[module][name] = {"kernel": kernel}
    return found


def _top(top: Any, model: ModelConfig) -> Any:
    r_DxD, gain_D = _float32(model.width), top["final_norm"]["scale"]
    table_VxD = top["embedding"]["embedding"]
    head_DxV = table_VxD.T if model.tie_embeddings else top["head"]["kernel"]
    return {
        **top,
        "embedding": {"embedding": _times(table_VxD, r_DxD)},
        "final_norm": {"scale": jnp.ones_like(gain_D)},
        "head": {"kernel": _times(r_DxD.T, head_DxV * gain_D[:, None])},
    }
