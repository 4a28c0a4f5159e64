"""What a compiled program sends, multiplies and copies, read from its optimized HLO as text.

Everything is for one device and one pass of the program. A loop whose number of turns the compiler knows counts so many
times; one that it does not know (the steps of a dispatch) counts once.
"""

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Bytes that each device sends per byte of the largest operand or result, n devices in a group, on a ring.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_HEADER = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
# No work of their own: names, views, and what calls other computations.
_NO_KERNELS = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "add-dependency", "domain"),
}
_GEMM = re.compile(r'custom_call_target="(__cublas\$|__cudnn\$|__triton_gemm)')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. type: dtypes and shapes of the result. rest: operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")", 1)[0])


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program.

    times: a pass. sent: bytes that each device sends in all of these, by a ring. devices: in a group. overlapped: it
    is split into a start and an end, or fused with other work, so that products can run meanwhile. between_slices: its
    bytes go over the network between machines (DCN), not over the links of a slice (ICI).
    """

    kind: str
    times: int
    sent: float
    devices: int
    overlapped: bool
    between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program does. products: {"bf16 x bf16": times}; copies: of whole buffers, outside of fusions. kernels: of
    all kinds, fusions and library calls among them, that a device is given one after another."""

    collectives: tuple[Collective, ...]
    products: Mapping[str, int]
    copies: int
    copied_bytes: int
    kernels: int = 0

    @property
    def sent(self) -> float:
        """Bytes that each device sends inside its slice."""
        return sum(one.sent for one in self.collectives if not one.between_slices)

    @property
    def sent_between_slices(self) -> float:
        """Bytes that each device sends to other slices, by its host and the network."""
        return sum(one.sent for one in self.collectives if one.between_slices)

    @property
    def blocking(self) -> int:
        """Collectives that nothing overlaps with."""
        return sum(one.times for one in self.collectives if not one.overlapped)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """{kind: {"count", "overlapped", "bytes_sent"}}."""
        found: dict[str, dict[str, float]] = {}
        for one in self.collectives:
            name = f"{one.kind} between slices" if one.between_slices else one.kind
            kind = found.setdefault(name, {"count": 0, "overlapped": 0, "bytes_sent": 0.0})
            kind["count"] += one.times
            kind["overlapped"] += one.times * one.overlapped
            kind["bytes_sent"] += one.sent
        return found


def count(text: str, devices: int, slices: int = 1) -> Counts:
    """Counts of a program for so many devices in so many slices. text: `compiled.as_text()`.

    A program of several TPU slices is that of one slice, with devices numbered inside of it: what the others have
    comes by transfers to and from the host, which the runtime (Megascale) sums.
    """
    program = Program(text)
    return Counts(
        (*_collectives(program, devices // slices), *_between_slices(program, slices)),
        dict(sorted(_products(program).items())),
        *_copies(program),
        _kernels(program),
    )


class Program:
    """The computations of an HLO text, and how often each runs in a pass."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(Instruction(*found.groups()))
        if not self.entry:
            raise ValueError("no HLO program: there is no ENTRY computation")

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """{computation: runs of it in a pass}."""
        times: defaultdict[str, int] = defaultdict(int)

        def visit(name: str, factor: int) -> None:
            times[name] += factor
            for instruction in self.computations.get(name, ()):
                turns = self.turns(instruction) if instruction.opcode == "while" else 1
                for called in _called(instruction):
                    visit(called, factor * turns)

        visit(self.entry, 1)
        return dict(times)

    def turns(self, loop: Instruction) -> int:
        """How often the body of a while loop runs; 1 where only the arguments tell."""
        if known := re.search(r'"?known_trip_count"?:?\s*=?\s*\{"?n"?:\s*"?(\d+)', loop.rest):
            return int(known[1])
        (condition,) = re.findall(r"\bcondition=%([\w.-]+)", loop.rest)
        lines = self.computations[condition]
        constants = {line.name: line.rest for line in lines if line.opcode == "constant"}
        limits = [line for line in lines if line.opcode == "compare" and "direction=LT" in line.rest]
        for name in limits[-1].operands if limits else ():
            if name in constants and (value := re.match(r"(\d+)\)", constants[name])):
                return int(value[1])
        return 1

    def each(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, times) of all that runs."""
        for name, times in self.times.items():
            for instruction in self.computations.get(name, ()):
                yield name, instruction, times


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """[(dtype, shape)] of a type, of all parts of a tuple."""
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _SHAPE.findall(type_)]


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array without padding."""
    bits = BITS.get(dtype) or int(re.match(r"[a-z]+(\d+)", dtype)[1])  # type: ignore[index]
    return math.ceil(math.prod(shape) * bits / 8)


def group_size(rest: str, devices: int) -> int:
    """Devices in a group of a collective, from the attribute `replica_groups` in any of its notations."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{((?:'\w+',?)+)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if grid := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(grid[1])
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(lists[1].split(","))
    return devices


def _called(instruction: Instruction) -> list[str]:
    called = _CALLED.findall(instruction.rest)
    if branches := _BRANCHES.search(instruction.rest):
        called += re.findall(r"%([\w.-]+)", branches[1])
    return called


def _collectives(program: Program, devices: int) -> Iterator[Collective]:
    """One for each channel: TPUs' compiler repeats a collective in every piece that it overlaps with."""
    found: dict[str, Collective] = {}
    for computation, instruction, times in program.each():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if computation.startswith("all-reduce-scatter"):  # TPUs' name of a reduce-scatter, from what it was made of
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        key = channel[1] if channel else f"{computation} {instruction.name}"
        members = group_size(instruction.rest, devices)
        parts = [bytes_of(*shape) for shape in shapes(instruction.type)]
        # A start has the operands in its type, too; a collective of several arrays adds them up.
        whole = sum(parts) if kind == instruction.opcode or kind == "all-reduce" else max(parts, default=0)
        whole *= members if instruction.opcode == "reduce-scatter" else 1
        overlapped = (
            instruction.opcode not in COLLECTIVES
            or "async" in computation
            or "async_collective_name" in instruction.rest
        )
        earlier = found.get(key)
        # Of a collective that goes on through the turns of a loop, start and end lie outside.
        fewest = min(times, earlier.times) if earlier else times
        overlapped = overlapped or bool(earlier and earlier.overlapped)
        found[key] = Collective(kind, fewest, fewest * whole * SENT[kind](members), members, overlapped)
    yield from (one for one in found.values() if one.devices > 1)


def _between_slices(program: Program, slices: int) -> Iterator[Collective]:
    """One for each array that a device hands to its host for the other slices."""
    for _, instruction, times in program.each():
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
        if instruction.opcode == "send" and transfer:
            kind = transfer[1].lower().replace("_", "-")
            sent = bytes_of(*shapes(instruction.type)[0]) * SENT.get(kind, lambda n: 1)(slices)
            yield Collective(kind, times, times * sent, slices, overlapped=True, between_slices=True)


def _products(program: Program) -> Counter[str]:
    found: Counter[str] = Counter()
    for computation, instruction, times in program.each():
        library = instruction.opcode == "custom-call" and _GEMM.search(instruction.rest)
        if instruction.opcode in ("dot", "convolution") or library:
            types = {line.name: line.type for line in program.computations[computation]}
            operands = [shapes(types[name])[0][0] for name in instruction.operands[:2] if shapes(types.get(name, ""))]
            found[" x ".join(operands)] += times
    return found


def _copies(program: Program) -> tuple[int, int]:
    """(number, bytes) of whole buffers that are copied, fusions' own copies not among them."""
    fused = {
        called
        for lines in program.computations.values()
        for line in lines
        if line.opcode == "fusion"
        for called in _called(line)
    }
    number = total = 0
    for computation, instruction, times in program.each():
        if instruction.opcode in ("copy", "copy-start") and computation not in fused:
            number += times
            total += times * bytes_of(*shapes(instruction.type)[0])
    return number, total


def _kernels(program: Program) -> int:
    """Instructions that are work, in the computations that the device runs as such: not inside a fusion or a sum."""
    number, left = 0, [program.entry]
    seen = set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in program.computations.get(name, ()):
            if line.opcode in ("while", "conditional", "call"):
                left += _called(line)
            elif line.opcode not in _NO_KERNELS and not line.opcode.endswith("-done"):
                number += program.times[name]
    return number
