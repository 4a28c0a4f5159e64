"""Presets as models are trained in them, NVFP4 and MXFP8, against NumPy with the small floats of ml_dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

from precision_scaling import quantize
from precision_scaling.config import base, experiment
from precision_scaling.errors import ConfigError
from precision_scaling.numerics import elements, hadamard
from precision_scaling.numerics.formats import FormatError
from precision_scaling.numerics.formats import parse as parse_format
from precision_scaling.numerics.gaussian import gaussian_mse
from precision_scaling.quantize.parsing import from_options, parse
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import of_layer, static_of, static_of_one

pytestmark = pytest.mark.usefixtures("quick_compile")

fake_quant = jax.jit(quantize.fake_quant, static_argnames=("fmt", "axis", "group_size", "rounding"))


def options(**leaves):
    config = base.get_config().precision
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in leaves.items()})
    return config


def arrays(seed=0):
    """Activations, kernel and incoming gradient with a few outliers."""
    rng = np.random.default_rng(seed)
    x, w, g = (rng.standard_t(4, size=s).astype(np.float32) for s in ((32, 64), (64, 96), (32, 96)))
    return x, w / 8, g / 1000


def blocks(x, rows, columns):
    """(number of blocks down, rows, number across, columns)."""
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def nvfp4(x, rows, columns):
    """e2m1 under e4m3 scales of blocks under a float32 scale of the tensor (arXiv 2509.25149, appendix)."""
    b = blocks(x, rows, columns)
    tensor_scale = np.abs(x).max() / np.float32(6 * 448)
    stored = (np.abs(b).max(axis=(1, 3), keepdims=True) / np.float32(6) / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    scale = stored.astype(np.float32) * tensor_scale
    codes = np.clip(b / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (codes * scale).reshape(x.shape)


def mxfp8(x, rows, columns):
    """e4m3 under powers of two, the least under which the largest element is not above 448 (arXiv 2506.08027)."""
    b = blocks(x, rows, columns)
    scale = 2.0 ** np.ceil(np.log2(np.abs(b).max(axis=(1, 3), keepdims=True).astype(np.float64) / 448))
    return ((b / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).astype(np.float32).reshape(x.shape)


def rotated(x):
    """16 tokens at a time by the signs and the Hadamard matrix, made by SciPy."""
    signs = np.asarray(hadamard.random_signs(jax.random.key(16), 16))
    matrix = scipy.linalg.hadamard(16) / 4 * signs
    return np.einsum("ij,bjk->bik", matrix, x.reshape(-1, 16, x.shape[1])).reshape(x.shape).astype(np.float32)


@functools.cache
def nearest(**leaves):
    """Product and gradients in the recipe without its random rounding."""
    leaves = {"preset": "nvfp4_train", "backward__gradient_rounding": "nearest", **leaves}
    return forward_and_gradients(from_options(options(**leaves)))


def forward_and_gradients(precision, key=None, at="down"):
    static = static_of_one(precision, "float32")
    grids = of_layer(static.grids(precision, 8), 0)
    x, w, g = map(jnp.asarray, arrays())

    @jax.jit
    def run(x, w, g, key):
        y, pullback = jax.vjp(lambda x, w: Products(static, grids, key).linear(x, w, place=at), x, w)
        return y, *pullback(g)

    return (run if key is None or key.ndim == 0 else jax.vmap(run, (None, None, None, 0)))(x, w, g, key)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())


def test_nvfp4_training_is_its_three_products():
    y, dx, dw = nearest()
    x, w, g = arrays()
    w_q = nvfp4(w, 16, 16)
    np.testing.assert_array_equal(nvfp4(w.T, 16, 16), w_q.T)  # why they are tiles
    close(y, nvfp4(x, 1, 16) @ w_q)
    close(dx, nvfp4(g, 1, 16) @ w_q.T)
    close(dw, nvfp4(rotated(x), 16, 1).T @ nvfp4(rotated(g), 16, 1))


@pytest.mark.parametrize(
    ("leaf", "value", "changed"),
    (
        ("weights_granularity", "group:16", {0: lambda x, w: nvfp4(x, 1, 16) @ nvfp4(w, 16, 1)}),
        ("backward__weights_rotation", "none", {2: lambda x, g: nvfp4(x, 16, 1).T @ nvfp4(g, 16, 1)}),
        ("backward__weights_saved", "bf16", None),
    ),
)
def test_each_part_of_the_recipe_is_an_option_of_its_own(leaf, value, changed):
    if changed is None:
        with pytest.raises(ConfigError, match=r"weights_rotation = 'hadamard:16': allowed is none, where weights_grad"):
            nearest(**{leaf: value})
        return
    x, w, g = arrays()
    found, plain = nearest(**{leaf: value}), nearest()
    assert not np.array_equal(found[2 if 2 in changed else 0], plain[2 if 2 in changed else 0])
    for i, by_hand in changed.items():
        close(found[i], by_hand(x, w if i == 0 else g))
    if 2 in changed:
        np.testing.assert_array_equal(found[0], plain[0])


def test_mxfp8_training_is_its_three_products():
    precision = parse("mxfp8_train", options())
    y, dx, dw = forward_and_gradients(precision)
    x, w, g = arrays()
    close(y, mxfp8(x, 1, 32) @ mxfp8(w, 32, 1))
    close(dx, mxfp8(g, 1, 32) @ mxfp8(w, 1, 32).T)
    close(dw, mxfp8(x, 32, 1).T @ mxfp8(g, 32, 1))


@pytest.mark.slow
def test_gradients_alone_are_rounded_at_random_and_without_bias():
    precision = from_options(options(preset="nvfp4_train"))
    random = {name for name, quantizer in precision.quantizers if quantizer.rounding == "stochastic"}
    assert random == {"g_a", "g_w"}
    draws = 4000
    y, dx, dw = forward_and_gradients(precision, jax.random.split(jax.random.key(1), draws))
    assert (np.asarray(y) == np.asarray(y[0])).all()
    x, w, g = arrays()
    for found, expected in ((dx, g @ nvfp4(w, 16, 16).T), (dw, nvfp4(rotated(x), 16, 1).T @ rotated(g))):
        found = np.asarray(found, np.float64)
        error, deviation = np.abs(found.mean(axis=0) - expected), found.std(axis=0) / np.sqrt(draws)
        assert np.max(error / (deviation + 1e-6 * np.abs(expected).max())) < 5


def test_layers_left_in_bf16_are_exact_in_both_directions():
    precision = parse("nvfp4_train first:1=bf16", options())
    static = static_of_one(precision, "float32")
    x, w, g = map(jnp.asarray, arrays())
    grids = static.grids(precision, 8)

    @functools.partial(jax.jit, static_argnums=0)
    def run(products_of, grids, key, x, w, g):
        y, pullback = jax.vjp(lambda x, w: products_of(grids, key).linear(x, w, place="out"), x, w)
        return y, *pullback(g)

    of_static = lambda grids, key: Products(static, grids, key)
    plain = run(lambda grids, key: Products(), None, None, x, w, g)
    kept = run(of_static, of_layer(grids, 0), jax.random.key(0), x, w, g)
    jax.tree.map(np.testing.assert_array_equal, kept, plain)
    rounded = run(of_static, of_layer(grids, 1), jax.random.key(0), x, w, g)
    assert all(0.02 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.5 for a, b in zip(rounded, plain, strict=True))


def test_tiles_and_scales_above():
    x, w, _ = arrays()
    np.testing.assert_allclose(fake_quant(w, fmt="nvfp4", axis=(0, 1)), nvfp4(w, 16, 16), rtol=1e-6)
    np.testing.assert_allclose(fake_quant(w, fmt="nvfp4", axis=(1, 0)), nvfp4(w, 16, 16), rtol=1e-6)
    np.testing.assert_allclose(fake_quant(x, fmt="mxfp8_up", axis=1), mxfp8(x, 1, 32), rtol=1e-6)
    tiles = blocks(w, 8, 8)
    scale = np.abs(tiles).max(axis=(1, 3), keepdims=True) / np.float32(7)
    by_hand = (np.rint(tiles / scale) * scale).reshape(w.shape)
    np.testing.assert_allclose(fake_quant(w, fmt="int4", axis=(0, 1), group_size=8), by_hand, rtol=1e-5)
    with pytest.raises(FormatError, match="group_size 16 does not divide axis 1"):
        fake_quant(w[:, :90], fmt="nvfp4", axis=(0, 1))
    # Integrated errors against samples.
    sample = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    for fmt, axis, count in (
        ("mxfp8_up", 1, None),
        ("mxfp8", 1, None),
        ("nvfp4", (0, 1), 256),
        ("nvfp4_4over6", 1, None),
    ):
        measured = np.mean(np.square(np.asarray(fake_quant(sample, fmt=fmt, axis=axis), np.float64) - sample))
        assert gaussian_mse(fmt, "absmax", count) == pytest.approx(measured, rel=0.02), fmt


@pytest.mark.slow
def test_recipes_resolve_and_share_cohorts_with_bf16():
    config = base.get_config()
    config.model.update({"width": 64, "depth": 8, "heads": 2, "mlp_width": 128})
    texts = ("bf16", "nvfp4_train", "nvfp4_train none", "nvfp4_train_wnvint4 @decay", "mxfp8_train", "nvfp4")
    config.study.grid.some = base.grid(("25k",), (100_000,), texts)
    cohorts = experiment.resolve(config, 256).cohorts
    assert sorted(len(cohort.runs) for cohort in cohorts) == [1, 1, 4]
    (recipe,) = (cohort for cohort in cohorts if len(cohort.runs) == 4)
    assert recipe.static.gradient_rotations == (("w", 16),)
    formats_of = parse("nvfp4_train", options()).by_place
    assert [row[0].name for row in formats_of("w", 8)] == ["nvfp4"] * 7 + ["bf16"]
    for leaves, words in (
        ({"batch_size": 1, "sequence_length": 24}, "divides the tokens of a microbatch, 24"),
        ({"mlp_width": 136}, "a group that divides model.mlp_width, 136"),
    ):
        for name, value in leaves.items():
            section = config.train if name == "batch_size" else config.model
            section[name] = value
        with pytest.raises(ConfigError, match=words):
            experiment.resolve(config, 256)
        config.train.batch_size, config.model.sequence_length = 16, 64


def test_four_over_six_takes_the_better_of_two_scales_for_each_block():
    x, w, _ = arrays()
    for array, rows, columns, axis in ((x, 1, 16, 1), (w, 16, 16, (0, 1))):
        b = blocks(array, rows, columns)
        tensor_scale = np.abs(array).max() / np.float32(6 * 256)
        candidates = []
        for level in (6, 4):
            stored = np.abs(b).max(axis=(1, 3), keepdims=True) / np.float32(level) / tensor_scale
            scale = stored.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * tensor_scale
            q = np.clip(b / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
            candidates.append((q, np.sum((q - b) ** 2, axis=(1, 3), keepdims=True)))
        (six, of_six), (four, of_four) = candidates
        by_hand = np.where(of_four < of_six, four, six).reshape(array.shape)
        found = np.asarray(fake_quant(array, fmt="nvfp4_4over6", axis=axis))
        np.testing.assert_allclose(found, by_hand, rtol=1e-5)
        if rows == 1:
            assert 0.1 < np.mean(of_four < of_six) < 0.9
            assert np.mean((found - array) ** 2) < np.mean((nvfp4(array, rows, columns) - array) ** 2)
    precision = parse("nvfp4_train_wnvfp4_4over6", options())
    assert precision.describe().startswith("w=nvfp4_4over6/tile:16/nearest a=nvfp4/group:16/nearest")


def test_eden_multiplies_scales_so_that_a_rotated_block_keeps_its_direction():
    x, _, _ = arrays()
    key = jax.random.key(3)
    b = blocks(x, 1, 16)
    tensor_scale = np.abs(x).max() / np.float32(6 * 256)
    stored = (np.abs(b).max(axis=(1, 3), keepdims=True) / np.float32(6) / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    scale = stored.astype(np.float32) * tensor_scale
    codes = np.clip(b / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    exact = np.sum(b * b, axis=(1, 3), keepdims=True) / np.sum(b * codes, axis=(1, 3), keepdims=True) / tensor_scale
    # The two e4m3 numbers around it, and the upper one with the probability of its distance to the lower.
    numbers = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)[:-1]
    above = np.searchsorted(numbers, exact, side="right")
    low, high = numbers[above - 1], numbers[above]
    noise = np.asarray(elements.rounding_noise(key, (32, 4, 1))).reshape(exact.shape)
    by_hand = (codes * np.where(noise < (exact - low) / (high - low), high, low) * tensor_scale).reshape(x.shape)
    np.testing.assert_allclose(fake_quant(x, fmt="nvfp4", axis=1, rounding="eden", key=key), by_hand, rtol=1e-5)


@pytest.mark.slow
def test_eden_has_less_than_half_the_error_of_stochastic_rounding_and_no_bias():
    exact = np.random.default_rng(0).normal(size=(16, 64))
    x = jnp.asarray(exact, jnp.float32)

    def estimate(how, key):
        signs = hadamard.random_signs(jax.random.fold_in(key, 1), 64)
        turned = hadamard.rotate(x, signs, 1)
        return hadamard.unrotate(quantize.fake_quant(turned, "nvfp4", 1, None, how, key), signs, 1)

    def of(how):
        draws = jax.jit(jax.vmap(functools.partial(estimate, how)))(jax.random.split(jax.random.key(0), 4000))
        draws = np.asarray(draws, np.float64)
        share = lambda error: np.mean(error**2) / np.mean(exact**2)
        return share(draws - exact), share(draws.mean(axis=0) - exact)

    (eden, left), (stochastic, noise), (nearest, bias) = map(of, ("eden", "stochastic", "nearest"))
    assert eden < stochastic / 2 and nearest < eden < 1.15 * nearest
    # Of the mean of 4000 draws little is left but their noise, of nearest its shrinkage.
    assert noise < 1.2 * stochastic / 4000 and left - eden / 4000 < 1e-6 and bias - nearest / 4000 > 1.5e-5


def test_eden_is_for_rotated_gradients_in_blocks_with_float_scales():
    leaves = {"preset": "nvfp4_train", "backward__weights_gradient": "nvfp4/eden"}
    precision = from_options(options(**leaves))
    draws = [forward_and_gradients(precision, jax.random.key(seed))[2] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    x, _, g = arrays()
    assert not np.array_equal(draws[0], draws[2])
    assert np.linalg.norm(draws[0] - x.T @ g) < 0.25 * np.linalg.norm(x.T @ g)
    rotated_inputs = {"backward__activations_rotation": "hadamard:32", "backward__activations_saved": "nvfp4"}
    both = from_options(options(**leaves, **rotated_inputs, backward__gradient_rounding="eden"))
    assert both.gradient_rotations == (("w", 16), ("a", 32)) and both.get("g_a").rounding == "eden"
    _, w, _ = arrays()
    dx = forward_and_gradients(both, jax.random.key(0))[1]
    assert 0.01 < np.linalg.norm(dx - g @ w.T) / np.linalg.norm(g @ w.T) < 0.25
    for wrong in (
        {"backward__activations_gradient": "nvfp4/eden"},
        {"weights_rounding": "eden"},
        {"backward__weights_gradient": "mxfp4/eden", "backward__weights_saved": "mxfp4"},
        {"backward__weights_rotation": "hadamard:8", "backward__weights_gradient": "nvfp4/eden"},
    ):
        with pytest.raises(ConfigError, match="rotated by whole blocks"):
            from_options(options(preset="nvfp4_train", **wrong))


def test_formats_equal_those_of_qwix():
    qwix = pytest.importorskip("qwix")
    x, w, _ = arrays()
    for array, fmt, theirs, axes, size in (
        (x, "mxfp8_up", "mxfp8", (1,), 32),
        (w, "mxfp8_up", "mxfp8", (0,), 32),
        (x, "nvfp4", "nvfp4", (1,), 16),
        (w, "nvfp4", "nvfp4", (0, 1), 16),
    ):
        # Which has no scale of the tensor.
        tensor_scale = np.abs(array).max() / np.float32(6 * 448) if fmt == "nvfp4" else np.float32(1)
        how = {"channelwise_axes": tuple({0, 1} - {*axes}), "tiled_axes": dict.fromkeys(axes, size)}
        found = qwix.dequantize(qwix.quantize(jnp.asarray(array / tensor_scale), theirs, **how))
        np.testing.assert_allclose(fake_quant(array, fmt=fmt, axis=axes), np.asarray(found) * tensor_scale, rtol=1e-6)


@pytest.mark.parametrize("value", ("hadamard", "hadamard:12", "hadamard:1", "16"))
def test_widths_of_rotations_are_powers_of_two(value):
    with pytest.raises(ConfigError, match=r"backward.weights_rotation = .*: allowed is none, or hadamard:WIDTH"):
        from_options(options(backward__weights_rotation=value))


def test_tiles_are_of_weights_alone():
    for text in ("a4/tile:16", "kv4/tile:16", "anvfp4/tile:16", "wnvfp4/tile:32"):
        with pytest.raises(ConfigError, match="allowed is"):
            parse(text, options())
    assert parse("w4/tile:8", options()).describe() == "w=int4/tile:8/nearest"
    one, other = parse("wnvfp4/tile:16", options()), parse("wnvfp4", options())
    assert static_of([one, other], "float32") is None
    assert dataclasses.replace(parse_format("nvint4"), name="").kind == parse_format("nvfp4").kind


@pytest.mark.parametrize(
    ("text", "preset", "leaves"),
    [
        ("nvfp4_train backward.weights_rotation=none", "nvfp4_train", {"backward__weights_rotation": "none"}),
        ("nvfp4_train none mode=simulated", "nvfp4_train", {"layers": "none"}),
        ("w4_a4 rotation=hadamard first:1=bf16", "paper", {"weights": "4", "activations": "4", "rotation": "hadamard",
                                                            "layers": "first:1=bf16"}),
        ("nvfp4_train weights_granularity=group:16 backward.activations_saved=nvfp4", "nvfp4_train",
         {"weights_granularity": "group:16", "backward__activations_saved": "nvfp4"}),
    ],
)  # fmt: skip
def test_a_grid_says_options_beside_formats(text, preset, leaves):
    assert parse(text, options()) == from_options(options(preset=preset, **leaves))
    assert parse(text, options(backward__gradient_rounding="nearest")) != parse("nvfp4_train", options())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bf16 rotation=hadamard", "no options with bf16"),
        ("w4_a4 rotation=hadamard rotation=none", "an option once"),
        ("w4_a4 rotation=", "an option once, with a value"),
        ("w4_a4 rotation=fourier", "one of none, hadamard"),
        ("w4_a4 preset=fp8", "LAYERS"),
    ],
)
def test_an_option_that_a_grid_cannot_say_is_one_line(text, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse(text, options())
    assert "\n" not in str(error.value)
