"""Damaged images, to measure how much of its accuracy a classifier keeps: six kinds of damage, three strengths each.

A set of our own, made from the images by this file and the same on every call. It is not CIFAR-10-C (Hendrycks and
Dietterich 2019), whose kinds are others and stronger, and its figures do not compare with that one's.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

STRENGTHS = 3


def noise(images: Tensor, strength: int) -> Tensor:
    """Gaussian, with a standard deviation of 10, 20 or 30 shades."""
    generator = torch.Generator().manual_seed(strength)
    return images + (10, 20, 30)[strength] * torch.randn(images.shape, generator=generator)


def blur(images: Tensor, strength: int) -> Tensor:
    """Gaussian, with a standard deviation of 0.5, 0.75 or 1 pixel."""
    distance = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (distance / (0.5, 0.75, 1.0)[strength]) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    channels = images.shape[1]
    padded = F.pad(images.float(), (3, 3, 3, 3), mode="reflect")
    return F.conv2d(padded, kernel.expand(channels, 1, 7, 7).contiguous(), groups=channels)


def contrast(images: Tensor, strength: int) -> Tensor:
    """Drawn towards the mean of each image, to 0.6, 0.4 or 0.2 of its contrast."""
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.6, 0.4, 0.2)[strength]


def brightness(images: Tensor, strength: int) -> Tensor:
    """Lighter by 25, 50 or 75 shades."""
    return images.float() + (25, 50, 75)[strength]


def pixelate(images: Tensor, strength: int) -> Tensor:
    """Averaged over areas, down to 24, 16 or 12 pixels a side and up again."""
    small = F.interpolate(images.float(), size=(24, 16, 12)[strength], mode="area")
    return F.interpolate(small, size=images.shape[2], mode="area")


def jpeg(images: Tensor, strength: int) -> Tensor:
    """Through a JPEG file of quality 60, 40 or 20."""
    damaged = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=(60, 40, 20)[strength])
        damaged.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(damaged)).permute(0, 3, 1, 2)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "pixelate": pixelate,
    "jpeg": jpeg,
}


def corrupt(images: Tensor, kind: str, strength: int) -> Tensor:
    """uint8 images [N, 3, S, S] -> the same, damaged; ``strength`` is 0, 1 or 2."""
    return CORRUPTIONS[kind](images, strength).round().clamp(0, 255).to(torch.uint8)
