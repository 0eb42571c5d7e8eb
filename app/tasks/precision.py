"""Choose precision and padding so that the result for a row does not depend on the other rows of its batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

TIMING_ROUNDS = 7  # alternating runs in each precision, of which the fastest counts
BFLOAT16_TIME_RATIO = 0.8  # bfloat16 is used if it takes less than this share of the float32 time
MIN_ROWS = 4  # smaller batches are padded, because many matrix kernels round differently for fewer rows


def padded_rows(rows: int, min_rows: int = 1) -> int:
    """Return the number of rows to which a batch of ``rows`` rows is padded: 1, 2, 4, 6 or a multiple of 8.

    Few different numbers are used, because the matrix kernels for each number are compiled and cached separately.
    """
    rows = max(rows, min_rows)
    return rows if rows == 1 else -(-rows // 2) * 2 if rows <= 8 else -(-rows // 8) * 8


def batch_invariant(compute: Callable[[Tensor], Tensor], inputs: Tensor, min_rows: int = MIN_ROWS) -> bool:
    """Return whether each row of ``compute(inputs)`` has the same bits if it is computed in a smaller batch.

    In float32, the bits may depend on the batch size, because the processor's matrix kernels may round differently for
    different sizes. Therefore all padded batch sizes from ``min_rows`` are tried. If results differ, callers use
    float64, in which the differences are too small to change an answer.
    """
    sizes = {padded_rows(rows) for rows in range(min_rows, len(inputs) + 1)}
    with torch.inference_mode():
        full = compute(inputs)
        return all(torch.equal(compute(inputs[:rows]), full[:rows]) for rows in sorted(sizes) if rows < len(inputs))


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is faster than float32. GPUs are assumed to be faster. On CPUs, the speed is measured."""
    return device.type == "cuda" or (torch.cpu._is_avx512_bf16_supported() and _bfloat16_is_faster())


@cache
def _bfloat16_is_faster() -> bool:
    """Time a convolution in both precisions, and return whether bfloat16 is clearly faster.

    The time is measured, because bfloat16 is slower on some processors that support it. The network
    ``cifar10-whitened`` takes 0.5 times the float32 time on an AMD EPYC, and 1.5 times the float32 time on an Intel
    Xeon without AMX.
    """
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    with torch.inference_mode():
        calls = {}
        for dtype in best:
            x, weight = (
                torch.ones(8, 320, 7, 7, dtype=dtype),
                torch.ones(320, 320, 3, 3, dtype=dtype),
            )  # constants, so that no random numbers are drawn
            x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
            calls[dtype] = partial(F.conv2d, x, weight, padding=1)
        for _ in range(TIMING_ROUNDS):
            for dtype, call in calls.items():
                started_at = time.perf_counter()
                call()
                best[dtype] = min(best[dtype], time.perf_counter() - started_at)
    return best[torch.bfloat16] < BFLOAT16_TIME_RATIO * best[torch.float32]


def check_finite(total: float, outputs: str) -> None:
    """Raise ArithmeticError if ``total``, the sum of a network's outputs, is not finite.

    The inputs are finite, and so are the weights of networks of this project. If the sum is not finite, the cause is
    therefore a fault of the machine.
    """
    if not math.isfinite(total):
        raise ArithmeticError(f"{outputs} are not finite")


def pad(rows: Tensor, min_rows: int = MIN_ROWS) -> Tensor:
    """Append rows of zeros, up to the number that ``padded_rows`` returns."""
    missing = padded_rows(len(rows), min_rows) - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
