"""Tokenizers: bytes (default), byte-level BPE trained on the corpus, or a given tokenizer.json. Documents in, ids out.

Every tokenizer has an end-of-text token, which text cannot produce: where a document spells its name, the letters are
encoded.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from precision_scaling.data import DataError, byte_level
from precision_scaling.runtime import files

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_ALLOWED = (
    "allowed: 'bytes', 'bpe:VOCAB' with VOCAB from 257 up (e.g. 'bpe:4096'), 'file:PATH' of a tokenizer.json, "
    "'file:PATH?end_of_text=ID'"
)
_MIN_BPE = 257  # the 256 bytes and end-of-text


class Tokenizer(Protocol):
    """vocab_size counts end_of_text. encode: UTF-8 documents -> one array of ids each; decode: ids -> UTF-8 bytes.

    text: what `from_file` reads.
    """

    vocab_size: int
    end_of_text: int

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes: ...

    def text(self) -> str: ...


class ByteTokenizer:
    """A token is a byte of UTF-8; id 256 is end-of-text."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(document, np.uint8) for document in documents]

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids)
        return ids[ids != self.end_of_text].astype(np.uint8).tobytes()

    def text(self) -> str:
        """Nothing: bytes need no file."""
        return ""


class LearnedTokenizer:
    """A tokenizer of the `tokenizers` library.

    usual_ends: ids of its tokens with a usual name of end-of-text. The first is end_of_text where `source`, the spec,
    gives no id.
    """

    def __init__(self, tokenizer, source: str):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a document that spells a special token must not end itself
        self.usual_ends = [i for i in map(tokenizer.token_to_id, _END_OF_TEXT_NAMES) if i is not None]
        _, given = split_file(source)
        if given is None and not self.usual_ends:
            raise DataError(f"data.tokenizer={source!r}: no end-of-text token, one of {list(_END_OF_TEXT_NAMES)}")
        self._tokenizer = tokenizer
        self._words = byte_level.of(tokenizer)
        self.end_of_text = self.usual_ends[0] if given is None else given
        if tokenizer.id_to_token(self.end_of_text) is None:
            raise DataError(f"data.tokenizer={source!r}: no token has the id {given}; allowed is an id that one has")
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        if self._words is not None:
            return [self._words.encode(document) for document in documents]
        texts = [document.decode("utf-8") for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self._tokenizer.decode([int(i) for i in ids if i != self.end_of_text]).encode("utf-8")

    def text(self) -> str:
        return self._tokenizer.to_str(pretty=True)


def split_file(spec: str) -> tuple[Path, int | None]:
    """Path of 'file:PATH?end_of_text=ID', and the id, None where the tokenizer's names tell."""
    path, mark, given = spec.removeprefix("file:").partition("?end_of_text=")
    if mark and not (given.isdecimal() and int(given) < 2**31):
        raise DataError(f"data.tokenizer={spec!r}: {_ALLOWED}")
    return files.expanded(path, "data.tokenizer"), int(given) if mark else None


def identify(spec: str) -> str:
    """What a token file made with `spec` depends on besides the corpus: the spec, and a named file's content.

    Raises:
      DataError: an unknown spec, a vocabulary below 257, or a file that does not exist.
    """
    kind, _, value = spec.partition(":")
    if spec == "bytes":
        return spec
    if kind == "bpe" and value.isdecimal() and int(value) >= _MIN_BPE:
        return f"bpe:{int(value)}"
    if kind == "file" and value:
        path, end_of_text = split_file(spec)
        found = f"file:{hashlib.blake2b(_read(path, spec), digest_size=16).hexdigest()}"
        return found if end_of_text is None else f"{found}?end_of_text={end_of_text}"
    raise DataError(f"data.tokenizer={spec!r}: {_ALLOWED}")


def build(spec: str, train_documents: Callable[[], Iterable[bytes]]) -> Tokenizer:
    """The tokenizer of a spec that `identify` accepted; a BPE is trained on `train_documents`."""
    kind, _, value = spec.partition(":")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "file":
        return given(spec)
    from tokenizers import Tokenizer as Trainable
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Trainable(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(value),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.decode("utf-8") for document in train_documents()), trainer)
    return LearnedTokenizer(tokenizer, spec)


def given(spec: str) -> LearnedTokenizer:
    """The tokenizer that a spec of the kind "file:" names."""
    return from_file(split_file(spec)[0], spec)


def load(spec: str, path: Path) -> Tokenizer:
    """The tokenizer of a spec, whose text is in `path`."""
    return ByteTokenizer() if spec == "bytes" else from_file(path, spec)


def from_file(path: Path, spec: str) -> LearnedTokenizer:
    """Loads a tokenizer.json; `spec` names it in errors."""
    from tokenizers import Tokenizer as Loadable

    content = _read(path, spec)
    try:
        tokenizer = Loadable.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.tokenizer={spec!r}: not a tokenizer.json ({reason}); {_ALLOWED}") from error
    return LearnedTokenizer(tokenizer, spec)


def _read(path: Path, spec: str) -> bytes:
    try:
        return files.read(path)
    except files.NotAFile as error:
        raise DataError(f"data.tokenizer={spec!r}: {error}") from None
    except OSError as error:
        raise DataError(f"data.tokenizer={spec!r}: no such file ({path}: {error.strerror}); {_ALLOWED}") from None
