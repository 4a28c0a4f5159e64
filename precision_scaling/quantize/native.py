"""Products that the hardware computes on the codes themselves: which formats and devices have them."""

import jax
from absl import logging

from precision_scaling.errors import ConfigError
from precision_scaling.numerics.formats import Format
from precision_scaling.quantize import operands
from precision_scaling.quantize.operands import OPTIONS, partner
from precision_scaling.quantize.precision import Precision

_CONTAINERS = {
    "e4m3fn": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    # Elements of blocks, which are multiplied with their scales.
    **dict.fromkeys(("mxfp8", "mxfp8_up"), "float8_e4m3fn"),
    "mxfp8_e5m2": "float8_e5m2",
    **dict.fromkeys(("nvfp4", "nvfp4_4over6"), "float4_e2m1fn"),
}


def container_of(fmt: Format) -> str | None:
    """The dtype that the hardware multiplies a format's codes in, None where there is none."""
    if fmt.family == "int" and fmt.bits <= 8:
        return "int8"
    return _CONTAINERS.get(fmt.name)


def check_products(precision: Precision) -> None:
    """Raises ConfigError where a precision asks for products that no hardware has."""

    def refuse(value: str, allowed: str):
        raise ConfigError("precision.mode", f"native with {value}", allowed)

    for name, quantizer in precision.quantizers:
        text = f"{OPTIONS[name]} = {quantizer.format.name}/{quantizer.granularity}"
        if name == "e":
            refuse(text, "bf16, a look-up is no product")
        if container_of(quantizer.format) is None:
            refuse(text, f"int2 to int8, {', '.join(_CONTAINERS)}, or mode simulated")
        if quantizer.format.family == "block":
            if name.removeprefix("g_").removeprefix("s_") in ("q", "k", "p", "v"):
                refuse(text, "other formats than blocks for attention, or mode simulated")
        elif not operands.output_scaled(name, quantizer.granularity):
            refuse(text, "a granularity whose scale is constant along the contraction")
    for left, right in operands.PRODUCTS:
        pairs = [(left, right)]
        for x in (left, right):
            if gradient := precision.get(f"g_{x}"):
                saved = f"s_{x}" if precision.get(f"s_{x}") else partner(x)
                pairs.append((f"g_{x}", saved))
                if x in precision.exact:
                    refuse(f"{OPTIONS[f's_{x}']} = exact", "forward or a format, as its gradient has one")
                other_quantizer = precision.get(saved)
                same = "tile:" if gradient.format.family == "block" else "tensor"  # what any contraction can read
                if saved == partner(x) and other_quantizer and not other_quantizer.granularity.startswith(same):
                    text = f"{OPTIONS[f'g_{x}']} = {gradient.format.name} and {OPTIONS[f's_{x}']} = forward"
                    shared = {"tile:": "tiles", "tensor": "granularity tensor"}[same]
                    refuse(text, f"{shared} for {OPTIONS[saved]}, or a format for the saved operand")
            elif precision.get(f"s_{x}"):
                refuse(
                    f"{OPTIONS[f's_{x}']} = {precision.format(f's_{x}').name}", f"a format for {OPTIONS[f'g_{x}']}, too"
                )
        for one, other in pairs:
            found = [precision.get(one), precision.get(other)]
            if any(found) and not all(found):
                missing = one if precision.get(other) else other
                refuse(f"{OPTIONS[missing]} = bf16", f"formats for both {OPTIONS[one]} and {OPTIONS[other]}")
            if len({_kind(quantizer.format) for quantizer in found if quantizer}) > 1:
                allowed = "both integers, both fp8, or blocks of one size"
                refuse(f"{OPTIONS[one]} and {OPTIONS[other]} of two kinds", allowed)


def _kind(fmt: Format) -> tuple[bool, int | None]:
    """What two formats have in common that are multiplied: whether they are integers, and the size of blocks."""
    return container_of(fmt) == "int8", fmt.block_size


def check_device(precision: Precision, device: jax.Device | None = None) -> None:
    """Raises ConfigError where the device has no native product of the precision's formats.

    int8 products exist on CPUs, GPUs and TPUs; fp8 on GPUs of compute capability 8.9 and above. Products of block
    formats are native from 10.0 on, and elsewhere emulated: then there is a line in the log.
    """
    device = device or jax.devices()[0]
    if not precision.native:
        return
    found = [quantizer.format for _, quantizer in precision.quantizers if container_of(quantizer.format) != "int8"]
    fp8, blocks = (sorted({fmt.name for fmt in found if (fmt.family == "block") is kind}) for kind in (False, True))
    is_gpu, given = device.platform == "gpu", str(getattr(device, "compute_capability", "0"))
    capability = tuple(map(int, given.split(".")))
    if blocks and not (is_gpu and capability >= (10, 0)):
        logging.info(
            "precision.mode = native: %s emulated on %s (%s)", ", ".join(blocks), device.device_kind, device.platform
        )
    if fp8 and not (is_gpu and capability >= (8, 9)):
        raise ConfigError(
            "precision.mode",
            "native",
            f"simulated for {', '.join(fp8)} on {device.device_kind} ({device.platform}); native fp8 needs a GPU of "
            "compute capability 8.9 or above",
        )
