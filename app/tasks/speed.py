"""Measure the speed of a predictor on one thread, for the field ``speed`` of a model card."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MAX_SECONDS = 5.0  # after this time MIN_REPEATS is ignored, because a full batch of a large network takes seconds
MIN_REPEATS = 5  # even if they take longer than the requested time
ROWS = 64  # rows of a full batch
STEPS = 20_000  # characters of a dummy text, more than are generated in 0.5 s


def measure(predictor: Any, hardware: str, seconds: float) -> dict[str, Any]:
    """Return the field ``speed`` of a card: median times on one thread, after a warm-up of the predictor.

    The measurement takes at least ``seconds``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        predictor.warm_up(ROWS)
        single, batch = (median_seconds(_dummy_step(predictor, rows), seconds) for rows in (1, ROWS))
    finally:
        torch.set_num_threads(threads)
    return {
        "milliseconds": round_figure(1000 * single),
        "per_second": round_figure(ROWS / batch),
        "rows": ROWS,
        "hardware": hardware,
    }


def processor() -> str:
    """Return the model name of the CPU, or "CPU" if it is unknown."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def _dummy_step(predictor: Any, rows: int) -> Callable[[], Any]:
    if hasattr(predictor, "dummy_texts"):
        texts = predictor.dummy_texts(rows, STEPS)
        return lambda: predictor.step(texts)
    return lambda: predictor.dummy_run(rows)


def median_seconds(compute: Callable[[], Any], seconds: float) -> float:
    """Return the median duration of a call. The calls take at least ``seconds``; the first call is not counted."""
    compute()
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while (len(durations) < MIN_REPEATS and sum(durations) < MAX_SECONDS) or time.perf_counter() < end:
        start = time.perf_counter()
        compute()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def round_figure(value: float) -> float:
    """Round to three significant digits, because further digits differ from measurement to measurement."""
    return float(f"{value:.3g}")
