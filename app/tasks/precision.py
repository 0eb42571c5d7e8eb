"""Precision and padding, chosen so that a result does not depend on the other rows of its batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

TIMING_ROUNDS = 7  # of each precision, in turns: the least counts
BFLOAT16_TIME_RATIO = 0.8  # of the time of single precision is what half of it is taken for
MIN_ROWS = 4  # rows: with fewer, many matrix kernels take other paths and round otherwise


def padded_rows(rows: int, min_rows: int = 1) -> int:
    """How many rows to compute for so many: one, or two, four, six, or a multiple of 8.

    For every other number the kernels are made anew, and kept.
    """
    rows = max(rows, min_rows)
    return rows if rows == 1 else -(-rows // 2) * 2 if rows <= 8 else -(-rows // 8) * 8


def batch_invariant(compute: Callable[[Tensor], Tensor], inputs: Tensor, min_rows: int = MIN_ROWS) -> bool:
    """Whether each row of ``compute(inputs)`` stays the same to the last bit with fewer rows beside it.

    In single precision this hangs on the processor's matrix kernels, so it is tried with every number of rows that is
    computed, from ``least`` on. Where it does not hold, double precision keeps the difference too small to be seen.
    """
    sizes = {padded_rows(rows) for rows in range(min_rows, len(inputs) + 1)}
    with torch.inference_mode():
        whole = compute(inputs)
        return all(torch.equal(compute(inputs[:rows]), whole[:rows]) for rows in sorted(sizes) if rows < len(inputs))


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than those in float32."""
    return device.type == "cuda" or (torch.cpu._is_avx512_bf16_supported() and _bfloat16_is_faster())


@cache
def _bfloat16_is_faster() -> bool:
    """Whether a convolution takes clearly less time in bfloat16: that a processor has the instructions does not say so.

    Measured for all of ``cifar10-whitened``: 0.5 of the time on an AMD EPYC, 1.5 on an Intel Xeon without AMX.
    """
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    with torch.inference_mode():
        calls = {}
        for dtype in best:
            x, weight = torch.ones(8, 320, 7, 7, dtype=dtype), torch.ones(320, 320, 3, 3, dtype=dtype)  # draws nothing
            x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
            calls[dtype] = partial(F.conv2d, x, weight, padding=1)
        for _ in range(TIMING_ROUNDS):
            for dtype, call in calls.items():
                begun = time.perf_counter()
                call()
                best[dtype] = min(best[dtype], time.perf_counter() - begun)
    return best[torch.bfloat16] < BFLOAT16_TIME_RATIO * best[torch.float32]


def check_finite(total: float, what: str) -> None:
    """``total`` is the sum of what a network gave. Raises ArithmeticError when any of it is not a number: the weights
    are finite, so that is a fault of the machine, and no answer.
    """
    if not math.isfinite(total):
        raise ArithmeticError(f"{what} are not finite")


def pad(rows: Tensor, min_rows: int = MIN_ROWS) -> Tensor:
    """As many rows as are computed for them: zeros are added."""
    missing = padded_rows(len(rows), min_rows) - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
