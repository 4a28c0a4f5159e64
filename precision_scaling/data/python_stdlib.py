"""TFDS builder of the embedded corpus: Python sources below a directory, by default the running interpreter's library.

Nothing is downloaded. `python_sources` chooses the config; importing this module imports TFDS.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from precision_scaling.data import DataError, python_sources
from precision_scaling.data.source import Source, quiet_tfds


@dataclasses.dataclass(eq=False)
class SourceTree(tfds.core.BuilderConfig):
    """Which sources: `python_sources.source_files` of `root`, whose `files_digest` is `fingerprint`."""

    root: str = ""
    fingerprint: str = ""


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """One example per source file, in sorted order; files that are not UTF-8 are left out and counted in metadata."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python sources found on this machine: the standard library, all packages, or a tree.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        files = list(python_sources.source_files(self.builder_config.root))
        if python_sources.files_digest(iter(files))[0] != self.builder_config.fingerprint:
            raise DataError(f"data.root={self.builder_config.root!r}: files changed while they were read; run it again")
        undecodable = 0
        for index, (path, content) in enumerate(files):
            try:
                yield index, {"text": content.decode("utf-8"), "path": path}
            except UnicodeDecodeError:
                undecodable += 1
        self.info.metadata["undecodable_files"] = undecodable


def build(source: Source, beam_options: str) -> None:
    """Writes the dataset."""
    del beam_options
    directory = Path(source.dataset_dir)
    config = SourceTree(name=directory.parent.name, root=source.root, fingerprint=source.fingerprint)
    with quiet_tfds():
        builder = PythonStdlib(data_dir=os.fspath(directory.parents[2]), config=config, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
