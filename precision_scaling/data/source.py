"""What identifies a corpus and where its dataset is, and what builders of datasets share."""

import contextlib
import dataclasses
import fcntl
import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from precision_scaling.data import DataError
from precision_scaling.runtime import files


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset and what identifies its content.

    Attributes:
      name: TFDS name, e.g. "python_stdlib/stdlib-py3.11.7-0123456789ab:1.0.0".
      fingerprint: hex digest of the content; equal content has equal fingerprints on every machine.
      dataset_dir: where TFDS keeps the prepared dataset (of the project's own builders it may not exist yet).
      root: what the project's own builders read; empty for datasets that are prepared.
      feature: that holds the text.
    """

    name: str
    fingerprint: str
    dataset_dir: str
    root: str = ""
    feature: str = "text"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a config says of its corpus: `data.root`, `data.feature`, and the directories of datasets and notes."""

    root: str
    feature: str
    tfds_dir: str
    notes_dir: Path


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of corpus that the project reads itself: one entry in `corpora.KINDS`.

    find: identifies the corpus, without TFDS; raises DataError. builder: the module whose build(source, beam_options)
    writes the dataset to `source.dataset_dir`, which is DIRECTORY/NAME/CONFIG/VERSION; it may import TFDS, as it is
    imported then. beam_options: the config's.
    """

    find: Callable[[Request], Source]
    builder: str

    def build(self, source: Source, beam_options: str) -> None:
        """Writes the dataset. Raises DataError."""
        importlib.import_module(self.builder).build(source, beam_options)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock among the processes of a machine, so that one does the work and the others find it done."""
    with files.open_lock(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # freed by the kernel when the holder dies
        yield


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Nothing is downloaded: TFDS's bars and banners would only mislead."""
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
def one_line_errors(what: str) -> Iterator[None]:
    """TFDS raises errors of many kinds and lengths: keeps the first line, and the rest as its cause."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DataError(f"{what}: {type(error).__name__}: {lines[0] if lines else 'no message'}") from error
