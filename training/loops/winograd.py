"""Faster 3x3 convolutions on the CPU, in training, with Winograd's algorithm (Lavin and Gray 2015, arXiv 1509.09308).

F(4x4, 3x3) computes a tile of 4 x 4 output pixels with 36 instead of 144 multiplications per pair of channels. Four
transforms of winograd.c, which a C compiler compiles in a second, surround batched matrix products.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

SOURCE = Path(__file__).with_name("winograd.c")
POINTS = 36  # values of a transformed tile
MIN_CHANNELS = 64  # with fewer input channels, the transforms take longer than the saved multiplications
WORKSPACE = 2**24  # bytes; images are processed in parts whose transformed tiles stay in the cache
_FILTER = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
FILTER = torch.kron(_FILTER, _FILTER)  # [36, 9], transforms a 3x3 filter


@cache
def library() -> ctypes.CDLL | None:
    """Compile and load winograd.c. Return None if there is no compiler, or if the library cannot be loaded."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not torch.backends.openmp.is_available():
        return None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "winograd.so"
        # PyTorch has loaded an OpenMP library. A second one would have threads of its own, so -fopenmp is not linked.
        compile_only = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-c", str(SOURCE), "-o", f"{path}.o"]
        link = ["-shared", f"{path}.o", "-o", str(path)]
        try:
            for arguments in (compile_only, link):
                subprocess.run([compiler, *arguments], check=True, capture_output=True)
            return ctypes.CDLL(str(path))
        except (OSError, subprocess.CalledProcessError):
            return None


def _transform(name: str, maps: Tensor, tiles: Tensor) -> None:
    """Call a function of winograd.c, given ``maps`` [n, h, w, c] and ``tiles`` [36, n * tiles, c]."""
    function: Callable[..., None] = getattr(library(), name)
    pointers = ctypes.c_void_p(maps.data_ptr()), ctypes.c_void_p(tiles.data_ptr())
    function(*pointers, *map(ctypes.c_long, (*maps.shape, tiles.stride(0))))


class _Parts:
    """Divides a batch of images into parts, and allocates memory for the transformed tiles of one part."""

    def __init__(self, images: int, height: int, width: int, *channels: int) -> None:
        self.tiles = -(-height // 4) * -(-width // 4)  # of one image
        self.size = min(images, max(1, WORKSPACE // (4 * POINTS * self.tiles * sum(channels))))

    def buffer(self, channels: int) -> Tensor:
        """Return an uninitialised tensor [36, tiles of a part, channels]."""
        return torch.empty(POINTS, self.size * self.tiles, channels)

    def used(self, buffer: Tensor, images: int) -> Tensor:
        """Return the part of a buffer that the tiles of ``images`` images need."""
        return buffer[:, : images * self.tiles]


class _Convolution(torch.autograd.Function):
    """A 3x3 convolution with stride 1 and padding 1, without bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()  # [n, h, w, in]
        images, height, width, channels = x.shape
        filters = (FILTER @ weight.reshape(-1, 9).T).view(POINTS, *weight.shape[:2])  # [36, out, in]
        ctx.save_for_backward(x, filters)
        y = torch.empty(images, height, width, len(weight))
        parts = _Parts(images, height, width, channels, len(weight))
        inputs, outputs = parts.buffer(channels), parts.buffer(len(weight))
        for x_part, y_part in zip(x.split(parts.size), y.split(parts.size), strict=True):
            tiles, products = (parts.used(buffer, len(x_part)) for buffer in (inputs, outputs))
            _transform("transform_input", x_part, tiles)
            torch.bmm(tiles, filters.mT, out=products)
            _transform("transform_output", y_part, products)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, filters = ctx.saved_tensors
        gradient = gradient.permute(0, 2, 3, 1).contiguous()  # [n, h, w, out]
        of_x, of_filters = torch.empty_like(x), torch.zeros_like(filters)
        parts = _Parts(len(x), x.shape[1], x.shape[2], 2 * x.shape[3], filters.shape[1])
        buffers = [parts.buffer(channels) for channels in (x.shape[3], x.shape[3], filters.shape[1])]
        for x_part, of_y, of_x_part in zip(*(t.split(parts.size) for t in (x, gradient, of_x)), strict=True):
            tiles, of_tiles, of_products = (parts.used(buffer, len(x_part)) for buffer in buffers)
            _transform("transform_input", x_part, tiles)
            _transform("transform_output_gradient", of_y, of_products)
            of_filters.baddbmm_(of_products.mT, tiles)
            torch.bmm(of_products, filters, out=of_tiles)
            _transform("transform_input_gradient", of_x_part, of_tiles)
        of_weight = (FILTER.T @ of_filters.view(POINTS, -1)).T.reshape(*filters.shape[1:], 3, 3)
        return of_x.permute(0, 3, 1, 2), of_weight


def suitable(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> bool:  # fmt: skip
    """Return whether the algorithm can compute a call of ``torch.conv2d``, and is expected to be faster than oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and bias is None
        and weight.shape[2:] == (3, 3)
        and (stride, padding, dilation, groups) == ((1, 1), (1, 1), (1, 1), 1)
        and weight.shape[1] >= MIN_CHANNELS
        and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
        and x.requires_grad
        and not torch.is_autocast_enabled("cpu")
    )


class Winograd(TorchFunctionMode):
    """A context in which ``torch.conv2d`` and ``nn.Conv2d`` use Winograd's algorithm for suitable convolutions.

    The results differ from those of oneDNN by up to 2e-5 of the largest value. If ``library`` returns None, nothing
    changes. Neither does anything change in float16 or bfloat16, as with autocast, or without gradients.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and len(args) >= 2 and suitable(*args, **kwargs) and library() is not None:
            return _Convolution.apply(*args[:2])
        return func(*args, **kwargs)
