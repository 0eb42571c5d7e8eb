"""A linear model of the time that a batch takes. It is fitted to measurements when a model version is loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_REPEATS, REPEAT_SECONDS = 10, 0.01  # limits on repeating a batch; seconds are those of the fastest repeat
INTERRUPTED_SECONDS = 0.5  # a batch that seems interrupted is repeated at least until this time has passed
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

    def efficient_rows(self, seconds: float) -> int:
        """Return the number of rows that take at most ``seconds``, or more if that is more efficient.

        With the returned number of rows, the fixed costs take at most about a third of the time. The number is a
        multiple of ``CHUNK_ROWS``.
        """
        rows = int(min(max(seconds - self.single_row, 2 * self.single_row) / max(self.per_row, 1e-9), 1e9))
        return max(rows - rows % CHUNK_ROWS, CHUNK_ROWS)

    @classmethod
    def measure(
        cls, compute: Callable[[int], object], rows: int, clock: Callable[[], float] = time.perf_counter
    ) -> LatencyModel:
        """Warm up with batches of 1, 4, 16 ... rows, and fit the model to the first and the last batch size.

        If a batch is slow, its size is the last size, and the duration of larger batches is extrapolated. Otherwise, a
        slow network would delay the start of the service. Returns the model in seconds of ``clock``.
        """

        def seconds_of(rows: int) -> float:
            started_at = clock()
            compute(rows)
            return clock() - started_at

        seconds_of(1)  # the first batch of a size is the slowest
        single = min(seconds_of(1), _fastest(seconds_of, 1))
        size, seconds = 1, single
        while size < rows and (size == 1 or seconds < SLOW_BATCH_SECONDS):
            size = min(SIZE_FACTOR * size, rows)
            seconds = seconds_of(size)
            if size == rows or seconds >= SLOW_BATCH_SECONDS:
                seconds = min(seconds, _fastest(seconds_of, size, size * single))
        return cls(single, max(seconds - single, 0.0) / max(size - 1, 1))


def _fastest(seconds_of: Callable[[int], float], rows: int, longest: float = math.inf) -> float:
    """Return the seconds of the fastest of several batches, because other programs may interrupt some of them.

    Batches that take more than ``longest`` seconds, such as the time of the same rows one by one, seem interrupted.
    """
    fastest = total = seconds_of(rows)
    for repeats in range(1, MAX_REPEATS):
        if repeats * fastest >= REPEAT_SECONDS and (fastest <= longest or total >= INTERRUPTED_SECONDS):
            break
        seconds = seconds_of(rows)
        fastest, total = min(fastest, seconds), total + seconds
    return fastest
