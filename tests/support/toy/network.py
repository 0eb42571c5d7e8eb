"""The toy network, as a file of ``app/networks``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from app.networks.cnn import Classifier


@dataclass(frozen=True)
class ToyNetSizes:
    """``width``: channels of the convolution."""

    classes: int = 2
    channels: int = 1
    image: int = 8
    width: int = 4


class ToyNet(Classifier):
    """One convolution 3x3, the largest value of each channel, one linear layer."""

    def __init__(self, sizes: ToyNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.convolution = nn.Conv2d(sizes.channels, sizes.width, 3, padding=1)
        self.linear = nn.Linear(sizes.width, sizes.classes)

    def maps(self, pixels: Tensor) -> Tensor:
        """pixels [N, channels, image, image], 0 to 255 -> [N, width, image, image]."""
        return self.convolution(pixels.to(self.linear.weight.dtype) / 255)

    def classified(self, maps: Tensor) -> Tensor:
        """maps [N, width, image, image] -> scores [N, classes]."""
        return self.linear(maps.relu().amax(dim=(2, 3)))
