"""Keys and values rounded to nearest on the fly, as a serving cache would keep them; kernels stay as they are."""

from precision_scaling.ptq.scheme import Method

METHOD = Method("kv_cache", options=("granularity",), operands=("k", "v"))
