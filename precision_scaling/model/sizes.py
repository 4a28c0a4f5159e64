"""Named model sizes: a name fixes width, depth, heads and the hidden width of the MLP; N is computed from them."""

import dataclasses

from precision_scaling.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a decoder. mlp_width: inside the SwiGLU MLP, 8/3 of the width so that N is about 12·depth·width²."""

    width: int
    depth: int
    heads: int
    mlp_width: int


def mlp_width_of(width: int, multiple: int) -> int:
    """8/3 of the width, rounded up to a multiple that the hardware likes."""
    return -(-8 * width // (3 * multiple)) * multiple


def _size(width: int, depth: int, heads: int, multiple: int) -> Size:
    return Size(width, depth, heads, mlp_width_of(width, multiple))


# The paper names its sizes by N alone and publishes no shapes: these keep width / depth near 100 and heads of 64.
SIZES = {
    "7k": _size(24, 1, 1, 8),
    "14k": _size(24, 2, 1, 8),
    "25k": _size(32, 2, 2, 8),
    "55k": _size(48, 2, 3, 8),
    "100k": _size(64, 2, 4, 8),
    # A ladder in width alone: depth-µP, which trained it, does not carry the best rate across depth. Blocks of
    # 32 divide its kernels.
    "27k": _size(32, 2, 2, 32),
    "106k": _size(64, 2, 4, 32),
    "400k": _size(128, 2, 8, 32),
    "1.6M": _size(256, 2, 16, 32),
    # Two with four layers, so that the first and the last are not all there are.
    "53k": _size(32, 4, 2, 32),
    "213k": _size(64, 4, 4, 32),
    "300k": _size(96, 3, 3, 16),
    "1M": _size(144, 4, 4, 16),
    "3M": _size(224, 5, 7, 32),
    "10M": _size(384, 6, 6, 64),
    "30M": _size(640, 6, 10, 64),
    "60M": _size(768, 8, 12, 64),
    "110M": _size(960, 10, 15, 64),
    "220M": _size(1280, 11, 20, 64),
    "1.7B": _size(2560, 22, 40, 64),
}


def named(name: str) -> Size:
    """The size of that name; ConfigError where there is none."""
    if name not in SIZES:
        raise ConfigError("model.size", name, f"one of {', '.join(SIZES)}")
    return SIZES[name]


def label(parameters: int) -> str:
    """A name like those above for a shape that has none: 1234567 -> "1.23M"."""
    for unit, value in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= value:
            return f"{parameters / value:.3g}{unit}"
    return str(parameters)
