"""Mutation tests: mutmut makes small changes to the code. For each change, a test should fail.

    make mutants ARGS="app.engine.fair_queue*"
    make mutants ARGS="--sample 150 --tests tests/store app.store*"     # 150 random changes, tested with one folder

``[tool.mutmut]`` in pyproject.toml lists the modules and tests. The program prints the changes for which no test
failed, and the score of each module. The score is the share of changes for which a test failed or did not end in time.
The exit status is 1 if a score is below ``MIN_SCORE``. Run this program on an idle machine. If other programs slow down
the tests, more tests time out, and the score is too high.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

RESULTS = Path("mutants")
MIN_SCORE = 85.0  # per cent, for each module or for a sample
# Exit codes of mutmut. Any other exit code means that a test failed.
SURVIVED, NO_TESTS, TIMED_OUT = (0,), (5, 33), (-24, 24, 36, 152, 255)
SMALLEST_MODULE = "app.engine.circuit_breaker*"  # a short run, which makes mutmut list the changes of all modules
Z = 1.96  # standard deviations of a 95 % interval
RUN = """
import sys
from mutmut.__main__ import cli
from mutmut.configuration import config
if tests := sys.argv.pop(1):
    config().pytest_add_cli_args_test_selection[:] = tests.split(",")
cli()
"""


def run(tests: str, names: Sequence[str]) -> None:
    """Run mutmut on the changes that match ``names``. Without names, run it on all changes.

    ``tests`` are test files or folders, separated by commas. If ``tests`` is empty, the tests in pyproject.toml are
    used.
    """
    subprocess.run([sys.executable, "-c", RUN, tests, "run", "--max-children", "1", *names], check=True)


def found(exit_code: int) -> bool:
    """Return whether a test found the change with this exit code of mutmut."""
    return exit_code not in (*SURVIVED, *NO_TESTS)


def results() -> dict[str, dict[str, int | None]]:
    """Return mutmut's exit code for each change, by module and name. The exit code of an untested change is None."""
    return {
        str(path.relative_to(RESULTS)).removesuffix(".meta"): json.loads(path.read_text())["exit_code_by_key"]
        for path in sorted(RESULTS.rglob("*.py.meta"))
    }


def draw(size: int, patterns: Sequence[str]) -> list[str]:
    """Return the names of ``size`` random changes that match the patterns. Each run draws the same names."""
    names = sorted(name for codes in results().values() for name in codes)
    fitting = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns or ["*"])]
    return random.Random(0).sample(fitting, min(size, len(fitting)))


def score(codes: Mapping[str, int]) -> float:
    """Return the share of changes that a test found, in per cent."""
    return 100 * sum(map(found, codes.values())) / len(codes)


def interval(percentage: float, size: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a percentage that was measured on a sample (Wilson 1927)."""
    share, scale = percentage / 100, 1 + Z**2 / size
    centre = (share + Z**2 / (2 * size)) / scale
    half = Z * math.sqrt(share * (1 - share) / size + Z**2 / (4 * size**2)) / scale
    return 100 * (centre - half), 100 * (centre + half)


def show(name: str) -> str:
    """Return the lines that a change removes and adds, as in a diff."""
    shown = subprocess.run([sys.executable, "-m", "mutmut", "show", name], capture_output=True, text=True, check=True)
    return "\n".join(line for line in shown.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run mutmut on the changes that match the patterns, and print the results. Return the exit status.

    Without patterns, run mutmut on all changes.
    """
    parser = argparse.ArgumentParser(prog="mutants", description="Run mutation tests.")
    parser.add_argument("patterns", nargs="*", help="names of changes, such as app.store*; default: all")
    parser.add_argument("--sample", type=int, metavar="N", help="run N random changes, and print a 95 %% interval")
    parser.add_argument("--tests", default="", metavar="PATHS", help="test files or folders, separated by commas")
    options = parser.parse_args(arguments)
    names = options.patterns
    if options.sample:
        run(options.tests, [SMALLEST_MODULE])
        names = draw(options.sample, options.patterns)
    run(options.tests, names)
    modules: dict[str, dict[str, int]] = {}
    for module, all_codes in results().items():
        for name, code in all_codes.items():
            if code is not None and (not options.sample or name in names):
                modules.setdefault("sample" if options.sample else module, {})[name] = code
    for codes in modules.values():
        for name, code in codes.items():
            if not found(code):
                print(f"{'no test runs' if code in NO_TESTS else 'not found'}: {name}\n{show(name)}")
    for module, codes in modules.items():
        low, high = interval(score(codes), len(codes))
        timeouts = sum(code in TIMED_OUT for code in codes.values())
        print(
            f"{module:40} {score(codes):5.1f} % of {len(codes)}, {timeouts} did not end"
            + (f"; 95 % interval {low:.0f} to {high:.0f} %" if options.sample else "")
        )
    return int(any(score(codes) < MIN_SCORE for codes in modules.values()))


if __name__ == "__main__":
    sys.exit(main())
