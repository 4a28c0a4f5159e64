"""The Gaussian error of formats against published quantizers, closed forms and sampled data."""

import numpy as np
import pytest

from precision_scaling.numerics import elements, rounding
from precision_scaling.numerics.formats import FormatError, parse
from precision_scaling.numerics.gaussian import gaussian_mse


@pytest.mark.parametrize(
    ("name", "step", "mse"), [("binary", 1.596, 0.3634), ("int2", 1.224, 0.1902), ("int3", 0.6508, 0.04686)]
)
def test_uniform_quantizers_are_those_of_max_1960(name, step, mse):
    """J. Max, Quantizing for Minimum Distortion, Table II: N = 2, 3 and 7 equally spaced levels."""
    spacing = parse(name).values()[1] - parse(name).values()[0]
    assert gaussian_mse(name, scale=step / spacing) == pytest.approx(mse, rel=1e-3)
    assert gaussian_mse(name) == pytest.approx(mse, rel=1e-3)


def test_binary_has_a_closed_form():
    # E (|x| - s)² = 1 - 2 s sqrt(2/pi) + s², least at the mean magnitude.
    assert gaussian_mse("binary") == pytest.approx(1 - 2 / np.pi, rel=1e-9)
    assert gaussian_mse("binary", scale=0.5) == pytest.approx(1.25 - np.sqrt(2 / np.pi), rel=1e-12)


def test_fine_integers_approach_a_twelfth_of_the_squared_step():
    step = 8 / 2047  # nothing to speak of lies beyond 8 standard deviations
    assert gaussian_mse("int12", scale=step) == pytest.approx(step**2 / 12, rel=1e-9)


@pytest.mark.parametrize("name", ["int3", "e2m1", "e3m2", "e4m3", "ternary"])
def test_no_scale_does_better_than_the_optimal_one(name):
    best, finest = gaussian_mse(name), 0.3 / parse(name).max_value
    errors = [gaussian_mse(name, scale=scale) for scale in np.geomspace(finest, 200 * finest, 200)]
    assert best * (1 - 1e-9) <= min(errors) <= best * 1.02


def test_more_bits_of_a_family_err_less():
    for names in (["int2", "int3", "int4", "int8"], ["e2m1", "e2m2", "e2m3"], ["mxfp4", "mxfp6"]):
        errors = [gaussian_mse(name) for name in names]
        assert errors == sorted(errors, reverse=True)
    assert gaussian_mse("nvfp4") < gaussian_mse("mxfp4")
    assert gaussian_mse("bf16") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [("int2", 32), ("int4", 32), ("e2m1", 128), ("mxfp4", 32), ("mxfp8", 32), ("mxint8", 32)]
)
def test_abs_max_errors_are_those_of_sampled_tensors(name, count):
    x = np.random.default_rng(0).standard_normal((20_000, count)).astype(np.float32)
    errors = np.mean((np.asarray(rounding.fake_quant_array(x, name, axis=-1), np.float64) - x) ** 2, axis=1)
    assert abs(gaussian_mse(name, "absmax", count) - errors.mean()) < 4 * errors.std() / np.sqrt(len(errors))


@pytest.mark.slow
def test_nvfp4_errs_as_in_a_sampled_tensor():
    x = np.random.default_rng(0).standard_normal((2**20 // 16, 16)).astype(np.float32)
    error = np.mean((np.asarray(rounding.fake_quant_array(x, "nvfp4"), np.float64) - x) ** 2)
    assert gaussian_mse("nvfp4") == pytest.approx(error, rel=5e-3)


def test_a_fixed_scale_errs_as_on_sampled_data():
    x = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    fmt = parse("e3m2")
    q = np.asarray(elements.round_to_grid(x / np.float32(0.2), fmt.grid(), "float"), np.float64) * 0.2
    errors = (q - x) ** 2
    assert abs(gaussian_mse(fmt, scale=0.2) - errors.mean()) < 4 * errors.std() / np.sqrt(x.size)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("int4", "best"), "'best'"),
        (("int4", -1.0), "-1.0"),
        (("int4", "absmax"), "count"),
        (("mxfp4", 0.5), "mxfp4"),
        (("mxfp4", "absmax", 16), "32"),
    ],
)
def test_bad_input_is_one_line(arguments, named):
    with pytest.raises(FormatError) as error:
        gaussian_mse(*arguments)
    assert named in str(error.value) and "allowed" in str(error.value) and "\n" not in str(error.value)
