"""The shape of a decoder, and the letters that axes have in the whole package.

An array's name ends with the letters of its axes: x_BxSxD is (sequences, positions, width). S1 is S + 1.

    model         B sequences   S positions   D residual width   V vocabulary   F width inside the MLP   L layers
                  H query heads   G key and value heads   Q query heads for each of those   A all heads, query, key and
                  value   K head dimension
    training      R runs, one a lane   T steps   M microbatches   N batches (validation), or sequences of a whole text
    ptq           I inputs and O outputs of a kernel   C calibration batches

Kernels have neither heads nor sequences: where `ptq` solves for one, G is groups of inputs, and B or K the bit-widths.
"""

import dataclasses
import math

NORM_PLACEMENTS = ("pre", "post")
NORM_TYPES = ("rms", "layer")
QK_NORMS = ("none", "projection", "head")
PARAMETRIZATIONS = ("depth_mup", "completep")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything static about a decoder; hashable, so that it keys compiled programs.

    `base_width` and `base_depth` name the shape at which the parametrization equals the standard one: wider and deeper
    models scale their rates, residual branches and logits from there. parametrization: "depth_mup" (Yang et al. 2023,
    arXiv 2310.02244) or "completep" (Dey et al. 2025, arXiv 2505.01618); what of it acts in training is in
    `training.parametrization`.

    kv_heads: heads of keys and values, each shared by heads / kv_heads queries (arXiv 2305.13245); 0 is `heads`.
    head_width: head dimension; 0 is width / heads. norm_placement: "pre" normalizes what a branch reads, "post" what it
    adds (OLMo 2, arXiv 2501.00656). norm_type: "rms" with gains, or "layer" without any parameters (OLMo, arXiv
    2402.00838). qk_norm: of queries and keys before they are rotated, over the "projection" (OLMo 2) or each "head".
    tie_embeddings: the head multiplies by the embedding's table. rope_scaling: how the rotary embedding's wavelengths
    are stretched, see `rope`. qkv_bias: biases of queries, keys and values (Qwen 2, arXiv 2407.10671). document_token:
    id of the token that opens a document, in which attention then stays, see `documents`; -1: it reads whole windows.

    remat: of REMATS. "full" recomputes each block from its input in the backward pass; "dots" keeps the results of the
    projections, and recomputes attention, norms and quantization. attention: of `attention.WAYS`.
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
    attention: str = "auto"
    document_token: int = -1
    parametrization: str = "depth_mup"  # not the config's default: ids of runs leave out what is as here

    @property
    def head_dim(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys, and of values."""
        return self.kv_heads or self.heads

    @property
    def residual_scale(self) -> float:
        """Multiplier of each residual branch: base_depth / depth, of depth-µP its root."""
        ratio = self.base_depth / self.depth
        return ratio if self.parametrization == "completep" else math.sqrt(ratio)

    @property
    def logit_scale(self) -> float:
        """Multiplier of the logits, base_width / width."""
        return self.base_width / self.width
