"""Mutation tests: mutmut changes the code in small ways, and a test should fail for each change.

    make mutants ARGS="app.engine.fair_queue*"

``[tool.mutmut]`` in pyproject.toml lists the modules and tests. Prints the changes that no test found, and the score of
each module: the share of its changes for which a test failed or did not end. The exit status is 1 below ``MIN_SCORE``.
docs/explanation/testing.md explains the changes that no test can find.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path("mutants")
MIN_SCORE = 85.0  # per cent, of each module
SURVIVED, NO_TESTS = (0,), (5, 33)  # mutmut's exit codes; all others are of failing tests and of timeouts


def found(exit_code: int) -> bool:
    """Return whether a test found a change."""
    return exit_code not in (*SURVIVED, *NO_TESTS)


def results() -> dict[str, dict[str, int]]:
    """Return mutmut's exit code of each change that was tried, by module."""
    modules: dict[str, dict[str, int]] = {}
    for path in sorted(RESULTS.rglob("*.py.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        if tried := {name: code for name, code in codes.items() if code is not None}:
            modules[str(path.relative_to(RESULTS)).removesuffix(".meta")] = tried
    return modules


def score(codes: Mapping[str, int]) -> float:
    """Return the share of changes that a test found, in per cent."""
    return 100 * sum(map(found, codes.values())) / len(codes)


def show(name: str) -> str:
    """Return the difference that a change makes."""
    shown = subprocess.run([sys.executable, "-m", "mutmut", "show", name], capture_output=True, text=True, check=True)
    return "\n".join(line for line in shown.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def main(arguments: Sequence[str]) -> int:
    """Run mutmut on the changes that fit the patterns, or on all."""
    subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "1", *arguments], check=True)
    modules = results()
    for module, codes in modules.items():
        for name, code in codes.items():
            if not found(code):
                print(f"{module}: {'no test runs' if code in NO_TESTS else 'not found'}: {name}\n{show(name)}")
    for module, codes in modules.items():
        print(f"{module:40} {score(codes):5.1f} % of {len(codes)}")
    return int(any(score(codes) < MIN_SCORE for codes in modules.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
