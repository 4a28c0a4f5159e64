"""XLA's earlier way to write loops on a CPU, which compiles in two thirds of the time; JAX 0.12 has it no more."""

import os
from importlib import metadata

OPTION = "xla_cpu_use_fusion_emitters"
KNOWN = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)


def use() -> None:
    """In this process and those that it starts; before JAX has a backend."""
    if KNOWN:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{OPTION}=false"
