"""Quantized checkpoints: kernels as densely packed integers with their scales, on disk through Orbax.

`study.ptq` saves what it has evaluated under a run's `quantized/`; `load` returns a decoder with the same kernels, bit
for bit. Scales are float32, as the methods found them: in 16 bits they would make another kernel than the one whose
loss is in the table, and per output channel they are less than a tenth of a bit per weight.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.model.accounting import bytes_of
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics.formats import Format, parse
from precision_scaling.ptq.codes import Codes, QuantizedModel, is_codes, named
from precision_scaling.ptq.scheme import Linear
from precision_scaling.runtime import files, paths
from precision_scaling.training import checkpoint

VERSIONS = 1, 2  # 2: bits by layer
# Of all kernels, or of each by module, name and layer.
Bits = int | Mapping[str, Mapping[str, Sequence[int]]]
_KEYS = {"version", "method", "bits", "operands", "shapes", "arrays"}


class Loaded(NamedTuple):
    """A model read from disk; `codes.parameters(model)` are its parameters."""

    model: QuantizedModel
    method: str  # the name of its `Scheme`
    bits: Bits
    operands: tuple[str, ...]  # of the forward pass, to be quantized at `bits` when the model is evaluated


def decoder(model: ModelConfig, loaded: Loaded) -> ModelConfig:
    """The decoder of a packed model: of one whose stream was rotated the head is a kernel of its own."""
    return dataclasses.replace(model, tie_embeddings=model.tie_embeddings and "head" not in loaded.model.rest)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """The low `bits` (1 to 8) of each 8-bit integer, one after the other without gaps: uint8 (ceil(n · bits / 8),).

    Value i takes bits i·b to (i+1)·b - 1 of the stream, bit 0 first, and byte j holds bits 8j to 8j + 7, its lowest
    bit first; so two int4 share a byte, the first in its lower half.
    """
    stream = np.unpackbits(values.reshape(-1, 1).view(np.uint8), axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    """What `pack` packed, in its shape; of int8 the sign is extended."""
    count = int(np.prod(shape))
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    values = np.packbits(stream, axis=1, bitorder="little").reshape(shape)
    unused = 8 - bits
    return np.right_shift(np.left_shift(values, unused).view(dtype), unused)


def bits_of(bits: Bits, module: str, name: str, layer: int) -> int:
    """Of one kernel of one layer."""
    return bits if isinstance(bits, int) else bits[module][name][layer]


def packed_bytes(model: QuantizedModel, bits: Bits) -> int:
    """Bytes of all arrays of the packed model: what is on disk but for Orbax's own files and before it compresses.

    Per layer and kernel (in, out): ceil(in · out · bits / 8), 4 for each scale, and with zero points another
    ceil(groups · out · bits / 8); norms, embedding and head as they are, in float32.
    """
    total = bytes_of(model.rest)
    for module, name, codes in named(model.kernels):
        layers = codes.codes.shape[0]
        for integers in (codes.codes, codes.zeros):
            if integers is not None:
                size = integers.size // layers
                total += sum(-(-size * bits_of(bits, module, name, layer) // 8) for layer in range(layers))
        for scales in (codes.scales, codes.row_scales, codes.group_size):
            if scales is not None:
                total += 4 * scales.size
    return total


def bytes_on_disk(path: Path) -> int:
    """Bytes of all files below a path."""
    return files.size_below(path)


class PackedBlock(NamedTuple):
    """A block with its integers packed. shapes: of its kernels."""

    kernels: Any
    rest: Any
    shapes: Any


def pack_block(kernels: dict[str, dict[str, Codes]], rest: Any, wanted: Mapping[Linear, Format]) -> PackedBlock:
    """A quantized block of a model, in the bytes that it will take on disk. wanted: integers of 2 to 8 bits."""
    arrays: dict[str, Any] = {}
    for module, name, codes in named(kernels):
        arrays.setdefault(module, {})[name] = _pack_codes(codes, int(wanted[module, name].bits))
    shapes = jax.tree.map(lambda codes: list(codes.codes.shape), kernels, is_leaf=is_codes)
    return PackedBlock(arrays, jax.tree.map(np.asarray, rest), shapes)


def save(path: Path, model: QuantizedModel, method: str, bits: int, operands: tuple[str, ...] = ()) -> None:
    """Writes a model of one width to the directory `path`, replacing what was there; returns when it is on disk.

    method: the name of its scheme. bits: 2 to 8. operands: see `Loaded`.
    """
    top = {name: value for name, value in model.rest.items() if name != "layers"}
    layers, rest = jax.tree.leaves(model.kernels)[0].shape[0], model.rest["layers"]["block"]
    wanted = {(module, name): parse(bits) for module, name, _ in named(model.kernels)}

    def block(layer: int) -> PackedBlock:
        kernels, left = jax.tree.map(lambda x: np.asarray(x[layer]), (model.kernels, rest))
        return pack_block(kernels, left, wanted)

    save_blocks(path, [block(layer) for layer in range(layers)], top, method, (wanted,) * layers, operands)


def save_blocks(
    path: Path,
    blocks: list[PackedBlock],
    top: Any,
    method: str,
    by_layer: Sequence[Mapping[Linear, Format]],
    operands: tuple[str, ...] = (),
) -> None:
    """The same for a model whose blocks are packed already. top: its parameters outside of the blocks."""
    files.remove_tree(path, first=paths.DESCRIPTION)
    widths = {int(fmt.bits) for wanted in by_layer for fmt in wanted.values()}
    by_name: dict[str, dict[str, list[int]]] = {}
    for module, name in by_layer[0]:
        by_name.setdefault(module, {})[name] = [int(wanted[module, name].bits) for wanted in by_layer]
    bits: Bits = by_name if len(widths) > 1 else widths.pop()
    kernels = {
        module: {name: _joined([block.kernels[module][name] for block in blocks]) for name in names}
        for module, names in blocks[0].kernels.items()
    }
    rest = jax.tree.map(lambda *x: np.stack(x), *(block.rest for block in blocks))
    arrays = {"kernels": kernels, "rest": {**jax.tree.map(np.asarray, top), "layers": {"block": rest}}}
    checkpoint.save(path / paths.ARRAYS, arrays)
    is_shape = lambda node: isinstance(node, list)
    description = {
        "version": VERSIONS[0] if isinstance(bits, int) else VERSIONS[1],
        "method": method,
        "bits": bits,
        "operands": operands,
        "shapes": jax.tree.map(lambda shape: [len(blocks), *shape], blocks[0].shapes, is_leaf=is_shape),
        "arrays": jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", arrays),
    }
    # Last: without it the directory does not count.
    files.write_sealed(path / paths.DESCRIPTION, description)


def load(path: Path) -> Loaded:
    """The model in a directory that `save` wrote. UserError, one line, where it cannot be read."""
    try:
        found = files.read_sealed(path / paths.DESCRIPTION, older=lambda found: set(found) == _KEYS)
        if found["version"] not in VERSIONS:
            raise UserError(
                f"{path}: quantized model of version {found['version']}; allowed is {VERSIONS[-1]} or below"
            )
        abstract, shapes = jax.tree.map(_abstract, found["arrays"]), found["shapes"]
        method, bits, operands = found["method"], found["bits"], tuple(found["operands"])
    except FileNotFoundError:
        raise UserError(f"{path}: no quantized model there; precision_scaling.ptq writes one with --save") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / paths.DESCRIPTION}: not the description of a quantized model ({error})") from None
    arrays = checkpoint.restore(path / paths.ARRAYS, abstract)
    kernels = {
        module: {
            name: _unpack_codes(
                arrays["kernels"][module][name],
                [bits_of(bits, module, name, layer) for layer in range(shape[0])],
                shape,
            )
            for name, shape in names.items()
        }
        for module, names in shapes.items()
    }
    return Loaded(QuantizedModel(kernels, arrays["rest"]), method, bits, operands)


def _pack_codes(codes: Codes, bits: int) -> dict[str, np.ndarray]:
    """The arrays of a kernel of one layer, its integers packed."""
    arrays = {name: np.asarray(value) for name, value in codes._asdict().items() if value is not None}
    return arrays | {name: pack(arrays[name], bits) for name in {"codes", "zeros"} & set(arrays)}


def _joined(layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of a kernel's layers on a leading axis; integers of different widths one behind the other."""
    found = {}
    for name in layers[0]:
        arrays = [layer[name] for layer in layers]
        alike = len({array.shape for array in arrays}) == 1
        found[name] = np.stack(arrays) if alike else np.concatenate(arrays)
    return found


def _unpack_codes(arrays: dict[str, Any], bits_L: list[int], shape: list[int]) -> Codes:
    _, rows, *features = shape
    groups = arrays["scales"].shape[1]
    dtype = np.uint8 if "zeros" in arrays else np.int8
    shapes = {"codes": (rows, *features), "zeros": (groups, *features)}
    unpacked = {}
    for name in set(shapes) & set(arrays):
        packed, sizes = np.asarray(arrays[name]), [-(-math.prod(shapes[name]) * bits // 8) for bits in bits_L]
        if packed.size != sum(sizes):
            raise UserError(f"{name} of a packed kernel: {packed.size} bytes; allowed is {sum(sizes)}")
        layers = np.split(packed.reshape(-1), np.cumsum(sizes)[:-1])
        both = zip(layers, bits_L, strict=True)
        unpacked[name] = np.stack([unpack(layer, bits, shapes[name], dtype) for layer, bits in both])
    return Codes(**{**arrays, **unpacked})


def _abstract(text: str) -> jax.ShapeDtypeStruct:
    """Of "float32[2, 16]"."""
    dtype, _, shape = text.partition("[")
    return jax.ShapeDtypeStruct(json.loads(f"[{shape}"), np.dtype(dtype))
