"""The network of the toy architecture, written like a file of ``app/networks``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from app.networks.cnn import Classifier


@dataclass(frozen=True)
class ToyNetSizes:
    """The sizes of the toy network. ``width``: number of channels of the convolution."""

    classes: int = 2
    channels: int = 1
    image: int = 8
    width: int = 4


class ToyNet(Classifier):
    """A network with a 3x3 convolution, the maximum of each channel, and a linear layer."""

    def __init__(self, sizes: ToyNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.convolution = nn.Conv2d(sizes.channels, sizes.width, 3, padding=1)
        self.linear = nn.Linear(sizes.width, sizes.classes)

    def maps(self, pixels: Tensor) -> Tensor:
        """Return feature maps [N, width, image, image] of pixels [N, channels, image, image] from 0 to 255."""
        return self.convolution(pixels.to(self.linear.weight.dtype) / 255)

    def classified(self, maps: Tensor) -> Tensor:
        """Return the scores [N, classes] of feature maps [N, width, image, image]."""
        return self.linear(maps.relu().amax(dim=(2, 3)))
