"""What quantizing a model block by block takes in memory: known from shapes and the compiler, before a weight is read.

Nothing is allocated and no parameter is needed, so that a model larger than the machine can be planned.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_scaling.model import decoder
from precision_scaling.model.accounting import bytes_of
from precision_scaling.numerics import formats
from precision_scaling.ptq import apply, projection
from precision_scaling.ptq.activations import memory_limit
from precision_scaling.ptq.forward import forward
from precision_scaling.ptq.scheme import LINEARS, NORMS, Scheme
from precision_scaling.ptq.statistics import Inherited, Statistics
from precision_scaling.quantize.static import of_layer
from precision_scaling.runtime.sharding import Layout
from precision_scaling.training.blocks import Stacked, abstract_block
from precision_scaling.training.step import StepConfig

# Of a block: as it is read, as it is multiplied, and with what is quantized by now; and in between, one kernel more.
COPIES = 3
STREAMS = (
    4  # of the calibration text at a time: before the block, the inputs of a projection, after attention, after it
)


class Plan(NamedTuple):
    """Bytes, over all devices, where nothing else is said.

    block: copies of the largest block. top: embedding, last norm and head. text: streams of both texts in memory.
    files: what of them is in temporary files. statistics: Hessians. program: the most that one compiled program takes
    beside its arguments. packed: of the blocks that are kept for a packed model.
    """

    block: int
    top: int
    text: int
    files: int
    statistics: int
    program: int
    packed: int

    @property
    def peak(self) -> int:
        """In memory at a time."""
        return sum(self) - self.files


def plan(
    step_config: StepConfig,
    scheme: Scheme,
    layout: Layout,
    grids: Any,
    bits: float,
    calibration: tuple[int, int],
    held_out: tuple[int, int],
    save: bool,
) -> Plan:
    """The plan of one scheme at one width.

    calibration, held_out: (sequences, sequences of a batch) of the two texts. save: a packed model is kept.
    """
    model = step_config.model
    block, top = abstract_block(model), Stacked(decoder.abstract(model)).top()
    calibrated = apply.needs_calibration(scheme)
    position = model.width * jnp.dtype(model.dtype).itemsize
    widest = max(model.width, model.mlp_width, model.heads * model.head_dim)
    text = [sequences * model.sequence_length * position for sequences in (calibration[0] * calibrated, held_out[0])]
    # A stream of inputs is wider than one of the residual stream.
    of_width = STREAMS - 1 + (2 if scheme.correct_inputs else 0)  # that of the model as it was, before and after
    streams = [text[0] * of_width, text[0] * widest // model.width, text[1] * 2]
    limits = [memory_limit(layout) * of_width, memory_limit(layout), memory_limit(layout) * 2]
    kept = [int(min(size, limit)) for size, limit in zip(streams, limits, strict=True)]
    hessians = (3 if scheme.correct_inputs else 1) * 4 * widest**2 if calibrated else 0
    kernels = sum(projection.kernel_of(block, linear).size for linear in LINEARS)
    programs = _programs(step_config, scheme, layout, grids, bits, calibration[1] if calibrated else 0, held_out[1])
    return Plan(
        block=COPIES * bytes_of(block),
        top=bytes_of(top),
        text=sum(kept),
        files=sum(streams) - sum(kept),
        statistics=hessians,
        program=max(programs),
        packed=int(kernels * model.depth * bits / 8) if save else 0,
    )


def _programs(
    step_config: StepConfig, scheme: Scheme, layout: Layout, grids: Any, bits: float, batch: int, held_out: int
) -> Iterator[int]:
    """What each program takes beside its arguments: temporaries and results."""
    model, f = step_config.model, forward(step_config, layout)
    block, top = abstract_block(model), Stacked(decoder.abstract(model)).top()
    of_block = of_layer(grids, 0)

    def taken(program, *arguments) -> int:
        found = program.lower(*arguments).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    for sequences in {batch, held_out} - {0}:
        shape = sequences, model.sequence_length
        x, o, h = (
            jax.ShapeDtypeStruct((*shape, size), model.dtype)
            for size in (model.width, model.heads * model.head_dim, model.mlp_width)
        )
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        yield taken(f.embed, top, grids, tokens)
        yield taken(f.before_out, block, of_block, x, tokens if model.document_token >= 0 else None)
        yield taken(f.after_out, block, of_block, x, o)
        yield taken(f.before_down, block, of_block, x)
        yield taken(f.after_down, block, of_block, x, h)
        if sequences == held_out:
            yield taken(f.loss, top, grids, x, tokens)
    fmt = formats.parse(scheme.format or bits)
    levels = jax.tree.map(jnp.asarray, fmt.grid())
    for linear in LINEARS:
        size = projection.kernel_of(block, linear).shape[0]
        square: Any = jax.ShapeDtypeStruct((size, size), jnp.float32)
        vector: Any = jax.ShapeDtypeStruct((size,), jnp.float32)
        found = Statistics(square, vector, vector) if batch else None
        inherited = Inherited(square, square) if batch and scheme.correct_inputs else None
        inputs = None
        if batch and scheme.method.branch_error and linear in NORMS:
            inputs = jax.ShapeDtypeStruct((1, batch, model.sequence_length, size), model.dtype)
        solve = projection.solver(step_config, scheme, fmt.kind, linear, layout)
        yield taken(solve, block, found, inputs, of_block, levels, 0.01, None, inherited)
