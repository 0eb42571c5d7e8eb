"""Read the guards of a ``.pt2`` file. Each guard is a text such as ``(L['image'].size()[2] % 2) == 0``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from app.importing.pt2_graph import BadProgram, InputSpec
from app.networks.imported.guards import MAX_CHARACTERS, broken_guard, read_guard

SAMPLES = 300  # combinations of sizes with which ``depend_on_rows`` computes the guards
USUAL_SIZES = (32, 48, 64, 96, 128, 224, 256)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 63, 64)


def read_guards(texts: Sequence[str], inputs: Sequence[InputSpec]) -> list[str]:
    """Return the guards of a program in the notation of ``app.networks.imported.guards``.

    Guards that all inputs of the right shapes fulfil are left out, such as the equality of two dimensions with the same
    name.

    Raises:
        BadProgram: a guard cannot be read.
    """
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise BadProgram(f"the conditions on sizes have more than {MAX_CHARACTERS:,} characters")
    shapes = {spec.name: spec.shape for spec in inputs}
    guards = (_rewritten(text) for text in texts)
    return [guard for guard in dict.fromkeys(guards) if not _always_holds(guard, shapes)]


def _rewritten(text: str) -> str:
    try:
        return ast.unparse(_Sizes().visit(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadProgram(f"condition {text[:200]!r} cannot be read: {error}") from None


class _Sizes(ast.NodeTransformer):
    """Replaces sizes such as ``L['image'].size()[2]`` by ``image.shape[2]``."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(
                value=ast.Call(func=ast.Attribute(value=source, attr="size"), args=[], keywords=[]), slice=axis
            ):
                # torch names the input after its path in the arguments: ``batch_image_0`` for L['batch']['image'][0]
                name = re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(_path(source)))
                return ast.Subscript(ast.Attribute(ast.Name(name), "shape"), axis)
        return self.generic_visit(node)


def _path(source: ast.expr) -> Iterator[str]:
    """Yield the keys of an input in the arguments of a program. Raises ValueError for another expression."""
    match source:
        case ast.Name(id="L"):
            return
        case ast.Subscript(value=value, slice=ast.Constant(value=str() | int() as key)):
            yield from _path(value)
            yield str(key)
        case ast.Attribute(value=value, attr=name):
            yield from _path(value)
            yield name
        case _:
            raise ValueError(f"{ast.unparse(source)[:80]!r} is not an input")


def _always_holds(guard: str, shapes: Mapping[str, Sequence[int | str]]) -> bool:
    """Return whether inputs of these shapes always fulfil a guard. Raises BadProgram if the guard cannot be read."""
    try:
        sizes = [shapes[name][axis] for name, axis in read_guard(guard).sizes]
    except (ValueError, KeyError, IndexError) as error:
        raise BadProgram(f"condition {guard[:200]!r} cannot be read: {error}") from None
    if all(isinstance(size, int) for size in sizes):
        if broken_guard([guard], shapes):  # type: ignore[arg-type]
            raise BadProgram(f"condition {guard[:200]!r} does not hold for the shapes in the file")
        return True
    return len(sizes) == 2 and sizes[0] == sizes[1] and bool(re.fullmatch(r"[\w.]+\[\d+\] == [\w.]+\[\d+\]", guard))


def depend_on_rows(
    guards: Sequence[str],
    inputs: Sequence[InputSpec],
    ranges: Mapping[str, tuple[int, int | None]],
    batch: str,
) -> bool:
    """Return whether inputs may fulfil the guards with some numbers of rows and not with others.

    The guards are computed with random sizes from 2 on. torch takes a size of 1 for a special case, so guards may
    exclude it although it makes no difference.
    """
    if not any(axis == 0 for guard in guards for _, axis in read_guard(guard).sizes):
        return False
    symbols = {str(size).rpartition("*")[2] for spec in inputs for size in spec.shape if isinstance(size, str)}
    candidates = {symbol: _candidates(*ranges.get(symbol, (1, None))) for symbol in sorted(symbols - {batch})}
    rows = [count for count in ROWS if count <= (ranges.get(batch, (1, None))[1] or count)]
    generator = np.random.default_rng(0)
    for _ in range(SAMPLES):
        sizes = {symbol: int(generator.choice(values)) for symbol, values in candidates.items()}
        results = {broken_guard(guards, _shapes(inputs, {**sizes, batch: count})) is None for count in rows}
        if len(results) > 1:
            return True
    return False


def _candidates(low: int, high: int | None) -> list[int]:
    first = max(low, 2)
    return [size for size in (*range(first, first + 17), *USUAL_SIZES) if first <= size <= (high or size)] or [low]


def _shapes(inputs: Sequence[InputSpec], sizes: Mapping[str, int]) -> dict[str, list[int]]:
    def size(rule: int | str) -> int:
        factor, _, symbol = str(rule).rpartition("*")
        return rule if isinstance(rule, int) else sizes[symbol] * int(factor or 1)

    return {spec.name: [size(rule) for rule in spec.shape] for spec in inputs}
