"""Check the guards of a program: conditions on the sizes of its inputs, without which its results would be wrong.

``torch.export`` records one path through the code of a network. It also records the conditions under which the code
takes this path, such as ``image.shape[2] % 2 == 0``. Such a text is data from a file, so Python never evaluates it. It
is parsed, and may only contain numbers, sizes, and the operators and functions in this module.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Shapes = Mapping[str, Sequence[int]]  # by the name of the input
Formula = Callable[[Shapes], Any]

MAX_CHARACTERS = 200_000  # of all guards of a program together
MAX_DEPTH = 100  # largest nesting depth of a guard
LARGEST = 2.0**256  # a larger number is an error, because products and powers of integers would take all memory
LARGEST_EXPONENT = 64


def _power(base: float, exponent: float) -> Any:
    if abs(exponent) > LARGEST_EXPONENT:
        raise OverflowError(f"the exponent {exponent} exceeds {LARGEST_EXPONENT}")
    return base**exponent


BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip
UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "abs": abs, "round": round, "math.floor": math.floor, "math.ceil": math.ceil,
    "math.trunc": math.trunc, "math.sqrt": math.sqrt, "torch._sym_sqrt": math.sqrt, "torch.sym_float": float,
}  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """A condition on the sizes of inputs. ``sizes`` has the input and the dimension of each size in it."""

    formula: Formula
    sizes: frozenset[tuple[str, int]]

    def holds(self, shapes: Shapes) -> bool:
        """Return whether the condition is true. A condition that cannot be computed, as for 1 // 0, is false."""
        try:
            return bool(self.formula(shapes))
        except (ArithmeticError, ValueError, TypeError):
            return False


@lru_cache(maxsize=4096)
def read_guard(text: str) -> Guard:
    """Return the guard of a text such as ``image.shape[2] % 2 == 0``.

    Raises ValueError if the text contains anything but numbers, sizes and the operators in this module.
    """
    sizes: set[tuple[str, int]] = set()
    try:
        formula = _formula(ast.parse(text, mode="eval").body, sizes, 0)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"condition {text[:200]!r} cannot be read: {error}") from None
    return Guard(formula, frozenset(sizes))


def broken_guard(guards: Iterable[str], shapes: Shapes) -> str | None:
    """Return the first guard that is false for these shapes of the inputs, or None if all are true."""
    return next((text for text in guards if not read_guard(text).holds(shapes)), None)


def _formula(node: ast.expr, sizes: set[tuple[str, int]], depth: int) -> Formula:
    """Return a function that computes a part of a guard. Add the sizes that it reads to ``sizes``."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} times")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        constant = node.value
        return lambda shapes: constant
    if isinstance(node, ast.Subscript):
        name, axis = _size(node)
        sizes.add((name, axis))
        return lambda shapes: shapes[name][axis]
    parts = [_formula(part, sizes, depth + 1) for part in _operands(node)]
    if isinstance(node, ast.BoolOp):
        combine = all if isinstance(node.op, ast.And) else any
        return lambda shapes: combine(part(shapes) for part in parts)
    if isinstance(node, ast.Compare):
        tests = [COMPARISONS[type(each)] for each in node.ops]  # the whitelist is checked in ``_operands``
        return lambda shapes: _compare(tests, [part(shapes) for part in parts])
    function: Callable[..., Any]
    if isinstance(node, ast.Call):
        function = FUNCTIONS[ast.unparse(node.func)]
    elif isinstance(node, ast.BinOp):
        function = BINARY[type(node.op)]
    else:
        assert isinstance(node, ast.UnaryOp)
        function = UNARY[type(node.op)]
    return lambda shapes: _bounded(function(*(part(shapes) for part in parts)))


def _operands(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the operands of an operator or the arguments of a function. Raises ValueError if it is not allowed."""
    if isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.Compare) and all(type(each) in COMPARISONS for each in node.ops):
        yield from (node.left, *node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield from (node.left, node.right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        yield node.operand
    elif isinstance(node, ast.Call) and node.args and not node.keywords and ast.unparse(node.func) in FUNCTIONS:
        yield from node.args
    else:
        raise ValueError(f"{ast.unparse(node)[:80]!r} is not allowed")


def _size(node: ast.Subscript) -> tuple[str, int]:
    """Return the name of the input and the dimension of a size such as ``image.shape[2]``."""
    match node:
        case ast.Subscript(
            value=ast.Attribute(value=ast.Name(id=name), attr="shape"), slice=ast.Constant(value=int(axis))
        ):
            return name, axis
    raise ValueError(f"{ast.unparse(node)[:80]!r} is not allowed")


def _compare(tests: Sequence[Callable[[Any, Any], bool]], values: Sequence[Any]) -> bool:
    return all(test(left, right) for test, left, right in zip(tests, values, values[1:], strict=False))


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or abs(value) > LARGEST:
        raise OverflowError(f"a number exceeds {LARGEST}")
    return value
