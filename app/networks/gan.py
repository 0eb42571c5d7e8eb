"""The generator of images and, for training, its discriminator: latents in, grey values out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GeneratorSizes:
    """``hidden``: the widths between the latent and the image [channels, image, image]."""

    latent: int = 100
    hidden: tuple[int, ...] = (128, 256, 512)
    channels: int = 1
    image: int = 28


class Generator(nn.Module):
    """The workshop's generator: linear layers with ReLU between and tanh at the end."""

    def __init__(self, sizes: GeneratorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        widths = (sizes.latent, *sizes.hidden, sizes.channels * sizes.image**2)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, latents: Tensor) -> Tensor:
        """latents [N, latent] from N(0, 1) -> grey values [N, channels, image, image] in [-1, 1]."""
        sizes = self.sizes
        return self.layers(latents).unflatten(1, (sizes.channels, sizes.image, sizes.image))

    def pixels(self, latents: Tensor) -> Tensor:
        """latents [N, latent] -> the same images as uint8 pixels, 0 to 255."""
        return ((self(latents) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Discriminator(nn.Module):
    """The workshop's discriminator: linear layers with LeakyReLU 0.2; real is 1.

    Its sigmoid stands in the loss (``binary_cross_entropy_with_logits``): the same function, without overflow.
    """

    def __init__(self, pixels: int = 784, hidden: tuple[int, ...] = (512, 256)) -> None:
        super().__init__()
        widths = (pixels, *hidden)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, grey: Tensor) -> Tensor:
        """grey values [N, ...] in [-1, 1] -> logits [N] of being real."""
        return self.layers(grey.flatten(1)).squeeze(1)
