"""Products at a precision against NumPy fake quantization: values, straight-through gradients, pass-through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.numerics.formats import parse
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED, StaticPrecision, StaticQuantizer

pytestmark = pytest.mark.usefixtures("quick_compile")

PRODUCTS = {"linear": ("a", "w"), "attention_scores": ("q", "k"), "attention_values": ("p", "v")}
SHAPES = {
    "linear": ((2, 3, 8), (8, 2, 5)),  # x (B, S, in), kernel (in, *features)
    "attention_scores": ((2, 5, 3, 4), (2, 6, 3, 4)),  # q (B, S, H, K), k (B, M, H, K)
    "attention_values": ((2, 3, 5, 6), (2, 6, 3, 4)),  # p (B, H, S, S), v (B, M, H, K)
}
EINSUMS = {
    "linear": "bli,ifg->blfg",
    "attention_scores": "blhk,bmhk->bhlm",
    "attention_values": "bhlm,bmhk->blhk",
}


def rounded(x, bits, axes=None):
    """Symmetric abs-max rounding in float32, from its definition; 16 bits and above leave x as it is."""
    if bits >= 16:
        return x
    last_level = np.float32(2 ** (bits - 1) - 1)
    largest = np.max(np.abs(x), axis=axes, keepdims=True).astype(np.float32)
    scale = largest / last_level
    return (np.rint(x / scale) * scale).astype(np.float32)


def operands(product, seed=0):
    rng = np.random.default_rng(seed)
    lhs, rhs = (rng.normal(size=shape).astype(np.float32) for shape in SHAPES[product])
    if product == "attention_values":
        lhs = np.exp(lhs) / np.exp(lhs).sum(-1, keepdims=True)
    return lhs, rhs


def static_of(names, **granularity):
    kind = parse("int4").kind
    default = {"w": "channel"}
    return StaticPrecision(
        tuple((name, StaticQuantizer(kind, granularity.get(name, default.get(name, "tensor")))) for name in names)
    )


def grids_of(**bits):
    return {name: parse(b).grid() for name, b in bits.items()}


@functools.partial(jax.jit, static_argnames=("product", "static"))
def forward_and_gradients(lhs, rhs, cotangent, grids, product, static):
    out, pullback = jax.vjp(lambda lhs, rhs: getattr(Products(static, grids), product)(lhs, rhs), lhs, rhs)
    return out, *pullback(cotangent.astype(out.dtype))


@functools.partial(jax.jit, static_argnames="static")
def linear(x, kernel, static, grids):
    return Products(static, grids).linear(x, kernel)


def cotangent_of(product, lhs, rhs):
    shape = np.einsum(EINSUMS[product], lhs, rhs).shape
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


def test_linear_of_a_case_worked_by_hand():
    x = np.array([[1.0, -0.4, 0.2]], np.float32)  # 3 bits: scale 1/3, levels 3, -1, 1
    kernel = np.array([[0.5, 2.0], [-1.0, 0.9], [0.2, -1.1]], np.float32)  # 2 bits: columns (0, -1, 0) and (2, 0, -2)
    y = linear(x, kernel, static_of("wa"), grids_of(w=2, a=3))
    np.testing.assert_allclose(y, [[1 / 3, 4 / 3]], rtol=1e-6)


@pytest.mark.parametrize("product", PRODUCTS)
def test_forward_multiplies_the_quantized_operands_and_gradients_are_straight_through_them(product):
    lhs, rhs = operands(product)
    g = cotangent_of(product, lhs, rhs)
    left, right = PRODUCTS[product]
    weight_axes = (0,) if product == "linear" else None  # per output channel; all others per tensor
    ins, out = EINSUMS[product].split("->")
    first, second = ins.split(",")
    for left_bits, right_bits in ((4, 4), (3, 8), (2, 16), (16, 5), (16, 16), (12, 6)):
        grids = grids_of(**{left: left_bits, right: right_bits})
        y, d_lhs, d_rhs = forward_and_gradients(lhs, rhs, g, grids, product, static_of((left, right)))
        lhs_q, rhs_q = rounded(lhs, left_bits), rounded(rhs, right_bits, weight_axes)
        where = f"{left} at {left_bits} bits, {right} at {right_bits}"
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5, err_msg=where)
        close(y, np.einsum(EINSUMS[product], lhs_q, rhs_q))
        close(d_lhs, np.einsum(f"{out},{second}->{first}", g, rhs_q))
        close(d_rhs, np.einsum(f"{out},{first}->{second}", g, lhs_q))


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_high_precision_is_bit_for_bit_the_plain_product(product):
    g = cotangent_of(product, *operands(product))
    for dtype in (jnp.float32, jnp.bfloat16):
        lhs, rhs = (jnp.asarray(x, dtype) for x in operands(product))
        grids = grids_of(**dict.fromkeys(PRODUCTS[product], 16))
        simulated = forward_and_gradients(lhs, rhs, g, grids, product, static_of(PRODUCTS[product]))
        plain = forward_and_gradients(lhs, rhs, g, None, product, UNQUANTIZED)
        for one, other in zip(simulated, plain, strict=True):
            assert one.dtype == other.dtype == dtype
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_unquantized_program_is_lax_dot_general_and_needs_no_table():
    lhs, rhs = operands("linear")
    dimensions = (((2,), (0,)), ((), ()))
    text = str(jax.make_jaxpr(lambda x, w: Products().linear(x, w))(lhs, rhs))
    assert "dot_general" in text and "round" not in text and "custom_vjp" not in text
    np.testing.assert_allclose(
        Products().linear(lhs, rhs),
        jax.lax.dot_general(lhs, rhs, dimensions),
        rtol=1e-5,
        atol=1e-6,
    )


def test_an_operand_absent_from_the_program_stays_exact():
    x, kernel = operands("linear")
    y = linear(x, kernel, static_of("w"), grids_of(w=3))
    np.testing.assert_allclose(y, np.einsum("bli,ifg->blfg", x, rounded(kernel, 3, (0,))), rtol=1e-5, atol=1e-5)
    q, k = operands("attention_scores")
    scores = jax.jit(lambda q, k, grids: Products(static_of("k"), grids).attention_scores(q, k))(q, k, grids_of(k=3))
    np.testing.assert_allclose(scores, np.einsum("blhk,bmhk->bhlm", q, rounded(k, 3)), rtol=1e-5, atol=1e-5)


def test_granularity_says_what_shares_a_scale():
    x, kernel = operands("linear")
    x[0, 0] *= 100  # one loud token
    kernel[:, 0, 0] *= 100  # one loud output channel
    grids = grids_of(w=4, a=4)
    y = linear(x, kernel, static_of("wa", w="tensor", a="token"), grids)
    expected = np.einsum("bli,ifg->blfg", rounded(x, 4, (2,)), rounded(kernel, 4))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
    assert not np.allclose(y, linear(x, kernel, static_of("wa"), grids), rtol=1e-2)


def test_traced_formats_give_the_same_bits_as_formats_compiled_in():
    x, kernel = operands("linear")
    static = static_of("wa")
    for bits in (2, 5, 16):
        grids = grids_of(w=bits, a=bits)
        step_config = jax.jit(lambda x, kernel, grids=grids: Products(static, grids).linear(x, kernel))
        traced = linear(x, kernel, static, grids)
        np.testing.assert_allclose(traced, step_config(x, kernel), rtol=1e-6, atol=1e-6)


def test_vmap_over_formats_equals_a_loop():
    x, kernel = operands("linear")
    g = cotangent_of("linear", x, kernel)
    grids_of_runs = [grids_of(w=w, a=a) for w, a in ((2, 4), (16, 3), (8, 16), (16, 16))]
    stacked = jax.tree.map(lambda *grids: np.stack(grids), *grids_of_runs)
    static = static_of("wa")
    one = lambda grids: forward_and_gradients(x, kernel, g, grids, "linear", static)
    together = jax.vmap(one)(stacked)
    for i, grids in enumerate(grids_of_runs):
        for all_, alone in zip(together, one(grids), strict=True):
            np.testing.assert_allclose(all_[i], alone, rtol=1e-5, atol=1e-5)


def test_floats_and_integers_share_a_program():
    x, kernel = map(jnp.asarray, operands("linear"))
    static = StaticPrecision((("w", StaticQuantizer(parse("e2m1").kind, "channel")),))
    traced = jax.jit(lambda kernel, grids: Products(static, grids).linear(x, kernel))
    scale = np.max(np.abs(kernel), axis=0, keepdims=True) / 6  # e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = np.concatenate([-positive[:0:-1], positive])
    nearest = levels[np.argmin(np.abs(np.asarray(kernel / scale)[..., None] - levels), axis=-1)]
    np.testing.assert_allclose(
        traced(kernel, grids_of(w="e2m1")), np.einsum("bli,ifg->blfg", x, nearest * scale), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        traced(kernel, grids_of(w=4)), np.einsum("bli,ifg->blfg", x, rounded(kernel, 4, (0,))), rtol=1e-4, atol=1e-4
    )
    assert traced._cache_size() == 1


def test_on_grid_is_the_operand_that_the_product_multiplies():
    x, kernel = operands("linear")
    static, grids = static_of("wa"), grids_of(w=3, a=5)
    np.testing.assert_allclose(Products(static, grids).on_grid(x, "a"), rounded(x, 5), atol=1e-6)
    np.testing.assert_allclose(Products(static, grids).on_grid(kernel, "w"), rounded(kernel, 3, (0,)), atol=1e-6)
    assert Products(static, grids).on_grid(x, "q") is x
