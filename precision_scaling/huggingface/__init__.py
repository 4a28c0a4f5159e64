"""Decoders of others: Hugging Face directories on disk into our parameters and back.

`architectures` says what a config.json means and which tensor is which parameter, `safetensors` reads and writes the
files, `directory` joins the two. `python -m precision_scaling.huggingface` makes a workdir of a directory, for `ptq`.
"""
