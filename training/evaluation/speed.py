"""How fast versions are on one thread, alone and in batches, with the code that serves them.

    python -m training.evaluation.speed [--store DIR] [NAME ...]
    python -m training.evaluation.speed --write     # and note it on their cards

A training measures its network itself and notes it on the card. Such a figure is of a machine, which is named beside
it, and of what else runs there: measure on a quiet one.
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
from app.store import files
from app.tasks import TASKS

SECONDS = 0.5  # for which something is repeated ...
MIN_REPEATS = 5  # ... and how often at least
ROWS = 64  # of a full batch
STEPS = 100_000  # characters that a timed text would have


def measure(predictor: Any, hardware: str) -> dict[str, Any]:
    """A card's ``speed`` of a predictor that is not warmed up yet: medians, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        predictor.warm_up(ROWS)
        alone, full = (_median_seconds(_dummy_step(predictor, rows)) for rows in (1, ROWS))
    finally:
        torch.set_num_threads(threads)
    return {
        "milliseconds": _round(1000 * alone),
        "per_second": _round(ROWS / full),
        "rows": ROWS,
        "hardware": hardware,
    }


def told(speed: dict[str, Any], task: store.TaskName) -> str:
    """The same as a sentence."""
    unit = TASKS[task].unit
    return (
        f"on one thread {speed['milliseconds']:g} ms for one {unit} alone, {speed['per_second']:,.0f} {unit}s a second "
        f"in batches of {speed['rows']}"
    )


def processor() -> str:
    """What the CPU calls itself."""
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
        begun = time.perf_counter()
        compute()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _round(value: float) -> float:
    """Three digits: more are not true of the next minute."""
    return float(f"{value:.3g}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to measure (default: all)")
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--write", action="store_true", help="note the figures on the cards")
    chosen = parser.parse_args(argv)
    for name, number in store.all_versions(chosen.store):
        if chosen.names and name not in chosen.names:
            continue
        version = store.read_version(chosen.store, name, number)
        speed = measure(TASKS[version.card.task].predictor(version, torch.device("cpu")), processor())
        print(f"{name}@{number}: {told(speed, version.card.task)}", flush=True)
        if chosen.write:
            path = version.folder / store.CARD
            card = json.loads(path.read_text(encoding="utf-8")) | {"speed": speed}
            files.replace_file(path, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
