"""Text to batches: TFDS corpora, tokenizers, token files and the batches that training reads."""


class DataError(ValueError):
    """A data option or file that cannot be used: one line that names the key, the value and what is allowed."""
