"""Layouts: what each axis shards, the refusal of a wrong mesh, and the same losses on every mesh of eight devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from precision_scaling.config import base
from precision_scaling.errors import ConfigError
from precision_scaling.model.config import ModelConfig
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import sharding
from precision_scaling.runtime.sharding import fit
from precision_scaling.training import step
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import StepConfig
from tests.conftest import once

ROOT = Path(__file__).parent.parent
SIZES = {"run": 2, "data": 1, "fsdp": 4, "tensor": 3}


def test_an_axis_that_does_not_divide_its_dimension_moves_or_is_left_out():
    assert fit(P("fsdp", "tensor"), (8, 6), SIZES) == P(("fsdp",), ("tensor",))
    assert fit(P("fsdp", "tensor"), (8, 7), SIZES) == P(("fsdp",), None)
    assert fit(P("fsdp", "tensor"), (24, 7), SIZES, movable=(0, 1)) == P(("fsdp", "tensor"), None)
    assert fit(P("fsdp", "tensor"), (7, 6), SIZES, movable=(0, 1)) == P(None, ("tensor",))
    assert fit(P(("fsdp", "tensor")), (4,), SIZES) == P(("fsdp",))
    assert fit(P("run", None), (3, 5), SIZES) == P(None, None)


def test_every_parameter_of_every_kind_of_model_has_a_rule():
    layout = sharding.make_layout({"slices": 1, "run": 1, "data": 1, "fsdp": -1, "tensor": 1})
    shape = {"vocab_size": 31, "width": 16, "depth": 2, "heads": 4, "mlp_width": 24, "sequence_length": 8}
    kinds = {}, {"tie_embeddings": True}, {"qk_norm": "head", "kv_heads": 2}, {"norm_placement": "post"}
    for more in (*kinds, {"qkv_bias": True}):
        known = {name: value for name, value in more.items() if hasattr(ModelConfig, name)}
        step_config = StepConfig(
            ModelConfig(**shape, base_width=16, base_depth=2, **known),
            UNQUANTIZED,
            OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1),
        )
        state = jax.eval_shape(lambda step_config=step_config: step.init_state(step_config, 0))
        specs = layout.of_tree(state)
        split = {
            jax.tree_util.keystr(path, simple=True, separator="/"): place.spec
            for path, place in jax.tree_util.tree_leaves_with_path(specs.params)
        }
        assert split["layers/block/mlp/down/kernel"] == P(None, ("tensor",), ("fsdp",))
        assert split["layers/block/attention/qkv/kernel"] == P(None, ("fsdp",), ("tensor",), None)
        for name, spec in split.items():
            if name.startswith("layers/") and name.endswith("/kernel"):  # as a matrix of inputs and outputs
                axis = int(spec.index(("fsdp",)) > 1)
                assert sharding.KERNEL_AXES.get(name.split("/")[-2], 0) == axis, name
        # The moments lie where the parameters lie.
        moments = [s.spec for s in jax.tree.leaves(specs.optimizer) if s.spec != P()]
        assert sorted(map(str, moments)) == sorted(map(str, 2 * list(split.values())))
    with pytest.raises(KeyError, match=r"no rule.*layers/other"):
        layout.of_tree({"layers": {"other": jax.ShapeDtypeStruct((2, 3), np.float32)}})


def test_a_mesh_takes_the_devices_that_are_left():
    devices = jax.devices() * 8  # of eight, or a multiple
    devices = devices[:1]
    assert sharding.make_layout({"slices": 1, "run": 1, "data": -1, "fsdp": 1, "tensor": 1}, devices).sizes["data"] == 1
    default = base.get_config().mesh
    assert sharding.make_layout(default).mesh.size == jax.device_count()


@pytest.mark.parametrize(
    "options, named",
    [
        ({"data": 3}, ["config.mesh =", "data 3", "devices there are"]),
        ({"data": -1, "fsdp": -1}, ["config.mesh.fsdp = -1", "mesh.data is -1"]),
        ({"tensor": 0}, ["config.mesh.tensor = 0", "from 1, or -1"]),
        ({"run": "2"}, ["config.mesh.run = '2'"]),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(options, named):
    with pytest.raises(ConfigError) as error:
        sharding.make_layout({"slices": 1, "run": 1, "data": 1, "fsdp": 1, "tensor": 1} | options)
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "sizes, options, named",
    [
        ({"data": 4, "fsdp": 2}, {"train.batch_size": 20}, ["train.batch_size = 20", "a multiple of 8"]),
        ({"data": 4, "fsdp": 2}, {"train.microbatches": 4}, ["train.batch_size = 16", "a multiple of 32"]),
        ({"run": 3}, {}, ["study.lanes = 4", "mesh.run, 3"]),
        ({"tensor": 8}, {}, ["mesh.tensor = 8", "divisor of the heads, 4"]),
    ],
)
def test_what_the_mesh_does_not_divide_is_one_line(sizes, options, named):
    class Sized:  # a layout for its sizes: this process has one device
        pass

    layout = Sized()
    layout.sizes = dict.fromkeys(sharding.AXES, 1) | sizes
    config = base.get_config()
    config.update_from_flattened_dict(options)
    shape = ModelConfig(31, 16, 2, 4, 24, 8, 16, 2)
    with pytest.raises(ConfigError) as error:
        sharding.check(layout, config, [shape])
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)


@dataclasses.dataclass(frozen=True)
class Device:
    """One that is not here."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    device_kind: str = "none"
    client: object = None


SLICES = {"slices": -1, "run": 1, "data": -1, "fsdp": 2, "tensor": 1}


def test_of_several_slices_only_data_leaves_one():
    """The mesh is that of JAX's own function for slices; other devices have processes that stand for slices."""
    tpus = [Device(i, i // 2, i % 2, "tpu", (i // 2 % 2, i // 4, 0)) for i in range(8)]  # two slices of 2 x 2
    layout = sharding.make_layout(SLICES, tpus)
    assert layout.slices == 2 and layout.sizes == {"run": 1, "data": 4, "fsdp": 2, "tensor": 1}
    expected = mesh_utils.create_hybrid_device_mesh((1, 2, 2, 1), (1, 2, 1, 1), tpus)
    assert (layout.mesh.devices == expected).all()
    assert {device.slice_index for device in layout.mesh.devices[0, :2].flat} == {0}
    hosts = [Device(i, i // 2, 0, "cpu") for i in range(8)]
    assert sharding.make_layout(SLICES, hosts).slices == 1
    layout = sharding.make_layout(SLICES | {"slices": 2}, hosts)
    assert layout.slices == 2 and {device.process_index for device in layout.mesh.devices[0, 2:].flat} == {2, 3}
    for options, devices, named in (
        ({"slices": 3}, tpus, ("mesh.slices", "3", "-1 or 2")),
        ({"slices": 3}, hosts, ("mesh.slices", "3", "a divisor of 4, the processes")),
        ({"data": 1, "fsdp": 8}, tpus, ("mesh.data", "1", "a multiple of 2, the slices")),
        (
            {"slices": -1},
            [*tpus, *(Device(i, 4, 0, "tpu") for i in (8, 9))],
            ("mesh.slices", "of equal size, not of 6, 4"),
        ),
    ):
        with pytest.raises(ConfigError) as error:
            sharding.make_layout(SLICES | options, devices)
        assert all(part in str(error.value) for part in named), error.value


MESHES = ("1,1,1,1", "1,8,1,1", "1,1,2,4", "1,2,2,2", "2,2,2,1", "2,2,2,1:parts")
OF_MUON = ("1,1,1,1:muon", "1,1,2,4:muon")
OF_DOCUMENTS = ("1,1,1,1:documents", "1,2,2,2:documents")


@pytest.fixture(scope="module")
def on_meshes(session_directory):
    """{mesh: what came of it}, from one process with eight devices, for all workers."""
    directory = session_directory / "meshes"
    with once(directory) as first:
        if first:
            directory.mkdir(exist_ok=True)
            done = subprocess.run(
                [sys.executable, "tests/meshes.py", directory, *MESHES, *OF_MUON, *OF_DOCUMENTS],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            (directory / "found.jsonl").write_text(done.stdout)
    lines = [json.loads(line) for line in (directory / "found.jsonl").read_text().splitlines()]
    return {line["mesh"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [MESHES, OF_MUON, OF_DOCUMENTS])
def test_every_mesh_gives_the_losses_of_one_device(on_meshes, meshes):
    one = on_meshes[meshes[0]]
    assert len(one["losses"]) == 3 and one["losses"]["bf16"][0] > one["losses"]["bf16"][-1] + 0.5
    for mesh in meshes[1:]:
        other = on_meshes[mesh]
        for run, losses in one["losses"].items():
            assert len(losses) == 12
            # Devices sum in another order. Where activations are quantized, one that lies between two levels may then
            # go the other way: on one device, parameters changed by 1e-7 move the first loss by up to 1e-3, too.
            tolerance = 2e-2 if "_a" in run else 1e-4 if meshes == OF_MUON else 1e-5
            np.testing.assert_allclose(other["losses"][run], losses, rtol=tolerance, err_msg=f"{mesh} {run}")


@pytest.mark.slow
def test_every_device_holds_its_share_of_parameters_and_moments(on_meshes):
    total = on_meshes["1,1,1,1"]["total"]
    assert on_meshes["1,1,1,1"]["bytes"] == [total]
    counts = 4 * 4  # Adam's count, one for each lane, is nobody's share
    for mesh, parts in (("1,8,1,1", 1), ("1,1,2,4", 8), ("1,2,2,2", 4)):
        assert on_meshes[mesh]["bytes"] == [(total - counts) // parts + counts]
    assert on_meshes["2,2,2,1"]["bytes"] == [(total - counts) // 4 + counts // 2]  # the lanes are split over run
    of_muon = on_meshes["1,1,1,1:muon"]["total"]  # with two counts
    assert on_meshes["1,1,2,4:muon"]["bytes"] == [(of_muon - 2 * counts) // 8 + 2 * counts]


@pytest.mark.slow
def test_calibration_on_every_mesh_is_that_of_one_device_and_hessians_are_split_by_rule(on_meshes):
    one = on_meshes["1,1,1,1"]
    assert one["hessian_parts"] == [1] and 0 < min(one["gptq"]) <= max(one["gptq"]) < 0.1
    for mesh, parts in (("1,8,1,1", 1), ("1,1,2,4", 8), ("1,2,2,2", 4), ("2,2,2,1", 2)):
        assert on_meshes[mesh]["hessian_parts"] == [parts]
        if on_meshes[mesh]["gptq"]:
            np.testing.assert_allclose(on_meshes[mesh]["gptq"], one["gptq"], rtol=1e-3, err_msg=mesh)
    assert [mesh for mesh in MESHES if on_meshes[mesh]["gptq"]] == ["1,1,1,1", "1,2,2,2", "2,2,2,1"]
