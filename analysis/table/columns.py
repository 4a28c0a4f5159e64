"""The columns of runs.csv: their names, the parts of a model that they describe, and the values that they may hold."""

import re

HIGH_PRECISION_BITS = 16.0  # P of bf16; from here up a part counts as not quantized
PARTS = ("w", "a", "kv")  # weights, activations, KV cache
COUNTS = ("N", "D")
PRECISIONS = tuple(f"P_{part}" for part in PARTS)
REQUIRED = (*COUNTS, "loss")
NUMERIC = (*COUNTS, *PRECISIONS, "P_post", "loss")
# With every text column: what makes two rows of a run different measurements.
SETTINGS = (*COUNTS, *PRECISIONS, "P_post", "seed", "group_size", "P_grad", "exponent_bits", "mantissa_bits")
KNOWN = ("run", *NUMERIC, *SETTINGS, "status", "method")

# Plausible values; their squares stay far from the limits of float64.
LEAST = {"N": 1.0, "D": 1.0, **dict.fromkeys((*PRECISIONS, "P_post"), 0.1)}
MOST = {"N": 1e20, "D": 1e20, "loss": 1e6, **dict.fromkeys((*PRECISIONS, "P_post"), 256.0)}
MOST_OF_OTHERS = 1e12
POSITIVE, NOT_NEGATIVE = ("group_size", "P_grad"), ("exponent_bits", "mantissa_bits")
EMPTY = ("", "nan", "na", "n/a", "none", "null")

# Columns that every checked table has: see runs.models. No file has them, as their names hold a space.
MODEL, BASE = "trained model", "row before PTQ"

FORMAT_COLUMNS = {"w": ("w_format",), "a": ("a_format",), "kv": ("k_format", "v_format")}
ALL_FORMAT_COLUMNS = tuple(name for names in FORMAT_COLUMNS.values() for name in names)
UNROUNDED = ("bf16", "fp16", "fp32")  # formats that pass through
METHOD_COLUMNS = ("method", "ptq_method")
BEYOND_WEIGHTS = ("smoothquant", "kv_cache")  # PTQ methods that quantize activations or the KV cache
STEP, GAUSSIAN_ERROR = "s_", "gmse_"  # prefixes of columns that a format determines: relative step, mean squared error


def mixture(text: str) -> tuple[tuple[str, float], ...]:
    """(format, share) in a cell of a format column: one format, or "int4:0.75+bf16:0.25" where layers differ."""
    words = [re.fullmatch(r"(\w+):(0?\.\d+)", word) for word in text.split("+")]
    return tuple((word[1], float(word[2])) for word in words if word) if all(words) else ((text, 1.0),)


def is_of_format(name: str) -> bool:
    """Whether a format determines the column: the relative step or the Gaussian error of a part."""
    return name.startswith((STEP, GAUSSIAN_ERROR))
