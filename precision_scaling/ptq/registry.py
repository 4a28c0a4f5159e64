"""The methods of post-training quantization, by name: the one line that a new method's module adds itself to."""

from collections.abc import Mapping
from typing import Any

from precision_scaling.ptq import awq, gptq, kv_cache, rtn, smoothquant
from precision_scaling.ptq.scheme import Scheme

METHODS = {module.METHOD.name: module.METHOD for module in (gptq, awq, rtn, smoothquant, kv_cache)}


def scheme_of(method: str, **options: Any) -> Scheme:
    """The scheme of a method with these options, the others at their defaults."""
    return Scheme(METHODS[method], **options)


def of_method(method: str, options: Mapping[str, Any]) -> Scheme:
    """The scheme of one method under the config's `ptq` section, values that `config.options.check_ptq` passed."""
    return scheme_of(method, **{name: options[name] for name in METHODS[method].options})


def of_config(options: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """A scheme for each of the config's methods."""
    return tuple(of_method(method, options) for method in options["methods"])
