"""Precisions of weights, activations and KV cache at once, for the grid of a study: the same, or drawn at random."""

import random

PARTS = ("w", "a", "kv")


def tied(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Weights, activations and KV cache in the same format: "w4_a4_kv4" of "4"."""
    return tuple("_".join(f"{part}{name}" for part in PARTS) for name in formats)


def combinations(bits: tuple[int, ...], count: int, seed: int) -> tuple[str, ...]:
    """`count` different precisions, the bits of each part drawn at random: a validation set for laws."""
    draw = random.Random(seed)
    found: dict[str, None] = {}  # a set that keeps its order
    while len(found) < count:
        found["_".join(f"{part}{draw.choice(bits)}" for part in PARTS)] = None
    return tuple(found)
