"""Memory of a served model: weights with their scales, KV cache, embeddings.

With long contexts and large batches the cache takes more than the weights (Kim et al., arXiv 2510.10964).
"""

import dataclasses
import re

import numpy as np

from analysis.laws.law import HIGH_PRECISION_BITS
from precision_scaling.errors import UserError

SCALE_BITS = 16.0  # of each scale of the weights
EMBEDDING_BITS = 16.0
WIDTH_PER_LAYER = 100.0  # of the standard shape (precision_scaling/model/sizes.py), whose N is 12 · depth · width²
UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNITS |= {"KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3, "TiB": 1024.0**4}
MOST_BYTES = 1e21


class ServingError(UserError):
    """A size, layout or serving load that does not exist."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the size of a KV cache depends on: layers, heads of keys (as many of values) and the width of a head."""

    depth: int
    kv_heads: int
    head_width: int

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """`"32x8x128"`, layers x heads of keys x width of a head."""
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5})", text.strip(), re.ASCII)
        if not found or 0 in (numbers := [int(number) for number in found.groups()]):
            raise ServingError(f"--layout={text}: want layers x KV heads x width of a head, such as 32x8x128")
        return cls(*numbers)


@dataclasses.dataclass(frozen=True)
class Serving:
    """How a model is served: tokens of context, sequences at once, bits of the cache, and what else takes memory.

    kv_bits: None for the bits that keys and values were trained in (`cache_trained_low`), else 16. group_size: weights
    that share a scale; 0: those of an output channel do. vocabulary: of an embedding and a head of its own, in 16 bits;
    0 leaves them out. layout: None for the standard shape of N. stored_scales: whether the bits of the weights leave
    their scales out.
    """

    context: float = 0.0
    batch: float = 1.0
    kv_bits: float | None = None
    group_size: int = 0
    vocabulary: int = 0
    layout: Layout | None = None
    cache_trained_low: bool = False
    stored_scales: bool = True

    def shape(self, n):
        """Width and depth of a model of N parameters: those of the layout, else width = 100 depth, one layer at least.

        Not rounded, so that memory grows smoothly with N.
        """
        depth = self.layout.depth if self.layout else np.maximum((n / (12 * WIDTH_PER_LAYER**2)) ** (1 / 3), 1.0)
        return np.sqrt(n / (12 * depth)), depth

    def weights(self, n, bits):
        """Bytes of N weights of so many bits each, and of their scales of 16 bits where they are below 16 bits.

        An output channel of a decoder layer holds 36/31 of the width: 12 width² weights in 4 + 2 · 8/3 + 1 widths.
        """
        width, _ = self.shape(n)
        shared = self.group_size or width * 36 / 31
        scale = np.where((np.asarray(bits) < HIGH_PRECISION_BITS) & self.stored_scales, SCALE_BITS / shared, 0.0)
        return n * (bits + scale) / 8

    def cache_bits(self, p):
        """Bits of a cached key or value of a model trained at P bits."""
        if self.kv_bits is not None:
            return np.full(np.shape(p), self.kv_bits)
        return np.minimum(p, HIGH_PRECISION_BITS) if self.cache_trained_low else np.full(np.shape(p), 16.0)

    def cache(self, n, p):
        """Bytes of the keys and values of every layer, head, token of context and sequence."""
        width, depth = self.shape(n)
        per_token = 2 * depth * (self.layout.kv_heads * self.layout.head_width if self.layout else width)
        return per_token * self.context * self.batch * self.cache_bits(p) / 8

    def embeddings(self, n):
        """Bytes of the embedding and of the head."""
        return 2 * self.vocabulary * self.shape(n)[0] * EMBEDDING_BITS / 8

    def total(self, n, bits, p):
        """Bytes of a model of N parameters trained at P bits, served with weights of `bits`; activations left out."""
        return self.weights(n, bits) + self.cache(n, p) + self.embeddings(n)

    def most_parameters(self, limit: float, bits, p):
        """The largest N that `limit` bytes hold, 0 where there is none; by bisection, as bytes grow with N."""
        low, high = np.full(np.broadcast(bits, p).shape, 0.0), np.full(np.broadcast(bits, p).shape, np.log(1e30))
        for _ in range(60):
            middle = (low + high) / 2
            fits = self.total(np.exp(middle), bits, p) <= limit
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return np.where(self.total(1.0, bits, p) <= limit, np.exp(low), 0.0)


def parse_bytes(text: str) -> float:
    """`"24GiB"`, `"80 GB"` to bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]\+?(\d{1,2}))?\s*([kKMGT]?i?B)", text.strip(), re.ASCII)
    if not found or found[3] not in UNITS:
        raise ServingError(f"--memory={text}: want a number and a unit, such as 24GiB or 80GB ({', '.join(UNITS)})")
    value = float(f"{found[1]}e{found[2] or 0}") * UNITS[found[3]]
    if not 1 <= value <= MOST_BYTES:
        raise ServingError(f"--memory={text}: want 1B to {MOST_BYTES / 1e12:g}TB")
    return value


def bytes_label(value: float) -> str:
    """Bytes with a unit in powers of 1000: 13.5 GB."""
    for unit in ("TB", "GB", "MB", "kB"):
        if value >= UNITS[unit] * 0.9995:
            return f"{value / UNITS[unit]:.3g} {unit}"
    return f"{value:.0f} B"
