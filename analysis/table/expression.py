"""Rows chosen by an expression on columns, such as `N < 3e5 and (P_w == 16 or D / N > 100)`.

The expression is parsed, never run: columns, numbers, texts in quotes, comparisons, and, or, not and + - * / are all it
may hold. `P_post is None` is true where the cell is empty.
"""

import ast
import operator

import numpy as np

from analysis.table import BASE, MODEL, Table
from precision_scaling.errors import UserError

_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_ORDER = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
_EQUALITY = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_EMPTY = {ast.Is: True, ast.IsNot: False, ast.Eq: True, ast.NotEq: False}
ALLOWED = "columns, numbers, texts in quotes, < <= > >= == !=, is None, and, or, not, + - * /, parentheses"
LONGEST = 10_000  # characters


class ExpressionError(UserError):
    """An expression that is not allowed, or that names an unknown column."""


def rows_where(text: str, table: Table) -> np.ndarray:
    """True for the rows that satisfy the expression. Raises ExpressionError in one line."""
    if len(text) > LONGEST:
        raise ExpressionError(f"expression of {len(text)} characters: allowed are {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        found = _Rows(table, text).value(tree.body)
    except ExpressionError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ExpressionError(f"expression {text!r}: allowed are {ALLOWED}") from None
    if not (isinstance(found, np.ndarray) and found.dtype == bool):
        raise ExpressionError(f"expression {text!r}: it must be true or false of a row, as in N < 3e5")
    return found


class _Rows:
    """The values of an expression's parts on the rows of a table."""

    def __init__(self, table: Table, text: str):
        self.table, self.text = table, text

    def value(self, node: ast.expr):
        if isinstance(node, ast.BoolOp):
            combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return combine.reduce([self._truth(part) for part in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._truth(node.operand)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            with np.errstate(all="ignore"):
                return _ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(node.ops, sides, sides[1:], strict=False)
            return np.logical_and.reduce([self._compared(op, left, right) for op, left, right in pairs])
        if isinstance(node, ast.Name):
            return self._column(node.id)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str) and node.value is not True:
            return node.value
        raise ExpressionError(f"expression {self.text!r}: {ast.unparse(node)!r} is not allowed; allowed are {ALLOWED}")

    def _compared(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> np.ndarray:
        if isinstance(right, ast.Constant) and right.value is None and type(op) in _EMPTY:
            column = self.value(left)
            if not isinstance(column, np.ndarray):
                raise self._wrong(left, "a column")
            empty = column == "" if column.dtype == object else np.isnan(column)
            return empty if _EMPTY[type(op)] else ~empty
        if type(op) in _ORDER:
            return self._all_rows(_ORDER[type(op)](self._number(left), self._number(right)))
        if type(op) not in _EQUALITY:
            raise ExpressionError(f"expression {self.text!r}: allowed are {ALLOWED}")
        a, b = self.value(left), self.value(right)
        if _is_text(a) != _is_text(b):
            one, other = (left, right) if _is_text(a) else (right, left)
            raise ExpressionError(
                f"expression {self.text!r}: {ast.unparse(one)} is a text and {ast.unparse(other)} a number"
            )
        return self._all_rows(_EQUALITY[type(op)](a, b))

    def _all_rows(self, value) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, bool), (len(self.table),))

    def _truth(self, node: ast.expr) -> np.ndarray:
        value = self.value(node)
        if not (isinstance(value, np.ndarray) and value.dtype == bool):
            raise self._wrong(node, "true or false of a row")
        return value

    def _number(self, node: ast.expr):
        value = self.value(node)
        if _is_text(value) or (isinstance(value, np.ndarray) and value.dtype == bool):
            raise self._wrong(node, "a number")
        return value

    def _wrong(self, node: ast.expr, wanted: str) -> ExpressionError:
        return ExpressionError(f"expression {self.text!r}: {ast.unparse(node)!r} must be {wanted}")

    def _column(self, name: str) -> np.ndarray:
        if name not in self.table or name in (MODEL, BASE):
            known = ", ".join(column for column in self.table.columns if column not in (MODEL, BASE))
            raise ExpressionError(f"expression {self.text!r}: no column {name}; the table has {known}")
        return self.table[name]


def _is_text(value) -> bool:
    return isinstance(value, str) or (isinstance(value, np.ndarray) and value.dtype == object)
