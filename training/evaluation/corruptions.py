"""Image corruptions, to measure the robustness of classifiers: six kinds with three strengths each.

The corruptions are deterministic. They differ from the corruptions of CIFAR-10-C (Hendrycks and Dietterich 2019) and
are weaker, so the results cannot be compared with results on CIFAR-10-C.
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
    """Add Gaussian noise with a standard deviation of 10, 20 or 30, on the pixel scale of 0 to 255."""
    generator = torch.Generator().manual_seed(strength)
    return images + (10, 20, 30)[strength] * torch.randn(images.shape, generator=generator)


def blur(images: Tensor, strength: int) -> Tensor:
    """Blur the images with a Gaussian filter. Its standard deviation is 0.5, 0.75 or 1 pixel."""
    from torchvision.transforms.v2.functional import gaussian_blur  # takes 2 s, and few commands need it

    return gaussian_blur(images.float(), [7, 7], [(0.5, 0.75, 1.0)[strength]])


def contrast(images: Tensor, strength: int) -> Tensor:
    """Multiply the contrast by 0.6, 0.4 or 0.2, around the mean of each image."""
    mean = images.float().mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.6, 0.4, 0.2)[strength]


def brightness(images: Tensor, strength: int) -> Tensor:
    """Increase the brightness by 25, 50 or 75, on the pixel scale of 0 to 255."""
    return images.float() + (25, 50, 75)[strength]


def pixelate(images: Tensor, strength: int) -> Tensor:
    """Downsample the images to a side of 24, 16 or 12 pixels, and upsample them to their original size."""
    small = F.interpolate(images.float(), size=(24, 16, 12)[strength], mode="area")
    return F.interpolate(small, size=images.shape[2], mode="area")


def jpeg(images: Tensor, strength: int) -> Tensor:
    """Compress the images as JPEG with quality 60, 40 or 20, and decode them."""
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
    """Corrupt uint8 images [N, 3, S, S]. ``strength``: 0 (weakest), 1 or 2 (strongest). Return uint8 images."""
    return CORRUPTIONS[kind](images, strength).round().clamp(0, 255).to(torch.uint8)
