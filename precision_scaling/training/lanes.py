"""Which run trains in which lane, when a trunk is branched from, and how far a dispatch goes: decisions, no devices.

A cohort has a fixed number of lanes. A lane holds a run at some step, or is free.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from precision_scaling.training import rewind
from precision_scaling.training.feed import Chunk
from precision_scaling.training.run import Run

DISPATCH_SECONDS = 10.0  # that a dispatch should take at most: stops, saves and the progress bar wait for its end


@dataclasses.dataclass(frozen=True)
class Lane:
    """A run under way, how many of its steps are done, and the batches of its stream that it leaves out."""

    run: Run
    step: int
    left_out: tuple[int, ...] = ()

    @property
    def position(self) -> tuple[int, int]:
        """(seed, number of the next batch), which name its tokens."""
        return self.run.seed, rewind.batch_of(self.step, self.left_out)

    def after(self, steps: int) -> "Lane | None":
        """The lane when so many steps more are done; None, a free lane, where the run has ended by then."""
        return dataclasses.replace(self, step=self.step + steps) if self.step + steps < self.run.steps else None

    def leads_to(self, run: Run) -> bool:
        """Whether the branch step of another run lies ahead of this one, or here, on the prefix that they share."""
        return (
            0 < run.branch_step <= self.run.branch_step and self.step <= run.branch_step and self.run.trunk == run.trunk
        )


Lanes = Sequence[Lane | None]


def next_run(lanes: Lanes, waiting: Sequence[Run], has_branch: Callable[[Run], bool]) -> Run | None:
    """The first waiting run whose branch state is there already, or that no lane under way will bring to it."""
    awaited = lambda run: any(lane and lane.leads_to(run) for lane in lanes) and not has_branch(run)
    return next((run for run in waiting if not awaited(run)), None)


def branches(lanes: Lanes, waiting: Sequence[Run], has_branch: Callable[[Run], bool]) -> list[tuple[int, Lane, Run]]:
    """(lane's index, lane, waiting run) where a lane is at a branch step whose state is still to be saved."""
    return [
        (i, lane, run)
        for i, lane in enumerate(lanes)
        if lane
        for run in waiting
        if lane.leads_to(run) and lane.step == run.branch_step and not has_branch(run)
    ]


def next_chunk(lanes: Lanes, waiting: Sequence[Run], most_steps: int) -> Chunk:
    """What is trained on next: all lanes, until the next run ends, is branched from or changes its precision, or for as
    long as a dispatch.

    A batch that is left out ends a chunk, too: its batches follow each other.
    """
    busy = [lane for lane in lanes if lane]
    ends = [lane.run.steps - lane.step for lane in busy]
    to_branches = [run.branch_step - lane.step for lane in busy for run in waiting if lane.leads_to(run)]
    to_switches = [step - lane.step for lane in busy for step in lane.run.switch_steps if step > lane.step]
    in_a_row = [rewind.steps_in_a_row(lane.step, lane.left_out) for lane in busy]
    steps = min([*ends, *in_a_row, *to_switches, *(left for left in to_branches if left)], default=0)
    return Chunk(tuple(lane.position if lane else None for lane in lanes), int(min(most_steps, steps)))


def expected(lanes: Lanes, waiting: Sequence[Run], steps: int, has_branch: Callable[[Run], bool]) -> list[Lane | None]:
    """The lanes after so many steps, with the runs that start then, unless a run diverges before."""
    waiting, after = list(waiting), [lane and lane.after(steps) for lane in lanes]
    for i, lane in enumerate(after):
        if lane is None and (run := next_run(after, waiting, has_branch)) is not None:
            waiting.remove(run)
            after[i] = Lane(run, run.branch_step if has_branch(run) else 0)
    return after


def steps_within(seconds_per_step: float, most: int) -> int:
    """Steps of a dispatch that keeps to DISPATCH_SECONDS, at most `most`.

    A power of two, which small changes of speed leave as it is: other batches would have to be read.
    """
    return min(most, 2 ** int(math.log2(max(1.0, DISPATCH_SECONDS / seconds_per_step))))
