"""The products of a decoder: projections, attention scores and values, and the embedding's table."""

import jax

from precision_scaling.numerics import hadamard
from precision_scaling.quantize.aqt import dot_general, fold_in, on_static_grid, scale_axes
from precision_scaling.quantize.operands import INDEX
from precision_scaling.quantize.static import Grids, StaticPrecision


def _rotation_signs(width: int) -> jax.Array:
    """One draw for each width, the same always: training, evaluation and what comes after see one basis."""
    return hadamard.random_signs(jax.random.key(width), width)


def on_grid(x, name: str, static: StaticPrecision, grids: Grids):
    """An operand of a projection ("a" or "w", contracted over its last or first axis) as the product sees it."""
    quantizer = static.get(name)
    if quantizer is None:
        return x
    weights = name.endswith("w")
    x_2d = x.reshape(x.shape[0], -1) if weights else x.reshape(-1, x.shape[-1])
    contracting = 0 if weights else 1
    signs = _rotation_signs(x_2d.shape[contracting]) if static.rotated else None
    if signs is not None:
        x_2d = hadamard.rotate(x_2d, signs, contracting)
    x_2d = on_static_grid(x_2d, quantizer, scale_axes(name, quantizer, 2, (contracting,)), grids[name], None)
    if signs is not None:
        x_2d = hadamard.unrotate(x_2d, signs, contracting)
    return x_2d.reshape(x.shape)


def linear(x, kernel, static: StaticPrecision, grids: Grids, key=None, names: tuple[str, str] = ("a", "w")):
    """x (..., in) times kernel (in, *features) -> (..., *features). names: of the two operands."""
    # A product of matrices, whatever the ranks: XLA's CPU backend is 1.5 times slower on the higher-rank form.
    x_2d, kernel_2d = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
    if static.rotated and names == ("a", "w"):
        signs = _rotation_signs(x.shape[-1])
        x_2d, kernel_2d = hadamard.rotate(x_2d, signs, 1), hadamard.rotate(kernel_2d, signs, 0)
    y = dot_general(x_2d, kernel_2d, (((1,), (0,)), ((), ())), *names, static, grids, key)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def attention_scores(q_BxSxHxK, k_BxSxHxK, static: StaticPrecision, grids: Grids, key=None):
    """(B, H, S, S)."""
    return dot_general(q_BxSxHxK, k_BxSxHxK, (((3,), (3,)), ((0, 2), (0, 2))), "q", "k", static, grids, key)


def attention_values(p_BxHxSxS, v_BxSxHxK, static: StaticPrecision, grids: Grids, key=None):
    """(B, S, H, K)."""
    o_BxHxSxK = dot_general(p_BxHxSxS, v_BxSxHxK, (((3,), (1,)), ((0, 1), (0, 2))), "p", "v", static, grids, key)
    return o_BxHxSxK.transpose(0, 2, 1, 3)


def embedding_table(table_VxD, static: StaticPrecision, grids: Grids, key=None):
    """The embedding's table as it is looked up; gradients pass straight through."""
    quantizer = static.get("e")
    if quantizer is None:
        return table_VxD
    own_key = fold_in(key, INDEX["e"]) if quantizer.rounding == "stochastic" else None
    return on_static_grid(table_VxD, quantizer, scale_axes("e", quantizer, 2, (1,)), grids["e"], own_key)
