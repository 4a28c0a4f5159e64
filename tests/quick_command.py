"""Runs a command of the project with programs that are compiled with few optimizations, as tests in processes need it.

python tests/quick_command.py MODULE ARGUMENTS OF THE COMMAND
"""

import runpy
import sys

import jax

from precision_scaling.runtime import compilation

if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    compilation.jit = lambda function, level=0, platform=None, **options: jax.jit(function, **options)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
