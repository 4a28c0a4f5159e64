"""The registry of number formats: names, bits, values and errors."""

import math

import ml_dtypes
import numpy as np
import pytest

from precision_scaling.numerics import formats, rounding

STANDARD = {
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3": ml_dtypes.float8_e4m3,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e5m10": np.float16,
    "e8m7": ml_dtypes.bfloat16,
}
SCALAR = [f"int{bits}" for bits in range(2, 17)] + [*STANDARD, "e2m0", "e3m0", "e3m1", "e4m2", "e5m6", "e1m2"]


@pytest.fixture
def registry(monkeypatch):
    """Registrations of one test stay in that test."""
    monkeypatch.setattr(formats, "_REGISTRY", dict(formats._REGISTRY))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("int4", "int4"),
        ("4", "int4"),
        (4, "int4"),
        (4.0, "int4"),
        (np.int64(4), "int4"),
        (np.float32(15), "int15"),
        (16, "bf16"),
        (32, "bf16"),
        ("16", "bf16"),
        ("int16", "int16"),
        (" BF16 ", "bf16"),
        ("bfloat16", "bf16"),
        ("e4m3", "e4m3"),
        ("e4m3fn", "e4m3fn"),
        ("E5M2", "e5m2"),
        ("float8_e4m3fn", "e4m3fn"),
        ("e2m1fn", "e2m1"),
        ("float6_e3m2fn", "e3m2"),
        ("mxfp6", "mxfp6"),
        ("mxfp6_e2m3", "mxfp6"),
        ("mxfp8_e4m3", "mxfp8"),
        (formats.parse("nvfp4"), "nvfp4"),
    ],
)
def test_every_spelling_finds_its_format(spec, name):
    assert formats.parse(spec).name == name


@pytest.mark.parametrize(
    "spec",
    [
        "e9m9",
        "e0m3",
        "e8m8",
        "e5m11",
        "int1",
        "int0",
        "int17",
        "foo",
        "",
        "1",
        "-4",
        "float6_e4m3",
        1,
        0,
        -4,
        2.5,
        15.5,
        None,
        True,
        False,
        math.nan,
        math.inf,
        -math.inf,
        [4],
        {"bits": 4},
    ],
)
def test_a_wrong_format_is_one_line_that_names_it_and_what_is_allowed(spec):
    with pytest.raises(formats.FormatError) as error:
        formats.parse(spec)
    message = str(error.value)
    assert repr(spec) in message and "allowed" in message and "eXmY" in message and "\n" not in message
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int2", 2),
        ("int12", 12),
        ("e2m0", 3),
        ("e3m0", 4),
        ("e3m2", 6),
        ("e4m2", 7),
        ("e5m2", 8),
        ("e5m6", 12),
        ("bf16", 16),
        ("fp16", 16),
        ("fp32", 32),
        ("binary", 1),
        ("ternary", math.log2(3)),
        ("mxfp4", 4.25),
        ("mxfp6", 6.25),
        ("mxfp6_e3m2", 6.25),
        ("mxfp8", 8.25),
        ("mxfp8_e5m2", 8.25),
        ("mxint8", 8.25),
        ("nvfp4", 4.5),
    ],
)
def test_bits_count_all_that_is_stored(name, bits):
    assert formats.parse(name).bits == bits


@pytest.mark.parametrize("name", STANDARD)
def test_values_are_all_finite_codes_of_the_standard_type(name):
    dtype = np.dtype(STANDARD[name])
    width = np.uint8 if dtype.itemsize == 1 else np.uint16
    codes = np.arange(256 if width is np.uint8 else 65536, dtype=width)
    if name in ("e2m1", "e2m3", "e3m2"):  # ml_dtypes pads these to bytes
        codes = codes[: 2 ** formats.parse(name).bits]
    with np.errstate(invalid="ignore"):  # signalling NaNs among the codes
        decoded = codes.view(dtype).astype(np.float64)
    expected = np.unique(decoded[np.isfinite(decoded)])
    np.testing.assert_array_equal(formats.parse(name).values(), expected)


@pytest.mark.parametrize(
    ("name", "positive"),
    [
        ("int3", [1, 2, 3]),
        ("e2m0", [1, 2, 4]),
        ("e3m0", [0.25, 0.5, 1, 2, 4, 8, 16]),
        ("e1m2", [0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        ("e2m1", [0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e3m1", [0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24]),
    ],
)
def test_values_of_small_formats_worked_by_hand(name, positive):
    expected = [-v for v in reversed(positive)] + [0] + positive
    np.testing.assert_array_equal(formats.parse(name).values(), expected)


@pytest.mark.parametrize("name", SCALAR)
def test_values_are_symmetric_and_fit_the_bits(name):
    fmt = formats.parse(name)
    values = fmt.values()
    np.testing.assert_array_equal(values, -values[::-1])
    assert values[-1] == fmt.max_value == fmt.grid().max_value
    assert len(values) <= 2**fmt.bits
    assert len(np.unique(values)) == len(values)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("e4m3", 240),
        ("e4m3fn", 448),
        ("e5m2", 57344),
        ("e5m2fn", 114688),
        ("e3m4", 15.5),
        ("e3m4fn", 31),
        ("e4m2", 448),
        ("e5m6", 130048),
        ("int16", 32767),
        ("mxint8", 127 / 64),
    ],
)
def test_ieee_like_and_finite_variants_differ_in_range(name, largest):
    assert formats.parse(name).max_value == largest


def test_a_pass_through_has_no_values_to_list():
    with pytest.raises(formats.FormatError, match="bf16"):
        formats.parse("bf16").values()


@pytest.mark.parametrize(
    ("specs", "family"),
    [
        ((3, 8, 16), "int"),
        ((3, "e4m3", "fp32"), "float"),
        (("e2m1", "e5m6"), "float"),
        (("bf16", "fp32"), "none"),
        (("mxfp4", "mxfp6", "mxint8", 16), "block"),
        (("ternary", 16), "levels"),
    ],
)
def test_formats_of_one_family_share_a_program(specs, family):
    assert formats.shared_kind(specs).family == family


@pytest.mark.parametrize(
    "specs", [("mxfp4", "nvfp4"), ("mxfp4", 4), ("ternary", 4), ("ternary", "binary"), ("e8m7", "e4m3")]
)
def test_formats_that_differ_in_what_is_static_share_none(specs):
    assert formats.shared_kind(specs) is None


def test_a_registered_level_set_is_a_format_like_any_other(registry):
    formats.register(formats.level_set("powers", [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]))
    assert formats.parse("powers").bits == math.log2(7)
    x = np.array([1.6, 0.13 * 1.6, -0.7 * 1.6, 0.375 * 1.6, 0.05], np.float32)
    # In units of the scale 1.6: 1, 0.13 -> 0.25, -0.7 -> -0.5, the midpoint 0.375 -> 0.25, 0.03 -> 0
    expected = np.array([1, 0.25, -0.5, 0.25, 0]) * 1.6
    np.testing.assert_allclose(rounding.fake_quant_array(x, "powers"), expected, rtol=1e-6)


def test_a_registered_block_format_is_a_format_like_any_other(registry):
    formats.register(formats.block("mxint4", formats.integer(4), 16, "e8m0"))
    assert formats.parse("mxint4").bits == 4.5
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = [5.0, 2.4, -1.2]  # scale 2^(2 - 2)
    x[0, 16:18] = [0.9, 0.3]  # scale 2^(-1 - 2): 7.2 saturates at 7, 2.4 rounds to 2
    y = np.asarray(rounding.fake_quant_array(x, "mxint4", axis=-1))
    np.testing.assert_array_equal(y[0, :3], [5, 2, -1])
    np.testing.assert_array_equal(y[0, 16:18], [7 / 8, 2 / 8])


def test_a_registered_float_with_its_own_range_rounds_on_its_own_grid(registry):
    fmt = formats.register(formats.Format("e3m2_24", "float", 6, max_value=24, min_exponent=-2, mantissa_bits=2))
    assert fmt.values()[-1] == 24 and 28 not in fmt.values()
    x = np.array([24, 23, -9, 0.1], np.float32)
    np.testing.assert_array_equal(rounding.fake_quant_array(x, "e3m2_24"), [24, 24, -8, 0.125])


@pytest.mark.parametrize(
    ("fmt", "why"),
    [
        (formats.Format("int4", "int", 4, 8.0, 3, 3), "taken"),
        (formats.Format("e4m2", "float", 7, 24.0, 0, 2), "taken"),
        (formats.Format("Loud", "int", 4, 7.0, 2, 2), "lower-case"),
        (formats.Format("mine", "integer", 4, 7.0, 2, 2), "family"),
        (formats.Format("mine", "float", 4, 5.5, 0, 1), "max_value"),
        (formats.Format("mine", "levels", 2, 1.0, levels=(0.0, 1.0, 0.5)), "ascending"),
        (formats.level_set("mine", []), "2 to 256"),
        (formats.level_set("mine", [-1, math.nan, 1]), "finite"),
        (formats.Format("mine", "int", 4, 7.0, 2, 2, scale="absmean"), "scale"),
        (formats.Format("mine", "block", 4, 7.0, 2, 2, block_scale="e8m0"), "block_size"),
    ],
)
def test_a_contradictory_format_is_refused(registry, fmt, why):
    with pytest.raises(formats.FormatError, match=why) as error:
        formats.register(fmt)
    assert "\n" not in str(error.value)


def test_registering_the_same_format_twice_changes_nothing(registry):
    fmt = formats.level_set("twice", [-1, 1])
    assert formats.register(fmt) is formats.register(fmt) is formats.parse("twice")


@pytest.mark.parametrize(("element", "scale"), [("ternary", "e8m0"), ("bf16", "e8m0"), (4, "bf16"), (4, "int8")])
def test_a_block_of_what_cannot_be_scaled_is_refused(element, scale):
    with pytest.raises(formats.FormatError, match="family"):
        formats.block("mine", formats.parse(element), 16, scale)
