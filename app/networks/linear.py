"""Linear layers for inference: with packed weights, and merged with the norm before them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNKS, LONG_CHUNK = (32, 16, 8), 128  # numbers of rows that ``Packed`` computes at once
MIN_PACKED_WIDTH = 256  # time with packed weights: 2 times as long as without at width 128, 0.7 times at 512


class Packed:
    """A linear layer, x W^T + b, in one oneDNN call.

    The weight [out, in] is converted once to oneDNN's layout. For large weights and few rows, the call is faster than
    separate operations. Unlike other matrix products, the call nearly always rounds a row independently of the other
    rows. ``batch_invariant`` in ``app.tasks.precision`` checks this property.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias
        sample = weight.repeat(-(-LONG_CHUNK // len(weight)), 1)[:LONG_CHUNK]
        parts = torch.cat([self._product(chunk) for chunk in sample.split(CHUNKS[0])])
        self.chunks = (LONG_CHUNK, *CHUNKS) if torch.equal(self._product(sample), parts) else CHUNKS

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output [N, out] for x [N, in].

        Many rows are computed in chunks of 128, 32, 16 and 8 rows. oneDNN compiles and caches a kernel of 0.75 MiB for
        each number of rows and weight shape, and chunks limit the number of kernels. Chunks of 128 rows take about 0.8
        times as long as four chunks of 32 rows. They are used only if they give the same bits.
        """
        sizes = _split(len(x), self.chunks)
        if len(sizes) == 1:
            return self._product(x)
        return torch.cat([self._product(chunk) for chunk in x.split(sizes)])

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


@cache
def _split(rows: int, chunks: tuple[int, ...]) -> list[int]:
    """Split a number of rows into chunks of the given sizes, largest first, and the remainder."""
    sizes = []
    for size in chunks:
        sizes += [size] * (rows // size)
        rows %= size
    return sizes + [rows] * (rows > 0)


def linear(weight: Tensor, bias: Tensor, pack: bool) -> Callable[[Tensor], Tensor]:
    """Return the function x W^T + b, with packed weights if ``pack`` is true."""
    return Packed(weight, bias) if pack else partial(F.linear, weight=weight, bias=bias)


def packable(weight: Tensor) -> bool:
    """Return whether packed weights are supported and faster, given the head's weight [vocabulary, hidden]."""
    supported = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return supported and weight.shape[1] >= MIN_PACKED_WIDTH


def merge_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [out, in] and a bias [out] that include the scale and shift of the preceding norm."""
    return weight * norm.weight, bias + weight @ norm.bias
