"""Post-training quantization of a decoder, block by block: each projection on inputs made by what is quantized already.

Stands between `projection`, which applies a method to one kernel, and `study.ptq`, which loads the parameters and
evaluates. Shape letters: C calibration batches of B sequences, S positions, I inputs, L layers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.numerics import formats
from precision_scaling.numerics.formats import Format
from precision_scaling.ptq import projection, statistics
from precision_scaling.ptq.activations import Stream
from precision_scaling.ptq.codes import Codes, QuantizedModel, block_parameters, dequantize
from precision_scaling.ptq.forward import Forward, forward
from precision_scaling.ptq.projection import Report
from precision_scaling.ptq.scheme import (
    DOWN,
    GATE_UP,
    LINEARS,
    NORMS,
    OUT,
    QKV,
    Linear,
    Scheme,
)
from precision_scaling.ptq.statistics import Inherited, Statistics
from precision_scaling.quantize.static import of_layer, of_place
from precision_scaling.runtime.sharding import Layout
from precision_scaling.training.blocks import Stacked
from precision_scaling.training.step import StepConfig


class QuantizedBlock(NamedTuple):
    """A block after quantization. rest: its parameters without these kernels."""

    kernels: dict[str, dict[str, Codes]]
    rest: Any
    report: Report


@dataclasses.dataclass
class BlockQuantizer:
    """Quantizes the blocks of a decoder in their order, by one scheme, and holds the residual stream between them.

    step_config: with the static precision of `scheme.static`. grids: of the run's activations and attention, weights
    passing through, with those of the scheme's operands. stream: the calibration text's residual stream before the
    next block; without batches where the method needs none. starts: of the documents in each batch (`documents`), which
    are None where attention reads whole windows. original: the residual stream of the model as it was, where the scheme
    corrects kernels for the error of their inputs.
    """

    step_config: StepConfig
    scheme: Scheme
    layout: Layout
    grids: Any
    damping: float
    stream: Stream
    starts: Sequence[Any]
    layer: int = 0  # of the next block
    original: Stream | None = None

    def __post_init__(self) -> None:
        if self.scheme.correct_inputs:
            self.original = self.stream  # before the first block both are the same

    @property
    def block_grids(self) -> Any:
        """The grids of the next block."""
        return of_layer(self.grids, self.layer)

    def quantize(self, block: Any, wanted: Mapping[Linear, Format]) -> QuantizedBlock:
        """The next block with its kernels in these formats; the stream goes through what comes out."""
        found = self._quantized(block, wanted) if self._calibrated else self._rounded(block, wanted)
        self.layer += 1
        return found

    def _quantized(self, block: Any, wanted: Mapping[Linear, Format]) -> QuantizedBlock:
        task = _Task(self, projection.as_multiplied(block, self.step_config.model.dtype), wanted)
        f, g = self._forward, self.block_grids

        task.solve(QKV, lambda block: (f.before_qkv(block, g, x) for x in self.stream))

        def mixed(block):
            return self._stream(f.before_out(block, g, f.before_qkv(block, g, x), starts) for x, starts in self._pairs)

        h = mixed(task.block)
        if task.solve(OUT, lambda block: h):
            h = mixed(task.block)
        x_after = self._stream(f.after_out(task.block, g, *pair) for pair in zip(self.stream, h, strict=True))
        task.solve(GATE_UP, lambda block: (f.before_gate_up(block, g, x) for x in x_after))

        def activated(block):
            return self._stream(f.before_down(block, g, f.before_gate_up(block, g, x)) for x in x_after)

        h = activated(task.block)
        if task.solve(DOWN, lambda block: h):
            h = activated(task.block)
        self.stream = self._stream(f.after_down(task.block, g, *pair) for pair in zip(x_after, h, strict=True))
        self._advance_original(block)
        return task.result()

    def follow(self, quantized: QuantizedBlock, block: Callable[[], Any]) -> None:
        """The stream goes through a block that was quantized before; block: reads it as it was."""
        if self._calibrated:
            parameters, grids = block_parameters(quantized.kernels, quantized.rest), self.block_grids
            self.stream = self._stream(self._forward.through(parameters, grids, *pair) for pair in self._pairs)
        if self.original is not None:
            self._advance_original(block())
        self.layer += 1

    def _advance_original(self, block: Any) -> None:
        if self.original is not None:
            block, grids = projection.as_multiplied(block, self.step_config.model.dtype), self.block_grids
            pairs = zip(self.original, self.starts, strict=True)
            self.original = self._stream(self._forward.through(block, grids, *pair) for pair in pairs)

    @property
    def _calibrated(self) -> bool:
        return needs_calibration(self.scheme)

    @property
    def _pairs(self) -> Iterable[tuple[Any, Any]]:
        return zip(self.stream, self.starts, strict=True)

    @property
    def _forward(self) -> Forward:
        return forward(self.step_config, self.layout)

    def _stream(self, batches: Iterable[Any]) -> Stream:
        return Stream(batches, self.stream.limit)

    def _rounded(self, block: Any, wanted: Mapping[Linear, Format]) -> QuantizedBlock:
        task = _Task(self, projection.as_multiplied(block, self.step_config.model.dtype), wanted)
        for linear in LINEARS:
            task.round(linear)
        return task.result()


class _Task:
    """One block on its way through the method: `block` always has what is quantized by now."""

    def __init__(self, quantizer: BlockQuantizer, block: Any, wanted: Mapping[Linear, Format]):
        self.block = self._original = block
        self._of, self._wanted = quantizer, wanted
        self._codes: dict[Linear, Codes] = {}
        self._notes: list[Report] = []

    def solve(self, linear: Linear, inputs: Callable[[Any], Iterable[Any]]) -> bool:
        """Quantizes a projection whose inputs, batch by batch, are those of a block; whether they have changed by it:
        then a factor of them was moved into the projection before."""
        method, unusable = self._of.scheme.method, jnp.asarray(False)
        if method.input_scales and linear in NORMS:
            unusable = self._move_scales(linear, self._statistics(linear, inputs).largest_I)
        found = self._statistics(linear, inputs)
        begins = method.branch_error and linear in NORMS
        batches_CxBxSxI = jnp.stack(list(inputs(self.block))) if begins else None
        inherited = None if self._of.original is None else self._inherited(linear, inputs)
        factor_I = self._solve(linear, found, batches_CxBxSxI, unusable, inherited)
        return factor_I is not None and self._fold(linear, factor_I)

    def round(self, linear: Linear) -> None:
        """Quantizes a projection by a method that looks at its kernel alone."""
        self._solve(linear, None, None)

    def result(self) -> QuantizedBlock:
        """The block when all of its projections are done."""
        return QuantizedBlock(*_split(self.block, self._codes), jax.tree.map(lambda *x: jnp.stack(x), *self._notes))

    def _solve(self, linear: Linear, found: Statistics | None, batches_CxBxSxI, unusable=False, inherited=None):
        """Puts the codes of a projection in its place; the factors (I,) that its inputs are to get, or None."""
        of, fmt = self._of, self._wanted[linear]
        solve = projection.solver(of.step_config, of.scheme, fmt.kind, linear, of.layout)
        levels = jax.tree.map(jnp.asarray, fmt.grid())
        starts = None if batches_CxBxSxI is None else jax.tree.map(lambda *batches: jnp.stack(batches), *of.starts)
        arguments = self.block, found, batches_CxBxSxI, of.block_grids, levels, of.damping, starts, inherited
        codes, report = solve(*arguments)
        self._notes.append(report._replace(fell_back=report.fell_back | unusable))
        self._codes[linear] = codes._replace(row_scales=None)
        self._set(linear)
        return codes.row_scales

    def _set(self, linear: Linear) -> None:
        """The block's kernel is what the codes say."""
        dtype = projection.kernel_of(self.block, linear).dtype
        self.block = projection.with_kernel(self.block, linear, _dequantized(self._codes[linear]).astype(dtype))

    def _statistics(self, linear: Linear, inputs: Callable[[Any], Iterable[Any]]) -> Statistics:
        size, grids = projection.kernel_of(self.block, linear).shape[0], of_place(self._of.block_grids, linear[1])
        return statistics.gather(self._of.step_config, self._of.layout, grids, size, inputs(self.block))

    def _inherited(self, linear: Linear, inputs: Callable[[Any], Iterable[Any]]) -> Inherited:
        """Of what is read in place of what the model as it was would read."""
        of, size = self._of, projection.kernel_of(self.block, linear).shape[0]
        assert of.original is not None
        pairs = zip(of.original, of.starts, strict=True)
        read = (of._forward.inputs(linear, self._original, of.block_grids, *pair) for pair in pairs)
        grids = of_place(of.block_grids, linear[1])
        return statistics.inherited(of.step_config, of.layout, grids, size, inputs(self.block), read)

    def _move_scales(self, linear: Linear, largest_I):
        """The method's factors moved from the norm before a projection into its kernel; whether that was impossible."""
        scheme = self._of.scheme
        assert scheme.method.input_scales is not None
        kernel = projection.kernel_of(self.block, linear)
        s_I, unusable = scheme.method.input_scales(largest_I, projection.flat(kernel), scheme)
        scaled_IxO = projection.flat(kernel) * s_I[:, None]
        self.block = projection.with_kernel(self.block, linear, scaled_IxO.reshape(kernel.shape))
        self._scale_norm(linear, 1 / s_I)
        return unusable

    def _scale_norm(self, linear: Linear, factor_I) -> None:
        norm = self.block[NORMS[linear]]
        self.block = {**self.block, NORMS[linear]: {**norm, "scale": norm["scale"] * factor_I}}

    def _fold(self, linear: Linear, factor_I) -> bool:
        """The factor of a projection's inputs goes to what makes them; whether that was another projection."""
        if linear in NORMS:
            if projection.can_fold(self._of.step_config.model, linear):
                self._scale_norm(linear, factor_I)
            return False
        model, before = self._of.step_config.model, QKV if linear == OUT else GATE_UP
        codes = self._codes[before]
        if linear == OUT:
            values = slice(model.heads + model.key_heads, None)
            # Heads that read the same values have the same factors, see `_per_value`.
            factor_GxK = factor_I.reshape(model.key_heads, -1, model.head_dim)[:, 0]
            scales = codes.scales.at[:, values].multiply(factor_GxK[None])
            if model.qkv_bias:
                attention = self.block["attention"]
                bias = attention["qkv_bias"].at[values].multiply(factor_GxK)
                self.block = {**self.block, "attention": {**attention, "qkv_bias": bias}}
        else:
            scales = codes.scales.at[:, 1].multiply(factor_I[None])
        self._codes[before] = codes._replace(scales=scales)
        self._set(before)
        return True


def needs_calibration(scheme: Scheme) -> bool:
    """Whether text goes through the layers."""
    return scheme.method.calibrated or scheme.method.input_scales is not None


def calibration_stream(
    step_config: StepConfig, layout: Layout, grids: Any, top: Any, tokens_NxS, batch_size: int, limit: float
) -> tuple[Stream, list[Any]]:
    """The residual stream before the first block and the starts of documents, in batches, as `BlockQuantizer` has them.

    tokens_NxS: N a multiple of batch_size.
    """
    f = forward(step_config, layout)
    batches = np.asarray(tokens_NxS).reshape(-1, batch_size, np.shape(tokens_NxS)[1])
    return Stream((f.embed(top, grids, batch) for batch in batches), limit), list(map(f.starts, batches))


def quantize_model(
    step_config: StepConfig,
    params: Any,
    grids: Any,
    tokens_NxS,
    bits: Sequence[object],
    damping,
    *,
    scheme: Scheme,
    batch_size: int,
    layout: Layout,
) -> tuple[tuple[QuantizedModel, ...], Report]:
    """The decoder with the kernels of all blocks on the grids of each of the formats, all in memory.

    step_config: with the static precision of `scheme.static`. grids: of the run's activations and attention, weights
    passing through; operands that the scheme quantizes need none. tokens_NxS: calibration text, N a multiple of
    batch_size. bits: bit-widths (2 to 8), or formats. layout: calibration batches and Hessians are sharded over its
    devices; a factorization gathers one Hessian.
    Every format has its own stream of activations, made by what is quantized already.
    """
    blocks, models, reports = Stacked(params), [], []
    for fmt in map(formats.parse, bits):
        now = {**grids, **dict.fromkeys(scheme.method.operands, jax.tree.map(jnp.asarray, fmt.grid()))}
        text = tokens_NxS if needs_calibration(scheme) else tokens_NxS[:0]
        text = calibration_stream(step_config, layout, now, blocks.top(), text, batch_size, np.inf)
        quantizer = BlockQuantizer(step_config, scheme, layout, now, damping, *text)
        found = [quantizer.quantize(blocks.block(i), dict.fromkeys(LINEARS, fmt)) for i in range(blocks.depth)]
        kernels, rest, report = jax.tree.map(lambda *layers: jnp.stack(layers), *found)
        models.append(QuantizedModel(kernels, {**params, "layers": {"block": rest}}))
        reports.append(report)
    return tuple(models), jax.tree.map(lambda *formats: np.stack(formats), *reports)


def _split(block: Any, codes: dict[Linear, Codes]) -> tuple[dict[str, dict[str, Codes]], Any]:
    """(codes by module and name, the block's parameters without its kernels)."""
    kernels: dict[str, dict[str, Codes]] = {}
    for (module, name), found in codes.items():
        kernels.setdefault(module, {})[name] = found
    left = {
        module: {name: value for name, value in parameters.items() if (module, name) not in codes}
        for module, parameters in block.items()
    }
    return kernels, {module: parameters for module, parameters in left.items() if parameters}


_dequantized = jax.jit(dequantize)
