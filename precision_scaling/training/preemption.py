"""Whether a checkpoint would be written in time if the machine were taken away: a spot slice has 30 s after SIGTERM.

`cohort` tells it how long dispatches and checkpoints take; what it knows goes into metrics.jsonl.
"""

from absl import logging

from precision_scaling.runtime import hosts

NOTICE_SECONDS = 30.0  # between SIGTERM and the end of a spot TPU or VM (Google Cloud's documentation)


class Preemption:
    """The seconds of the last dispatch and the last checkpoint: SIGTERM is heard after the one and met by the other."""

    def __init__(self) -> None:
        self._dispatch = 0.0
        self._save: float | None = None
        self._warned = False

    def dispatched(self, seconds: float) -> None:
        """Takes note of a dispatch."""
        self._dispatch = seconds

    def saved(self, seconds: float) -> None:
        """Takes note of a checkpoint; the first that would come too late is a warning."""
        self._save = seconds
        if self._warned or self._dispatch + seconds <= NOTICE_SECONDS or not hosts.primary():
            return
        self._warned = True
        logging.warning(
            "a checkpoint took %.0f s after steps of %.0f s; a slice that is taken away has %.0f s after SIGTERM, and "
            "would lose the steps since the checkpoint before. Sooner with a bucket in the slice's region, fewer "
            "config.study.lanes or more hosts; less is lost with a smaller config.train.checkpoint_seconds",
            *(seconds, self._dispatch, NOTICE_SECONDS),
        )

    def described(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of the last checkpoint, if there was one."""
        return {} if self._save is None else {"save_seconds": round(self._save, 2)}
