"""Batches: a pure function of (seed, step), the same over hosts and after a resume."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from precision_scaling.data import DataError, loader
from precision_scaling.data.loader import Loader
from precision_scaling.data.tokens import Corpus


def counting_corpus(train: int, validation: int = 101) -> Corpus:
    """Tokens that are their own positions (validation from 30,000), so that a window shows where it comes from."""
    assert train < 30_000
    held_out = np.arange(30_000, 30_000 + validation, dtype=np.uint16)
    arrays = {"train": np.arange(train, dtype=np.uint16), "validation": held_out}
    return Corpus(**arrays, vocab_size=65_536, end_of_text=65_535, directory=Path(), meta={})


def batch(loader: Loader, seed: int, step: int) -> np.ndarray:
    """The windows of one step, as training reads them."""
    return loader.windows(loader.window_indices(seed, step, 1)[0])


def test_a_window_is_seq_len_inputs_and_the_next_token_and_a_short_rest_is_left_out():
    batches = Loader(counting_corpus(48), seq_len=10, batch_size=4)
    assert batches.n_windows == 4  # 0-10, 10-20, 20-30, 30-40; 40-47 is short
    first = batch(batches, seed=0, step=0)
    assert (first.shape, first.dtype) == ((4, 11), np.uint16)
    assert sorted(first[:, 0]) == [0, 10, 20, 30]
    np.testing.assert_array_equal(first, first[:, :1] + np.arange(11))
    assert Loader(counting_corpus(41), 10, 4).n_windows == 4  # the last target is the last token
    assert Loader(counting_corpus(40), 10, 4).n_windows == 3


def test_epochs_is_tokens_over_one_pass():
    assert Loader(counting_corpus(48), seq_len=10, batch_size=4).epochs(100) == 2.5


def test_every_window_comes_once_an_epoch_in_an_order_of_its_own():
    batches = Loader(counting_corpus(3001), seq_len=3, batch_size=8)
    stream = batches.window_indices(seed=5, first_step=0, n_steps=375).reshape(3, 1000)
    for epoch in stream:
        assert sorted(epoch) == list(range(1000))
    orders = [*stream, *batches.window_indices(seed=6, first_step=0, n_steps=375).reshape(3, 1000)]
    for one, other in itertools.combinations(orders, 2):  # neighbouring seeds share no epoch either
        assert np.mean(one == other) < 0.02
    # Well mixed: the mean of each of 8 stretches of an epoch is within 5 standard errors of the middle.
    assert np.all(np.abs(stream.reshape(24, 125).mean(axis=1) - 499.5) < 5 * 288.7 / 125**0.5)


def test_a_batch_depends_on_seed_and_step_alone():
    corpus = counting_corpus(25_001)
    batches = Loader(corpus, seq_len=4, batch_size=16)
    forward = [batch(batches, 1, step) for step in range(300)]  # crosses blocks of the order
    loader._order_block.cache_clear()
    fresh = Loader(corpus, seq_len=4, batch_size=16)
    for step in (299, 7, 256, 0, 255):
        batch(fresh, 2, step)
        np.testing.assert_array_equal(batch(fresh, 1, step), forward[step])
    # The stream of examples does not depend on the batch size either.
    rows = np.concatenate(forward)
    np.testing.assert_array_equal(batch(Loader(corpus, 4, 40), 1, 50), rows[2000:2040])


def test_the_order_of_a_seed_is_the_one_of_earlier_versions():
    # Recorded: a change (here or in Grain) would make a resumed run read other data than it did before.
    order = Loader(counting_corpus(101), seq_len=10, batch_size=10).window_indices(seed=0, first_step=0, n_steps=2)
    assert order.tolist() == [[4, 2, 8, 5, 0, 3, 9, 6, 1, 7], [1, 8, 4, 0, 3, 2, 5, 6, 9, 7]]


def test_windows_by_number_are_those_of_the_stream_in_the_type_of_the_file():
    batches = Loader(counting_corpus(25_007), seq_len=12, batch_size=8)
    index = np.stack([batches.window_indices(seed, first_step=4, n_steps=3) for seed in (0, 1)])  # lanes, steps, B
    windows = batches.windows(index)
    assert index.dtype == np.int32 and windows.dtype == np.uint16
    np.testing.assert_array_equal(windows, index[..., None] * 12 + np.arange(13))
    last = Loader(counting_corpus(41), seq_len=10, batch_size=4)
    np.testing.assert_array_equal(last.windows(np.array(last.n_windows - 1)), np.arange(30, 41))


def test_validation_windows_are_fixed_and_evenly_spread_over_held_out_text():
    batches = Loader(counting_corpus(500, validation=101), seq_len=10, batch_size=4)
    np.testing.assert_array_equal(batches.validation_windows(2)[:, 0], [30_020, 30_070])
    np.testing.assert_array_equal(batches.validation_windows(10)[:, 0], 30_000 + 10 * np.arange(10))
    assert batches.validation_windows(3).shape == (3, 11)


def test_calibration_windows_are_distinct_training_windows_drawn_by_their_seed():
    batches = Loader(counting_corpus(5001), seq_len=5, batch_size=8)
    windows = batches.calibration_windows(100, seed=0)
    assert windows.shape == (100, 6)
    assert len(set(windows[:, 0])) == 100
    assert windows.max() < 30_000  # none from validation
    assert np.mean(windows == batches.calibration_windows(100, seed=1)) < 0.05
    assert np.mean(windows == np.concatenate([batch(batches, 0, step) for step in range(13)])[:100]) < 0.05


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Loader(counting_corpus(10), 10, 4), ["seq_len=10", "train tokens (10)"]),
        (lambda: Loader(counting_corpus(50, validation=5), 10, 4), ["seq_len=10", "validation tokens (5)"]),
        (lambda: Loader(counting_corpus(50), 10, 0), ["batch_size=0", "1 or more"]),
        (lambda: Loader(counting_corpus(50), 10, 4).validation_windows(11), ["11 validation windows", "1 to 10"]),
        (lambda: Loader(counting_corpus(50), 10, 4).calibration_windows(5, 0), ["5 calibration windows", "1 to 4"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_value_and_what_is_allowed(call, named):
    with pytest.raises(DataError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)
