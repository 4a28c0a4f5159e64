"""TFDS builder of Dolma: the documents of its shards to ArrayRecord files, on Apache Beam.

A document has "id", "source" and "text". Beam is imported when shards are read: a dataset that is prepared needs none.
"""

import contextlib
import dataclasses
import shlex
import sys

import tensorflow_datasets as tfds

from precision_scaling.data import DataError, shards
from precision_scaling.data.source import Source, one_line_errors


@dataclasses.dataclass(eq=False)
class Shards(tfds.core.BuilderConfig):
    """Which files."""

    files: tuple[str, ...] = ()


class Dolma(tfds.core.GeneratorBasedBuilder):
    """One example per document, in an order that depends on the files' names alone."""

    VERSION = tfds.core.Version("1.7.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Documents of Dolma, as its shards have them.",
            features=tfds.features.FeaturesDict({"text": text, "id": text, "source": text}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        import apache_beam as beam

        files = list(self.builder_config.files)
        return beam.Create(files) | beam.Reshuffle() | beam.FlatMap(shards.read_shard)


def prepare(dataset_dir: str, files: tuple[str, ...], beam_options: str) -> None:
    """Writes the dataset to `dataset_dir`, which is TFDS_DIR/dolma/CONFIG/VERSION, by Beam with its options' flags."""
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise DataError("data.name='dolma' needs Apache Beam: pip install -e '.[beam]'") from error
    data_dir, config = dataset_dir.rsplit("/", 3)[0], dataset_dir.rsplit("/", 2)[-2]
    builder = Dolma(data_dir=data_dir, config=Shards(name=config, files=files), file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            try_download_gcs=False,
            # Lengths of features and such would be a second pass over all of it.
            compute_stats=tfds.download.ComputeStatsMode.SKIP,
            beam_options=PipelineOptions(flags=shlex.split(beam_options)),
        )
    )


def build(source: Source, beam_options: str) -> None:
    """Writes the dataset of the shards that `data.root` names."""
    with one_line_errors(f"data.name={shards.NAME!r}"), contextlib.redirect_stdout(sys.stderr):
        prepare(source.dataset_dir, shards.find_files(source.root)[0], beam_options)
