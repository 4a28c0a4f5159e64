"""Text to batches: TFDS corpora, tokenizers, token files and the batches that training reads."""

from precision_scaling.errors import UserError


class DataError(UserError):
    """A data option or file that cannot be used: one line that names the key, the value and what is allowed."""
