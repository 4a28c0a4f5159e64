"""XLA's earlier way to write loops on a CPU, which compiles in two thirds of the time; JAX 0.12 has it no more."""

from importlib import metadata

OPTION = "xla_cpu_use_fusion_emitters"
KNOWN = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)
FLAG = f"--{OPTION}=false" if KNOWN else ""  # in XLA_FLAGS, before JAX has a backend
