"""Frequencies of the rotary embedding: values by hand, and words that are refused."""

import numpy as np
import pytest

from precision_scaling.errors import ConfigError
from precision_scaling.model import rope


def test_llama_3_1_keeps_short_wavelengths_and_stretches_long_ones_eight_times():
    plain, found = (np.asarray(rope.frequencies(128, 5e5, text)) for text in ("", "llama3:8,1,4,8192"))
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(64) / 64), rtol=1e-5)
    # 8192 positions hold a wavelength of 2π/f 4 times where f is above 8π/8192 = 0.003068: up to the pair 28, where f
    # is 0.003215; and less than once where f is below 0.000767, from the pair 35 on, where f is 0.000765.
    np.testing.assert_array_equal(found[:29], plain[:29])
    np.testing.assert_allclose(found[35:], plain[35:] / 8, rtol=1e-6)
    # The pair 31: f = 5e5^(-31/64) = 0.0017360, in 8192 positions 2.2634 times, of the way from 1 to 4 0.42112.
    np.testing.assert_allclose(found[31], 0.0017360 * (0.42112 + 0.57888 / 8), rtol=1e-4)


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(rope.frequencies(4, 100.0, "linear:4"), [0.25, 0.025], rtol=1e-6)


def test_yarn_keeps_pairs_that_turn_often_and_stretches_those_that_turn_less_than_once():
    plain, found = (np.asarray(rope.frequencies(128, 1e4, text)) for text in ("", "yarn:16,4096,32,1,1.5"))
    # Pair 128 ln(4096 / 2πr) / (2 ln 1e4) turns r times in 4096 positions: 20.94 for r = 32, 45.03 for r = 1.
    np.testing.assert_array_equal(found[:21], plain[:21])
    np.testing.assert_allclose(found[46:], plain[46:] / 16, rtol=1e-6)
    np.testing.assert_allclose(found[33], plain[33] * (0.5 + 0.5 / 16), rtol=1e-6)  # half way from 20 to 46
    assert rope.amplitude("yarn:16,4096,32,1,1.5") == 1.5 and rope.amplitude("linear:4") == rope.amplitude("") == 1
    with pytest.raises(ConfigError, match="beta_slow below"):
        rope.parse("yarn:16,4096,1,1,1")


@pytest.mark.parametrize(
    "text",
    ["yarn:4", "linear", "linear:", "linear:x", "linear:1,2", "linear:0", "linear:nan", "linear:inf", "llama3:8"],
)
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match=r"model\.rope_scaling.*allowed is"):
        rope.parse(text)


def test_what_is_described_is_parsed():
    values = {
        "factor": 32.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    text = rope.describe("llama3", values)
    assert text == "llama3:32,1.5,4,8192" and rope.parse(text) == ("llama3", values)
    with pytest.raises(ConfigError, match="low_freq_factor below"):
        rope.parse("llama3:8,4,4,8192")
