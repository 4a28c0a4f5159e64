"""Parametrizations: activations that move as much in a step at every width and depth, and those that do not."""

import numpy as np
import pytest

from benchmarks import coordinate_check

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def movement(quick_compile):
    """Of (width, depth, scaled or not, parametrization): how much the residual stream has moved after four steps."""
    tokens_TxBxS1 = np.random.default_rng(0).integers(0, 257, (4, 8, 17)).astype(np.int32)

    def measure(*shape):
        found = coordinate_check.coordinates(
            coordinate_check.decoder(*shape), tokens_TxBxS1, tokens_TxBxS1[0, :, :-1], rate=4e-3, seeds=2
        )
        return found[1, -1, coordinate_check.QUANTITIES.index("residual stream")]

    return measure


@pytest.mark.slow
def test_the_residual_stream_moves_as_much_when_width_and_depth_grow(movement):
    base = movement(32, 2, True)
    assert movement(64, 8, True, "completep") == pytest.approx(base, rel=0.4)
    assert movement(64, 8, False) > 2.5 * base
