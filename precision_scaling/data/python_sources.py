"""Corpora of Python sources: this interpreter's library, all that is installed, or the tree below a directory."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from precision_scaling.data import DataError
from precision_scaling.data.source import Kind, Request, Source
from precision_scaling.runtime import files

NAME = "python_stdlib"
PACKAGES = f"{NAME}/packages"

# Packages installed beside the library are not the library; caches hold no source.
_SKIPPED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "__pycache__"})


def source_files(root: Path | str) -> Iterator[tuple[str, bytes]]:
    """Yields (path relative to root with "/", content) of every .py file below root, in sorted order.

    Of several roots, joined as in PATH, no content comes twice: packages bring copies of each other.
    """
    roots = os.fspath(root).split(os.pathsep)
    if len(roots) == 1:
        yield from _files_below(roots[0])
        return
    seen = set()
    for i, each in enumerate(roots):
        for path, content in _files_below(each):
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield f"{i}/{path}", content


def _files_below(root: str) -> Iterator[tuple[str, bytes]]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
        prefix = directory[len(root) :].lstrip(os.sep).replace(os.sep, "/")
        for file in sorted(names):
            if file.endswith(".py"):
                yield (f"{prefix}/{file}" if prefix else file), files.read(os.path.join(directory, file))


def files_digest(files: Iterator[tuple[str, bytes]]) -> tuple[str, int]:
    """Hex digest of names and contents, and the number of files."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for path, content in files:
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
        count += 1
    return digest.hexdigest(), count


def find_tree(request: Request) -> Source:
    """The library, or the tree that `data.root` names. Raises DataError."""
    root = request.root
    directory = (files.expanded(root, "data.root") if root else Path(sysconfig.get_path("stdlib"))).resolve()
    return _source("tree" if root else f"stdlib-py{platform.python_version()}", os.fspath(directory), request)


def find_packages(request: Request) -> Source:
    """The library and every installed package. Raises DataError."""
    if request.root:
        raise DataError(f"data.root={request.root!r}: allowed is '' with data.name={PACKAGES!r}")
    directories = (Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib"))
    return _source("packages", os.pathsep.join(dict.fromkeys(map(os.fspath, directories))), request)


def _source(kind: str, directories: str, request: Request) -> Source:
    fingerprint, count = files_digest(source_files(directories))
    if count == 0:
        allowed = "a directory of Python sources"
        raise DataError(f"data.root={request.root!r}: no .py file below {directories}; allowed is {allowed}")
    # The content stands in the config's name, so another interpreter or an edited file never meets a stale dataset.
    config = f"{kind}-{fingerprint[:12]}"
    # Read from this machine, so kept on it, wherever other datasets are.
    dataset_dir = request.notes_dir / "tfds" / NAME / config / "1.0.0"
    return Source(f"{NAME}/{config}:1.0.0", fingerprint, os.fspath(dataset_dir), directories, request.feature)


BUILDER = "precision_scaling.data.python_stdlib"
TREE_KIND, PACKAGES_KIND = Kind(find_tree, BUILDER), Kind(find_packages, BUILDER)
