"""Check rules that ruff has no rule for: patches and private names in tests, and functions that do not fit on a screen.

python .ci/check_tests.py     # run by `make check`
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# Tests replace no function of this project and name no private attribute, so that they survive a redesign. These are
# the numbers that are left. Lower them when a test is repaired.
MAX_PATCHES = 17
MAX_PRIVATE_NAMES = 11
MAX_FUNCTION_LINES = 60
PUBLIC = {"_exit", "_asdict", "_replace"}  # names of the standard library that begin with an underscore


def attributes(folder: str) -> list[ast.Attribute]:
    """Return all attributes in the Python files of a folder."""
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(Path(folder).rglob("*.py"))]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def is_private(node: ast.Attribute) -> bool:
    """Return whether an attribute is private and belongs to another object than ``self`` or ``cls``."""
    own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    return node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in PUBLIC and not own


def long_functions(folder: str) -> list[str]:
    """Return the functions in a folder that have more than ``MAX_FUNCTION_LINES`` lines."""
    long = []
    for path in sorted(Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, above {MAX_FUNCTION_LINES}")
    return long


def main() -> int:
    found = attributes("tests")
    patches, private = sum(node.attr == "setattr" for node in found), sum(map(is_private, found))
    problems = [problem for folder in ("app", "benchmarks", "training") for problem in long_functions(folder)]
    for name, count, allowed in (("patches", patches, MAX_PATCHES), ("private names", private, MAX_PRIVATE_NAMES)):
        if count > allowed:
            problems.append(f"tests/ has {count} {name}; {allowed} are allowed")
    print("\n".join(problems or [f"tests/ has {patches} patches and {private} private names"]))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
