"""The embedded corpora: which files they read, and that no content comes twice where packages copy each other."""

import sysconfig
from pathlib import Path

import pytest

from precision_scaling.data import DataError, corpora, python_sources


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A library with one package beside it that has a file of its own and a copy of the library's."""
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    (packages / "pkg").mkdir(parents=True)
    (library / "a.py").write_text("x = 1\n")
    (library / "b.py").write_text("y = 2\n")
    (packages / "pkg" / "copy.py").write_text("x = 1\n")
    (packages / "pkg" / "own.py").write_text("z = 3\n")
    (packages / "pkg" / "data.txt").write_text("no source")
    paths = {"stdlib": library, "purelib": packages, "platlib": packages}
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(paths[kind]))
    return tmp_path


def read(source):
    source = corpora.prepared(source, Path(source.dataset_dir).parents[2])
    documents = corpora.Documents(source, "train", "text")
    return list(documents.read(0, len(documents)))


def test_packages_are_the_library_and_all_that_is_installed_each_content_once(installed):
    cache = installed / "cache"
    library = corpora.find(python_sources.NAME, root="", cache_dir=cache, tfds_dir="")
    packages = corpora.find(python_sources.PACKAGES, root="", cache_dir=cache, tfds_dir="")
    assert read(library) == [b"x = 1\n", b"y = 2\n"]
    assert read(packages) == [b"x = 1\n", b"y = 2\n", b"z = 3\n"]
    assert library.fingerprint != packages.fingerprint and library.dataset_dir != packages.dataset_dir
    (installed / "lib" / "site-packages" / "pkg" / "own.py").write_text("z = 4\n")
    assert (
        corpora.find(python_sources.PACKAGES, root="", cache_dir=cache, tfds_dir="").fingerprint != packages.fingerprint
    )


def test_copies_within_one_tree_stay(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("same\n")
    assert [path for path, _ in python_sources.source_files(tmp_path)] == ["a.py", "b.py"]


def test_packages_take_no_root(installed):
    with pytest.raises(DataError, match=r"data\.root='elsewhere'"):
        corpora.find(python_sources.PACKAGES, root="elsewhere", cache_dir=Path("cache"), tfds_dir="")
