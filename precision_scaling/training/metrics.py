"""How fast training goes: model FLOP/s, and its share of what the devices can do (MFU). Formulas: docs/metrics.md.

`cohort` calls it for the lines of metrics.jsonl; a device that is not in the table has no MFU.
"""

import re
from typing import NamedTuple

import numpy as np

from precision_scaling.model.accounting import training_flops_per_token
from precision_scaling.model.config import ModelConfig


class Peak(NamedTuple):
    """FLOP/s of one device in dense products of operands of a compute dtype, accumulated in float32.

    float32: at the precision that JAX multiplies float32 in by default there, a pass of bf16 on TPUs and TF32 on GPUs.
    """

    bfloat16: float
    float32: float


# By the whole of what JAX calls the device (a slice of one by MIG is another). TPUs: Google Cloud's TPU documentation,
# "peak compute per chip (bf16)". GPUs: NVIDIA's data sheets of each product, of which most print the rates with
# sparsity, twice these.
PEAKS = (
    (r"TPU v4", Peak(275e12, 275e12)),
    (r"TPU (v5 lite|v5e)", Peak(197e12, 197e12)),
    (r"TPU (v5|v5p)", Peak(459e12, 459e12)),
    (r"TPU (v6 lite|v6e)", Peak(918e12, 918e12)),
    (r"NVIDIA A100(-SXM4-[48]0GB|-PCIE-40GB| 80GB PCIe)", Peak(312e12, 156e12)),
    (r"NVIDIA H100 80GB HBM3", Peak(989.4e12, 494.7e12)),  # SXM
    (r"NVIDIA H100 PCIe", Peak(756e12, 378e12)),
    (r"NVIDIA H200", Peak(989.4e12, 494.7e12)),  # SXM
    (r"NVIDIA B200", Peak(2250e12, 1125e12)),
    (r"NVIDIA L4", Peak(121e12, 60e12)),
)


def peak_flops_per_second(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of a device (as `jax.Device.device_kind` names it) at a compute dtype; None where it is not known."""
    found = (getattr(peak, dtype, None) for pattern, peak in PEAKS if re.fullmatch(pattern, device_kind))
    return next(found, None)


def model_flops_per_second(config: ModelConfig, tokens_per_second: float) -> float:
    """Useful FLOP/s of training: what the model's products take, whatever recomputation (remat) adds to them."""
    return training_flops_per_token(config) * tokens_per_second


def mfu(flops_per_second: float, device_kind: str, dtype: str, devices: int) -> float | None:
    """Model FLOP utilization (Chowdhery et al. 2022, arXiv 2204.02311, appendix B); None without a peak to divide by.

    flops_per_second: of all devices together. dtype: the model's compute dtype. Products in native int8 or fp8 count
    against it, too: what they gain shows as a larger share.
    """
    peak = peak_flops_per_second(device_kind, dtype)
    return None if peak is None else flops_per_second / (peak * devices)


def speed(
    config: ModelConfig, devices: np.ndarray, runs: int, run_tokens: int, seconds: float, waited: float
) -> dict[str, float]:
    """How fast so many tokens of each of so many runs went, as metrics.jsonl has it.

    tokens/s of each run, and of all runs together (as they share the devices) model FLOP/s, their share of the devices'
    peak where that is known, and the share of time spent waiting for tokens.
    """
    rate = run_tokens / seconds
    flops = model_flops_per_second(config, runs * rate)
    share = mfu(flops, devices.flat[0].device_kind, config.dtype, devices.size)
    return {
        "tokens_per_second": round(rate, 1),
        "flops_per_second": float(f"{flops:.5g}"),
        **({} if share is None else {"mfu": float(f"{share:.4g}")}),
        "data_wait": round(waited / seconds, 4),
    }
