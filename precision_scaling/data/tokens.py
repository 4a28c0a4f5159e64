"""Token files: a corpus tokenized once into memory-mapped arrays, split into train and validation by document.

Documents (`corpora`) and a tokenizer come in; `prepare` leaves one directory per (content, tokenizer, split) with
train.bin, validation.bin and meta.json, and returns the arrays that `loader` cuts into batches.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from precision_scaling.data import DataError, corpora
from precision_scaling.data import tokenizer as tokenizers

_LAYOUT = 1  # stands in every name: raise it when the same options would give other tokens
_SPLITS = ("train", "validation")
_ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at a time: enough for its threads, little memory


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
      train, validation: token ids, (tokens,), memory-mapped, uint16 or uint32; every document ends with end_of_text.
      vocab_size: number of ids, end_of_text included.
      end_of_text: the id between documents.
      directory: where the files are.
      meta: the JSON beside the tokens.
    """

    train: np.memmap
    validation: np.memmap
    vocab_size: int
    end_of_text: int
    directory: Path
    meta: dict[str, Any]

    def load_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that made the tokens."""
        spec = self.meta["tokenizer"]
        if spec == "bytes":
            return tokenizers.ByteTokenizer()
        return tokenizers.from_file(self.directory / "tokenizer.json", spec)


def prepare(
    *,
    name: str,
    root: str,
    split: str,
    validation_split: str,
    feature: str,
    tokenizer: str,
    validation_fraction: float,
    split_seed: int,
    cache_dir: str,
    tfds_dir: str,
    progress: bool = True,
) -> Corpus:
    """Tokenizes a corpus, or finds it tokenized. The arguments are those of `config.data`: `prepare(**config.data)`.

    Exact duplicates and empty documents are dropped. A document is held out for validation by a hash of its content
    and `split_seed`: the choice depends on nothing else. With `validation_split` named, its documents are the
    validation set, and training documents equal to one of them are dropped. Near-duplicates are not looked for.

    Safe to call from several processes at once: one writes, the others wait and read. A directory appears complete or
    not at all; one that was damaged since is written again.

    Raises:
      DataError: an option or corpus that cannot be used.
    """
    if not validation_split and not 0 < validation_fraction < 1:
        raise DataError(f"data.validation_fraction={validation_fraction}: allowed is 0 < fraction < 1")
    tokenizer_id = tokenizers.identify(tokenizer)
    cache = Path(cache_dir or _user_cache()).expanduser()
    try:
        source = corpora.find(name, root=root, cache_dir=cache, tfds_dir=tfds_dir)
        held_out = [validation_split] if validation_split else [validation_fraction, split_seed]
        identity = json.dumps([_LAYOUT, source.fingerprint, split, feature, held_out, tokenizer_id])
        key = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        label = f"{name}-{tokenizer_id}"[:48].translate(str.maketrans("/:", "__"))
        directory = cache / "tokens" / f"{label}-{key}"
        if (corpus := _open(directory)) is not None:
            return corpus
        with corpora.exclusive(directory.with_name(f"{directory.name}.lock")):
            if (corpus := _open(directory)) is not None:  # another process was first
                return corpus
            documents = _Documents(source, split, validation_split, feature, validation_fraction, split_seed, progress)
            options = {
                "hash": key,
                "name": name,
                "source": source.name,
                "split": split,
                "validation_split": validation_split,
                "feature": feature,
                "tokenizer": tokenizer,
                "validation_fraction": None if validation_split else validation_fraction,
                "split_seed": None if validation_split else split_seed,
            }
            _write(directory, documents, options)
            return _open(directory)
    except OSError as error:  # no permission, disk full; the message names the file
        raise DataError(f"data.name={name!r}, data.cache_dir={str(cache)!r}: {error}") from error


class _Documents:
    """Iterates (side, text), 0 train and 1 validation, without duplicates; `counts` describes the last pass."""

    def __init__(self, source, split, validation_split, feature, fraction, seed, progress):
        self._train = corpora.Documents(source, split, feature)
        self._validation = None
        if validation_split:
            self._validation = corpora.Documents(
                source, validation_split, feature, split_option="data.validation_split"
            )
        self._threshold = fraction * 2.0**64
        self._salt = f"split/{seed}".encode()
        self._progress = progress
        self.counts: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return self.read("tokenizing")

    def read(self, task: str) -> Iterator[tuple[int, bytes]]:
        self.counts = collections.Counter(undecodable_skipped=self._train.undecodable)
        seen: set[bytes] = set()
        total = len(self._train) + (len(self._validation) if self._validation else 0)
        with tqdm(total=total, desc=task, unit=" documents", disable=None if self._progress else True) as bar:
            # A named validation split goes first, so that `seen` keeps its documents out of train.
            for side, documents in ((1, self._validation), (None, self._train)):
                for text in documents or ():
                    bar.update()
                    if self._keep(text, seen):
                        yield (self._side(text) if side is None else side), text

    def _keep(self, text: bytes, seen: set[bytes]) -> bool:
        if not text:
            self.counts["empty_dropped"] += 1
            return False
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if digest in seen:
            self.counts["duplicates_dropped"] += 1
            return False
        seen.add(digest)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            self.counts["undecodable_skipped"] += 1
            return False
        return True

    def _side(self, text: bytes) -> int:
        if self._validation is not None:
            return 0
        draw = int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self._salt).digest(), "big")
        return int(draw < self._threshold)


def _write(directory: Path, documents: _Documents, options: dict[str, Any]) -> None:
    """Tokenizes into a temporary directory and renames it; the caller holds the lock."""
    for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a process that was killed
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tokenizer = tokenizers.build(
            options["tokenizer"], lambda: (text for side, text in documents.read("training the tokenizer") if side == 0)
        )
        tokenizer.save(temporary / "tokenizer.json")
        meta = options | _write_tokens(temporary, documents, tokenizer)
        for side in _SPLITS:
            if meta["documents"][side] == 0:
                option = "validation_split" if options["validation_split"] else "validation_fraction"
                raise DataError(
                    f"data.{option}={options[option]!r}: no {side} document among the"
                    f" {sum(meta['documents'].values())} distinct ones of {options['source']};"
                    " choose another fraction, data.split_seed or split"
                )
        meta["versions"] = {"python": platform.python_version(), "tokenizers": version("tokenizers")}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        temporary.chmod(0o755)
        if directory.exists():  # damaged, or _open would have taken it
            directory.rename(directory.parent / f".{directory.name}.damaged")
        temporary.rename(directory)
        _sync(directory.parent)
    finally:
        for leftover in directory.parent.glob(f".{directory.name}.*"):
            shutil.rmtree(leftover)


def _write_tokens(directory: Path, documents: _Documents, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Writes train.bin and validation.bin; returns what meta.json says about them."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    sums = {key: dict.fromkeys(_SPLITS, 0) for key in ("tokens", "documents", "bytes")}
    digests = [hashlib.blake2b(digest_size=16) for _ in _SPLITS]
    with open(directory / "train.bin", "wb") as train, open(directory / "validation.bin", "wb") as validation:
        for block in _blocks(documents):
            for side, file in enumerate((train, validation)):
                texts = [text for text_side, text in block if text_side == side]
                stream = _join(tokenizer.encode(texts), tokenizer.end_of_text, dtype)
                stream.tofile(file)
                digests[side].update(stream)
                for key, value in (("tokens", stream.size), ("documents", len(texts)), ("bytes", sum(map(len, texts)))):
                    sums[key][_SPLITS[side]] += value
    return {
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "dtype": dtype.name,
        **sums,
        "content_hash": {split: digest.hexdigest() for split, digest in zip(_SPLITS, digests, strict=True)},
        **{key: documents.counts[key] for key in ("duplicates_dropped", "empty_dropped", "undecodable_skipped")},
    }


def _blocks(documents: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    block, size = [], 0
    for document in documents:
        block.append(document)
        size += len(document[1])
        if size >= _ENCODE_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _join(encoded: list[np.ndarray], end_of_text: int, dtype: np.dtype) -> np.ndarray:
    stream = np.full(sum(map(len, encoded)) + len(encoded), end_of_text, dtype)
    start = 0
    for ids in encoded:
        stream[start : start + len(ids)] = ids
        start += len(ids) + 1
    return stream


def _open(directory: Path) -> Corpus | None:
    """The corpus in a directory, or None where there is none or its files are not what meta.json says."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        dtype = np.dtype(meta["dtype"])
        arrays = {}
        for split in _SPLITS:
            path, count = directory / f"{split}.bin", meta["tokens"][split]
            if path.stat().st_size != count * dtype.itemsize:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {count * dtype.itemsize}")
            arrays[split] = np.memmap(path, dtype, mode="r", shape=(count,))
        ids = {key: meta[key] for key in ("vocab_size", "end_of_text")}
        return Corpus(**arrays, **ids, directory=directory, meta=meta)
    except (OSError, ValueError, KeyError) as error:
        if directory.exists():
            logging.warning("%s is damaged (%s): writing it again", directory, error)
        return None


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "precision_scaling"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
