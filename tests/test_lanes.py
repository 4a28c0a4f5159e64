"""Which run is next, when a trunk is branched from, and how far a dispatch goes, worked out by hand; no device."""

import dataclasses

import pytest

from precision_scaling.config import base, experiment
from precision_scaling.training import lanes
from precision_scaling.training.feed import Chunk
from precision_scaling.training.lanes import Lane

STEP = 512  # tokens


def runs(*steps: int, schedule: str = "wsd", seed: int = 0):
    """Runs of these lengths with ten steps of warm-up and a fifth of decay: one trunk."""
    config = base.get_config()
    config.model.sequence_length, config.train.batch_size = 64, STEP // 64
    config.optimizer.warmup_steps, config.optimizer.decay_fraction = 10, 0.2
    tokens = tuple(STEP * number for number in steps)
    with config.unlocked():
        config.study.grid = {"one": base.grid(("25k",), tokens, schedules=(schedule,), seeds=(seed,))}
    found = experiment.resolve(config, 257).runs
    return [next(run for run in found if run.steps == number) for number in steps]


NEVER, ALWAYS = (lambda run: False), (lambda run: True)


def test_a_lane_leads_to_runs_that_share_its_prefix():
    long, short = runs(100, 50)
    assert (long.branch_step, short.branch_step) == (80, 40)
    assert Lane(long, 0).leads_to(short) and Lane(long, 40).leads_to(short) and not Lane(long, 41).leads_to(short)
    assert not Lane(short, 0).leads_to(long)  # it decays before
    assert not Lane(runs(100, seed=1)[0], 0).leads_to(short)
    cosine = runs(100, schedule="cosine")[0]
    assert not Lane(long, 0).leads_to(cosine) and not Lane(cosine, 0).leads_to(short)


def test_the_next_run_waits_for_its_trunk_unless_its_branch_is_there():
    long, short = runs(100, 50)
    other = runs(30, schedule="cosine")[0]
    assert lanes.next_run([None, None], [long, short], NEVER) == long
    under_way = [Lane(long, 20), None]
    assert lanes.next_run(under_way, [short], NEVER) is None
    assert lanes.next_run(under_way, [short, other], NEVER) == other
    assert lanes.next_run(under_way, [short, other], ALWAYS) == short
    assert lanes.next_run([Lane(long, 60), None], [short], NEVER) == short  # the trunk is past it: from the first step


def test_branches_are_saved_at_their_step_once():
    long, short, shorter = runs(100, 50, 20)
    held = [None, Lane(long, 40)]
    assert lanes.branches(held, [short, shorter], NEVER) == [(1, held[1], short)]
    assert lanes.branches(held, [short, shorter], ALWAYS) == [] == lanes.branches([Lane(long, 39)], [short], NEVER)


def test_a_chunk_ends_with_the_first_run_at_a_branch_or_before_a_batch_that_is_left_out():
    long, short = runs(100, 50)
    other = runs(30, schedule="cosine")[0]
    assert lanes.next_chunk([Lane(long, 0), Lane(other, 4)], [], 1000) == Chunk(((0, 0), (0, 4)), 26)
    assert lanes.next_chunk([Lane(long, 0), None], [short], 1000) == Chunk(((0, 0), None), 40)
    assert lanes.next_chunk([Lane(long, 40), None], [short], 1000).steps == 60  # it is there
    assert lanes.next_chunk([Lane(long, 0)], [], 16).steps == 16
    # Batch 3 is left out: three steps, then the batches from 4 on.
    assert lanes.next_chunk([Lane(long, 0, (3,))], [], 16) == Chunk(((0, 0),), 3)
    assert lanes.next_chunk([Lane(long, 3, (3,))], [], 16) == Chunk(((0, 4),), 16)
    assert lanes.next_chunk([None], [], 16) == Chunk((None,), 0)


def test_what_is_expected_after_a_dispatch():
    long, short = runs(100, 50)
    other = runs(30, schedule="cosine")[0]
    held = [Lane(long, 10), Lane(other, 4)]
    assert lanes.expected(held, [], 20, NEVER) == [Lane(long, 30), Lane(other, 24)]
    assert lanes.expected(held, [short], 26, NEVER) == [Lane(long, 36), None]  # short waits for the trunk
    assert lanes.expected(held, [short], 26, ALWAYS) == [Lane(long, 36), Lane(short, 40)]
    assert lanes.expected(held, [short], 90, NEVER) == [Lane(short, 0), None]
    assert held == [Lane(long, 10), Lane(other, 4)]


def test_positions_skip_batches_that_are_left_out():
    (run,) = runs(100)
    lane = Lane(dataclasses.replace(run, seed=7), 5, (2, 6))
    assert lane.position == (7, 7)  # batches 0 1 3 4 5 are done
    assert lane.after(94).step == 99 and lane.after(95) is None


@pytest.mark.parametrize(
    ("seconds", "steps"), [(100, 1), (10, 1), (5, 2), (2.6, 2), (2.5, 4), (0.01, 512), (1e-9, 700)]
)
def test_a_dispatch_takes_ten_seconds_at_most(seconds, steps):
    assert lanes.steps_within(seconds, 700) == steps
