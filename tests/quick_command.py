"""Runs commands of the project, one after the other in one process, as tests in processes need it: with programs that
are compiled with few optimizations. It ends with the first that fails.

python tests/quick_command.py MODULE ARGUMENTS OF THE COMMAND [--then MODULE ARGUMENTS ...]
"""

import itertools
import runpy
import sys

import jax
import simple_loops

from precision_scaling.runtime import compilation

if __name__ == "__main__":
    simple_loops.use()
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.0
    )  # many small ones; the next process has them all
    compilation.jit = lambda function, level=0, platform=None, **options: jax.jit(function, **options)
    for is_end, command in itertools.groupby(sys.argv[1:], lambda word: word == "--then"):
        if not is_end:
            sys.argv = list(command)
            try:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                if ended.code:
                    raise
