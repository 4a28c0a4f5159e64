"""Devices that are not here, and their compilers: TPU slices and H100s as topologies that programs can be compiled for.

`pip install 'precision_scaling[tpu]'` brings the compiler of TPUs, `[cuda]` that of GPUs; neither needs the device. A
program compiled so says what it holds, sends and multiplies ("by the compiler"), never how long it takes.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from precision_scaling.errors import UserError
from precision_scaling.runtime import hosts

GIB = 2**30
# name: bytes of memory of a chip, and what TPU_ACCELERATOR_TYPE calls a slice of 64.
TPUS = {
    "v4": (32 * GIB, "v4-128"),
    "v5e": (16 * GIB, "v5litepod-64"),
    "v5p": (95 * GIB, "v5p-128"),
    "v6e": (32 * GIB, "v6e-64"),
}
ALLOWED = (
    "a TPU topology (v5e:2x4, v5e:8x8, v6e:8x8, v5p:2x2x4, v4:2x2x2, ...; two slices: v5e:8x8*2), "
    "h100 or h100:N with up to 8 on a host, cpu or cpu:N"
)
# What a chip calls itself.
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
# From the card's data sheet and CUDA's occupancy tables for compute capability 9.0.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. memory: bytes of one device, None for a CPU, whose memory is the machine's. here: they
    are those of this run."""

    name: str
    devices: Sequence[Any]
    memory: int | None
    slices: int = 1
    here: bool = False

    @property
    def kind(self) -> str:
        """What each device calls itself."""
        return self.devices[0].device_kind


def here() -> Target:
    """The devices of this run, all processes of it together.

    memory: what a program may take of the smallest, by what the device tells, or by `TPUS`; None for CPUs. UserError
    for a device whose memory neither knows.
    """
    devices = jax.devices()
    name = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu":
        return Target(name, devices, None, here=True)
    told = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    memory = min(told) or TPUS.get(KINDS.get(devices[0].device_kind, ""), (0,))[0]
    if not memory:
        raise UserError(f"{name}: the memory of these devices is not known; allowed are numbers, not auto")
    memory = -hosts.largest(-(memory >> 20)) << 20  # in whole MiB, for all processes to agree on
    return Target(name, devices, memory, here=True)


def target(name: str) -> Target:
    """The devices that a name such as "v5e:8x8", "h100" or "cpu:8" stands for.

    To be called before anything asks JAX for its devices; this process then has CPUs alone. UserError for a name that
    is none of `ALLOWED`, and where the compiler is not installed.
    """
    if found := re.fullmatch(r"((v\d\w*):\d+(?:x\d+){1,2})(?:\*([1-9]\d?))?", name):
        return _tpu(name, found[1], found[2], int(found[3] or 1))
    if found := re.fullmatch(r"h100(?::([1-8]))?", name):
        return _h100(name, int(found[1] or 1))
    if found := re.fullmatch(r"cpu(?::([1-9]\d{0,3}))?", name):
        _stay_on_cpu()
        jax.config.update("jax_num_cpu_devices", int(found[1] or 1))
        return Target(name, jax.devices(), None)
    raise UserError(f"the target {name!r}: allowed is {ALLOWED}")


def missing(name: str) -> str | None:
    """Why this installation cannot compile for a target; None where it can."""
    if name.startswith("v") and importlib.util.find_spec("libtpu") is None:
        return "the TPU compiler is not installed: pip install 'precision_scaling[tpu]'"
    if name.startswith("h100") and _cuda_plugin() is None:
        return "the GPU compiler is not installed: pip install 'precision_scaling[cuda]'"
    return None


def _stay_on_cpu() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def _require(name: str) -> None:
    if why := missing(name):
        raise UserError(f"the target {name!r}: {why}")


def _tpu(name: str, topology: str, generation: str, slices: int) -> Target:
    from jax.experimental import topologies

    if generation not in TPUS:
        raise UserError(f"the target {name!r}: allowed is {ALLOWED}")
    _require(name)
    memory, accelerator = TPUS[generation]
    # Without these libtpu asks the network for the machine that it is on.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator)
    _stay_on_cpu()
    try:
        more = {"num_slices": slices} if slices > 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as error:  # of several types, by version
        raise UserError(f"the target {name!r}: the TPU compiler refuses it ({' '.join(str(error).split())})") from None
    return Target(name, devices, memory, slices)


def _cuda_plugin() -> tuple[Path, Path] | None:
    """(JAX's CUDA plug-in, the directory of ptxas) of the packages of `jax[cuda13]`."""
    if importlib.util.find_spec("jax_plugins") is None:  # without it, the next would raise
        return None
    plugin, nvidia = (importlib.util.find_spec(package) for package in ("jax_plugins.xla_cuda13", "nvidia"))
    if not plugin or not plugin.origin or not nvidia or not nvidia.submodule_search_locations:
        return None
    library = Path(plugin.origin).with_name("xla_cuda_plugin.so")
    assemblers = sorted(Path(nvidia.submodule_search_locations[0]).glob("*/bin/ptxas"))
    return (library, assemblers[0].parent) if library.exists() and assemblers else None


def _h100(name: str, count: int) -> Target:
    """JAX loads its CUDA plug-in only beside a driver, so it is registered by hand, by private names of JAX."""
    from jax._src import xla_bridge
    from jax.experimental import topologies

    _require(name)
    bridge: Any = xla_bridge
    library, binaries = _cuda_plugin() or (Path(), Path())
    os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    # Autotuning would need the device.
    flags = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={binaries.parent}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    _stay_on_cpu()
    try:
        bridge.discover_pjrt_plugins = lambda: None
        bridge.register_plugin("cuda", library_path=str(library), options={})
        canonical = bridge.canonicalize_platform
        bridge.canonicalize_platform = lambda name: "cuda" if name == "gpu" else canonical(name)
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology=f"1x1x{count}", target_config=_H100
        ).devices
    except Exception as error:
        raise UserError(
            f"the target {name!r}: jax {jax.__version__} does not take the GPU compiler without a GPU "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    return Target(name, devices, 80 * GIB)
