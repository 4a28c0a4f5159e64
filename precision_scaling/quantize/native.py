"""Products that the hardware computes on the codes themselves: which formats and devices have them."""

import jax

from precision_scaling.errors import ConfigError
from precision_scaling.numerics.formats import Format
from precision_scaling.quantize import operands
from precision_scaling.quantize.operands import OPTIONS, partner
from precision_scaling.quantize.precision import Precision


def container_of(fmt: Format) -> str | None:
    """The dtype that the hardware multiplies a format's codes in, None where there is none."""
    if fmt.family == "int" and fmt.bits <= 8:
        return "int8"
    return {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2"}.get(fmt.name)


def check_products(precision: Precision) -> None:
    """Raises ConfigError where a precision asks for products that no hardware has."""

    def refuse(value: str, allowed: str):
        raise ConfigError("precision.mode", f"native with {value}", allowed)

    for name, quantizer in precision.quantizers:
        text = f"{OPTIONS[name]} = {quantizer.format.name}/{quantizer.granularity}"
        if name == "e":
            refuse(text, "bf16, a look-up is no product")
        if container_of(quantizer.format) is None:
            refuse(text, "int2 to int8, e4m3fn, e5m2, or mode simulated")
        if not operands.output_scaled(name, quantizer.granularity):
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
                if saved == partner(x) and other_quantizer and other_quantizer.granularity != "tensor":
                    text = f"{OPTIONS[f'g_{x}']} = {gradient.format.name} and {OPTIONS[f's_{x}']} = forward"
                    refuse(text, f"granularity tensor for {OPTIONS[saved]}, or a format for the saved operand")
            elif precision.get(f"s_{x}"):
                refuse(
                    f"{OPTIONS[f's_{x}']} = {precision.format(f's_{x}').name}", f"a format for {OPTIONS[f'g_{x}']}, too"
                )
        for one, other in pairs:
            found = [precision.get(one), precision.get(other)]
            if any(found) and not all(found):
                missing = one if precision.get(other) else other
                refuse(f"{OPTIONS[missing]} = bf16", f"formats for both {OPTIONS[one]} and {OPTIONS[other]}")
            kinds = {container_of(quantizer.format) == "int8" for quantizer in found if quantizer}
            if len(kinds) > 1:
                refuse(f"{OPTIONS[one]} and {OPTIONS[other]} of two kinds", "both integers, or both fp8")


def check_device(precision: Precision, device: jax.Device | None = None) -> None:
    """Raises ConfigError where the device has no native product of the precision's formats.

    int8 products exist on CPUs, GPUs and TPUs; fp8 on GPUs of compute capability 8.9 and above.
    """
    device = device or jax.devices()[0]
    if not precision.native:
        return
    fp8 = sorted(
        {quantizer.format.name for _, quantizer in precision.quantizers if container_of(quantizer.format) != "int8"}
    )
    capability = getattr(device, "compute_capability", "0")
    if fp8 and not (device.platform == "gpu" and tuple(map(int, str(capability).split("."))) >= (8, 9)):
        raise ConfigError(
            "precision.mode",
            "native",
            f"simulated for {', '.join(fp8)} on {device.device_kind} ({device.platform}); native fp8 needs a GPU of "
            "compute capability 8.9 or above",
        )
