"""A linear model of the time that a batch takes. It is fitted to measurements when a model version is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_SINGLES, SINGLES_SECONDS = 10, 0.01  # limits on repeating batches of one row, of which the fastest counts
SIZE_FACTOR = 4  # ratio of two batch sizes that are measured one after the other
CHUNK_ROWS = 32  # rows that a matrix kernel computes at once; on CPUs, fewer rows take nearly as long
SLOW_BATCH_SECONDS = 0.01  # seconds; after a batch that takes this long, no larger batches are measured


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the seconds that a batch takes, as a linear function of its number of rows."""

    single_row: float  # seconds of a batch of one row
    per_row: float  # seconds of each further row

    def __call__(self, rows: int) -> float:
        return self.single_row + (rows - 1) * self.per_row

    def rows_within(self, seconds: float) -> int:
        """Return the largest number of rows that take at most ``seconds``, but at least 1."""
        return 1 + int(min(max(seconds - self.single_row, 0.0) / max(self.per_row, 1e-9), 1e9))

    def efficient_rows(self, seconds: float) -> int:
        """Return the number of rows that take at most ``seconds``, or more if that is more efficient.

        With the returned number of rows, the fixed costs take at most about a third of the time. The number is a
        multiple of ``CHUNK_ROWS``.
        """
        rows = max(self.rows_within(seconds), int(min(2 * self.single_row / max(self.per_row, 1e-9), 1e9)))
        return max(rows - rows % CHUNK_ROWS, CHUNK_ROWS)

    @classmethod
    def measure(cls, compute: Callable[[int], object], rows: int) -> LatencyModel:
        """Warm up with batches of 1, 4, 16 ... rows, and fit the model to the first and the last batch size.

        If a batch is slow, its size is the last size, and the duration of larger batches is extrapolated. Otherwise, a
        slow network would delay the start of the service.
        """
        _seconds(compute, 1)  # the first batch of a size is the slowest
        singles = [_seconds(compute, 1) for _ in range(2)]
        while len(singles) < MAX_SINGLES and sum(singles) < SINGLES_SECONDS:
            singles.append(_seconds(compute, 1))
        size, seconds = 1, min(singles)
        while size < rows and (size == 1 or seconds < SLOW_BATCH_SECONDS):
            size = min(SIZE_FACTOR * size, rows)
            seconds = _seconds(compute, size)
            if size == rows or seconds >= SLOW_BATCH_SECONDS:  # an interruption can make one batch slow
                seconds = min(seconds, _seconds(compute, size))
        return cls(min(singles), max(seconds - min(singles), 0.0) / max(size - 1, 1))


def _seconds(compute: Callable[[int], object], rows: int) -> float:
    started_at = time.perf_counter()
    compute(rows)
    return time.perf_counter() - started_at
