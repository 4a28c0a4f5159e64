"""The methods of post-training quantization, by name: the one line that a new method's module adds itself to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from precision_scaling.numerics import formats
from precision_scaling.ptq import awq, gptq, kv_cache, rtn, smoothquant
from precision_scaling.ptq.scheme import Scheme

METHODS = {module.METHOD.name: module.METHOD for module in (gptq, awq, rtn, smoothquant, kv_cache)}


def scheme_of(method: str, **options: Any) -> Scheme:
    """The scheme of a method with these options, the others at their defaults."""
    return Scheme(METHODS[method], **options)


def of_method(method: str, options: Mapping[str, Any]) -> Scheme:
    """The scheme of one method under the config's `ptq` section, values that `config.options.check_ptq` passed."""
    return scheme_of(method, **{name: options[name] for name in METHODS[method].options})


def planned(options: Mapping[str, Any]) -> tuple[tuple[Scheme, tuple[float, ...]], ...]:
    """The schemes of the config's `ptq` section, each with the P_post of its rows.

    All bit-widths of a method are one scheme; each format is a scheme of its own, as its bits may be those of another.
    """
    found: list[tuple[Scheme, tuple[float, ...]]] = []
    for method in options["methods"]:
        scheme = of_method(method, options)
        if options["bits"]:
            found.append((scheme, tuple(dict.fromkeys(options["bits"]))))
        for fmt in dict.fromkeys(map(formats.parse, options["formats"])):
            # Formats whose scales are given have no range to search; who asks for it is told before.
            clip = scheme.clip and fmt.family not in ("block", "wide")
            found.append((dataclasses.replace(scheme, format=fmt.name, clip=clip), (fmt.bits,)))
    return tuple(found)
