"""Post-training quantization: a method turns (kernel, calibration statistics, grid) into a quantized kernel."""

METHODS = ("gptq", "awq", "rtn", "smoothquant", "kv_cache")
GRANULARITIES = ("tensor", "token")  # what may share a scale in activations, keys and values
