"""Tokenizers: bytes (default), byte-level BPE trained on the corpus, or a given tokenizer.json. Documents in, ids out.

Every tokenizer has an end-of-text token, which text does not produce: where a document spells the name of a special
token, the letters are encoded, and where it gives an end of text all the same, it is refused.
"""

import hashlib
import logging
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
    "'file:PATH?end_of_text=NAME' or '...=ID' of one of its tokens"
)
_SHOWN = 8  # tokens that an error lists
LEARNED_END_OF_TEXT = 0  # id in a BPE of our own
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
    gives none.
    """

    def __init__(self, tokenizer, source: str):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a document that spells a special token must not end itself
        self.usual_ends = [i for i in map(tokenizer.token_to_id, _END_OF_TEXT_NAMES) if i is not None]
        _, given = split_file(source)
        if given is None and not self.usual_ends:
            raise DataError(
                f"data.tokenizer={source!r}: no token has a usual name of an end of text, one of "
                f"{list(_END_OF_TEXT_NAMES)}; ?end_of_text= names it, {_candidates(tokenizer)}"
            )
        self.end_of_text = self.usual_ends[0] if given is None else _token(tokenizer, given, source)
        self._tokenizer = tokenizer
        self._words = byte_level.of(tokenizer)
        self._source = source
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Raises DataError for a document with an end of text in it: a token that text produces cannot be one."""
        encoded = self._encode(documents)
        for document, ids in zip(documents, encoded, strict=True):
            if (ids == self.end_of_text).any():
                shown = document[:40].decode("utf-8", "replace")
                raise DataError(
                    f"data.tokenizer={self._source!r}: a document that begins with {shown!r} has the token "
                    f"{_named(self._tokenizer, self.end_of_text)} in it; allowed as ?end_of_text= is one that no text "
                    f"gives, {_candidates(self._tokenizer)}"
                )
        return encoded

    def _encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        if self._words is not None:
            return [self._words.encode(document) for document in documents]
        texts = [document.decode("utf-8") for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self._tokenizer.decode([int(i) for i in ids if i != self.end_of_text]).encode("utf-8")

    def text(self) -> str:
        return self._tokenizer.to_str(pretty=True)

    def say_choice(self) -> None:
        """A warning where the usual names of an end of text leave a choice."""
        if len(self.usual_ends) > 1 and split_file(self._source)[1] is None:
            named = [_named(self._tokenizer, i) for i in self.usual_ends]
            logging.warning(
                "data.tokenizer=%s has several ends of text, %s: %s ends documents; ?end_of_text=NAME sets another",
                *(self._source, ", ".join(named), named[0]),
            )


def split_file(spec: str) -> tuple[Path, str | None]:
    """Path of 'file:PATH?end_of_text=TOKEN', and the token's name or id, None where the usual names tell."""
    path, mark, given = spec.removeprefix("file:").partition("?end_of_text=")
    if mark and not given:
        raise DataError(f"data.tokenizer={spec!r}: {_ALLOWED}")
    return files.expanded(path, "data.tokenizer"), given if mark else None


def _token(tokenizer, given: str, source: str) -> int:
    """Id of a token, by name or, in digits, by itself. DataError where there is none."""
    if given.isdecimal():
        known = len(given) < 10 and tokenizer.id_to_token(int(given)) is not None
        found = int(given) if known else None
    else:
        found = tokenizer.token_to_id(given)
    if found is None:
        what = f"id {given}" if given.isdecimal() else f"name {given!r}"
        raise DataError(
            f"data.tokenizer={source!r}: no token has the {what}; allowed "
            f"as ?end_of_text= is the name or the id of a token, {_candidates(tokenizer)}"
        )
    return found


def _candidates(tokenizer) -> str:
    """What may end a text: the tokens that are apart from those of text, with their ids."""
    added = sorted(tokenizer.get_added_tokens_decoder())
    if not added:
        return "and it has no special tokens"
    more = f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else ""
    return f"e.g. {', '.join(_named(tokenizer, i) for i in added[:_SHOWN])}{more}"


def _named(tokenizer, token: int) -> str:
    return f"{tokenizer.id_to_token(token)!r} ({token})"


def identify(spec: str) -> str:
    """What a token file made with `spec` depends on besides the corpus: the spec, and a named file's content.

    Raises:
      DataError: an unknown spec, a vocabulary below 257, a file that does not exist, or a token that it lacks.
    """
    kind, _, value = spec.partition(":")
    if spec == "bytes":
        return spec
    if kind == "bpe" and value.isdecimal() and int(value) >= _MIN_BPE:
        return f"bpe:{int(value)}"
    if kind == "file" and value:
        path, end_of_text = split_file(spec)
        found = f"file:{hashlib.blake2b(_read(path, spec), digest_size=16).hexdigest()}"
        if end_of_text is not None and not end_of_text.isdecimal():  # the tokens of a name are those of its id
            end_of_text = str(given(spec).end_of_text)
        return found if end_of_text is None else f"{found}?end_of_text={end_of_text}"
    raise DataError(f"data.tokenizer={spec!r}: {_ALLOWED}")


def build(spec: str, train_documents: Callable[[], Iterable[bytes]]) -> Tokenizer:
    """The tokenizer of a spec that `identify` accepted; a BPE is trained on `train_documents`."""
    kind, _, value = spec.partition(":")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "file":
        found = given(spec)
        found.say_choice()
        return found
    from tokenizers import Tokenizer as Trainable
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Trainable(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(value),
        special_tokens=[END_OF_TEXT],  # they come first
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
