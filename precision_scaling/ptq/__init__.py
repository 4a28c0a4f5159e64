"""Post-training quantization: a method turns (kernel, calibration statistics, grid) into a quantized kernel."""
