"""What a method of post-training quantization declares, and a scheme: a method with its options.

A method's module makes a `Method` of its functions and `registry` lists the module; `apply` and `study.ptq` do what the
method says. A scheme is made from the config's `ptq` section (or the flags of the command) before anything is compiled.
Shape letters: I inputs and O outputs of a projection, G groups of inputs.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.errors import ConfigError
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Kind
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer

GRANULARITIES = ("tensor", "token")  # what may share a scale in activations, keys and values

Linear = tuple[str, str]
# The projections of a block in the order in which data reaches them.
LINEARS: tuple[Linear, ...] = (("attention", "qkv"), ("attention", "out"), ("mlp", "gate_up"), ("mlp", "down"))
QKV, OUT, GATE_UP, DOWN = LINEARS
# The norms before projections, whose gains can take a factor of their inputs.
NORMS = {QKV: "attention_norm", GATE_UP: "mlp_norm"}


def has_gains(model: ModelConfig) -> bool:
    """Whether what a block reads comes from norms with gains alone, which pass factors and rotations on."""
    return (model.norm_placement, model.norm_type) == ("pre", "rms")


class Calibration(NamedTuple):
    """What is known of the inputs x of a projection, as the layers quantized before it make them."""

    hessian_IxI: jax.Array  # Σ x xᵀ
    magnitude_I: jax.Array  # mean |x|
    damping: jax.Array  # of the Hessian, a fraction of its mean diagonal
    cross_IxI: jax.Array | None = None  # Σ x (x₀ - x)ᵀ, x₀ being the inputs before anything was quantized
    # The squared error of what attention or MLP adds with another kernel (I, O) in this one's place, for methods that
    # ask for it; None for projections that end such a branch.
    branch_error: Callable[[jax.Array], jax.Array] | None = None


class Rounded(NamedTuple):
    """A quantized kernel (I, O): (code - zero) · scale · row_scale."""

    code_IxO: jax.Array
    scale_GxO: jax.Array
    zero_GxO: jax.Array
    row_scale_I: jax.Array | None = None
    fell_back: Any = False  # the calibration was unusable, so this is rounding to nearest
    damping: Any = jnp.nan  # that the method used; NaN where it damps nothing


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of post-training quantization.

    name: in flags, configs and the table.
    solve: (kernel (I, O) in float32, levels and kind of its format, scheme, Calibration or None) -> Rounded; traced.
        None leaves kernels as they are.
    options: the fields of `Scheme` that it has; of these `correct_inputs` asks for `Calibration.cross_IxI`.
    operands: operands of the forward pass ("a", "k", "v") that are quantized on the fly, at the same bits.
    calibrated: `solve` needs the inputs' Hessian and magnitudes, so calibration text goes through the layers.
    branch_error: `solve` takes `Calibration.branch_error`.
    any_format: `solve` takes the formats of any kind, not integers alone.
    input_scales: (max |x| (I,) over the calibration text, kernel (I, O), scheme) -> (factors s (I,), whether the
        statistics were unusable): x is divided by s in the gain of the norm before, and the kernel multiplied by it.
    """

    name: str
    solve: Callable[..., Rounded] | None = None
    options: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    calibrated: bool = False
    branch_error: bool = False
    any_format: bool = False
    input_scales: Callable[..., tuple[jax.Array, jax.Array]] | None = None

    @property
    def parts(self) -> str:
        """What is quantized, in the table's words: "w" kernels, "wa" kernels and activations, "kv" keys and values."""
        return "w" * bool(self.solve) + "".join(self.operands)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A method and its options; those that it does not have are at their defaults. Hashable: keys compiled programs.

    group_size: inputs that share a scale in an output channel; 0 is all of them. symmetric: levels ±(2^(b-1) - 1), or
    2^b levels from a zero point. full_range: symmetric integers with all 2^b levels, see `kernel_grid.find`. act_order:
    inputs by decreasing diagonal of the Hessian (GPTQ). clip: ranges shrunk to the least squared error.
    rotate: the residual stream is rotated first, see `rotation`.
    correct_inputs: share of the error of its inputs that a kernel is corrected for before it is rounded (GPTQ).
    smoothing: SmoothQuant's α. granularity: what shares a scale in activations, keys and values. layers: formats by
    layer and projection in place of the scheme's, see `by_layer`. target_bits: mean bits of a weight, of whole widths
    allotted by what each projection costs in loss, see `allotment`; 0: none. format: of the kernels, where it is not
    integers, whose bits are data. widths: that a target chooses among.
    """

    method: Method
    group_size: int = 0
    symmetric: bool = True
    full_range: bool = False
    act_order: bool = False
    clip: bool = False
    rotate: bool = False
    correct_inputs: float = 0.0
    smoothing: float = 0.5
    granularity: str = "tensor"
    layers: str = ""
    target_bits: float = 0.0
    format: str = ""
    widths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Method, format and every option that is not at its default: "gptq", "rtn-e2m1", "gptq-group32-asymmetric"."""
        return "-".join([self.method.name, *[self.format] * bool(self.format), *self.options])

    @property
    def described(self) -> str:
        """Every field with its value, the same in every process: a method is its name, not where its functions lie."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return repr({**fields, "method": self.method.name})

    @property
    def options(self) -> tuple[str, ...]:
        """The options that are not at their defaults, a word each."""
        words = {
            f"group{self.group_size}": self.group_size,
            "asymmetric": not self.symmetric,
            "full_range": self.has_full_range(formats.parse(self.format or "int4").kind),
            "act_order": self.act_order,
            "clip": self.clip,
            "rotate": self.rotate,
            f"correct_inputs{self.correct_inputs:g}": self.correct_inputs,
            f"smoothing{self.smoothing:g}": self.smoothing != 0.5,
            self.granularity: self.granularity != "tensor",
            f"layers{hashlib.sha256(self.layers.encode()).hexdigest()[:8]}": self.layers,
            f"target{self.target_bits:g}": self.target_bits,
            f"of{'.'.join(map(str, self.widths))}": self.target_bits,
        }
        return tuple(word for word, chosen in words.items() if chosen)

    @property
    def without_target(self) -> "Scheme":
        """What a projection is quantized by, whatever it is allotted."""
        return dataclasses.replace(self, target_bits=0.0, widths=())

    def of_kind(self, kind: Kind) -> "Scheme":
        """What a kernel of a format of that kind is quantized by: it may have scales or groups of its own."""
        given = kind.family in ("block", "wide")
        size = 0 if kind.block_size else self.group_size
        alike = dataclasses.replace(self.without_target, layers="", format="")
        return dataclasses.replace(alike, clip=self.clip and not given, group_size=size)

    def has_full_range(self, kind: Kind) -> bool:
        """Whether kernels of that kind have all 2^b levels of a symmetric grid; other grids have theirs anyway."""
        return self.full_range and self.symmetric and kind.family == "int"

    @property
    def weight_granularity(self) -> str:
        """What shares a scale in a kernel; empty where kernels stay."""
        if not self.method.solve:
            return ""
        size = self.group_size or (formats.parse(self.format).block_size if self.format else 0)
        return f"group:{size}" if size else "channel"

    @property
    def columns(self) -> dict[str, str]:
        """What the table says of it."""
        return {
            "method": self.name,
            "ptq_granularity": self.weight_granularity or self.granularity,
            "ptq_options": " ".join(self.options),
            "post_parts": self.method.parts,
            "post_format": self.format,
        }

    def static(self, trained: StaticPrecision) -> StaticPrecision:
        """The forward pass of the quantized model: simulated, with the method's operands as integers on their own
        grids.

        Weights of another format than the hardware multiplies make every native product a simulated one.
        """
        evaluated = trained.evaluation().simulated()
        integer = StaticQuantizer(Kind("int"), self.granularity)
        kept = tuple((name, operand) for name, operand in evaluated.quantizers if name not in self.method.operands)
        return dataclasses.replace(evaluated, quantizers=kept + tuple((name, integer) for name in self.method.operands))

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError where groups do not fit the inputs of a decoder's projections, or smoothing its norms."""
        self._check_format()
        block_size = formats.parse(self.format).block_size if self.format else None
        inputs = {
            "model.width": model.width,
            "model.mlp_width": model.mlp_width,
            "all heads": model.heads * model.head_dim,
        }
        # The last group may have fewer inputs, but not where a scale is a mean over the group.
        whole = bool(self.format) and formats.parse(self.format).scale != "absmax"
        for name, rows in inputs.items():
            if self.group_size > rows or (whole and self.group_size and rows % self.group_size):
                allowed = f"0, or {'a divisor of' if whole else 'at most'} {name}, {rows}"
                raise ConfigError("ptq.group_size", self.group_size, allowed)
            if block_size and rows % block_size:
                raise ConfigError("ptq.formats", self.format, f"formats whose blocks divide {name}, {rows}")
        if self.rotate and not has_gains(model):
            found = f"True with {model.norm_placement} norms of type {model.norm_type}"
            raise ConfigError("ptq.rotate", found, "False, or pre norms of type rms, which pass a rotation on")
        if self.method.input_scales and not has_gains(model):
            found = f"{self.method.name} with {model.norm_placement} norms of type {model.norm_type}"
            allowed = f"{self.method.name} with pre norms of type rms, whose gains it changes"
            raise ConfigError("ptq.methods", found, allowed)

    def _check_format(self) -> None:
        """Raises ConfigError for a format that the method or the options do not go with."""
        if not self.format:
            return
        kind = formats.parse(self.format).kind
        if not self.method.any_format:
            raise ConfigError("ptq.formats", self.format, f"none with {self.method.name}, which takes ptq.bits alone")
        if not self.symmetric:
            raise ConfigError("ptq.symmetric", self.symmetric, f"True with the format {self.format}")
        if self.clip and kind.family in ("block", "wide"):
            raise ConfigError("ptq.clip", self.clip, f"False with the format {self.format}, whose scales are given")
        if kind.block_size and self.group_size not in (0, kind.block_size):
            raise ConfigError("ptq.group_size", self.group_size, f"0 with the format {self.format}, which has blocks")
