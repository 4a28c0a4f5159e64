"""Corpora by name: finds or builds a TFDS dataset and reads its documents. First stage of the data flow.

TFDS is imported only where a dataset is built or read: a corpus that is already tokenized is recognised without it.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from precision_scaling.data import DataError, python_sources, shards, text_files
from precision_scaling.data.source import Kind, Request, Source, exclusive, one_line_errors
from precision_scaling.runtime import files

# {data.name: how it is found and built}; every other name is a dataset of TFDS.
KINDS: dict[str, Kind] = {
    python_sources.NAME: python_sources.TREE_KIND,
    python_sources.PACKAGES: python_sources.PACKAGES_KIND,
    shards.NAME: shards.KIND,
    text_files.NAME: text_files.KIND,
}
_READ_BLOCK = 256  # documents fetched from ArrayRecord at a time


def find(name: str, *, root: str, cache_dir: Path, tfds_dir: str, feature: str = "text") -> Source:
    """Identifies the corpus `name`; a TFDS dataset that is not prepared yet is downloaded and prepared first.

    Args:
      name: one of KINDS, or any TFDS name ("lm1b", "wiki40b/en:1.3.0").
      root: what a corpus of KINDS reads, as docs/data.md says for each.
      cache_dir: where notes, and the datasets of this machine's files are kept.
      tfds_dir: TFDS data_dir of other datasets ("": cache_dir/tfds).
      feature: that holds the text.

    Raises:
      DataError: unknown name, no sources, or a dataset that cannot be prepared.
    """
    directory = tfds_dir or os.fspath(cache_dir / "tfds")
    if kind := KINDS.get(name):
        return kind.find(Request(root, feature, directory, cache_dir))
    if root:
        named = ", ".join(repr(known) for known in KINDS if known != python_sources.PACKAGES)
        raise DataError(f"data.root={root!r} is for data.name={named}, not {name!r}: leave it empty")
    dataset_dir = _resolve_tfds(name, cache_dir, directory)
    return Source(_dataset_name(dataset_dir), _dataset_fingerprint(dataset_dir), os.fspath(dataset_dir))


def _resolve_tfds(name: str, cache_dir: Path, tfds_dir: str) -> Any:
    """Directory (epath) of the prepared dataset. A note of what TFDS made of the name saves importing TFDS again."""
    from etils import epath

    # A release of TFDS may move a name to a new version of its dataset.
    request = f"{name}\0{tfds_dir}\0{importlib.metadata.version('tensorflow-datasets')}"
    note = cache_dir / "resolved" / f"{hashlib.blake2b(request.encode(), digest_size=8).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # none yet, an older one, or damaged
        dataset_dir = epath.Path(files.read_sealed(note)["dataset_dir"])
        if (dataset_dir / "dataset_info.json").exists():
            return dataset_dir
    import tensorflow_datasets as tfds

    with exclusive(note.with_suffix(".lock")):  # of several processes, one downloads
        with one_line_errors(f"data.name={name!r}"), contextlib.redirect_stdout(sys.stderr):
            builder = tfds.builder(name, data_dir=tfds_dir, file_format="array_record", try_gcs=False)
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        files.write_sealed(note, {"name": name, "dataset_dir": os.fspath(builder.data_dir)})
        return epath.Path(builder.data_dir)


def _dataset_fingerprint(dataset_dir: Any) -> str:
    """Digest of a prepared dataset's description and the names and sizes of its files (shards may be terabytes)."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(dataset_dir.iterdir()):
        far = "://" in os.fspath(file)
        size = file.stat().length if far else os.stat(file).st_size  # epath's would ask for the owner's name
        digest.update(f"{file.name}\0{size}\0".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes() if far else files.read(os.fspath(file)))
    return digest.hexdigest()


def _dataset_name(dataset_dir: Any) -> str:
    """TFDS name with config and version, from the description beside the data."""
    info = json.loads((dataset_dir / "dataset_info.json").read_text())
    config = f"/{info['configName']}" if info.get("configName") else ""
    return f"{info['name']}{config}:{info['version']}"


def prepared(source: Source, lock_dir: Path, beam_options: str = "") -> Source:
    """The same source, with its dataset on disk: other processes read it from there."""
    from etils import epath

    if not source.root:
        return source
    dataset_dir = epath.Path(source.dataset_dir)
    with exclusive(lock_dir / f"{source.name.partition('/')[0]}.lock"):
        if not _is_sound(source.dataset_dir):
            if dataset_dir.exists():
                dataset_dir.rmtree()
            if dataset_dir.parent.exists():
                for leftover in dataset_dir.parent.glob("incomplete.*"):  # of a process that was killed
                    leftover.rmtree()
            KINDS[source.name.partition("/")[0]].build(source, beam_options)
            _seal(source.dataset_dir)
    return dataclasses.replace(source, root="")


def _is_sound(dataset_dir: str) -> bool:
    """Whether a dataset is there, and as it was prepared: its description and the sizes of its files.

    ArrayRecord has checksums of what is in them. An object store keeps what it is given.
    """
    from etils import epath

    if not (epath.Path(dataset_dir) / "dataset_info.json").exists():
        return False
    if "://" in dataset_dir:
        return True
    try:
        if not _seal_path(dataset_dir).exists():  # an older one: from now on it has one
            _seal(dataset_dir)
        if files.read_sealed(_seal_path(dataset_dir)) != {"dataset": _dataset_fingerprint(epath.Path(dataset_dir))}:
            raise ValueError("not as it was prepared")
        return True
    except ValueError as error:
        logging.warning("%s is damaged (%s): preparing it again", dataset_dir, error)
        return False


def _seal(dataset_dir: str) -> None:
    from etils import epath

    if "://" not in dataset_dir:
        files.write_sealed(_seal_path(dataset_dir), {"dataset": _dataset_fingerprint(epath.Path(dataset_dir))})


def _seal_path(dataset_dir: str) -> Path:
    return Path(f"{dataset_dir}.json")


class Documents:
    """The documents of one split of a source, as UTF-8 bytes, in the dataset's order.

    Raises (on construction):
      DataError: unknown split, a feature that is not text, or a dataset that cannot be read without TensorFlow.
    """

    def __init__(self, source: Source, split: str, feature: str, *, split_option: str = "data.split"):
        import tensorflow_datasets as tfds

        with one_line_errors(f"data.name={source.name!r}"):
            builder = tfds.builder_from_directory(source.dataset_dir)
        features = dict(builder.info.features)
        text_features = sorted(key for key, kind in features.items() if isinstance(kind, tfds.features.Text))
        if feature not in text_features:
            raise DataError(f"data.feature={feature!r}: {source.name} has the text features {text_features}")
        with one_line_errors(f"{split_option}={split!r}: {source.name} has the splits {sorted(builder.info.splits)}"):
            self._records = builder.as_data_source(split=split)
        self._feature = feature
        self._where = f"data.name={source.name!r}: cannot read {source.dataset_dir} (delete it to prepare it again)"
        self.undecodable = int((builder.info.metadata or {}).get("undecodable_files", 0))
        self.bytes = sum(each.num_bytes for each in builder.info.splits.values())  # of all splits, as they are stored

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Documents start to stop - 1."""
        for first in range(start, stop, _READ_BLOCK):
            with one_line_errors(self._where):
                records = self._records.__getitems__(list(range(first, min(first + _READ_BLOCK, stop))))
            for record in records:
                yield record[self._feature]
