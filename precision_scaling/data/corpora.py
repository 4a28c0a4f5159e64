"""Corpora by name: finds or builds a TFDS dataset and reads its documents. First stage of the data flow.

TFDS is imported only where a dataset is built or read: a corpus that is already tokenized is recognised without it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from precision_scaling.data import DataError, shards
from precision_scaling.data.source_files import files_digest, source_files
from precision_scaling.runtime import files

PYTHON_STDLIB = "python_stdlib"
PACKAGES = f"{PYTHON_STDLIB}/packages"
DOLMA = "dolma"
_READ_BLOCK = 256  # documents fetched from ArrayRecord at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset and what identifies its content.

    Attributes:
      name: TFDS name, e.g. "python_stdlib/stdlib-py3.11.7-0123456789ab:1.0.0".
      fingerprint: hex digest of the content; equal content has equal fingerprints on every machine.
      dataset_dir: where TFDS keeps the prepared dataset (of the project's own builders it may not exist yet).
      root: what the project's own builders read: python_stdlib's directory of sources, dolma's shards.
    """

    name: str
    fingerprint: str
    dataset_dir: str
    root: str = ""


def find(name: str, *, root: str, cache_dir: Path, tfds_dir: str) -> Source:
    """Identifies the corpus `name`; a TFDS dataset that is not prepared yet is downloaded and prepared first.

    Args:
      name: "python_stdlib", "python_stdlib/packages" (the sources of everything installed), "dolma", or any TFDS name
        ("lm1b", "wiki40b/en:1.3.0").
      root: for python_stdlib, a directory whose .py files stand in for this interpreter's library ("": the library);
        for dolma, a directory or pattern of json.gz shards, or a .txt file that lists them.
      cache_dir: where python_stdlib and notes are kept.
      tfds_dir: TFDS data_dir of other datasets ("": cache_dir/tfds).

    Raises:
      DataError: unknown name, no sources, or a dataset that cannot be prepared.
    """
    if name == PYTHON_STDLIB:
        return _find_python_sources(root, cache_dir / "tfds")
    if name == PACKAGES and not root:
        return _find_installed_packages(cache_dir / "tfds")
    if name == DOLMA:
        return _find_dolma(root, tfds_dir or os.fspath(cache_dir / "tfds"))
    if root:
        raise DataError(
            f"data.root={root!r} is for data.name={PYTHON_STDLIB!r} or {DOLMA!r}, not {name!r}: leave it empty"
        )
    dataset_dir = _resolve_tfds(name, cache_dir, tfds_dir or os.fspath(cache_dir / "tfds"))
    return Source(_dataset_name(dataset_dir), _dataset_fingerprint(dataset_dir), os.fspath(dataset_dir))


def _find_python_sources(root: str, tfds_dir: Path) -> Source:
    directory = (files.expanded(root, "data.root") if root else Path(sysconfig.get_path("stdlib"))).resolve()
    return _python_source(
        "tree" if root else f"stdlib-py{platform.python_version()}", os.fspath(directory), root, tfds_dir
    )


def _find_installed_packages(tfds_dir: Path) -> Source:
    directories = (Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib"))
    return _python_source("packages", os.pathsep.join(dict.fromkeys(map(os.fspath, directories))), "", tfds_dir)


def _python_source(kind: str, directories: str, root: str, tfds_dir: Path) -> Source:
    fingerprint, count = files_digest(source_files(directories))
    if count == 0:
        raise DataError(f"data.root={root!r}: no .py file below {directories}; name a directory of Python sources")
    # The content stands in the config's name, so another interpreter or an edited file never meets a stale dataset.
    config = f"{kind}-{fingerprint[:12]}"
    dataset_dir = os.path.join(tfds_dir, PYTHON_STDLIB, config, "1.0.0")
    return Source(f"{PYTHON_STDLIB}/{config}:1.0.0", fingerprint, dataset_dir, directories)


def _find_dolma(root: str, tfds_dir: str) -> Source:
    if not root:
        raise DataError(f"data.root='': for data.name={DOLMA!r} it names the json.gz shards")
    _, fingerprint = shards.find_files(root)
    config = f"shards-{fingerprint[:12]}"
    return Source(f"{DOLMA}/{config}:1.7.0", fingerprint, f"{tfds_dir}/{DOLMA}/{config}/1.7.0", root)


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
        with _one_line_errors(f"data.name={name!r}"), contextlib.redirect_stdout(sys.stderr):
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
            if source.name.startswith(DOLMA):
                from precision_scaling.data import dolma

                with _one_line_errors(f"data.name={DOLMA!r}"), contextlib.redirect_stdout(sys.stderr):
                    dolma.prepare(source.dataset_dir, shards.find_files(source.root)[0], beam_options)
            else:
                _build_python_sources(source)
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

        with _one_line_errors(f"data.name={source.name!r}"):
            builder = tfds.builder_from_directory(source.dataset_dir)
        features = dict(builder.info.features)
        text_features = sorted(key for key, kind in features.items() if isinstance(kind, tfds.features.Text))
        if feature not in text_features:
            raise DataError(f"data.feature={feature!r}: {source.name} has the text features {text_features}")
        with _one_line_errors(f"{split_option}={split!r}: {source.name} has the splits {sorted(builder.info.splits)}"):
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
            with _one_line_errors(self._where):
                records = self._records.__getitems__(list(range(first, min(first + _READ_BLOCK, stop))))
            for record in records:
                yield record[self._feature]


def _build_python_sources(source: Source) -> None:
    import tensorflow_datasets as tfds

    from precision_scaling.data.python_stdlib import PythonStdlib, SourceTree

    directory = Path(source.dataset_dir)
    config = SourceTree(name=directory.parent.name, root=source.root, fingerprint=source.fingerprint)
    with _quiet_tfds():
        builder = PythonStdlib(data_dir=os.fspath(directory.parents[2]), config=config, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock among the processes of a machine, so that one does the work and the others find it done."""
    with files.open_lock(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # freed by the kernel when the holder dies
        yield


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Nothing is downloaded and it takes a second: TFDS's bars and banners would only mislead."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """TFDS raises errors of many kinds and lengths: keeps the first line, and the rest as its cause."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DataError(f"{what}: {type(error).__name__}: {lines[0] if lines else 'no message'}") from error
