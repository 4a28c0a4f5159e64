"""How many lanes of a cohort the devices' memory holds."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from precision_scaling.errors import ConfigError
from precision_scaling.model.accounting import bytes_of
from precision_scaling.runtime import sharding
from precision_scaling.training import cohort, compiled, step
from precision_scaling.training.feed import Prefetcher


def lanes_for(monkeypatch, memory, asked=32, run=1, fixed=1000, each=100):
    """lanes_that_fit on a device of `memory` bytes, for a program of fixed + each · lanes bytes, and those it tried."""
    tried = []

    def bytes_of(step_config, layout, lanes, inputs, tokens):
        tried.append(lanes)
        return fixed + each * lanes // layout.sizes["run"]

    monkeypatch.setattr(compiled, "_bytes", bytes_of)
    monkeypatch.setattr(compiled, "device_memory", lambda layout: memory / compiled.MEMORY_SHARE)
    step_config, layout = SimpleNamespace(model=SimpleNamespace(width=16, depth=2)), SimpleNamespace(sizes={"run": run})
    arguments = lambda lanes: (None, jax.ShapeDtypeStruct((4, lanes, 2, 8, 17), np.uint8))
    return compiled.lanes_that_fit(step_config, layout, asked, arguments), tried


@pytest.mark.parametrize(
    ("memory", "run", "lanes"), [(4201, 1, 32), (4199, 1, 31), (2001, 1, 10), (1101, 1, 1), (1501, 4, 20), (1101, 4, 4)]
)
def test_lanes_are_those_that_fit_and_as_the_mesh_divides_them(monkeypatch, memory, run, lanes):
    found, tried = lanes_for(monkeypatch, memory, run=run)
    assert found == lanes and found % run == 0
    assert 1000 + 100 * found // run <= memory and len(tried) <= 3


def test_a_model_of_which_not_one_fits_is_one_line(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"train.batch_size = 16: allowed is what fits a device's .* width 16"
    ) as error:
        lanes_for(monkeypatch, 1099)
    assert "\n" not in str(error.value)


def test_bytes_are_those_of_the_state_and_more(finished_study, quick_compile):
    workspace, _ = finished_study
    (group,) = workspace.experiment.cohorts
    step_config = step.StepConfig(group.shape.model, group.static, workspace.experiment.optimizer)
    inputs = cohort._inputs(group, [None, None])
    feed = Prefetcher(
        workspace.loader(group.shape), workspace.layout, 2, 1, workspace.experiment.config.train.steps_per_dispatch
    )
    state = compiled.stacked(compiled.compiled_cohort(step_config, workspace.layout, 2).one, 2)
    held = bytes_of(state)
    found = compiled._bytes(step_config, workspace.layout, 2, inputs, feed.abstract)
    assert 1.5 * held < found < 50 * held  # and the gradients, at least


def test_a_machine_tells_its_memory():
    layout = sharding.make_layout({"slices": 1, "run": 1, "data": -1, "fsdp": 1, "tensor": 1})
    assert 1 << 28 < compiled.device_memory(layout) < 1 << 50
    assert compiled.device_memory(layout) % (1 << 20) == 0
