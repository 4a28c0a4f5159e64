"""What quantizing a model block by block is said to take in memory, before it is done."""

import dataclasses

import pytest

from precision_scaling.model.config import ModelConfig
from precision_scaling.ptq import memory
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime.sharding import local_layout
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import StepConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

OPTIMIZER = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)
LLAMA_7B = ModelConfig(
    vocab_size=32_000, width=4096, depth=32, heads=32, mlp_width=11_008, sequence_length=2048, base_width=4096,
    base_depth=32, dtype="bfloat16",
)  # fmt: skip


def planned(model: ModelConfig, scheme, calibration=(128, 4), save=True):
    step_config = StepConfig(model, UNQUANTIZED, OPTIMIZER)
    return memory.plan(step_config, scheme, local_layout(), {}, 4, calibration, (128, 4), save)


@pytest.mark.slow
def test_seven_billion_parameters_fit_in_sixteen_gigabytes():
    scheme = scheme_of("gptq", group_size=128, act_order=True, clip=True, full_range=True)
    found = planned(LLAMA_7B, scheme)
    block = 4096 * 4096 * 4 + 3 * 4096 * 11_008
    assert found.block >= 3 * 4 * block  # in float32
    assert found.statistics == 4 * 11_008**2
    assert found.packed == pytest.approx(32 * block / 2, rel=1e-3)
    assert 8e9 < found.peak < 16e9
    assert found.files > 128 * 2048 * 4096 * 2  # a stream of bfloat16 and more
    assert planned(LLAMA_7B, scheme, save=False).peak == found.peak - found.packed


@pytest.mark.slow
def test_more_text_takes_files_and_not_memory_and_what_rounds_to_nearest_takes_none_of_either():
    model = dataclasses.replace(
        LLAMA_7B, width=128, depth=2, heads=4, mlp_width=256, vocab_size=512, sequence_length=2048
    )
    gptq, few, many = scheme_of("gptq"), (64, 4), (4096, 4)
    less, more = (planned(model, gptq, calibration) for calibration in (few, many))
    assert more.peak - less.peak < 8 * 128e6 and more.files > less.files
    rtn = planned(model, scheme_of("rtn"), many)
    assert (rtn.statistics, rtn.files) == (0, 0) and rtn.peak < less.peak


@pytest.mark.slow
def test_a_kernel_that_is_corrected_for_its_inputs_takes_two_matrices_and_two_streams_more():
    model = dataclasses.replace(LLAMA_7B, width=64, depth=2, heads=4, mlp_width=128, vocab_size=512)
    model = dataclasses.replace(model, sequence_length=128)
    plain, corrected = (planned(model, scheme_of("gptq", correct_inputs=share), (16, 4)) for share in (0.0, 1.0))
    assert (plain.statistics, corrected.statistics) == (4 * 128**2, 3 * 4 * 128**2)
    assert corrected.text - plain.text == 2 * 16 * 128 * 64 * 2
