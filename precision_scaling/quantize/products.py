"""The products of a decoder at a precision: projections, attention scores and values, and the embedding's table."""

import dataclasses
import functools

import jax

from precision_scaling.numerics import hadamard
from precision_scaling.quantize import scaled
from precision_scaling.quantize.aqt import dot_general, fold_in, key_of, observing, on_static_grid, scale_axes
from precision_scaling.quantize.static import UNQUANTIZED, Grids, StaticPrecision, of_place
from precision_scaling.runtime import sharding


@functools.partial(jax.tree_util.register_dataclass, data_fields=("grids", "key"), meta_fields=("static",))
@dataclasses.dataclass(frozen=True)
class Products:
    """How the products of a model, or of a part of it, are computed.

    static: what is compiled in. grids: of every operand that it names, traced. key: of stochastic rounding; None where
    all operands round to nearest. Each product of a step needs a key of its own: take a `part` for it.
    """

    static: StaticPrecision = UNQUANTIZED
    grids: Grids = dataclasses.field(default_factory=dict)
    key: jax.Array | None = None

    def part(self, index) -> "Products":
        """The same for the part of the model with that index."""
        return dataclasses.replace(self, key=fold_in(self.key, index))

    def linear(self, x, kernel, names: tuple[str, str] = ("a", "w"), place: str = ""):
        """x (..., in) times kernel (in, *features) -> (..., *features).

        names: of the two operands. place: of `layers.PROJECTIONS`, where the grids differ by projection.
        """
        # A product of matrices, whatever the ranks: XLA's CPU backend is 1.5 times slower on the higher-rank form.
        x_2d, kernel_2d = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
        if self.static.rotated and names == ("a", "w"):
            signs = _rotation_signs(x.shape[-1])
            x_2d, kernel_2d = hadamard.rotate(x_2d, signs, 1), hadamard.rotate(kernel_2d, signs, 0)
        return self._dot_general(x_2d, kernel_2d, (((1,), (0,)), ((), ())), *names, place).reshape(
            *x.shape[:-1], *kernel.shape[1:]
        )

    def attention_scores(self, q_BxSxHxK, k_BxSxHxK):
        """(B, H, S, S)."""
        return self._dot_general(q_BxSxHxK, k_BxSxHxK, (((3,), (3,)), ((0, 2), (0, 2))), "q", "k", "attention")

    def attention_values(self, p_BxHxSxS, v_BxSxHxK):
        """(B, S, H, K)."""
        o_BxHxSxK = self._dot_general(p_BxHxSxS, v_BxSxHxK, (((3,), (1,)), ((0, 1), (0, 2))), "p", "v", "attention")
        return o_BxHxSxK.transpose(0, 2, 1, 3)

    @property
    def observed(self) -> bool:
        """Whether somebody is shown the operands of products, see `aqt.observed`."""
        return observing()

    def key_or_value(self, x_BxSxHxK, name: str):
        """Keys ("k") or values ("v") as their product sees them; gradients pass straight through."""
        quantizer = self.static.get(name)
        if quantizer is None:
            return x_BxSxHxK
        axes = scale_axes(name, quantizer, 4, (3,) if name == "k" else (1,))
        own_key = key_of(name, quantizer, self.key)
        grid = of_place({name: self.grids[name]}, "attention")[name]
        return on_static_grid(x_BxSxHxK, quantizer, axes, grid, own_key)

    def embedding_table(self, table_VxD):
        """The embedding's table as it is looked up; gradients pass straight through."""
        quantizer = self.static.get("e")
        if quantizer is None:
            return table_VxD
        own_key = key_of("e", quantizer, self.key)
        return on_static_grid(table_VxD, quantizer, scale_axes("e", quantizer, 2, (1,)), self.grids["e"], own_key)

    def on_grid(self, x, name: str):
        """An operand of a projection ("a" or "w", contracted over its last or first axis) as the product sees it.

        The grids are scalars, of that place.
        """
        quantizer = self.static.get(name)
        if quantizer is None:
            return x
        weights = name.endswith("w")
        x_2d = x.reshape(x.shape[0], -1) if weights else x.reshape(-1, x.shape[-1])
        contracting = 0 if weights else 1
        signs = _rotation_signs(x_2d.shape[contracting]) if self.static.rotated else None
        if signs is not None:
            x_2d = hadamard.rotate(x_2d, signs, contracting)
        axes = scale_axes(name, quantizer, 2, (contracting,))
        x_2d = on_static_grid(x_2d, quantizer, axes, self.grids[name], None)
        if signs is not None:
            x_2d = hadamard.unrotate(x_2d, signs, contracting)
        return x_2d.reshape(x.shape)

    def _dot_general(self, lhs, rhs, dimension_numbers, lhs_name: str, rhs_name: str, place: str):
        mine = (f"{side}{name}" for name in (lhs_name, rhs_name) for side in ("", "g_", "s_"))
        given = self.grids or {}
        grids = of_place({name: given[name] for name in mine if name in given}, place)
        if scaled.serves(self.static, lhs_name):
            return scaled.dot_general(lhs, rhs, lhs_name, rhs_name, self.static, grids, self.key)
        axis = sharding.KERNEL_AXES.get(place, 0)
        return dot_general(lhs, rhs, dimension_numbers, lhs_name, rhs_name, self.static, grids, self.key, axis)


def _rotation_signs(width: int) -> jax.Array:
    """One draw for each width, the same always: training, evaluation and what comes after see one basis."""
    return hadamard.random_signs(jax.random.key(width), width)
