"""Token files: a corpus tokenized once into memory-mapped parts, split into train and validation by document.

Documents (`corpora`) and a tokenizer come in; `prepare` leaves one directory per (content, tokenizer, split) with
train-00000.bin and so on, validation-00000.bin and so on and meta.json, and returns what `loader` cuts into batches.

Everything in the directory is checked when it is opened: meta.json by its fingerprint, the tokens and the tokenizer by
the digests in it. See `parts.digests` for what that costs.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from precision_scaling.data import DataError, corpora, remote, tokenize
from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.data import workers as workers_lib
from precision_scaling.data.parts import TokenFile, TokenParts, digests, open_tokens
from precision_scaling.data.tokenize import SIDES
from precision_scaling.runtime import files

_LAYOUT = 1  # stands in every name: raise it when the same options would give other tokens
_SUMS = ("tokens", "documents", "bytes")


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

    train: np.ndarray | TokenParts
    validation: np.ndarray | TokenParts
    vocab_size: int
    end_of_text: int
    directory: Path
    meta: dict[str, Any]

    def last_tokens(self) -> dict[str, int]:
        """Of each side."""
        ends = {"train": self.train, "validation": self.validation}
        return {side: ids.last() if isinstance(ids, TokenParts) else int(ids[-1]) for side, ids in ends.items()}

    def load_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that made the tokens."""
        return tokenizers.load(self.meta["tokenizer"], self.directory / "tokenizer.json")


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the ids in a token file."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


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
    hash: str,
    cache_dir: str,
    tfds_dir: str,
    workers: int,
    beam_options: str,
    within_documents: bool = False,
    progress: bool = True,
) -> Corpus:
    """Tokenizes a corpus, or finds it tokenized. The arguments are those of `config.data`: `prepare(**config.data)`.

    Exact duplicates and empty documents are dropped. A document is held out for validation by a hash of its content
    and `split_seed`: the choice depends on nothing else. With `validation_split` named, its documents are the
    validation set, and training documents equal to one of them are dropped. Near-duplicates are not looked for.

    `within_documents` is for the model (`model.documents`): no token depends on it.

    `hash`, where it is not empty, is the one that the corpus must have: content, split and tokenizer.

    `workers` processes share the work (0: one per core); the tokens do not depend on their number. What a process that
    was killed had finished is kept and not done again. `cache_dir` may be a URL that fsspec knows (gs://, s3://): token
    files are then stored there and copied to this machine's own cache.

    Safe to call from several processes at once: one writes, the others wait and read. A directory appears complete or
    not at all; one that was damaged since is written again, which a warning says.

    Raises:
      DataError: an option or corpus that cannot be used.
    """
    if not validation_split and not 0 < validation_fraction < 1:
        raise DataError(f"data.validation_fraction={validation_fraction}: allowed is 0 < fraction < 1")
    tokenizer_id = tokenizers.identify(tokenizer)
    if workers < 0:
        raise DataError(f"data.workers={workers}: allowed is 0 (one per core) or more")
    # Token files on an object store are read from a copy on this machine.
    far = cache_dir if remote.is_remote(cache_dir) else ""
    option = "data.cache_dir"
    cache = files.expanded(cache_dir, option) if cache_dir and not far else files.user_cache(option)
    salt = f"split/{split_seed}".encode()
    try:
        source = corpora.find(name, root=root, cache_dir=cache, tfds_dir=tfds_dir, feature=feature)
        held_out = [validation_split] if validation_split else [validation_fraction, split_seed]
        identity = json.dumps([_LAYOUT, source.fingerprint, split, feature, held_out, tokenizer_id])
        key = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        if hash not in ("", key):
            raise DataError(f"data.hash={hash!r}: {source.name}, split and tokenized as asked, has the hash {key!r}")
        label = f"{name}-{tokenizer_id}"[:48].translate(str.maketrans("/:", "__"))
        directory = cache / "tokens" / f"{label}-{key}"
        far = far and f"{far.rstrip('/')}/tokens/{directory.name}"
        if (corpus := _open(directory, key)) is not None:
            return corpus
        with corpora.exclusive(directory.with_name(f"{directory.name}.lock")):
            if (corpus := _open(directory, key)) is not None:  # another process was first
                return corpus
            if far and _fetch(far, directory) and (corpus := _open(directory, key)) is not None:
                return corpus
            source = corpora.prepared(source, cache / "tfds", beam_options)
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
            texts = [tokenize.Texts(source, split, "data.split", feature, None, validation_fraction, salt)]
            if validation_split:  # first, so that its documents are those that stay
                texts = [
                    tokenize.Texts(source, validation_split, "data.validation_split", feature, 1, 0.0, b""),
                    tokenize.Texts(source, split, "data.split", feature, 0, 0.0, b""),
                ]
            _write(directory, texts, options, workers, progress)
            if (corpus := _open(directory, key)) is None:
                raise DataError(f"{directory}: what was written there cannot be read back; is the disk sound?")
            if far:
                remote.store(directory, far)
            return corpus
    except OSError as error:  # no permission, disk full; the message names the file
        raise DataError(f"data.name={name!r}, data.cache_dir={str(cache)!r}: {error}") from error


def _write(
    directory: Path, texts: Sequence[tokenize.Texts], options: dict[str, Any], workers: int, progress: bool
) -> None:
    """Tokenizes in a directory beside it and renames that; the caller holds the lock.

    What a process that was killed had finished is kept there and used: `directory` says all that the tokens depend on.
    """
    partial = _partial(directory)
    try:
        size = tokenize.size(texts)
        with workers_lib.pool(tokenize.processes(workers, size)) as run:
            plan = tokenize.plan(texts, partial, run, progress)
            spec = options["tokenizer"]
            learn = lambda: tokenizers.build(spec, lambda: tokenize.training_documents(texts, plan)).text()
            text = tokenize.text_of_tokenizer(partial, learn)
            if text:
                files.atomic_write(partial / "tokenizer.json", text)
            tokenizer = tokenizers.load(spec, partial / "tokenizer.json")
            dtype = token_dtype(tokenizer.vocab_size)
            parts = tokenize.write(texts, plan, spec, partial, dtype, run, progress)
        meta = {
            **options,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "dtype": dtype.name,
            **{key: {side: sum(part[key][side] for part in parts) for side in SIDES} for key in _SUMS},
            "content_hash": {side: _digest(part["hash"][side] for part in parts) for side in SIDES},
            "tokenizer_hash": _digest([text]),
            **plan.counts,
            "parts": {side: [part["tokens"][side] for part in parts] for side in SIDES},
            "versions": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
        }
        for side in SIDES:
            if meta["documents"][side] == 0:
                option = "validation_split" if options["validation_split"] else "validation_fraction"
                raise DataError(
                    f"data.{option}={options[option]!r}: no {side} document among the"
                    f" {sum(meta['documents'].values())} distinct ones of {options['source']};"
                    " choose another fraction, data.split_seed or split"
                )
    except DataError:  # a mistake: nothing there is of use
        shutil.rmtree(partial)
        raise
    finally:
        tokenize.forget()
    files.write_sealed(partial / "meta.json", meta)
    kept = {"meta.json", *(one.path.name for one in contents(partial, meta))}
    _install(partial, directory, kept | ({"tokenizer.json"} if text else set()))


def _fetch(url: str, directory: Path) -> bool:
    """Copies the directory at `url` from an object store; False where there is none. The caller holds the lock."""
    partial = _partial(directory)
    names = remote.fetch(url, partial)
    if names:
        _install(partial, directory, set(names))
    return bool(names)


def _partial(directory: Path) -> Path:
    """A directory beside it to write in, or what a process of the same user that was killed has left there."""
    partial = directory.with_name(f".{directory.name}.{os.geteuid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    found = partial.lstat()
    if not partial.is_dir() or partial.is_symlink() or found.st_uid != os.geteuid():
        raise DataError(f"{partial}: is not a directory of this user; delete it")
    for path in partial.iterdir():
        if not path.is_file():
            _remove(path)
    return partial


def _install(partial: Path, directory: Path, kept: set[str]) -> None:
    """Gives the finished files their directory's name, and removes everything else there and beside it."""
    for path in partial.iterdir():
        if path.name not in kept:
            _remove(path)
    tokenize.sync(partial)
    if os.path.lexists(directory):  # damaged, or it would have been taken
        directory.rename(directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.damaged"))
    partial.rename(directory)
    tokenize.sync(directory.parent)
    for leftover in directory.parent.iterdir():
        if leftover.name.startswith(f".{directory.name}."):
            _remove(leftover)


def _remove(path: Path) -> None:
    """Whatever it is; what belongs to another user stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(PermissionError):
            path.unlink()


def _digest(hashes: Iterable[str]) -> str:
    return hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def contents(directory: Path, meta: dict[str, Any], sides: Sequence[str] = SIDES) -> list[TokenFile]:
    """The token files of these sides, in their order."""
    dtype = np.dtype(meta["dtype"])
    return [
        TokenFile(directory / tokenize.part_name(side, i), count, dtype)
        for side in sides
        for i, count in enumerate(meta["parts"][side])
    ]


def _open(directory: Path, key: str) -> Corpus | None:
    """The corpus in a directory, or None where there is none or its files are not what was written.

    key: of what was asked for.
    """
    try:
        meta = files.read_sealed(directory / "meta.json", older=lambda found: "tokenizer_hash" not in found)
        if meta["hash"] != key:
            raise ValueError(f"meta.json is that of {meta['hash']}")
        tokens = {side: open_tokens(contents(directory, meta, [side]), np.dtype(meta["dtype"])) for side in SIDES}
        everything = contents(directory, meta)
        found = digests(everything, meta["vocab_size"], directory.with_name(f"{directory.name}.checked"))
        for side in SIDES:
            hashes = [digest for one, digest in zip(everything, found, strict=True) if one.path.name.startswith(side)]
            if _digest(hashes) != meta["content_hash"][side]:
                raise ValueError(f"the {side} tokens are not those that were written")
        text = "" if meta["tokenizer"] == "bytes" else files.read(directory / "tokenizer.json").decode("utf-8")
        if "tokenizer_hash" not in meta:  # older: from now on it has one, and a fingerprint
            meta["tokenizer_hash"] = _digest([text])
            with contextlib.suppress(OSError):  # another user's
                files.write_sealed(directory / "meta.json", meta)
        if _digest([text]) != meta["tokenizer_hash"]:
            raise ValueError("tokenizer.json is not what was written")
        return Corpus(tokens["train"], tokens["validation"], meta["vocab_size"], meta["end_of_text"], directory, meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if os.path.lexists(directory):
            logging.warning("%s is damaged (%s): making it again", directory, error)
        return None
