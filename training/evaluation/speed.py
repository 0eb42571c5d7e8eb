"""Measure how fast the serving code computes each version on one thread, for single items and for batches.

    python -m training.evaluation.speed [--store DIR] [NAME or NAME@VERSION ...]

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
from app.store import Store
from app.tasks import TASKS
from app.tasks.speed import measure as measure
from app.tasks.speed import processor as processor
from training.limits import limits
from training.options import STORE, STORE_HELP


def describe(speed: dict[str, Any], task: store.TaskName) -> str:
    """Return a text with the time of a single item and the number of items per second in batches."""
    unit = TASKS[task].unit
    return (
        f"on one thread {speed['milliseconds']:g} ms for one {unit}, {speed['per_second']:,.0f} {unit}s a second "
        f"in batches of {speed['rows']}"
    )


def selected(parser: argparse.ArgumentParser, models: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """Return the versions in a model store, or those that ``names`` lists as NAME or NAME@VERSION.

    A store that is not a folder, or an unknown name, ends the command with a message.
    """
    if not models.is_dir():
        parser.error(f"--store is {str(models)!r}, which is not a folder")
    versions = list(Store(models).versions())
    labels = [f"{name}@{number}" for name, number in versions]
    if unknown := [text for text in names if text not in labels and text not in dict(versions)]:
        parser.error(f"{models} has no {unknown[0]}; it has {', '.join(labels) or 'nothing'}")
    return [(name, n) for name, n in versions if not names or name in names or f"{name}@{n}" in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the speed of all versions; return the exit status, which is 1 if a version is damaged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models or versions to measure (default: all)")
    parser.add_argument("--store", metavar="DIR", type=Path, default=STORE, help=STORE_HELP)
    options = parser.parse_args(argv)
    status = 0
    for name, number in selected(parser, options.store, options.names):
        try:
            version = Store(options.store).read(name, number)
            predictor = TASKS[version.card.task].load(version, torch.device("cpu"))
            speed = measure(predictor, processor(), limits().speed_seconds)
        except store.StoreError as error:
            print(f"{name}@{number}: not measured: {error}", flush=True)
            status = 1
            continue
        print(f"{name}@{number}: {describe(speed, version.card.task)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
