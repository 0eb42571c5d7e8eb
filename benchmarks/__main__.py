"""Run a benchmark, print its tables, and fail if a limit is exceeded.

python -m benchmarks soak --minutes 2
python -m benchmarks attack --save      # also writes benchmarks/results/reliability/attack.json, for `make report`
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support import report
from benchmarks.support.servers import ROOT

BENCHMARKS = {  # name: folder of its results
    **dict.fromkeys(("serving", "profile"), "speed"),
    **dict.fromkeys(("soak", "determinism", "overload", "attack", "restarts", "records", "fuzz"), "reliability"),
    **dict.fromkeys(("corruptions", "forecasters", "drift"), "accuracy"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark whose name is the first argument. Return the exit status."""
    name, *others = arguments or ("--help",)
    if name not in BENCHMARKS:
        print(f"{__doc__}\nBenchmarks: {', '.join(BENCHMARKS)}. Each has --help.", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/")
    module.add_options(parser)
    options = parser.parse_args(others)
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop the servers, too
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="quartet-benchmark-") as folder:
        tables, failures = module.run(options, Path(folder))
    for table in tables:
        print(report.show(table))
    if options.save:
        command = ["python", "-m", "benchmarks", name, *(each for each in others if each != "--save")]
        report.save(ROOT / "benchmarks" / "results" / BENCHMARKS[name] / f"{name}.json", shlex.join(command), tables)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
