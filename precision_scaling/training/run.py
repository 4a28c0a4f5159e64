"""What is trained: a run, the shape it shares with others, cohorts of runs, and shards of a study."""

import bisect
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable
from typing import Any

from precision_scaling.model import mixture
from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize import operands as operands_lib
from precision_scaling.quantize import switches
from precision_scaling.quantize.precision import Precision
from precision_scaling.quantize.static import StaticPrecision
from precision_scaling.training import schedule
from precision_scaling.training.schedule import Schedule

LONGEST = 160  # letters of a precision in the name of a run: names of files have 255


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the runs of a cohort share: everything a compiled step depends on but the static precision."""

    size: str
    model: ModelConfig
    batch_size: int
    microbatches: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.sequence_length


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    steps: length of the schedule. schedule_name: of `schedule.NAMES`. decay_steps: the last ones, of a WSD schedule.
    imported: the model it is, where it was trained elsewhere. ema: of an average of its parameters, the decay; such a
    run is not trained, but measured beside the one that it is of.
    """

    shape: Shape
    precision: Precision
    steps: int
    warmup_steps: int
    peak_lr: float = dataclasses.field(metadata={"digest": "peak_rate"})
    seed: int
    ptq: bool
    imported: str = ""
    schedule_name: str = "cosine"
    decay_steps: int = 0
    ema: float = 0.0

    def averaged(self, decay: float) -> "Run":
        """The average of its parameters with that decay."""
        return dataclasses.replace(self, ema=decay)

    @property
    def average(self) -> str:
        """Which average of the parameters it is, "ema0.99"; "" for those at the end."""
        return f"ema{self.ema:g}" if self.ema else ""

    @property
    def schedule(self) -> Schedule:
        """The learning rate, step by step."""
        return schedule.of(self.schedule_name, self.peak_lr, self.steps, self.warmup_steps, self.decay_steps)

    @functools.cached_property
    def switch_steps(self) -> tuple[int, ...]:
        """The first step of each precision but the first."""
        if not self.precision.before:  # a model from elsewhere may have more steps than a schedule counts
            return ()
        decay_start = int(self.schedule.decay_start)
        return tuple(switches.step_of(when, self.steps, decay_start) for when, _ in self.precision.before)

    def precision_at(self, step: int) -> Precision:
        """What the update after `step` updates is computed at."""
        return self.precision.stages[bisect.bisect_right(self.switch_steps, step)]

    @functools.cached_property
    def branch_step(self) -> int:
        """Steps that the run may share with another: with a longer one where the rate does not depend on the length,
        and with one that goes on at the precision of its beginning; 0 for none."""
        stable = self.schedule_name in ("constant", "wsd")
        end = min(int(self.schedule.decay_start), self.steps - 1) if stable else self.steps - 1
        return min((end, *self.switch_steps))

    @functools.cached_property
    def trunk(self) -> "Run":
        """What runs have in common whose first steps are the same; the run itself where no other can share them."""
        beginning = dataclasses.replace(self, precision=self.precision.stages[0], ptq=False, ema=0.0)
        if self.schedule_name not in ("constant", "wsd"):
            return beginning
        return dataclasses.replace(beginning, steps=0, schedule_name="", decay_steps=0)

    @property
    def tokens(self) -> int:
        """D, training tokens."""
        return self.steps * self.shape.tokens_per_step

    @functools.cached_property
    def id(self) -> str:
        """Name of the run: readable, and different for runs that differ in anything but the study's common options."""
        if self.ema:
            return f"{self.averaged(0.0).id}-{self.average}"
        named = "" if self.schedule_name == "cosine" else f"-{self.schedule_name}"
        short = self.precision.short[:LONGEST]
        readable = f"{self.shape.size}-D{self.tokens}-{short}{named}-s{self.seed}"
        return f"{readable}-{digest(dataclasses.replace(self, ptq=False))}"

    @property
    def formats(self) -> tuple[tuple[str, mixture.Shares], ...]:
        """The number formats of each operand of the forward pass, bf16 where it is not quantized."""
        return tuple((name, self._mixture(name)) for name in operands_lib.OPERANDS)

    def bits(self, *operands: str) -> float:
        """Bits of an operand, by the mean noise where layers differ; of several, the fewest. bf16 counts as 16."""
        return min(mixture.bits(self._mixture(name)) for name in operands)

    def _mixture(self, name: str) -> mixture.Shares:
        return mixture.shares(self.precision, name, self.shape.model)


def digest(value: Any) -> str:
    """Six characters that name a dataclass by content.

    Fields at their defaults do not count, and a renamed field counts under its first name (metadata "digest"), so that
    old runs keep their names.
    """
    return hashlib.sha256(repr(_content(value)).encode()).hexdigest()[:6]


def _content(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return [_content(item) for item in value] if isinstance(value, tuple) else value
    fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {field.metadata.get("digest", field.name): _content(now) for field, now in fields if now != field.default}


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Runs of one shape that one compiled program serves."""

    shape: Shape
    static: StaticPrecision
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a study: the index-th of `count` shards, and of that the runs whose id the regex `only` finds."""

    index: int = 0
    count: int = 1
    only: str = ""

    def of(self, runs: Iterable[Run]) -> tuple[Run, ...]:
        """Every count-th run from the index-th on, so that the shards of a cohort share its long and its short runs.

        Runs that branch from one trunk stay together.
        """
        runs = tuple(runs)
        trunks = list(dict.fromkeys(run.trunk for run in runs))
        mine = set(trunks[self.index :: self.count])
        return tuple(run for run in runs if run.trunk in mine and re.search(self.only, run.id))

    @property
    def name(self) -> str:
        """Names the files of the worker that has this shard."""
        return f"{self.index}of{self.count}" + (f"-{digest(self.only)}" if self.only else "")


WHOLE = Shard()
