"""The noise between seeds against values worked out by hand and noise of known size."""

import numpy as np
import pytest

from analysis.table import from_columns
from analysis.table.seed_noise import noise_of, repeated


def rows(settings, losses_by_seed):
    """A table with every setting once per seed; losses_by_seed[s][i] is of setting i."""
    made = [
        {**setting, "run": f"{i}-{s}", "seed": s, "loss": losses[i]}
        for s, losses in enumerate(losses_by_seed)
        for i, setting in enumerate(settings)
    ]
    return from_columns({name: [row[name] for row in made] for name in made[0]})


FOUR = [{"N": n, "D": d} for n in (1e5, 2e5) for d in (1e6, 2e6)]


def test_pooled_over_pairs():
    table = rows(FOUR, [(2.0, 1.9, 1.8, 1.7), (2.02, 1.9, 1.78, 1.74)])
    noise = noise_of(table)
    # variances of a pair: d²/2
    assert noise.sd == pytest.approx(np.sqrt((0.02**2 + 0.02**2 + 0.04**2) / 2 / 4))
    assert noise.freedom == 4 and not noise.slopes
    assert noise.limit() == pytest.approx(2.7764 * noise.sd * np.sqrt(2), rel=1e-4)
    assert noise.limit((2, 2)) == pytest.approx(2.7764 * noise.sd, rel=1e-4)


def test_needs_seeds():
    table = rows(FOUR, [(2.0, 1.9, 1.8, 1.7)])
    assert noise_of(table) is None
    assert noise_of(rows(FOUR[:2], [(2.0, 1.9), (2.1, 1.8)])) is None  # two degrees of freedom
    unnamed = from_columns({"N": [1e5] * 8, "D": [1e6] * 8, "loss": np.linspace(1, 2, 8)})
    assert noise_of(unnamed) is None


def test_other_settings_are_not_repeats():
    settings = [{**setting, "schedule": name} for setting in FOUR for name in ("cosine", "wsd")]
    table = rows(settings, [np.linspace(1, 2, 8), np.linspace(1, 2, 8)])
    groups = repeated(table)
    assert len(groups) == 8
    for group in groups:
        assert len(set(table["schedule"][group])) == 1 and set(table["seed"][group]) == {0, 1}


@pytest.mark.parametrize("exponent", [0.0, -0.5])
def test_varies_with_size_only_where_the_seeds_say_so(exponent):
    rng = np.random.default_rng(3)
    settings = [{"N": n, "D": d} for n in (1e4, 1e5, 1e6, 1e7) for d in (1e6, 1e7)]
    sd = np.array([0.01 * (s["N"] / 1e4) ** exponent for s in settings])
    table = rows(settings, [2 + sd * rng.normal(size=len(settings)) for _ in range(20)])
    noise = noise_of(table)
    if exponent:
        assert noise.slopes["N"] / 2 == pytest.approx(exponent, abs=0.05)
        assert noise.at(N=1e4, D=3e6) == pytest.approx(0.01, rel=0.25)
        assert noise.at(N=1e7, D=3e6) == pytest.approx(0.01 * 1e3**exponent, rel=0.25)
    else:
        assert not noise.slopes
        assert noise.at(N=1e7, D=1e7) == pytest.approx(0.01, rel=0.1)
