"""Image generators, which map latents to pixel values in [-1, 1], and their discriminators for training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelGenerator(nn.Module):
    """Base class of the generators."""

    def pixels(self, *inputs: Tensor) -> Tensor:
        """Return images as uint8 pixels [N, channels, image, image] from 0 to 255, given the inputs of ``forward``.

        Raises ArithmeticError if a value is not finite, such as NaN.
        """
        images = self(*inputs)
        if not bool(images.sum().isfinite()):
            raise ArithmeticError("pixel values are not finite")
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class GeneratorSizes:
    """Sizes of ``Generator``. ``hidden``: widths of the layers between latent and image [channels, image, image]."""

    latent: int = 100
    hidden: tuple[int, ...] = (128, 256, 512)
    channels: int = 1
    image: int = 28


class Generator(PixelGenerator):
    """The generator of the workshop (see ``app.networks``): linear layers, ReLU between them, and tanh at the end."""

    def __init__(self, sizes: GeneratorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        widths = (sizes.latent, *sizes.hidden, sizes.channels * sizes.image**2)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, latents: Tensor) -> Tensor:
        """Return grey values [N, channels, image, image] in [-1, 1], given latents [N, latent] from N(0, 1)."""
        sizes = self.sizes
        return self.layers(latents).unflatten(1, (sizes.channels, sizes.image, sizes.image))


class Discriminator(nn.Module):
    """The discriminator of the workshop: linear layers with LeakyReLU 0.2. The label of a real image is 1.

    The network returns logits, because the loss (``binary_cross_entropy_with_logits``) contains the sigmoid. This
    prevents an overflow.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (784, 512, 256)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, grey: Tensor) -> Tensor:
        """Return logits [N] of the probability that an image is real, given grey values [N, ...] in [-1, 1]."""
        return self.layers(grey.flatten(1)).squeeze(1)


@dataclass(frozen=True)
class ConditionalSizes:
    """Sizes of ``ConditionalGenerator``. ``widths``: channels at a quarter, half and full side length of the image."""

    latent: int = 64
    classes: int = 10
    widths: tuple[int, int, int] = (96, 32, 16)
    channels: int = 1
    image: int = 28


class ClassNorm(nn.Module):
    """Conditional batch norm (de Vries et al. 2017) with gain and shift per class, then ReLU.

    In evaluation mode the statistics are fixed, so an image does not depend on the other images in its batch.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Parameter(torch.ones(classes, channels))
        self.shift = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, one_hot: Tensor) -> Tensor:
        """Return a tensor [N, channels, H, W], given x [N, channels, H, W] and the one-hot classes [N, classes]."""
        gain, shift = one_hot @ self.gain, one_hot @ self.shift  # indexing would add up gradients in a varying order
        return torch.addcmul(shift[..., None, None], self.norm(x), gain[..., None, None]).relu()


class ConditionalGenerator(PixelGenerator):
    """A class-conditional generator: a linear layer, and convolutions that double the side twice.

    The class is an input of the linear layer and of every norm. The latent alone determines the style of an image, such
    as slant and thickness, in all classes.
    """

    def __init__(self, sizes: ConditionalSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.side = sizes.image // 4
        first, second, third = sizes.widths
        self.linear = nn.Linear(sizes.latent + sizes.classes, self.side**2 * first, bias=False)
        self.double1 = nn.ConvTranspose2d(first, second, 4, stride=2, padding=1, bias=False)
        self.convolution = nn.Conv2d(second, second, 3, padding=1, bias=False)
        self.double2 = nn.ConvTranspose2d(second, third, 4, stride=2, padding=1, bias=False)
        self.grey = nn.Conv2d(third, sizes.channels, 3, padding=1)
        self.norms = nn.ModuleList(ClassNorm(width, sizes.classes) for width in (first, second, second, third))
        with torch.no_grad():  # give the one column of a class as much weight as all latent columns
            self.linear.weight[:, sizes.latent :] *= sizes.latent**0.5
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return values [N, channels, image, image] in [-1, 1], given latents [N, latent] and labels [N]."""
        one_hot = F.one_hot(labels, self.sizes.classes).to(latents.dtype)
        x = self.linear(torch.cat([latents, one_hot], dim=1))
        x = x.unflatten(1, (self.side, self.side, -1)).permute(0, 3, 1, 2)  # [N, 96, 7, 7]
        x = self.norms[0](x, one_hot)
        x = self.norms[1](self.double1(x), one_hot)  # [N, 32, 14, 14]
        x = self.norms[2](self.convolution(x), one_hot)
        x = self.norms[3](self.double2(x), one_hot)  # [N, 16, 28, 28]
        return self.grey(x).tanh()


class ConditionalDiscriminator(nn.Module):
    """Strided convolutions with LeakyReLU 0.2, for images of 28 x 28 or 32 x 32.

    A projection (Miyato and Koyama 2018) scores how likely an image is a real image of its class. A second head
    classifies the image.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        first, second, third = 32, 64, 128
        self.conv1 = nn.Conv2d(channels, first, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(first, second, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, stride=2, padding=1)
        self.linear = nn.Linear(4 * 4 * third, third)
        self.real = nn.Linear(third, 1)
        self.projections = nn.Linear(third, classes, bias=False)
        self.classes = nn.Linear(third, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors: logits [N] of the probability that an image is real, and class logits [N, classes].

        ``images`` [N, channels, H, W] are in [-1, 1], and ``labels`` [N] are their classes.
        """
        x = F.leaky_relu(self.conv1(images), 0.2)  # [N, 32, 14, 14]
        x = F.leaky_relu(self.conv2(x), 0.2)  # [N, 64, 7, 7]
        x = F.leaky_relu(self.conv3(x), 0.2)  # [N, 128, 4, 4]
        x = F.leaky_relu(self.linear(x.flatten(1)), 0.2)
        fitting = self.projections(x).gather(1, labels.unsqueeze(1)) + self.real(x)
        return fitting.squeeze(1), self.classes(x)
