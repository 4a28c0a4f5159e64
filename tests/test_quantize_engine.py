"""Backward formats, groups, stochastic rounding, rotation and native products against explicit NumPy products."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.model import decoder
from precision_scaling.model.config import ModelConfig
from precision_scaling.numerics import elements
from precision_scaling.numerics.formats import FormatError, parse
from precision_scaling.quantize.operands import BACKWARD, OPERANDS
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer
from precision_scaling.training import optimizer, schedule
from precision_scaling.training import step as step_lib

pytestmark = pytest.mark.usefixtures("quick_compile")

INT = parse("int4").kind
# Left and right operand of each product, their shapes, and the product; the shapes give every axis another length.
PRODUCTS = {
    "linear": ("a", "w", (6, 8), (8, 10), "ti,io->to"),
    "attention_scores": ("q", "k", (2, 5, 3, 4), (2, 6, 3, 4), "blhk,bmhk->bhlm"),
    "attention_values": ("p", "v", (2, 3, 5, 6), (2, 6, 3, 4), "bhlm,bmhk->blhk"),
}


def rounded(x, bits, letters=None, over=None, group=None):
    """Symmetric abs-max rounding from its definition. over: letters of `letters` that share a scale, None for all."""
    if bits >= 16:
        return x
    axes = None if over is None else tuple(letters.index(letter) for letter in over)
    shape = x.shape
    if group:
        (axis,) = axes
        x, axes = x.reshape(*shape[:axis], -1, group, *shape[axis + 1 :]), (axis + 1,)
    scale = np.max(np.abs(x), axis=axes, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    return (np.rint(x / scale) * scale).astype(np.float32).reshape(shape)


def arrays(product, seed=0):
    _, _, lhs_shape, rhs_shape, subscripts = PRODUCTS[product]
    rng = np.random.default_rng(seed)
    lhs, rhs = rng.normal(size=lhs_shape).astype(np.float32), rng.normal(size=rhs_shape).astype(np.float32)
    return lhs, rhs, rng.normal(size=np.einsum(subscripts, lhs, rhs).shape).astype(np.float32)


def grids_of(**formats):
    return {name: parse(fmt).grid() for name, fmt in formats.items()}


@functools.partial(jax.jit, static_argnames=("product", "static"))
def forward_and_gradients(lhs, rhs, g, grids, key=None, *, product, static):
    function = lambda lhs, rhs: getattr(Products(static, grids, key), product)(lhs, rhs)
    out, pullback = jax.vjp(function, lhs, rhs)
    return out, *pullback(g.astype(out.dtype))


def close(ours, theirs, rtol=2e-5, atol=5e-5, **kwargs):
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=rtol, atol=atol, **kwargs)


def contracted_in_gradients(subscripts):
    """Letters that the products for the left and the right operand's gradient contract."""
    ins, out = subscripts.split("->")
    left, right = ins.split(",")
    return [letter for letter in right if letter not in left], [letter for letter in left if letter not in right], out


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ("tensor", "vector"))
@pytest.mark.parametrize("product", PRODUCTS)
def test_backward_products_multiply_the_gradient_and_the_saved_operand_in_their_own_formats(product, granularity):
    left, right, _, _, subscripts = PRODUCTS[product]
    lhs, rhs, g = arrays(product)
    ins, out = subscripts.split("->")
    lhs_letters, rhs_letters = ins.split(",")
    for_lhs, for_rhs, _ = contracted_in_gradients(subscripts)
    shared = lambda letters: None if granularity == "tensor" else letters
    formats = {left: 5, right: 4, f"g_{left}": 6, f"s_{left}": 3, f"g_{right}": 7, f"s_{right}": 2}
    static = StaticPrecision(
        tuple((name, StaticQuantizer(INT, granularity if name in BACKWARD else "tensor")) for name in sorted(formats))
    )
    y, d_lhs, d_rhs = forward_and_gradients(lhs, rhs, g, grids_of(**formats), product=product, static=static)
    close(y, np.einsum(subscripts, rounded(lhs, 5), rounded(rhs, 4)))
    g_6, saved_3 = rounded(g, 6, out, shared(for_lhs)), rounded(rhs, 3, rhs_letters, shared(for_lhs))
    close(d_lhs, np.einsum(f"{out},{rhs_letters}->{lhs_letters}", g_6, saved_3))
    g_7, saved_2 = rounded(g, 7, out, shared(for_rhs)), rounded(lhs, 2, lhs_letters, shared(for_rhs))
    close(d_rhs, np.einsum(f"{out},{lhs_letters}->{rhs_letters}", g_7, saved_2))


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_saved_operands_are_the_forward_pass_s_unless_the_exact_ones_are_asked_for(product):
    left, right, _, _, subscripts = PRODUCTS[product]
    lhs, rhs, g = arrays(product)
    ins, out = subscripts.split("->")
    lhs_letters, rhs_letters = ins.split(",")
    forward = ((left, StaticQuantizer(INT)), (right, StaticQuantizer(INT)), (f"g_{left}", StaticQuantizer(INT)))
    grids = grids_of(**{left: 3, right: 4, f"g_{left}": 5})
    for exact in ((), (left,), (right,)):
        static = StaticPrecision(forward, exact=exact)
        _, d_lhs, d_rhs = forward_and_gradients(lhs, rhs, g, grids, product=product, static=static)
        saved_rhs = rhs if left in exact else rounded(rhs, 4)
        saved_lhs = lhs if right in exact else rounded(lhs, 3)
        close(d_lhs, np.einsum(f"{out},{rhs_letters}->{lhs_letters}", rounded(g, 5), saved_rhs), err_msg=str(exact))
        close(d_rhs, np.einsum(f"{out},{lhs_letters}->{rhs_letters}", g, saved_lhs), err_msg=str(exact))


def test_gradients_alone_can_be_quantized():
    x, kernel, g = arrays("linear")
    static = StaticPrecision((("g_w", StaticQuantizer(INT)),))
    y, dx, dw = forward_and_gradients(x, kernel, g, grids_of(g_w=3), product="linear", static=static)
    close(y, x @ kernel)
    close(dx, g @ kernel.T)
    close(dw, x.T @ rounded(g, 3))


def test_groups_run_along_the_contraction_of_each_product():
    for product, (left, right, _, _, subscripts) in PRODUCTS.items():
        lhs, rhs, g = arrays(product)
        lhs_letters, rhs_letters = subscripts.split("->")[0].split(",")
        out = subscripts.split("->")[1]
        (contracted,) = {*lhs_letters} & {*rhs_letters} - {*out}
        static = StaticPrecision(((left, StaticQuantizer(INT, "group:2")), (right, StaticQuantizer(INT, "group:2"))))
        y, d_lhs, _ = forward_and_gradients(
            lhs, rhs, g, grids_of(**{left: 3, right: 4}), product=product, static=static
        )
        lhs_q = rounded(lhs, 3, lhs_letters, contracted, group=2)
        rhs_q = rounded(rhs, 4, rhs_letters, contracted, group=2)
        close(y, np.einsum(subscripts, lhs_q, rhs_q), err_msg=product)
        close(d_lhs, np.einsum(f"{out},{rhs_letters}->{lhs_letters}", g, rhs_q), err_msg=product)


@pytest.mark.parametrize(
    ("product", "left", "right", "lhs_over", "rhs_over"),
    (
        ("linear", "token", "channel", "i", "i"),
        ("linear", "channel", "tensor", "t", None),
        ("attention_scores", "token", "channel", "k", "m"),
        ("attention_values", "token", "token", "m", "k"),
        ("attention_values", "channel", "channel", "l", "m"),
    ),
)
def test_token_and_channel_scales_are_shared_over_the_other_axes(product, left, right, lhs_over, rhs_over):
    left_name, right_name, _, _, subscripts = PRODUCTS[product]
    lhs, rhs, g = arrays(product)
    lhs_letters, rhs_letters = subscripts.split("->")[0].split(",")
    static = StaticPrecision(((left_name, StaticQuantizer(INT, left)), (right_name, StaticQuantizer(INT, right))))
    grids = grids_of(**{left_name: 4, right_name: 4})
    y, _, _ = forward_and_gradients(lhs, rhs, g, grids, product=product, static=static)
    lhs_q, rhs_q = rounded(lhs, 4, lhs_letters, lhs_over), rounded(rhs, 4, rhs_letters, rhs_over)
    close(y, np.einsum(subscripts, lhs_q, rhs_q))


def test_block_formats_bring_their_own_groups():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 64)).astype(np.float32), rng.normal(size=(64, 5)).astype(np.float32)
    kind = parse("mxfp4").kind
    static = StaticPrecision((("a", StaticQuantizer(kind)), ("w", StaticQuantizer(kind, "channel"))))
    y = jax.jit(lambda x, w: Products(static, grids_of(a="mxfp4", w="mxfp4")).linear(x, w))(x, kernel)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def mxfp4(rows):  # blocks of 32 along the last axis, scale 2^(floor(log2 max) - 2)
        blocks = rows.reshape(len(rows), -1, 32)
        scale = 2.0 ** (np.floor(np.log2(np.max(np.abs(blocks), axis=-1, keepdims=True))) - 2)
        nearest = levels[np.argmin(np.abs(np.abs(blocks / scale)[..., None] - levels), axis=-1)]
        return (np.sign(blocks) * nearest * scale).reshape(rows.shape)

    close(y, mxfp4(x) @ mxfp4(kernel.T).T)


def test_traced_backward_formats_under_vmap_equal_a_loop():
    x, kernel, g = arrays("linear")
    names = ("a", "w", "g_a", "g_w")
    static = StaticPrecision(tuple((name, StaticQuantizer(parse("e4m3").kind)) for name in names))
    choices = (("int4", "e2m1", "e5m2", "int8"), ("bf16", "int4", "bf16", "e3m2"), ("bf16",) * 4)
    grids_of_runs = [grids_of(**dict(zip(names, choice, strict=True))) for choice in choices]
    one = lambda grids: forward_and_gradients(x, kernel, g, grids, product="linear", static=static)
    together = jax.vmap(one)(jax.tree.map(lambda *grids: np.stack(grids), *grids_of_runs))
    for i, grids in enumerate(grids_of_runs):
        for all_, alone in zip(together, one(grids), strict=True):
            close(all_[i], alone, rtol=1e-6, atol=1e-6)
    close(together[1][2], g @ kernel.T)  # passes through


# Stochastic rounding


def stochastic(*names, **fields):
    return StaticPrecision(tuple((name, StaticQuantizer(INT, rounding="stochastic")) for name in names), **fields)


@pytest.mark.slow
def test_products_with_stochastic_operands_are_unbiased_in_both_directions():
    x, kernel, g = arrays("linear")
    static = stochastic("w", "g_a", exact=("a",))
    grids = grids_of(w=2, g_a=2)
    draw = lambda key: forward_and_gradients(x, kernel, g, grids, key, product="linear", static=static)
    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
    for all_, expected in zip(draws, (x @ kernel, g @ kernel.T, None), strict=True):
        if expected is not None:
            error = np.abs(np.mean(all_, axis=0) - expected)
            assert np.max(error / (np.std(all_, axis=0) / np.sqrt(4000))) < 4.5


def test_stochastic_rounding_without_a_key_is_refused():
    x, kernel, _ = map(jnp.asarray, arrays("linear"))
    with pytest.raises(FormatError, match="without a key"):
        Products(stochastic("w"), grids_of(w=4)).linear(x, kernel)


TINY = ModelConfig(
    vocab_size=13, width=8, depth=2, heads=2, mlp_width=16, sequence_length=6, base_width=8, base_depth=2
)
OPTIMIZER = optimizer.OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)
EVERYTHING = (*OPERANDS, "e", "head_w", "head_a", *(f"g_{name}" for name in OPERANDS))


def inputs_of(static, seed, bits=4):
    grids = grids_of(**{name: bits for name, _ in static.quantizers})
    return step_lib.RunInputs(grids, schedule.of("cosine", 1e-3, 10, 1, 0), np.int32(seed))


def tokens_of(batch=2, length=7):
    return np.random.default_rng(2).integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


@pytest.mark.slow
def test_no_key_repeats_across_steps_layers_and_operands(monkeypatch):
    seen = []
    noise = elements.rounding_noise

    def recording(key, shape):
        jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return noise(key, shape)

    monkeypatch.setattr(elements, "rounding_noise", recording)
    static = stochastic(*EVERYTHING)
    step_config = step_lib.StepConfig(TINY, static, OPTIMIZER)
    step = jax.jit(functools.partial(step_lib.train_step, step_config))
    state = step_lib.init_state(step_config, 0)
    for seed in (0, 1):
        now = state
        for _ in range(2):
            now, _ = step(now, inputs_of(static, seed), tokens_of())
    jax.effects_barrier()
    # Four projections and two attention products of two operands, forward and backward, in each layer; and the rest.
    per_step = TINY.depth * 6 * (2 + 2) + len(("e", "head_w", "head_a"))
    assert len(seen) == 2 * 2 * per_step
    assert len(set(seen)) == len(seen)


@pytest.mark.slow
def test_a_step_rounds_by_seed_and_step_alone_whatever_the_lane():
    static = stochastic("w", "a", "g_a", "g_w")
    step_config = step_lib.StepConfig(TINY, static, OPTIMIZER)
    one = jax.jit(functools.partial(step_lib.train_step, step_config))
    together = jax.jit(jax.vmap(functools.partial(step_lib.train_step, step_config)))
    state = step_lib.init_state(step_config, 0)
    state = state._replace(step=jnp.int32(3))  # as a run that resumes
    seeds = (5, 0, 5)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), state)
    inputs = jax.tree.map(lambda *xs: np.stack(xs), *(inputs_of(static, seed) for seed in seeds))
    _, metrics = together(stacked, inputs, np.stack([tokens_of()] * 3))
    for i, seed in enumerate(seeds):
        _, alone = one(state, inputs_of(static, seed), tokens_of())
        assert metrics.loss[i] == pytest.approx(float(alone.loss), rel=1e-6)
        assert metrics.grad_norm[i] == pytest.approx(float(alone.grad_norm), rel=1e-5)
    assert metrics.loss[0] == metrics.loss[2] != metrics.loss[1]
    _, later = one(state._replace(step=jnp.int32(4)), inputs_of(static, 5), tokens_of())
    assert later.loss != metrics.loss[0]


@pytest.mark.slow
def test_evaluation_rounds_to_nearest():
    nearest = StaticPrecision(tuple((name, StaticQuantizer(INT)) for name in ("w", "a")))
    params = step_lib.init_state(step_lib.StepConfig(TINY, nearest, OPTIMIZER), 0).params
    tokens_NxBxS1 = tokens_of(4).reshape(2, 2, -1)
    losses = [
        step_lib.validation_loss(
            step_lib.StepConfig(TINY, static, OPTIMIZER), params, grids_of(w=3, a=4), tokens_NxBxS1
        )
        for static in (nearest, stochastic("w", "a", "g_a", exact=("w",)))
    ]
    assert losses[0] == losses[1]


# Embedding, head, rotation


@pytest.mark.slow
def test_embedding_and_head_are_quantized_on_request():
    static = StaticPrecision(
        (
            ("e", StaticQuantizer(INT, "token")),
            ("head_w", StaticQuantizer(INT, "channel")),
            ("head_a", StaticQuantizer(INT)),
        )
    )
    params = decoder.init(TINY, jax.random.key(0))
    tokens = tokens_of(length=6)
    logits = decoder.Decoder(TINY, static).apply({"params": params}, tokens, grids_of(e=3, head_w=4, head_a=16))
    embedding, kernel = (np.asarray(params[k][v]) for k, v in (("embedding", "embedding"), ("head", "kernel")))
    by_hand = {
        **params,
        "embedding": {"embedding": rounded(embedding, 3, "vd", "d")},
        "head": {"kernel": rounded(kernel, 4, "dv", "d")},
    }
    close(logits, decoder.Decoder(TINY).apply({"params": by_hand}, tokens), atol=1e-5)


@pytest.mark.slow
def test_rotation_leaves_exact_products_alone_and_spreads_outliers():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(20, 64)).astype(np.float32), rng.normal(size=(64, 16)).astype(np.float32)
    x[:, 5] *= 10  # one loud feature
    plain = StaticPrecision((("a", StaticQuantizer(INT)), ("w", StaticQuantizer(INT, "channel"))))
    rotated = dataclasses.replace(plain, rotated=True)
    g = rng.normal(size=(20, 16)).astype(np.float32)
    run = functools.partial(forward_and_gradients, x, kernel, g, product="linear")
    exact = (x @ kernel, g @ kernel.T, x.T @ g)
    for ours, theirs in zip(run(grids_of(a=16, w=16), static=rotated), exact, strict=True):
        close(ours, theirs, rtol=1e-4, atol=1e-3)
    errors = [np.std(run(grids_of(a=4, w=16), static=static)[0] - x @ kernel) for static in (plain, rotated)]
    assert errors[1] < errors[0] / 3
    grids = grids_of(a=4, w=5)
    operands = [Products(rotated, grids).on_grid(array, name) for array, name in ((x, "a"), (kernel, "w"))]
    close(run(grids, static=rotated)[0], np.asarray(operands[0]) @ np.asarray(operands[1]), rtol=1e-3, atol=1e-2)


# Native products


def native(static, container="int8"):
    operands = tuple((name, dataclasses.replace(operand, container=container)) for name, operand in static.quantizers)
    return dataclasses.replace(static, quantizers=operands)


NATIVE = {
    "forward": StaticPrecision((("a", StaticQuantizer(INT, "token")), ("w", StaticQuantizer(INT, "channel")))),
    "per tensor, forward operands saved": StaticPrecision(
        tuple((name, StaticQuantizer(INT, "tensor")) for name in ("a", "w", "g_a", "g_w"))
    ),
    "vectors, operands saved in their own format": StaticPrecision(
        (
            ("a", StaticQuantizer(INT, "token")),
            ("w", StaticQuantizer(INT, "channel")),
            *((name, StaticQuantizer(INT, "vector", "stochastic")) for name in ("g_a", "g_w")),
            *((name, StaticQuantizer(INT, "vector")) for name in ("s_a", "s_w")),
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NATIVE)
def test_native_int8_products_equal_the_simulated_ones(case):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(33, 70)).astype(np.float32), rng.normal(size=(70, 40)).astype(np.float32)
    g = rng.normal(size=(33, 40)).astype(np.float32)
    static = NATIVE[case]
    for bits in (8, 3):
        grids, key = grids_of(**{name: bits for name, _ in static.quantizers}), jax.random.key(1)
        run = functools.partial(forward_and_gradients, x, kernel, g, grids, key, product="linear")
        for ours, theirs in zip(run(static=native(static)), run(static=static), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.max(np.abs(theirs)))


def test_native_attention_products_equal_the_simulated_ones():
    along_contraction = {"attention_scores": ("token", "token"), "attention_values": ("token", "channel")}
    for product, granularities in along_contraction.items():
        left, right, *_ = PRODUCTS[product]
        lhs, rhs, g = arrays(product)
        static = StaticPrecision(
            ((left, StaticQuantizer(INT, granularities[0])), (right, StaticQuantizer(INT, granularities[1])))
        )
        run = functools.partial(forward_and_gradients, lhs, rhs, g, grids_of(**{left: 8, right: 6}), product=product)
        for ours, theirs in zip(run(static=native(static)), run(static=static), strict=True):
            close(ours, theirs, err_msg=product)


def test_native_programs_multiply_codes():
    x, kernel, g = arrays("linear")
    static = native(NATIVE["per tensor, forward operands saved"])
    grids = grids_of(**{name: 8 for name, _ in static.quantizers})
    lowered = forward_and_gradients.lower(x, kernel, g, grids, product="linear", static=static)
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3
    assert all(line.count("xi8>") == 2 and line.count("xi32>") == 1 for line in products)


def test_native_fp8_products_equal_the_simulated_ones():
    x, kernel, g = arrays("linear")
    kinds = {"a": "e4m3fn", "w": "e4m3fn", "g_a": "e5m2", "g_w": "e5m2"}
    simulated = StaticPrecision(tuple((name, StaticQuantizer(parse(fmt).kind)) for name, fmt in kinds.items()))
    operands = tuple(
        (name, dataclasses.replace(operand, container=f"float8_{kinds[name]}"))
        for name, operand in simulated.quantizers
    )
    run = functools.partial(forward_and_gradients, x, kernel, g, grids_of(**kinds), product="linear")
    results = zip(run(static=dataclasses.replace(simulated, quantizers=operands)), run(static=simulated), strict=True)
    for ours, theirs in results:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.max(np.abs(theirs)))


# Many devices

SHARDED = """
import functools, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from precision_scaling.numerics.formats import parse
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import StaticPrecision, StaticQuantizer

def static_precision(fmt, rounding, container=None, **granularity):
    kind = parse(fmt).kind
    names = ("a", "w", "g_a", "g_w", "s_a", "s_w")
    quantizer = lambda name: StaticQuantizer(kind, granularity.get(name[0], "vector"), rounding, container)
    return StaticPrecision(tuple((name, quantizer(name)) for name in names))

@functools.partial(jax.jit, static_argnames="static")
def products(x, kernel, g, grids, key, static):
    out, pullback = jax.vjp(lambda x, kernel: Products(static, grids, key).linear(x, kernel), x, kernel)
    return out, *pullback(g)

rng = np.random.default_rng(0)
x, kernel, g = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 64), (64, 64), (64, 64)))
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
place = lambda array, *axes: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
for fmt, chosen in (
    ("int4", static_precision("int4", "nearest", a="tensor", w="channel", g="tensor", s="tensor")),
    ("e4m3", static_precision("e4m3", "stochastic", a="token", w="channel")),
    ("int6", static_precision("int6", "nearest", a="group:16", w="group:16", g="group:16", s="group:16")),
    ("mxfp4", static_precision("mxfp4", "stochastic", a="tensor", w="tensor")),
    ("int8", static_precision("int8", "stochastic", "int8", a="token", w="channel")),
):
    grids, key = {name: parse(fmt).grid() for name, _ in chosen.quantizers}, jax.random.key(0)
    one = products(x, kernel, g, grids, key, chosen)
    placed = place(x, "data", None), place(kernel, None, "tensor"), place(g, "data", "tensor")
    many = products(*placed, grids, key, chosen)
    print(fmt, len(many[0].devices()), *(float(np.max(np.abs(a - b))) for a, b in zip(one, map(np.asarray, many))))
"""


@pytest.mark.slow
def test_products_spread_over_devices_equal_those_of_one():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[fmt, "4"] for fmt in ("int4", "e4m3", "int6", "mxfp4", "int8")]
    assert all(float(difference) < 1e-4 for line in lines for difference in line[2:]), lines  # products are near 8


# Compute dtype


def test_float32_products_multiply_in_bf16_models_what_twelve_bits_make_of_the_operands():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((64, 256), (256, 64)))
    x_f32, kernel_f32 = np.asarray(x, np.float32), np.asarray(kernel, np.float32)
    intended = (rounded(x_f32, 12) @ rounded(kernel_f32, 12, "io", "i")).astype(jnp.bfloat16)
    static = StaticPrecision((("a", StaticQuantizer(INT)), ("w", StaticQuantizer(INT, "channel"))))
    equal = {}
    for wide in ((), ("a",)):
        compute = jax.jit(
            lambda x, kernel, grids, wide=wide: Products(dataclasses.replace(static, wide=wide), grids).linear(
                x, kernel
            ),
            # A CPU has no bf16 products, and would keep the digits that the hardware this is for drops.
            compiler_options={"xla_allow_excess_precision": False},
        )
        y = compute(x, kernel, grids_of(a=12, w=12))
        assert y.dtype == jnp.bfloat16
        equal[wide] = np.mean(np.asarray(y) == intended)
    assert equal["a",] > 0.99 and equal[()] < 0.9
