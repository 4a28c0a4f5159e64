"""Python source files below a directory, in a stable order, and their fingerprint."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from precision_scaling.runtime import files

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
