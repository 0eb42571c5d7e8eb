"""Measure the speed of all versions on one thread, for single items and for batches, with the serving code.

    python -m training.evaluation.speed [--store DIR] [NAME ...]
    python -m training.evaluation.speed --write     # write the results to the cards

Every training measures its network and writes the speed and the processor to the card. Other processes distort the
measurement, so use an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from app import store
from app.store import atomic_files
from app.tasks import TASKS

SECONDS = 0.5  # per measurement, and at least MIN_REPEATS repetitions
MIN_REPEATS = 5
ROWS = 64  # of a full batch
STEPS = 100_000  # characters of a timed text; more than are generated in SECONDS


def measure(predictor: Any, hardware: str) -> dict[str, Any]:
    """The field ``speed`` of a card: medians on one thread, after a warm-up of the predictor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        predictor.warm_up(ROWS)
        single, batch = (_median_seconds(_dummy_step(predictor, rows)) for rows in (1, ROWS))
    finally:
        torch.set_num_threads(threads)
    return {
        "milliseconds": _round(1000 * single),
        "per_second": _round(ROWS / batch),
        "rows": ROWS,
        "hardware": hardware,
    }


def describe(speed: dict[str, Any], task: store.TaskName) -> str:
    """The speed as a sentence."""
    unit = TASKS[task].unit
    return (
        f"on one thread {speed['milliseconds']:g} ms for one {unit}, {speed['per_second']:,.0f} {unit}s a second "
        f"in batches of {speed['rows']}"
    )


def processor() -> str:
    """The model name of the CPU."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _dummy_step(predictor: Any, rows: int) -> Callable[[], Any]:
    if TASKS[predictor.card.task].engine == "text":
        texts = predictor.dummy_texts(rows, STEPS)
        return lambda: predictor.step(texts)
    return lambda: predictor.dummy_run(rows)


def _median_seconds(compute: Callable[[], Any]) -> float:
    compute()
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < MIN_REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        compute()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _round(value: float) -> float:
    """Round to three significant digits, because repeated measurements differ more."""
    return float(f"{value:.3g}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure (default: all)")
    parser.add_argument("--store", metavar="DIR", type=Path, default=Path("models_store"), help="default: models_store")
    parser.add_argument("--write", action="store_true", help="write the results to the cards")
    options = parser.parse_args(argv)
    for name, number in store.all_versions(options.store):
        if options.names and name not in options.names:
            continue
        version = store.read_version(options.store, name, number)
        speed = measure(TASKS[version.card.task].predictor(version, torch.device("cpu")), processor())
        print(f"{name}@{number}: {describe(speed, version.card.task)}", flush=True)
        if options.write:
            path = version.folder / store.CARD
            card = json.loads(path.read_text(encoding="utf-8")) | {"speed": speed}
            atomic_files.replace_file(path, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
