"""Frequencies of the rotary embedding, and how models that were trained on for longer texts stretch them.

`model` turns queries and keys by them; `huggingface` reads and writes the stretching as config.json has it.
"""

import math

import jax.numpy as jnp

from precision_scaling.errors import ConfigError

# What follows the name of a stretching, in order, in the words of config.json.
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ALLOWED = " or ".join(["''", *(f"'{kind}:{','.join(names)}'" for kind, names in SCALINGS.items())])


def parse(scaling: str) -> tuple[str, dict[str, float]]:
    """'llama3:8,1,4,8192' -> its name and its numbers by name; '' -> ('', {}). ConfigError for anything else."""
    if not scaling:
        return "", {}
    kind, _, values = str(scaling).partition(":")
    try:
        found = dict(zip(SCALINGS[kind], map(float, values.split(",")), strict=True))
    except (KeyError, ValueError):
        raise ConfigError("model.rope_scaling", scaling, ALLOWED) from None
    if not all(0 < value < math.inf for value in found.values()):
        raise ConfigError("model.rope_scaling", scaling, f"{ALLOWED} with numbers above 0")
    if kind == "llama3" and not found["low_freq_factor"] < found["high_freq_factor"]:
        raise ConfigError("model.rope_scaling", scaling, "a low_freq_factor below the high_freq_factor")
    return kind, found


def describe(kind: str, values: dict[str, float]) -> str:
    """The option that `parse` takes apart."""
    return f"{kind}:" + ",".join(repr(float(values[name])).removesuffix(".0") for name in SCALINGS[kind])


def frequencies(head_dim: int, theta: float, scaling: str = ""):
    """Radians per position of each pair of a head's elements, (head_dim / 2,).

    linear: positions are divided by the factor (Chen et al., arXiv 2306.15595). llama3: wavelengths that fit into the
    original length high_freq_factor times stay, those that do not fit low_freq_factor times are stretched by the
    factor, and between them it goes over linearly in the number of turns (Llama 3.1, arXiv 2407.21783).
    """
    frequency_k = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    kind, s = parse(scaling)
    if kind == "linear":
        return frequency_k / s["factor"]
    if kind == "llama3":
        turns_k = s["original_max_position_embeddings"] * frequency_k / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        kept_k = jnp.clip((turns_k - low) / (high - low), 0, 1)
        return frequency_k * (kept_k + (1 - kept_k) / s["factor"])
    return frequency_k
