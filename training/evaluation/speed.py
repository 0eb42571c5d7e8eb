"""Measure how fast the serving code computes each version on one thread, for single items and for batches.

    python -m training.evaluation.speed [--store DIR] [NAME ...]

Each training also measures the speed of its network, and writes the speed and the processor to the card. This command
does not change cards. Use an idle machine, because other processes distort the measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app import store
from app.tasks import TASKS
from app.tasks.speed import measure as measure
from app.tasks.speed import processor as processor


def describe(speed: dict[str, Any], task: store.TaskName) -> str:
    """Return a text with the time of a single item and the number of items per second in batches."""
    unit = TASKS[task].unit
    return (
        f"on one thread {speed['milliseconds']:g} ms for one {unit}, {speed['per_second']:,.0f} {unit}s a second "
        f"in batches of {speed['rows']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure (default: all)")
    parser.add_argument(
        "--store", metavar="DIR", type=Path, default="models_store", help="model store (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    for name, number in store.all_versions(options.store):
        if options.names and name not in options.names:
            continue
        version = store.read_version(options.store, name, number)
        speed = measure(TASKS[version.card.task].load(version, torch.device("cpu")), processor())
        print(f"{name}@{number}: {describe(speed, version.card.task)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
