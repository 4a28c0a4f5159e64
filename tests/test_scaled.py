"""Native products of block formats: codes and scales multiplied as they are, against what simulation multiplies."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_scaling.config import base
from precision_scaling.errors import ConfigError
from precision_scaling.numerics import rounding
from precision_scaling.numerics.formats import parse
from precision_scaling.quantize.parsing import parse as parse_precision
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import static_of_one

pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.partial(jax.jit, static_argnames="static")
def forward_and_gradients(x, kernel, g, grids, key, static):
    product, pull = jax.vjp(lambda x, kernel: Products(static, grids, key).linear(x, kernel), x, kernel)
    return product, *pull(g)


def native(text, **backward):
    """(StaticPrecision, grids) of a grid's words in native mode."""
    options = base.get_config().precision
    options.backward.update(backward)
    precision = parse_precision(text, {**options, "mode": "native"})
    static = static_of_one(precision, "float32")
    return static, {name: jax.tree.map(jnp.asarray, precision.format(name).grid()) for name, _ in static.quantizers}


BLOCKS = {
    "mxfp8_train": ("mxfp8_train", {}),
    "nvfp4": ("nvfp4", {}),
    "nvfp4_train": ("nvfp4_train none", {}),
    "forward alone": ("wnvfp4_anvfp4", {}),
    "exact operands saved": ("wmxfp8_amxfp8_e5m2", {"weights_saved": "exact", "activations_saved": "exact"}),
    "two candidates of a scale": ("wnvfp4_4over6_anvfp4_4over6", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BLOCKS)
def test_native_products_of_blocks_equal_the_simulated_ones(case):
    rng = np.random.default_rng(0)
    x, kernel, g = (rng.standard_t(4, size=s).astype(np.float32) for s in ((64, 96), (96, 32), (64, 32)))
    text, saved = BLOCKS[case]
    static, grids = native(text, **saved)
    run = functools.partial(forward_and_gradients, x, kernel, g, grids, jax.random.key(1))
    for ours, theirs in zip(run(static=static), run(static=static.simulated()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6 * np.max(np.abs(theirs)))
    plain = x @ kernel
    assert np.max(np.abs(run(static=static)[0] - plain)) > 1e-3 * np.max(np.abs(plain))


def test_lanes_of_native_blocks_are_those_one_by_one():
    rng = np.random.default_rng(0)
    x, kernel, g = (rng.normal(size=(3, *s)).astype(np.float32) for s in ((32, 64), (64, 32), (32, 32)))
    static, grids = native("mxfp8_train")
    run = lambda x, kernel, g: forward_and_gradients(x, kernel, g, grids, None, static)
    together = jax.vmap(run)(x, kernel, g)
    for lane in range(3):
        for ours, alone in zip(together, run(x[lane], kernel[lane], g[lane]), strict=True):
            np.testing.assert_allclose(ours[lane], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_codes_and_scales_of_blocks_are_values_of_their_dtypes():
    """What is cast to a container is exact: levels in e4m3, e5m2 or e2m1, scales in e8m0 or e4m3."""
    x = np.random.default_rng(0).standard_t(3, size=(32, 64)).astype(np.float32) * 1e-3
    for name, container in (
        ("mxfp8", "e4m3fn"),
        ("mxfp8_e5m2", "e5m2"),
        ("nvfp4", "e2m1fn"),
        ("nvfp4_4over6", "e2m1fn"),
    ):
        fmt = parse(name)
        codes, scales, unit = map(np.asarray, rounding.block_codes(x, fmt.grid(), fmt.kind, (1,)))
        element = getattr(ml_dtypes, f"float{4 if container == 'e2m1fn' else 8}_{container}")
        assert (codes.astype(element).astype(np.float32) == codes).all()
        stored = ml_dtypes.float8_e4m3fn if name.startswith("nv") else ml_dtypes.float8_e8m0fnu
        kept = scales.astype(stored).astype(np.float32)
        np.testing.assert_allclose(kept, scales, rtol=1e-6)
        values = codes * np.repeat(kept, fmt.block_size, 1) * unit
        np.testing.assert_allclose(values, rounding.fake_quant_array(x, name, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wnvint4_anvint4", ("weights = nvint4", "nvfp4", "mode simulated")),
        ("wmxfp8_abf16", ("activations = bf16", "formats for both")),
        ("wmxfp8_anvfp4", ("two kinds", "blocks of one size")),
        ("wmxfp8_ae4m3fn", ("two kinds",)),
        ("wmxfp8_amxfp8_kvmxfp8", ("k = mxfp8", "attention")),
        ("wnvfp4_anvfp4_gnvfp4", ("activations_saved = forward", "tiles for weights")),
        ("nvfp4_train", ("none with precision.mode native",)),
    ],
)
def test_blocks_that_no_product_multiplies_are_refused(text, words):
    with pytest.raises(ConfigError) as error:
        native(text)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
