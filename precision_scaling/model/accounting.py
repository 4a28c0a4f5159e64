"""What a decoder holds and what it computes: its parameters N, and the FLOPs of a token."""

import functools
import math
from typing import Any

import jax

from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import abstract


@functools.cache
def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(non-embedding, all) parameter counts; embedding and head are what "non-embedding" leaves out."""
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))
    grids_of_runs = 1 if config.tie_embeddings else 2
    return total - grids_of_runs * config.vocab_size * config.width, total


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward FLOPs of one token: 6 per parameter of every matmul (head included), 12·depth·heads·head
    dimension·length for the two attention products (full, not causal, as PaLM's appendix B counts them)."""
    non_embedding, _ = count_parameters(config)
    matmul = non_embedding + config.vocab_size * config.width
    return 6 * matmul + 12 * config.depth * config.heads * config.head_dim * config.sequence_length


def projection_parameters(config: ModelConfig) -> dict[str, int]:
    """Weights of each projection of one block, by its name."""
    attended = config.heads * config.head_dim
    read = (config.heads + 2 * config.key_heads) * config.head_dim
    return {
        "qkv": config.width * read,
        "out": attended * config.width,
        "gate_up": 2 * config.width * config.mlp_width,
        "down": config.mlp_width * config.width,
    }


def bytes_of(tree: Any) -> int:
    """Of all arrays in a tree, or of their shapes and types."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
