"""A model of the time that a batch takes. It is fitted to measurements when a version is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SLOW_BATCH_SECONDS = 0.05  # seconds; a slower batch is timed only once, which is accurate enough


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the seconds that a batch takes, as a linear function of its number of rows."""

    single_row: float  # seconds of a batch of one row
    per_row: float  # seconds of each further row

    def __call__(self, rows: int) -> float:
        return self.single_row + (rows - 1) * self.per_row

    def rows_within(self, seconds: float) -> int:
        """Return the largest number of rows that take at most ``seconds``; at least 1."""
        return 1 + int(min(max(seconds - self.single_row, 0.0) / max(self.per_row, 1e-9), 1e9))

    @classmethod
    def measure(cls, compute: Callable[[int], object], rows: int) -> LatencyModel:
        """Warm up with batches of 1, 2, 4 ... ``rows`` rows, and fit the model to the first and the last batch size."""
        sizes = [1]
        while sizes[-1] < rows:
            sizes.append(min(2 * sizes[-1], rows))
        first_seconds = [_seconds(compute, size) for size in sizes]  # the first batch of each size is the slowest
        single, full = (
            min(_seconds(compute, size) for _ in range(2)) if first < SLOW_BATCH_SECONDS else first
            for size, first in ((1, first_seconds[0]), (rows, first_seconds[-1]))
        )
        return cls(single, max(full - single, 0.0) / max(rows - 1, 1))


def _seconds(compute: Callable[[int], object], rows: int) -> float:
    started_at = time.perf_counter()
    compute(rows)
    return time.perf_counter() - started_at
