"""Train decoders at any numerical precision, quantize them, and write the measured losses as one table."""
