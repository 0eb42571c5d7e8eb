"""Find the tests that start other processes. ``make quick`` does not run them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest

STARTERS = {"subprocess", "support.processes", "multiprocessing"}  # modules whose use starts processes


def starts_processes(item: pytest.Item) -> bool:
    """Return whether a test uses ``STARTERS``, directly, in a fixture, or in a function of its file that it calls."""
    definitions = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009
    functions = [getattr(item, "function", None), *(each.func for fixtures in definitions for each in fixtures)]
    visited: set[types.CodeType] = set()
    return any(_uses_starter(function, visited) for function in functions if function is not None)


def _uses_starter(function: Any, visited: set[types.CodeType]) -> bool:
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None or code in visited:
        return False
    visited.add(code)
    for name in _names(code):
        value = names.get(name)
        module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if module in STARTERS:
            return True
        value = getattr(value, "__wrapped__", value)  # the generator function of a context manager
        if isinstance(value, types.FunctionType) and module == function.__module__ and _uses_starter(value, visited):
            return True
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that a function and its inner functions use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
