"""The corpus Dolma (Soldaini et al. 2024): finds its json.gz shards and reads their documents.

Files, or URLs of any kind that fsspec knows. No TFDS here: it is not needed where a corpus is already tokenized.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator

import fsspec

from precision_scaling.data import DataError
from precision_scaling.data.source import Kind, Request, Source
from precision_scaling.runtime import files

NAME = "dolma"

_SUFFIX = ".json.gz"
_ALLOWED = "a directory of *.json.gz files, a pattern of such files, or a .txt file with a path or URL in each line"


def read_shard(file: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (key, example) for each line of a shard. DataError for a file that is cut off or holds anything else."""
    name, number = file.rsplit("/", 1)[-1], 0
    try:
        with fsspec.open(file, "rb") as packed, gzip.open(packed, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                document = json.loads(line)
                text = {key: str(document[key]) for key in ("text", "id", "source")}
                yield f"{name}:{number}", text
    except (EOFError, OSError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}, line {number}: not a shard of Dolma ({type(error).__name__}: {error})") from error


def find_files(root: str) -> tuple[tuple[str, ...], str]:
    """Shards that `data.root` names, sorted, and a digest of their names and sizes (they may be terabytes).

    Raises:
      DataError: no shard there, two of one name, or a place that cannot be read.
    """
    try:
        found = _files(root)
        sizes = [_size(file) for file in found]
    except (OSError, ValueError, ImportError) as error:  # ValueError, ImportError: no such protocol, no driver for it
        raise DataError(f"data.root={root!r}: {type(error).__name__}: {error}; allowed is {_ALLOWED}") from error
    names = [file.rsplit("/", 1)[-1] for file in found]
    if not found:
        raise DataError(f"data.root={root!r}: no {_SUFFIX} file there; allowed is {_ALLOWED}")
    if len(set(names)) < len(names):  # the key of a document, and so its place in the order, begins with the name
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"data.root={root!r}: several files are called {repeated!r}")
    digest = hashlib.blake2b(digest_size=16)
    for name, size in sorted(zip(names, sizes, strict=True)):
        digest.update(f"{name}\0{size}\0".encode())
    return tuple(found), digest.hexdigest()


def _files(root: str) -> list[str]:
    root = root if "://" in root else str(files.expanded(root, "data.root"))
    if root.endswith(".txt"):
        _size(root)
        with fsspec.open(root, "rt") as lines:
            return sorted(line.strip() for line in lines if line.strip())
    system, path = fsspec.core.url_to_fs(root)
    found = system.glob(path) if any(sign in path for sign in "*?[") else system.find(path)
    return sorted(system.unstrip_protocol(file) for file in found if file.endswith(_SUFFIX))


def _size(file: str) -> int:
    """Bytes of a file. ValueError for what is none: a pipe on this machine would be waited for without end."""
    system, path = fsspec.core.url_to_fs(file)
    found = system.info(path)
    if found["type"] != "file":
        raise ValueError(f"{file}: is no file")
    return found["size"]


def find(request: Request) -> Source:
    """The shards that `data.root` names. Raises DataError."""
    if not request.root:
        raise DataError(f"data.root='': for data.name={NAME!r} it names the json.gz shards")
    _, fingerprint = find_files(request.root)
    config = f"shards-{fingerprint[:12]}"
    dataset_dir = f"{request.tfds_dir}/{NAME}/{config}/1.7.0"
    return Source(f"{NAME}/{config}:1.7.0", fingerprint, dataset_dir, request.root, request.feature)


KIND = Kind(find, "precision_scaling.data.dolma")
