"""Where arrays live: a mesh of devices and, by rules on parameters' paths, the axes that each array is sharded over.

`study.workspace` makes the layout of a study; `training.cohort` trains, evaluates and restores on it. Parameters and
optimizer state are made in their place, so that no device ever holds all of them.
"""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from precision_scaling.errors import ConfigError

# run: the lanes of a cohort. data: the batch; of several slices, the only axis that leaves one. fsdp: the batch, and
# the parameters of each layer, gathered when they are used. tensor: the heads and the MLP's units of a layer.
AXES = ("run", "data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
HESSIAN = P(("fsdp", "tensor"))  # (inputs, inputs) of a projection: rows, over the devices that share its kernel

# (regex on the parameter's path, axes of its dimensions), the first match counts; the axes of lanes and of stacked
# layers come before these. An axis that does not divide its dimension moves to the next that it divides, see `fit`.
RULES = (
    (r"embedding/embedding$", P("tensor", "fsdp")),  # (vocabulary, width)
    (r"attention/qkv/([qkv]/)?kernel$", P("fsdp", "tensor", None)),  # (width, heads of q, k and v, head dimension)
    (r"attention/qkv_bias$", P("tensor", "fsdp")),  # (heads of q, k and v, head dimension)
    (r"mlp/gate_up/kernel$", P("fsdp", None, "tensor")),  # (width, 2, MLP width)
    (r"(attention/out|mlp/down)/kernel$", P("tensor", "fsdp")),  # (heads x head dimension or MLP width, width)
    (r"head/kernel$", P("fsdp", "tensor")),  # (width, vocabulary)
    (r"/scale$", P(("fsdp", "tensor"))),  # gains of norms
)

# Of kernels as matrices: the axis that fsdp divides, where it is not the first.
KERNEL_AXES = {"out": 1, "down": 1}


def fit(spec: P | Sequence[Any], shape: tuple[int, ...], sizes: dict[str, int], movable: Sequence[int] = ()) -> P:
    """`spec` for an array of that shape: jit splits into equal parts only.

    An axis that does not divide its dimension goes to the first of the dimensions `movable` that it divides, and where
    there is none the array is replicated along it.
    """
    placed: list[list[str]] = [[] for _ in shape]
    for dimension, axes in enumerate(spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            for candidate in (dimension, *movable):
                parts = math.prod(sizes[other] for other in placed[candidate]) * sizes[axis]
                if shape[candidate] % parts == 0:
                    placed[candidate].append(axis)
                    break
    return P(*(tuple(axes) if axes else None for axes in placed))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the axes `AXES`, and where things go on it.

    slices: parts of the axis `data` that only a network between machines connects (DCN).
    """

    mesh: Mesh
    slices: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return dict(self.mesh.shape)

    @property
    def platform(self) -> str:
        """Of its devices: "cpu", "gpu", "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def spans_hosts(self) -> bool:
        """Whether other processes hold a part of it."""
        return any(device.process_index != jax.process_index() for device in self.mesh.devices.flat)

    def place(self, *spec: Any) -> NamedSharding:
        """Sharding of an array by the axes of its dimensions; none: replicated."""
        return NamedSharding(self.mesh, P(*spec))

    def of_shape(self, shape: tuple[int, ...], *spec: Any) -> NamedSharding:
        """As `place`, without the axes that do not divide their dimension."""
        return NamedSharding(self.mesh, fit(spec, shape, self.sizes))

    def of_tree(self, tree: Any, lanes: bool = False) -> Any:
        """Shardings of parameters, or of a train state, by `RULES`; lanes: every leaf has a leading axis of runs."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(self.mesh, self._spec(path, leaf.shape, lanes)), tree
        )

    def abstract(self, tree: Any, lanes: bool = False) -> Any:
        """Shapes and types of a tree with these shardings, for a checkpoint to be restored into."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.of_tree(tree, lanes),
        )

    def _spec(self, path, shape: tuple[int, ...], lanes: bool) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lead = (*(("run",) if lanes else ()), *((None,) if "layers/" in name else ()))
        own = range(len(lead), len(shape))
        if not own:  # a step or a count
            return fit(lead, shape, self.sizes)
        for pattern, spec in RULES:
            if re.search(pattern, name):
                return fit((*lead, *spec), shape, self.sizes, own)
        raise KeyError(f"no rule in sharding.RULES for the parameter {name}")


_batches: contextvars.ContextVar[tuple[Mesh, tuple[str, ...]] | None] = contextvars.ContextVar("batches", default=None)

_platform: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")
_gradients: contextvars.ContextVar[str] = contextvars.ContextVar("gradients", default="")


@contextlib.contextmanager
def splitting(layout: Layout, axes: tuple[str, ...] = BATCH) -> Iterator[None]:
    """While a program is traced in here, `split_batch` keeps its activations sharded over these axes."""
    token = _batches.set((layout.mesh, axes) if layout.mesh.size > 1 else None)
    platform = _platform.set(layout.platform)
    try:
        yield
    finally:
        _batches.reset(token)
        _platform.reset(platform)


def split_batch(x: jax.Array, rest: Sequence[Any] | None = None) -> jax.Array:
    """x with its first axis, sequences, sharded over the devices; outside of `splitting`, as it is.

    rest: axes of the mesh for the other dimensions; without it, those are the partitioner's to choose.
    Left to itself the partitioner follows the parameters, which fsdp shards over the same devices, and gives every
    device the activations of the whole batch.
    """
    if (split := _batches.get()) is None:
        return x
    mesh, axes = split
    sizes = dict(mesh.shape)
    (first,) = fit(P(axes), x.shape[:1], sizes)
    others = [P.UNCONSTRAINED] * (x.ndim - 1) if rest is None else fit(rest, x.shape[1:], sizes)
    spec = P(first, *others)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def in_shares(gradient_IxO: jax.Array, axis: int) -> jax.Array:
    """The gradient of a kernel with that axis over fsdp, as `RULES` has it; outside of `splitting`, as it is.

    The axis is cut into what each device keeps. The compilers of TPUs otherwise scatter a sum only where its tiles
    divide evenly, and sum the whole array on every device where they do not.
    """
    if (split := _batches.get()) is None:
        return gradient_IxO
    mesh, _ = split
    shape = gradient_IxO.shape
    parts = mesh.shape["fsdp"] if shape[axis] % mesh.shape["fsdp"] == 0 else 1
    cut = gradient_IxO.reshape(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])
    spec: list[Any] = [P.UNCONSTRAINED] * len(shape)
    spec[axis : axis + 1] = ["fsdp" if parts > 1 else None, None]
    return jax.lax.with_sharding_constraint(cut, NamedSharding(mesh, P(*spec))).reshape(shape)


def looked_up(look_up: Callable[[jax.Array], jax.Array], tokens_BxS: jax.Array) -> jax.Array:
    """look_up(tokens), (B, S, D), of a table whose width fsdp divides; outside of `splitting`, just that.

    Each device looks up its share of the width, for the sequences of all that have another, and rows then go to the
    devices of their sequences. Gradients come back the same way before they are added to the table's rows: left to
    itself the partitioner may add to a whole table on every device, and sum those.
    """
    if (split := _batches.get()) is None:
        return look_up(tokens_BxS)
    mesh, axes = split
    sizes = dict(mesh.shape)
    others = tuple(axis for axis in axes if axis != "fsdp")
    place = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit(spec, x.shape, sizes)))
    x_BxSxD = place(look_up(place(tokens_BxS, others)), others, None, "fsdp")
    return split_batch(x_BxSxD, (None, None))


def batch_parts(size: int) -> int:
    """Into how many parts `split_batch` cuts a first axis of that size."""
    if (split := _batches.get()) is None:
        return 1
    mesh, axes = split
    (first,) = fit(P(axes), (size,), dict(mesh.shape))
    return math.prod(mesh.shape[axis] for axis in _names(first))


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """The axes of one dimension of a spec."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def summed_parts(x_PxIxO: jax.Array, spec: Sequence[Any]) -> jax.Array:
    """The sum of one array for each of the `batch_parts`, sharded over the axes of `spec`: as gradients are.

    One axis of the mesh after the other, the innermost first: all but the first sum shares of what is left.
    """
    if (split := _batches.get()) is None:
        return jax.numpy.sum(x_PxIxO, axis=0)
    mesh, axes = split
    sizes = dict(mesh.shape)
    (first,) = fit(P(axes), x_PxIxO.shape[:1], sizes)
    left = list(_names(first))
    x = x_PxIxO.reshape(*(sizes[axis] for axis in left), *x_PxIxO.shape[1:]) if left else x_PxIxO[0]
    own = fit(spec, x_PxIxO.shape[1:], sizes)
    # Dimensions that are sharded in shares, or the compilers of TPUs sum the whole array on every device.
    shares, placed = [], []
    for size, axes_of_it in zip(x_PxIxO.shape[1:], own, strict=True):
        parts = math.prod(sizes[axis] for axis in _names(axes_of_it))
        shares += [parts, size // parts]
        placed += [axes_of_it, None]
    x = x.reshape(*x.shape[: len(left)], *shares)
    while left:
        left.pop()
        x = jax.numpy.sum(x, axis=len(left))
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*left, *placed)))
    return x.reshape(x_PxIxO.shape[1:])


@contextlib.contextmanager
def summing_gradients(dtype: str) -> Iterator[None]:
    """While a program is traced in here, devices add up gradients of kernels in that dtype, see `sums_in_float32`."""
    token = _gradients.set(dtype)
    try:
        yield
    finally:
        _gradients.reset(token)


def on_several_devices() -> bool:
    """Whether what is traced now is for several devices, see `splitting`."""
    return _batches.get() is not None


def on_one_cpu() -> bool:
    """Whether what is traced now is for one device, and that a CPU."""
    return not on_several_devices() and (_platform.get() or jax.default_backend()) == "cpu"


def sums_in_float32() -> bool:
    """Whether a product that several devices add up leaves each of them in float32. On one device there is none."""
    return on_several_devices() and _gradients.get() == "float32"


def whole_kernel(kernel_IxO: jax.Array, axis: int) -> jax.Array:
    """A kernel of a projection as its products multiply it, gathered over fsdp; outside of `splitting`, as it is.

    axis: that fsdp divides. Products of the same kernel share what is gathered; the partitioner would gather it for
    each in a shape of its own. Where layers are divided over tensor, too, that is left to the partitioner.
    """
    if (split := _batches.get()) is None or split[0].shape["tensor"] > 1:
        return kernel_IxO
    mesh, _ = split
    # As a matrix, and not in the shape that it comes from.
    own = fit(P(*(("fsdp",) if i == axis else () for i in range(2))), kernel_IxO.shape, dict(mesh.shape))
    kernel_IxO = jax.lax.with_sharding_constraint(kernel_IxO, NamedSharding(mesh, own))
    return jax.lax.with_sharding_constraint(kernel_IxO, NamedSharding(mesh, P(None, None)))


def gathered(x: jax.Array, spec: Sequence[Any]) -> jax.Array:
    """x sharded over the axes of `spec` alone; outside of `splitting`, as it is.

    Where a loop uses a parameter again and again: the partitioner would gather it in every turn.
    """
    if (split := _batches.get()) is None:
        return x
    mesh, _ = split
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit(spec, x.shape, dict(mesh.shape))))


def split_hessian(h_IxI: jax.Array) -> jax.Array:
    """h sharded by the rule `HESSIAN`; outside of `splitting`, as it is."""
    if (split := _batches.get()) is None:
        return h_IxI
    mesh, _ = split
    return jax.lax.with_sharding_constraint(h_IxI, NamedSharding(mesh, fit(HESSIAN, h_IxI.shape, dict(mesh.shape))))


def make_layout(options: Any, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The layout of `config.mesh`: sizes of the axes, of which one may be -1 to take the devices that are left.

    Of several slices, `data` is their number times the parts in each, and all other axes stay inside of one.

    devices: all of them, by default. ConfigError where the axes do not make up their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = _slices(devices, options["slices"])
    sizes = {axis: options[axis] for axis in AXES}
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ConfigError(f"mesh.{axis}", size, "a number of devices from 1, or -1 for those that are left")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}", -1, f"1 or more, because mesh.{free[0]} is -1 already")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        named = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError("mesh", named, f"a product of {len(devices)}, the devices there are")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if sizes["data"] % len(slices):
        raise ConfigError(
            "mesh.data", sizes["data"], f"a multiple of {len(slices)}, the slices: no other axis leaves one"
        )
    inside = tuple({**sizes, "data": sizes["data"] // len(slices)}.values())
    # Made by hand, because jax.make_mesh has explicit axes in newer versions, under which AQT's products fail.
    grids = [mesh_utils.create_device_mesh(inside, of_slice, allow_split_physical_axes=True) for of_slice in slices]
    return Layout(Mesh(np.concatenate(grids, axis=AXES.index("data")), AXES), len(slices))


def _slices(devices: Sequence[Any], wanted: int) -> list[list[Any]]:
    """The devices of each slice: TPUs know theirs; of others, groups of processes are as many as are wanted."""
    tpus = devices[0].platform == "tpu"
    place = lambda device: getattr(device, "slice_index", 0) if tpus else device.process_index
    found = sorted(set(map(place, devices)))
    if tpus and wanted not in (-1, len(found)):
        raise ConfigError("mesh.slices", wanted, f"-1 or {len(found)}, the slices of the devices")
    count = len(found) if tpus else max(wanted, 1)
    if len(found) % count:
        raise ConfigError("mesh.slices", wanted, f"-1 or a divisor of {len(found)}, the processes of the run")
    each = len(found) // count
    slices = [[device for device in devices if found.index(place(device)) // each == i] for i in range(count)]
    if len(set(map(len, slices))) > 1:
        raise ConfigError(
            "mesh.slices", wanted, f"slices of equal size, not of {', '.join(map(str, map(len, slices)))} devices"
        )
    return slices


def local_layout() -> Layout:
    """All devices of this process, parameters sharded over them: for what a process does on its own."""
    return make_layout({"slices": 1, "run": 1, "data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())


def check(layout: Layout, config: Any, models: Sequence[Any]) -> None:
    """ConfigError for a batch, a number of lanes or of heads that the mesh does not divide."""
    sizes = layout.sizes
    parts = sizes["data"] * sizes["fsdp"]
    if config.train.batch_size // config.train.microbatches % parts:
        raise ConfigError(
            "train.batch_size",
            config.train.batch_size,
            f"a multiple of {parts * config.train.microbatches}: train.microbatches x mesh.data x mesh.fsdp",
        )
    if config.study.lanes % sizes["run"]:
        raise ConfigError("study.lanes", config.study.lanes, f"a multiple of mesh.run, {sizes['run']}")
    for model in models:
        if model.heads % sizes["tensor"]:
            raise ConfigError(
                "mesh.tensor", sizes["tensor"], f"a divisor of the heads, {model.heads} at width {model.width}"
            )
