"""A post-training quantization with its options, and the name that its rows and files go by.

Made from the config's `ptq` section (or the flags of the command) before anything is compiled; `apply` and `runs` do
what it says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from precision_scaling.errors import ConfigError
from precision_scaling.model.decoder import ModelConfig
from precision_scaling.numerics.formats import Kind
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer

# The options that a method has. The others do not touch it, so that one config can ask for several methods.
# AWQ always searches for a clip of its own.
_OPTIONS = {
    "gptq": ("group_size", "symmetric", "act_order", "clip"),
    "awq": ("group_size", "symmetric"),
    "rtn": ("group_size", "symmetric", "clip"),
    "smoothquant": ("group_size", "symmetric", "clip", "smoothing", "granularity"),
    "kv_cache": ("granularity",),
}
# What a method quantizes, in the table's words, and the operands of the forward pass that are not kernels.
_PARTS = {"smoothquant": "wa", "kv_cache": "kv"}
_OPERANDS = {"smoothquant": ("a",), "kv_cache": ("k", "v")}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A method and its options; those that it does not have are at their defaults. Hashable: keys compiled programs.

    group_size: inputs that share a scale in an output channel; 0 is all of them. symmetric: levels ±(2^(b-1) - 1), or
    2^b levels from a zero point. act_order: inputs by falling size (GPTQ). clip: ranges shrunk to the least squared
    error. smoothing: SmoothQuant's α. granularity: what shares a scale in activations, keys and values.
    """

    method: str
    group_size: int = 0
    symmetric: bool = True
    act_order: bool = False
    clip: bool = False
    smoothing: float = 0.5
    granularity: str = "tensor"

    @property
    def name(self) -> str:
        """The method and every option that is not at its default: "gptq", "gptq-group32-asymmetric"."""
        return "-".join([self.method, *self.options])

    @property
    def options(self) -> tuple[str, ...]:
        """The options that are not at their defaults, a word each."""
        words = {
            f"group{self.group_size}": self.group_size,
            "asymmetric": not self.symmetric,
            "act_order": self.act_order,
            "clip": self.clip,
            f"smoothing{self.smoothing:g}": self.smoothing != 0.5,
            self.granularity: self.granularity != "tensor",
        }
        return tuple(word for word, chosen in words.items() if chosen)

    @property
    def parts(self) -> str:
        """What is quantized: "w" kernels, "wa" kernels and activations, "kv" keys and values."""
        return _PARTS.get(self.method, "w")

    @property
    def kernels(self) -> bool:
        """Whether kernels are quantized."""
        return "w" in self.parts

    @property
    def operands(self) -> tuple[str, ...]:
        """Operands of the forward pass that are quantized on the fly, at the same bits."""
        return _OPERANDS.get(self.method, ())

    @property
    def weight_granularity(self) -> str:
        """What shares a scale in a kernel; empty where kernels stay."""
        if not self.kernels:
            return ""
        return f"group:{self.group_size}" if self.group_size else "channel"

    @property
    def columns(self) -> dict[str, str]:
        """What the table says of it."""
        return {
            "method": self.name,
            "ptq_granularity": self.weight_granularity or self.granularity,
            "ptq_options": " ".join(self.options),
            "post_parts": self.parts,
        }

    def static(self, static: StaticPrecision) -> StaticPrecision:
        """The forward pass of the quantized model: simulated, with these operands as integers on their own grids.

        Weights of another format than the hardware multiplies make every native product a simulated one.
        """
        static = static.evaluation().simulated()
        integer = StaticQuantizer(Kind("int"), self.granularity)
        kept = tuple((name, operand) for name, operand in static.quantizers if name not in self.operands)
        return dataclasses.replace(static, quantizers=kept + tuple((name, integer) for name in self.operands))

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError where groups do not fit the inputs of a decoder's projections, or smoothing its norms."""
        inputs = {
            "model.width": model.width,
            "model.mlp_width": model.mlp_width,
            "all heads": model.heads * model.head_dim,
        }
        for name, rows in inputs.items():
            if self.group_size and rows % self.group_size:
                raise ConfigError("ptq.group_size", self.group_size, f"0, or a divisor of {name}, {rows}")
        if self.method == "smoothquant" and (model.norm_placement, model.norm_type) != ("pre", "rms"):
            found = f"smoothquant with {model.norm_placement} norms of type {model.norm_type}"
            raise ConfigError("ptq.methods", found, "smoothquant with pre norms of type rms, whose gains it changes")


def of_method(method: str, options: Mapping[str, Any]) -> Scheme:
    """The scheme of one method under the config's `ptq` section, values that `config.options.check_ptq` passed."""
    return Scheme(method, **{name: options[name] for name in _OPTIONS[method]})


def of_config(options: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """A scheme for each of the config's methods."""
    return tuple(of_method(method, options) for method in options["methods"])
