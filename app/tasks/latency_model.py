"""The time that a batch takes, measured when a version is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SLOW_BATCH_SECONDS = 0.05  # seconds; what takes longer is not timed again: the first time is near enough


@dataclass(frozen=True)
class LatencyModel:
    """Seconds that a batch takes: measured alone and full, and on the line between."""

    single_row: float
    per_row: float  # for every row after the first

    def __call__(self, rows: int) -> float:
        return self.single_row + (rows - 1) * self.per_row

    @classmethod
    def measure(cls, compute: Callable[[int], object], rows: int) -> LatencyModel:
        """Warm up with 1, 2, 4 ... ``rows`` rows, and time the first and the last."""
        sizes = [1]
        while sizes[-1] < rows:
            sizes.append(min(2 * sizes[-1], rows))
        taken = [_seconds(compute, size) for size in sizes]  # the first of a size costs more than those after it
        alone, full = (
            min(_seconds(compute, size) for _ in range(2)) if first < SLOW_BATCH_SECONDS else first
            for size, first in ((1, taken[0]), (rows, taken[-1]))
        )
        return cls(alone, max(full - alone, 0.0) / max(rows - 1, 1))


def _seconds(compute: Callable[[int], object], rows: int) -> float:
    begun = time.perf_counter()
    compute(rows)
    return time.perf_counter() - begun
