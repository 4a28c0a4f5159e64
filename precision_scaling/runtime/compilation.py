"""How programs are compiled: a persistent cache, and an optimization level for each backend."""

import jax

from precision_scaling.errors import ConfigError
from precision_scaling.runtime import files


def jit(function, level: int = 2, platform: str | None = None, **options):
    """jax.jit at an optimization level that pays on a CPU; other backends keep their default.

    platform: what it is compiled for; None: JAX's default.

    LLVM's level 2 compiles a train step in two thirds of the time of the default 3 and runs it as fast; level 1 is for
    programs that run once, such as initialization.
    """
    if (platform or jax.default_backend()) == "cpu":
        options["compiler_options"] = {"xla_backend_optimization_level": level}
    return jax.jit(function, **options)


def use_cache(path: str) -> None:
    """Keeps compiled programs in a directory for later processes; "": in the user's cache, "none": not at all.

    ConfigError where the directory cannot be made.
    """
    if path == "none":
        return
    option = "compilation_cache"
    directory = files.expanded(path, f"config.{option}") if path else files.user_cache(option) / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = '"none", or a directory that can be written'
        raise ConfigError(option, str(directory), f"{allowed} ({error.strerror})") from None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Small programs, too: JAX would keep what takes a second or more.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
