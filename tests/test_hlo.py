"""What is read from a compiled program, against collectives, loops and products that were counted by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.runtime import hlo, targets

ROOT = Path(__file__).parent.parent
PROGRAM = """HloModule toy

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%async_collective_fusion.1 (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.2 = bf16[32,4]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%async_collective_fusion.2 (p: f32[10]) -> f32[40] {
  %p.2 = f32[10]{0} parameter(0)
  ROOT %gather.3 = f32[40]{0} all-gather(%p.2), channel_id=12, replica_groups={{0,1,2,3},{4,5,6,7}}
}

%all-reduce-scatter.1 (g: f32[16]) -> f32[2] {
  %g = f32[16]{0} parameter(0)
  %whole = f32[16]{0} all-reduce(%g), channel_id=13, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %here = s32[] constant(0)
  ROOT %mine = f32[2]{0} dynamic-slice(%whole, %here), dynamic_slice_sizes={2}
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t = (s32[], bf16[8,4]{1,0}, /*index=2*/f32[3]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%t), index=1
  %gather.1 = bf16[32,4]{1,0} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %fused = bf16[32,4]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  %kernel = s8[4,6]{1,0} constant({...})
  %codes = s8[32,4]{1,0} convert(%fused)
  %product = s32[32,6]{1,0} dot(%codes, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %kept = bf16[8,4]{0,1} copy(%x)
  %meanwhile = f32[40]{0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%i, %kept)
}

%condition (t: (s32[], bf16[8,4])) -> pred[] {
  %t.1 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> f32[10] {
  %x.1 = bf16[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,4]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[], bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body
  %grads = f32[10]{0} constant({...})
  %reduced = f32[10]{0} all-reduce(%grads), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %both = (f32[10]{0}, f32[2]{0}) all-reduce(%grads, %grads), channel_id=10, replica_groups=mesh['a'=4,'b'=2] {'b'}
  %shard = f32[10]{0} reduce-scatter(%grads), channel_id=11, replica_groups={}, dimensions={0}, to_apply=%add
  %sixteen = f32[16]{0} constant({...})
  %scattered = f32[2]{0} fusion(%sixteen), kind=kCustom, calls=%all-reduce-scatter.1
  %begin = (f32[10]{0}, f32[40]{0}) all-gather-start(%grads), channel_id=12, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %end = f32[40]{0} all-gather-done(%begin)
}
"""


def test_a_program_counted_by_hand():
    counts = hlo.count(PROGRAM, devices=8)
    found = {(one.kind, one.devices, one.times): (0.0, one.overlapped) for one in counts.collectives}
    for one in counts.collectives:
        sent, overlapped = found[one.kind, one.devices, one.times]
        found[one.kind, one.devices, one.times] = (sent + one.sent, overlapped)
    assert found == {
        # Five turns of 32 x 4 values in bf16 over four devices; in two pieces of one channel, so that it overlaps.
        ("all-gather", 4, 5): (5 * 32 * 4 * 2 * 3 / 4, True),
        ("all-reduce", 8, 1): (2 * 40 * 7 / 8, False),
        ("all-reduce", 2, 1): (2 * 48 * 1 / 2, False),
        # It goes on through the five turns of the loop.
        ("all-gather", 4, 1): (160 * 3 / 4, True),
        ("reduce-scatter", 8, 1): (80 * 4 * 7 / 8 + 64 * 7 / 8, False),
    }
    assert counts.blocking == 4 and counts.sent == sum(sent for sent, _ in found.values())
    assert counts.products == {"s8 x s8": 5}
    assert (counts.copies, counts.copied_bytes) == (5, 5 * 8 * 4 * 2)
    assert counts.kernels == 5 + 5 * (6 + 1)  # six in each turn, and the condition of the loop
    with pytest.raises(ValueError, match="no HLO"):
        hlo.count("nothing", 8)


def test_what_goes_to_other_slices_is_told_apart():
    """A program of two slices of four: sixteen bytes inside of each go over DCN, where each chip sends them once."""
    program = """
ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %reduced = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %all = f32[4]{0} all-reduce(%x), channel_id=2, replica_groups={}, to_apply=%add
  %token = token[] after-all()
  %send = (f32[4]{0}, u32[], token[]) send(%x, %token), attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %other = (f32[4]{0}, u32[], token[]) send(%x, %token), channel_id=4
}
"""
    counts = hlo.count(program, devices=8, slices=2)
    assert counts.sent == 2 * (2 * 3 / 4 * 16) and counts.sent_between_slices == 16
    assert counts.by_kind()["all-reduce between slices"] == {"count": 1, "overlapped": 1, "bytes_sent": 16}
    assert hlo.count(program, devices=12, slices=3).sent_between_slices == 2 * 2 / 3 * 16


def test_the_products_of_a_compiled_loop():
    def program(x_BxI, kernels_LxIxI):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x_BxI, kernels_LxIxI)[0]

    compiled = jax.jit(program).lower(np.zeros((4, 8), np.float32), np.zeros((7, 8, 8), np.float32)).compile()
    counts = hlo.count(compiled.as_text(), 1)
    assert counts.products == {"f32 x f32": 7} and counts.collectives == () and counts.sent == 0


def test_sizes_of_types_and_groups():
    assert hlo.shapes("(s32[], bf16[2,3]{1,0:T(8,128)})") == [("s32", ()), ("bf16", (2, 3))]
    assert [hlo.bytes_of(*one) for one in (("s4", (3,)), ("f8e4m3fn", (3,)), ("pred", ()), ("f32", (2, 2)))] == [
        2,
        3,
        1,
        16,
    ]
    assert hlo.group_size("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'a','b'}, x", 64) == 8
    assert hlo.group_size("channel_id=1", 64) == 64


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "allowed is"),
        ("h100:9", "allowed is"),
        ("v5e", "allowed is"),
        ("cpu:0", "allowed is"),
        ("v5e:2x4*0", "allowed is"),
    ],
)
def test_a_target_that_there_is_not(name, said):
    with pytest.raises(UserError, match=said):
        targets.target(name)


def aot(*arguments: str) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.aot",
        "--size=25k",
        "--config.train.microbatches=1",
        "--config.data.tokenizer=bytes",
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_gradients_are_the_traffic_of_data_parallel_training():
    arguments = ("--target=cpu:4", "--config.train.batch_size=4", "--config.model.sequence_length=16")
    (case,) = aot(*arguments, "--config.mesh.data=4", "--config.model.dtype=float32")
    # Every parameter's gradient is reduced once over four devices, in float32; its norm and the losses are scalars.
    gradients = 2 * 3 / 4 * 4 * case["parameters"]
    assert gradients <= case["bytes_sent"] <= 1.001 * gradients
    assert set(case["collectives"]) == {"all-reduce"} and case["devices"] == 4
    assert case["bytes"]["arguments"] >= 12 * case["parameters"]


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize(
    ("target", "options", "products"),
    [
        ("v5e:2x4", ("--config.mesh.fsdp=8", "--config.precision.mode=native", "--precision=int8_full"), "s8 x s8"),
        ("v5e:2x4", ("--config.mesh.fsdp=8", "--precision=w4_a8_kv8"), "bf16 x bf16"),
        ("h100", ("--config.precision.mode=native", "--precision=fp8"), "f8e4m3fn x f8e4m3fn"),
        ("h100", ("--config.precision.mode=native", "--precision=int8_full"), "s8 x s8"),
    ],
)
def test_what_the_compilers_of_accelerators_say(target, options, products):
    if why := targets.missing(target):
        pytest.skip(why)
    options = ("--config.train.batch_size=8", "--config.model.sequence_length=128", *options)
    for case in aot(f"--target={target}", "--program=train,evaluate", *options):
        assert case["products"][products] > 0 and case["fits"] and case["memory"] >= 16 * 2**30
        assert 0 < case["bytes"]["arguments"] < case["bytes"]["peak"] < case["memory"]
        assert ("all-gather" in case["collectives"]) == (case["devices"] > 1)


# `train` for chips of v5e with 22 MiB: a small model, which compiles fast, fits four of them but not each.
SMALL_CHIPS = """
from precision_scaling.runtime import targets
targets.TPUS["v5e"] = (22 * 2**20, targets.TPUS["v5e"][1])
from precision_scaling import train
raise SystemExit(train.command())
"""


@pytest.mark.slow
@pytest.mark.compiler
def test_a_run_that_does_not_fit_is_refused_with_the_nearest_that_does(tmp_path):
    if why := targets.missing("v5e:2x2"):
        pytest.skip(why)

    def train(*more):
        options = ("--config.model.size=1.6M", "--config.model.sequence_length=64", "--config.train.batch_size=8")
        command = [sys.executable, "-c", SMALL_CHIPS, "--config=configs/base.py", f"--workdir={tmp_path / 'none'}"]
        command += [*options, "--config.train.tokens=1e8", "--topology=v5e:2x2", *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = train("--dry_run")
    assert done.returncode == 2 and not (tmp_path / "none").exists()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 1.6M on 4 x v5e, by its compiler, "), last
    assert "nearest that fits: --config.mesh.run=1 --config.mesh.data=-1 --config.mesh.fsdp=4" in last
    done = train("--dry_run", "--config.mesh=auto", "--config.train.microbatches=auto")
    assert done.returncode == 0 and done.stdout.startswith("auto: train.microbatches=1 "), done.stderr
    assert "each chip holds" in done.stdout and "mesh.fsdp=4" in done.stdout.splitlines()[0]
    done = train()
    assert done.returncode == 2 and "--dry_run" in done.stderr


# Sums over 2 x 4 chips of the head's gradient and of a kernel's whose tiles four chips do not divide evenly.
SUMS = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from precision_scaling.quantize import aqt
from precision_scaling.runtime import hlo, sharding, targets
devices = targets.target("v5e:2x4").devices
layout = sharding.make_layout({"slices": 1, "run": 1, "data": 2, "fsdp": 4, "tensor": 1}, devices)
spread = layout.place("run", ("data", "fsdp"))
array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16, sharding=spread)
head = lambda x: sharding.summed_parts(x.astype(jnp.float32), ("fsdp", "tensor"))
kernel = lambda x, g: aqt._summed(aqt._dot, 0, wide=True)(x, g, (((0,), (0,)), ((), ())))
for function, arrays in ((head, (array(8, 256, 512),)), (kernel, (array(8192, 32), array(8192, 896)))):
    with sharding.splitting(layout):
        lanes = jax.vmap(function, spmd_axis_name="run")
        compiled = jax.jit(lanes, out_shardings=layout.place("run", "fsdp")).lower(*arrays).compile()
    print(sorted((kind, found["count"]) for kind, found in hlo.count(compiled.as_text(), 8).by_kind().items()))
"""


@pytest.mark.slow
@pytest.mark.compiler
def test_sums_of_gradients_are_scattered():
    if why := targets.missing("v5e:2x4"):
        pytest.skip(why)
    done = subprocess.run([sys.executable, "-c", SUMS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    # Over fsdp; the sum over data is one of shares.
    assert done.stdout.splitlines() == 2 * ["[('all-reduce', 1), ('reduce-scatter', 1)]"], done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.compiler
def test_lanes_share_the_kernels_of_a_gpu():
    if why := targets.missing("h100"):
        pytest.skip(why)
    options = ("--target=h100", "--config.train.batch_size=4", "--config.model.sequence_length=32")
    (one,), (four,) = (aot(*options, f"--lanes={lanes}") for lanes in (1, 4))
    assert one["products"] == four["products"] and four["kernels"] < 1.3 * one["kernels"]
    assert four["bytes"]["temporary"] > 2 * one["bytes"]["temporary"]


@pytest.mark.slow
@pytest.mark.compiler
def test_two_slices_send_each_gradient_once_between_them():
    if why := targets.missing("v5e:2x4*2"):
        pytest.skip(why)
    options = ("--config.train.batch_size=16", "--config.model.sequence_length=128", "--config.mesh.fsdp=8")
    # So wide that an eighth of every kernel fills tiles of 128: between slices they are sent as they lie in memory.
    shape = ("--config.model.width=1024", "--config.model.heads=8", "--config.model.mlp_width=2048")
    (case,) = aot("--target=v5e:2x4*2", *options, *shape, "--config.model.dtype=float32")
    assert case["slices"] == 2 and case["mesh"] == {"run": 1, "data": 2, "fsdp": 8, "tensor": 1}
    # Each chip has an eighth of the gradients when they are summed over slices: all-reduce of two sends it once.
    assert 4 * case["parameters"] / 8 <= case["bytes_sent_between_slices"] <= 1.05 * 4 * case["parameters"] / 8
    assert case["bytes_sent"] > case["bytes_sent_between_slices"]
    assert "all-reduce between slices" in case["collectives"]
