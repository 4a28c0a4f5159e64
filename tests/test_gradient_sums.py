"""What devices add up: gradients of kernels in float32, and scales, which they agree on once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model import decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Decoder
from precision_scaling.numerics import formats
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED, StaticPrecision, StaticQuantizer
from precision_scaling.runtime import sharding

pytestmark = pytest.mark.usefixtures("quick_compile")
INT = StaticQuantizer(formats.Kind("int"))


def wide_products(function, *args) -> int:
    """How many products of bfloat16 operands give float32."""
    text = jax.jit(lambda *args: function(*args)).lower(*args).as_text()
    of_bfloat16 = r"stablehlo.dot_general .*: \(tensor<[\dx]+xbf16>, tensor<[\dx]+xbf16>\) -> tensor<[\dx]+xf32>"
    return len(re.findall(of_bfloat16, text))


@pytest.mark.parametrize("names", [(), ("w", "a"), ("a", "g_w")])
def test_partial_sums_of_a_kernels_gradient_are_float32_and_the_result_is_what_it_was(monkeypatch, names):
    static = StaticPrecision(tuple((name, INT) for name in names)) if names else UNQUANTIZED
    products = Products(static, {name: formats.parse("int8").grid() for name in names})
    rng = np.random.default_rng(0)
    x, kernel, g = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((64, 8), (8, 4), (64, 4)))

    def gradients(x, kernel, g):
        return jax.vjp(lambda x, kernel: products.linear(x, kernel, place="out"), x, kernel)[1](g)

    plain, before = jax.jit(gradients)(x, kernel, g), wide_products(gradients, x, kernel, g)
    monkeypatch.setattr(sharding, "on_several_devices", lambda: True)
    monkeypatch.setattr(sharding, "sums_in_float32", lambda: True)
    assert wide_products(gradients, x, kernel, g) == before + 1
    for one, other in zip(jax.jit(lambda *args: gradients(*args))(x, kernel, g), plain, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=2**-7, atol=2**-7)


def test_on_one_device_there_is_nothing_to_add_up():
    layout = sharding.make_layout({"slices": 1, "run": 1, "data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with sharding.summing_gradients("float32"):
        assert not sharding.sums_in_float32()
        with sharding.splitting(layout):
            assert not sharding.sums_in_float32()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_scale_of_a_whole_tensor_is_kept_and_not_made_again(remat):
    static = StaticPrecision((("a", INT),))
    grids = {"a": formats.parse("int4").grid()}
    tokens = jnp.zeros((2, 9), jnp.int32)

    def maxima(remat):
        model = ModelConfig(31, 16, 2, 4, 24, 8, 16, 2, remat=remat)
        params = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
        loss = lambda params: Decoder(model, static).apply({"params": params}, tokens, grids, method=Decoder.losses)[0]
        text = jax.jit(jax.grad(loss)).lower(params).as_text()
        return text.count("stablehlo.maximum across dimensions = [0, 1]") + text.count("applies stablehlo.maximum")

    assert maxima(remat) <= maxima("none") + 1  # that of the softmax
