"""Images that are decoded whenever they are used, because all of them would not fit into the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from app.tasks.image_codecs import ImageDecoder

MAX_PIXELS = 10**8  # images with more pixels are skipped


class ImageFiles:
    """Image files that are used like a tensor uint8 [N, 3, side, side].

    Attributes:
        shape: the shape of this tensor.
    """

    def __init__(self, files: Sequence[Path], side: int) -> None:
        self.files, self._decoder = files, ImageDecoder(3, side)
        self.shape = torch.Size((len(files), 3, side, side))

    def decode(self, index: int) -> Tensor:
        """Return the pixels [3, side, side] of one image."""
        file = self.files[index]
        return self._decoder.parse(file.read_bytes(), MAX_PIXELS, str(file))

    def __getitem__(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pixels of the images with these indices."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads help, because decoding releases the GIL
            return torch.stack(list(pool.map(self.decode, torch.as_tensor(indices).tolist())))

    def subset(self, indices: Tensor | Sequence[int]) -> ImageFiles:
        """Return the images with these indices, without decoding them."""
        files = [self.files[index] for index in torch.as_tensor(indices).tolist()]
        return ImageFiles(files, self.shape[-1])

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield the pixels of at most ``size`` images at a time."""
        for start in range(0, len(self.files), size):
            yield self[range(start, min(start + size, len(self.files)))]


Pixels = Tensor | ImageFiles


def subset(images: Pixels, indices: Tensor) -> Pixels:
    """Return the images with these indices. Image files are not decoded."""
    return images.subset(indices) if isinstance(images, ImageFiles) else images[indices]
