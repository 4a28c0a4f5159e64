"""Quantized checkpoints: kernels as densely packed codes with their scales, on disk through Orbax.

`study.ptq` saves what it has evaluated under a run's `quantized/`; `load` returns a decoder with the same kernels, bit
for bit. Codes are integers, or of other formats their bit patterns. Scales are float32, as the methods found them: in
16 bits they would make another kernel than the one whose loss is in the table, and per output channel they are less
than a tenth of a bit per weight. Scales of blocks are in the format that they have.
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
from precision_scaling.numerics import bit_patterns
from precision_scaling.numerics.formats import Format, parse
from precision_scaling.ptq.codes import Codes, QuantizedModel, is_codes, named
from precision_scaling.ptq.scheme import Linear
from precision_scaling.runtime import files, paths
from precision_scaling.training import checkpoint

VERSIONS = 1, 2, 3  # 2: bits by layer; 3: other formats than integers
Word = int | str  # bits of integers, or the name of another format
# Of all kernels, or of each by module, name and layer.
Bits = Word | Mapping[str, Mapping[str, Sequence[Word]]]
TENSOR_SCALE = "tensor_scale"  # of blocks whose scales are relative to it, beside the arrays of `Codes`
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


def format_of(bits: Bits, module: str, name: str, layer: int) -> Format:
    """Of one kernel of one layer."""
    return parse(bits if isinstance(bits, int | str) else bits[module][name][layer])


def _word(fmt: Format) -> Word:
    return int(fmt.bits) if fmt.family == "int" else fmt.name


def _layout(fmt: Format) -> bit_patterns.Layout:
    found = bit_patterns.layout(fmt)
    if found is None:
        raise UserError(f"format {fmt.name}: allowed are those whose elements, and scales of blocks, take 8 bits")
    return found


def packed_bytes(model: QuantizedModel, bits: Bits) -> int:
    """Bytes of all arrays of the packed model: what is on disk but for Orbax's own files and before it compresses.

    Per layer and kernel (in, out): ceil(in · out · bits / 8), 4 for each scale, and with zero points another
    ceil(groups · out · bits / 8); of formats of blocks 1 for each scale, and 4 for that of a tensor where there is one.
    Norms, embedding and head as they are, in float32.
    """
    total = bytes_of(model.rest)
    for module, name, codes in named(model.kernels):
        layers = codes.codes.shape[0]
        for layer in range(layers):
            layout = _layout(format_of(bits, module, name, layer))
            for integers in (codes.codes, codes.zeros):
                total += 0 if integers is None else -(-integers.size // layers * layout.bits // 8)
            total += codes.scales.size // layers * layout.scale_bits // 8 + 4 * layout.tensor_scale
        for others in (codes.row_scales, codes.group_size):
            total += 0 if others is None else 4 * others.size
    return total


def bytes_on_disk(path: Path) -> int:
    """Bytes of all files below a path."""
    return files.size_below(path)


class PackedBlock(NamedTuple):
    """A block with its codes packed. shapes: of its kernels."""

    kernels: Any
    rest: Any
    shapes: Any


def pack_block(kernels: dict[str, dict[str, Codes]], rest: Any, wanted: Mapping[Linear, Format]) -> PackedBlock:
    """A quantized block of a model, in the bytes that it will take on disk. wanted: see `by_layer.check_packable`."""
    arrays: dict[str, Any] = {}
    for module, name, codes in named(kernels):
        arrays.setdefault(module, {})[name] = _pack_codes(codes, wanted[module, name])
    shapes = jax.tree.map(lambda codes: list(codes.codes.shape), kernels, is_leaf=is_codes)
    return PackedBlock(arrays, jax.tree.map(np.asarray, rest), shapes)


def save(path: Path, model: QuantizedModel, method: str, bits: Word, operands: tuple[str, ...] = ()) -> None:
    """Writes a model of one format to the directory `path`, replacing what was there; returns when it is on disk.

    method: the name of its scheme. bits: 2 to 8, or the name of a format. operands: see `Loaded`.
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
    """The same for a model whose blocks are packed already; they lose their kernels, which are in memory once.

    top: its parameters outside of the blocks.
    """
    files.remove_tree(path, first=paths.DESCRIPTION)
    words = {_word(fmt) for wanted in by_layer for fmt in wanted.values()}
    by_name: dict[str, dict[str, list[Word]]] = {}
    for module, name in by_layer[0]:
        by_name.setdefault(module, {})[name] = [_word(wanted[module, name]) for wanted in by_layer]
    integers = all(isinstance(word, int) for word in words)
    bits: Bits = by_name if len(words) > 1 else words.pop()
    kernels = {
        module: {name: _joined([block.kernels[module].pop(name) for block in blocks]) for name in names}
        for module, names in by_name.items()
    }
    rest = jax.tree.map(lambda *x: np.stack(x), *(block.rest for block in blocks))
    arrays = {"kernels": kernels, "rest": {**jax.tree.map(np.asarray, top), "layers": {"block": rest}}}
    checkpoint.save(path / paths.ARRAYS, arrays)
    is_shape = lambda node: isinstance(node, list)
    description = {
        "version": VERSIONS[2] if not integers else VERSIONS[0] if isinstance(bits, int) else VERSIONS[1],
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
                [format_of(bits, module, name, layer) for layer in range(shape[0])],
                shape,
            )
            for name, shape in names.items()
        }
        for module, names in shapes.items()
    }
    return Loaded(QuantizedModel(kernels, arrays["rest"]), method, bits, operands)


def _pack_codes(codes: Codes, fmt: Format) -> dict[str, np.ndarray]:
    """The arrays of a kernel of one layer, its codes packed."""
    arrays = {name: np.asarray(value) for name, value in codes._asdict().items() if value is not None}
    layout = _layout(fmt)
    try:
        if fmt.family != "int":
            arrays["codes"] = bit_patterns.encode(arrays["codes"], fmt)
        if fmt.family == "block":
            arrays["scales"], tensor_scale = bit_patterns.encode_scales(arrays["scales"], fmt)
            arrays |= {} if tensor_scale is None else {TENSOR_SCALE: np.asarray(tensor_scale)}
    except ValueError as error:
        raise UserError(f"a kernel in {fmt.name} has {error}; allowed are methods that keep to the format") from None
    return arrays | {name: pack(arrays[name], layout.bits) for name in {"codes", "zeros"} & set(arrays)}


def _joined(layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of a kernel's layers on a leading axis; integers of different widths one behind the other."""
    found = {}
    for name in layers[0]:
        arrays = [layer[name] for layer in layers]
        alike = len({array.shape for array in arrays}) == 1
        found[name] = np.stack(arrays) if alike else np.concatenate(arrays)
    return found


def _unpack_codes(arrays: dict[str, Any], formats_L: list[Format], shape: list[int]) -> Codes:
    _, rows, *features = shape
    groups, some = arrays["scales"].shape[1], formats_L[0]
    integers = some.family == "int"
    dtype = np.int8 if integers and "zeros" not in arrays else np.uint8
    shapes = {"codes": (rows, *features), "zeros": (groups, *features)}
    found = {name: array for name, array in arrays.items() if name != TENSOR_SCALE}
    for name in set(shapes) & set(arrays):
        bits_L = [_layout(fmt).bits for fmt in formats_L]
        packed, sizes = np.asarray(arrays[name]), [-(-math.prod(shapes[name]) * bits // 8) for bits in bits_L]
        if packed.size != sum(sizes):
            raise UserError(f"{name} of a packed kernel: {packed.size} bytes; allowed is {sum(sizes)}")
        layers = np.split(packed.reshape(-1), np.cumsum(sizes)[:-1])
        both = zip(layers, bits_L, strict=True)
        found[name] = np.stack([unpack(layer, bits, shapes[name], dtype) for layer, bits in both])
    if not integers:
        found["codes"] = bit_patterns.decode(found["codes"], some)
    if some.family == "block":
        of_tensor = arrays.get(TENSOR_SCALE)
        of_tensor = None if of_tensor is None else np.asarray(of_tensor).reshape(-1, *(1 for _ in shape[1:]))
        found["scales"] = bit_patterns.decode_scales(np.asarray(found["scales"]), some, of_tensor)
    return Codes(**found)


def _abstract(text: str) -> jax.ShapeDtypeStruct:
    """Of "float32[2, 16]"."""
    dtype, _, shape = text.partition("[")
    return jax.ShapeDtypeStruct(json.loads(f"[{shape}"), np.dtype(dtype))
