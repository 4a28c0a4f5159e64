"""Train decoders at any numerical precision, quantize them, and write the measured losses as one table.

From Python, `import precision_scaling as ps` gives what `__all__` lists; each is imported when it is first asked for.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# On CPUs JAX factorizes by SciPy's OpenBLAS, whose threads wait for each other: on two cores a Cholesky factor of 1536
# rows then takes 0.05 to 1.8 s, with one thread 0.04. It is read when SciPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if TYPE_CHECKING:
    from precision_scaling.api.models import (
        evaluate,
        fake_quant,
        generate,
        grid,
        load_config,
        quantize_model,
        register_format,
        run_study,
        train_model,
    )
    from precision_scaling.api.tables import fit, plan, predict, register_law, summary

__all__ = [
    "evaluate",
    "fake_quant",
    "fit",
    "generate",
    "grid",
    "load_config",
    "plan",
    "predict",
    "quantize_model",
    "register_format",
    "register_law",
    "run_study",
    "summary",
    "train_model",
]
_OF_TABLES = ("fit", "plan", "predict", "register_law", "summary")


def __getattr__(name: str) -> Any:
    """PEP 562: the import of the package takes no time, and `fit` needs none of what `train_model` does."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.api.{'tables' if name in _OF_TABLES else 'models'}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
