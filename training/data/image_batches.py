"""Augmentation for image classifiers."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def shift_and_mirror(images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Shift images [N, C, S, S] up and left by ``shifts`` [2, N, 1]; mirror them where ``mirrored`` [N, 1] is true.

    Reflected pixels fill the edges. The result is in channels-last memory format.
    """
    count, _, side, _ = images.shape
    position = torch.arange(side) + shifts  # [2, N, S]
    position = side - 1 - (side - 1 - position.abs()).abs()  # reflected at both edges, in 0 ... S - 1
    columns = torch.where(mirrored, side - 1 - position[1], position[1]).to(images.device)
    rows = position[0].to(images.device)
    image_indices = torch.arange(count, device=images.device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[image_indices, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def random_shifts(count: int, largest: int) -> Tensor:
    """Return random shifts [2, count, 1] of up to ``largest`` pixels for ``shift_and_mirror``."""
    return torch.randint(-largest, largest + 1, (2, count, 1))


def masked(images: Tensor, side: int, fill: Tensor) -> Tensor:
    """Return images [N, C, S, S] in which a square at a random place has the value ``fill`` [C, 1, 1] (cutout).

    ``side``: side length of the square in pixels.
    """
    count, _, height, width = images.shape

    def covered(length: int) -> Tensor:
        start = torch.randint(length - side + 1, (count, 1))
        position = torch.arange(length)
        return ((position >= start) & (position < start + side)).to(images.device)  # [N, length]

    square = covered(height)[:, None, :, None] & covered(width)[:, None, None, :]
    return torch.where(square, fill.to(images.dtype), images)


def corrupted(images: Tensor, share: float) -> Tensor:
    """Return uint8 images [N, C, S, S] of which a share has noise, blur or JPEG artefacts of random strengths.

    Of these images, half have Gaussian noise with a standard deviation of up to 40 (of 255), a quarter is blurred with
    a standard deviation of 0.3 to 1.2 pixels, and a quarter is compressed with a JPEG quality of 15 to 90.
    """
    count = min(round(len(images) * share / 4), len(images) // 4)
    if not count:
        return images
    from torchvision.transforms.v2.functional import gaussian_blur  # takes 2 s, and few trainings need it

    images = images.clone()
    noisy, blurred, compressed = torch.randperm(len(images))[: 4 * count].split([2 * count, count, count])
    noise = torch.randn(images[noisy].shape) * 40 * torch.rand(2 * count, 1, 1, 1)
    images[noisy] = (images[noisy] + noise.to(images.device)).round().clamp(0, 255).to(torch.uint8)
    for index, deviation in zip(blurred.tolist(), (0.3 + 0.9 * torch.rand(count)).tolist(), strict=True):
        images[index] = gaussian_blur(images[index], [7, 7], [deviation])
    for index, quality in zip(compressed.tolist(), torch.randint(15, 91, (count,)).tolist(), strict=True):
        file = io.BytesIO()
        Image.fromarray(images[index].permute(1, 2, 0).cpu().numpy()).save(file, "JPEG", quality=quality)
        images[index] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    return images
