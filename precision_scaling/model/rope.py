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
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
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
    if kind == "yarn" and not found["beta_slow"] < found["beta_fast"]:
        raise ConfigError("model.rope_scaling", scaling, "a beta_slow below the beta_fast")
    return kind, found


def amplitude(scaling: str) -> float:
    """What queries and keys are multiplied by when they are rotated: YaRN's attention_factor, otherwise 1."""
    return parse(scaling)[1].get("attention_factor", 1.0)


def describe(kind: str, values: dict[str, float]) -> str:
    """The option that `parse` takes apart."""
    return f"{kind}:" + ",".join(repr(float(values[name])).removesuffix(".0") for name in SCALINGS[kind])


def frequencies(head_dim: int, theta: float, scaling: str = ""):
    """Radians per position of each pair of a head's elements, (head_dim / 2,).

    linear: positions are divided by the factor (Chen et al., arXiv 2306.15595). llama3: wavelengths that fit into the
    original length high_freq_factor times stay, those that do not fit low_freq_factor times are stretched by the
    factor, and between them it goes over linearly in the number of turns (Llama 3.1, arXiv 2407.21783). yarn: pairs
    that turn beta_fast times or more in the original length stay, those that turn beta_slow times or less are stretched
    by the factor, and between them it goes over linearly in the index of the pair (Peng et al., arXiv 2309.00071).
    theta must be above 1 for yarn.
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
    if kind == "yarn":
        stretched_k = _stretched(head_dim, theta, s)
        return frequency_k * (1 - stretched_k + stretched_k / s["factor"])
    return frequency_k


def _stretched(head_dim: int, theta: float, s: dict[str, float]):
    """How far YaRN stretches each pair, from 0 (not) to 1; the ends of the ramp are whole pairs."""

    def pair(turns: float) -> float:
        wavelength = s["original_max_position_embeddings"] / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair(s["beta_fast"])), 0), min(math.ceil(pair(s["beta_slow"])), head_dim - 1)
    ramp = last - first or 0.001
    return jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - first) / ramp, 0, 1)
