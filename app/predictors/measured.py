"""What is measured of a network when it is loaded: how long a batch takes, and whether batches change its answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 4  # rows: with fewer, many matrix kernels take other paths and round otherwise


@dataclass(frozen=True)
class Pace:
    """Seconds that a batch takes: measured alone and full, and on the line between."""

    alone: float
    each: float  # for every row after the first

    def __call__(self, rows: int) -> float:
        return self.alone + (rows - 1) * self.each

    @classmethod
    def measure(cls, compute: Callable[[int], object], rows: int) -> Pace:
        """Warm up with 1, 2, 4 ... ``rows`` rows, and time the first and the last."""
        sizes = [1]
        while sizes[-1] < rows:
            sizes.append(min(2 * sizes[-1], rows))
        for size in sizes:  # the first of a size costs more than those after it
            compute(size)
        alone, full = _least(compute, 1), _least(compute, rows)
        return cls(alone, max(full - alone, 0.0) / max(rows - 1, 1))


def _least(compute: Callable[[int], object], rows: int, times: int = 2) -> float:
    """Seconds of the fastest of a few runs: what slowed the others was not the network."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        compute(rows)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def steady(compute: Callable[[Tensor], Tensor], inputs: Tensor, least: int = LEAST) -> bool:
    """Whether each row of ``compute(inputs)`` stays the same to the last bit with fewer rows beside it.

    In single precision this hangs on the processor's matrix kernels, so it is tried with every number of rows from
    ``least`` to all. Where it does not hold, double precision keeps the difference too small to be seen.
    """
    with torch.inference_mode():
        whole = compute(inputs)
        return all(torch.equal(compute(inputs[:rows]), whole[:rows]) for rows in range(least, len(inputs)))


def padded(rows: Tensor, least: int = LEAST) -> Tensor:
    """At least so many rows: zeros are added to fewer."""
    missing = least - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
