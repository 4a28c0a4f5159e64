"""TFDS builder of the corpus "text". `text_files` finds and reads the files; importing this module imports TFDS."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from precision_scaling.data import DataError, text_files
from precision_scaling.data.source import Request, Source, quiet_tfds
from precision_scaling.runtime.progress import progress_bar


@dataclasses.dataclass(eq=False)
class TextFilesConfig(tfds.core.BuilderConfig):
    """Which files, and where records that are no documents are counted."""

    source: Source | None = None
    broken: text_files.Broken = dataclasses.field(default_factory=text_files.Broken)


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """One example per document, in the files' order."""

    name = text_files.NAME
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text from files of the user's own.",
            features=tfds.features.FeaturesDict({self.builder_config.source.feature: tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        source, broken = self.builder_config.source, self.builder_config.broken
        found, index = text_files.find_files(source.root), 0
        sizes = [path.stat().st_size for _, path in found]
        with progress_bar(total=sum(sizes), desc="reading text", unit="B", unit_scale=True) as bar:
            for (name, path), size in zip(found, sizes, strict=True):
                for text in text_files.documents(path, name, source.feature, broken):
                    yield index, {source.feature: text}
                    index += 1
                bar.update(size)
        if not index:
            named = "; ".join(broken.named) or "all files are empty"
            raise DataError(f"data.root={source.root!r}: no document in {len(found)} files ({named})")
        self.info.metadata["undecodable_files"] = broken.count


def build(source: Source, beam_options: str) -> None:
    """Writes the dataset. A warning counts the records that are no documents; DataError where nothing else is there."""
    del beam_options
    directory, broken = Path(source.dataset_dir), text_files.Broken()
    config = TextFilesConfig(name=directory.parent.name, source=source, broken=broken)
    with quiet_tfds():
        builder = TextFiles(data_dir=os.fspath(directory.parents[2]), config=config, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    again = text_files.find(Request(source.root, source.feature, "", directory.parents[3]))
    if again.fingerprint != source.fingerprint:
        raise DataError(f"data.root={source.root!r}: files changed while they were read; run it again")
    if broken.count:
        logging.warning("data.root=%s: %d records are left out: %s", source.root, broken.count, "; ".join(broken.named))
