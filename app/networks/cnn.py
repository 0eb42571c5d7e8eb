"""Image classifiers: networks that read pixels (uint8 or float, 0 to 255) and return logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module, ABC):
    """Base class of the classifiers. It computes feature maps from pixels, then scores, and then calibrated logits.

    ``memory_format`` is the memory format of the weights with which the network is fastest.
    """

    memory_format = torch.contiguous_format

    @abstractmethod
    def maps(self, pixels: Tensor) -> Tensor:
        """Return feature maps [N, C, h, w] of a late convolution, given pixels [N, channels, image, image]."""

    @abstractmethod
    def classified(self, maps: Tensor) -> Tensor:
        """Return scores [N, classes], the logits that the loss of the training uses, given feature maps."""

    def calibrated(self, scores: Tensor) -> Tensor:
        """Return calibrated logits [N, classes] with the same ranking, given scores [N, classes]."""
        return scores

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes], given pixels [N, channels, image, image] from 0 to 255."""
        return self.calibrated(self.classified(self.maps(pixels)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [N, classes], each row summing to 1, given logits [N, classes]."""
        return probabilities(logits)


@dataclass(frozen=True)
class LeNetSizes:
    """Sizes of ``LeNet``.

    ``conv``: channels of the two 5x5 convolutions. ``hidden``: widths of the two hidden linear layers.
    """

    classes: int = 10
    channels: int = 3
    image: int = 32
    conv: tuple[int, int] = (6, 16)
    hidden: tuple[int, int] = (120, 84)


class LeNet(Classifier):
    """A small CNN: two blocks of 5x5 convolution, ReLU and 2x2 max-pooling, then three linear layers.

    The network comes from the workshop, the lecture from which this project started. The network itself scales the
    pixels to [-1, 1].
    """

    def __init__(self, sizes: LeNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        first, second = sizes.conv
        side = ((sizes.image - 4) // 2 - 4) // 2  # a 5x5 convolution removes 4 pixels, pooling halves the side
        self.conv1 = nn.Conv2d(sizes.channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * side * side, sizes.hidden[0])
        self.fc2 = nn.Linear(sizes.hidden[0], sizes.hidden[1])
        self.fc3 = nn.Linear(sizes.hidden[1], sizes.classes)

    def maps(self, pixels: Tensor) -> Tensor:
        """Return the maps [N, conv[1], 10, 10] of the last convolution, given pixels [N, channels, image, image]."""
        x = scaled(pixels, self.fc3.weight.dtype)
        # ReLU after pooling gives the same values with a quarter of the work.
        x = F.relu(max_pool(conv2d(self.conv1, x)))  # [N, 6, 14, 14]
        return conv2d(self.conv2, x)

    def classified(self, maps: Tensor) -> Tensor:
        """Return scores [N, classes], given maps."""
        x = F.relu(max_pool(maps))  # [N, 16, 5, 5]
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


@dataclass(frozen=True)
class DigitNetSizes:
    """Sizes of ``DigitNet``.

    ``conv``: channels of the two pairs of 3x3 convolutions. ``features``: width of the hidden linear layer.
    """

    classes: int = 10
    channels: int = 1
    image: int = 28
    conv: tuple[int, int] = (32, 64)
    features: int = 128


class MaxPool(nn.Module):
    """A layer that applies ``max_pool``."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x)


class DigitNet(Classifier):
    """A CNN: two pairs of 3x3 convolutions with batch norm, max-pooling after each pair, then two linear layers.

    The method ``features`` returns the output of the hidden linear layer after ReLU. These features are used to measure
    Frechet distances between sets of digit images.
    """

    def __init__(self, sizes: DigitNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        first, second = sizes.conv

        def pair(channels_in: int, channels_out: int) -> list[nn.Module]:
            layers: list[nn.Module] = []
            for channels in (channels_in, channels_out):
                layers += [nn.Conv2d(channels, channels_out, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(channels_out), nn.ReLU()]
            return [*layers, MaxPool()]

        self.convolutions = nn.Sequential(*pair(sizes.channels, first), *pair(first, second))
        self.fc1 = nn.Linear(second * (sizes.image // 4) ** 2, sizes.features)
        self.fc2 = nn.Linear(sizes.features, sizes.classes)

    def maps(self, pixels: Tensor) -> Tensor:
        """Return the maps [N, conv[1], 14, 14] of the last convolution, given pixels [N, channels, image, image]."""
        return self.convolutions[:-1](scaled(pixels, self.fc2.weight.dtype))

    def features(self, pixels: Tensor) -> Tensor:
        """Return features [N, features], all at least 0, given pixels [N, channels, image, image] from 0 to 255."""
        return self._features(self.maps(pixels))

    def _features(self, maps: Tensor) -> Tensor:
        return F.relu(self.fc1(self.convolutions[-1](maps).flatten(1)))

    def classified(self, maps: Tensor) -> Tensor:
        """Return scores [N, classes], given maps."""
        features = self._features(maps)
        if self.training:
            features = F.dropout(features, 0.4)
        return self.fc2(features)


@dataclass(frozen=True)
class WhitenedNetSizes:
    """Sizes of ``WhitenedNet``.

    ``widths``: channels of the three groups of 3x3 convolutions. ``depth``: convolutions per group, 2 or 3.
    ``label_smoothing``: strength of the label smoothing whose effect ``unsmoothed`` removes from the logits.
    """

    classes: int = 10
    channels: int = 3
    image: int = 32
    widths: tuple[int, int, int] = (96, 320, 320)
    label_smoothing: float = 0.0
    depth: int = 2


class Group(nn.Module):
    """Two or three 3x3 convolutions, each followed by batch norm and GELU.

    Max-pooling by 2 follows the first convolution. With three convolutions, the output after the first GELU is added
    to the input of the last GELU. The first output channels of each convolution initially copy its input channels
    (Dirac initialisation). Training changes the bias of the batch norms, but not their gain.
    """

    def __init__(self, channels_in: int, channels_out: int, depth: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = normalized_convolution(channels_in, channels_out)
        self.conv2, self.norm2 = normalized_convolution(channels_out, channels_out)
        self.residual = depth == 3
        if self.residual:
            self.conv3, self.norm3 = normalized_convolution(channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor [N, out, S / 2, S / 2], given x [N, in, S, S]."""
        first = F.gelu(self.norm1(max_pool(self.conv1(x))))
        x = F.gelu(self.norm2(self.conv2(first)))
        return F.gelu(self.norm3(self.conv3(x)) + first) if self.residual else x


def normalized_convolution(channels_in: int, channels_out: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a 3x3 convolution with Dirac initialisation, and a batch norm with a constant gain of 1."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:channels_in])
    norm = nn.BatchNorm2d(channels_out, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return convolution, norm


class WhitenedNet(Classifier):
    """The network of airbench94, 95 and 96 (Jordan 2024, arXiv 2404.00498).

    The first layer, ``whiten``, whitens patches of 2x2 pixels. It has fixed filters and their negatives. The effect of
    label smoothing is removed from the logits. ``temperature`` (for one view of an image) and ``views_temperature``
    (for six views) are fitted after training. They calibrate the probabilities that the softmax of the logits gives.
    """

    # In other formats, each call copies the weights, and takes 40 % longer for one image.
    memory_format = torch.channels_last
    mean: Tensor
    deviation: Tensor
    temperature: Tensor
    views_temperature: Tensor

    def __init__(self, sizes: WhitenedNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        first, second, third = sizes.widths
        patch = sizes.channels * 2 * 2
        side = (sizes.image - 1) // 2 // 2 // 2
        self.register_buffer("mean", torch.full((sizes.channels, 1, 1), 127.5))
        self.register_buffer("deviation", torch.full((sizes.channels, 1, 1), 127.5))
        self.whiten = nn.Conv2d(sizes.channels, 2 * patch, 2, bias=False)
        self.whiten.weight.requires_grad_(False)
        self.whiten.bias = nn.Parameter(torch.zeros(2 * patch))
        if sizes.depth not in (2, 3):
            raise ValueError(f"depth must be 2 or 3, not {sizes.depth}")
        pairs = ((2 * patch, first), (first, second), (second, third))
        self.groups = nn.Sequential(*(Group(*channels, sizes.depth) for channels in pairs))
        self.pool = nn.MaxPool2d(side)
        self.head = nn.Linear(third, sizes.classes, bias=False)
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("views_temperature", torch.ones(()))

    def to_bfloat16(self) -> None:
        """Convert the large convolutions to bfloat16. The layers between them then also compute in bfloat16.

        On a CPU with bfloat16 instructions, this conversion halves the computing time and the memory. Pixels,
        whitening, batch-norm statistics and head stay in float32. Converting these parts too would not save time, and
        would triple the error.
        """
        for layer in self.groups.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def maps(self, pixels: Tensor) -> Tensor:
        """Return the maps [N, widths[1], 7, 7] of the second group, given pixels [N, channels, image, image]."""
        x = (pixels.to(self.head.weight.dtype) - self.mean) / self.deviation
        x = x.contiguous(memory_format=torch.channels_last)  # faster on the CPU
        x = F.gelu(self.whiten(x)).to(next(self.groups.parameters()).dtype)  # [N, 24, 31, 31]
        return self.groups[1](self.groups[0](x))

    def classified(self, maps: Tensor) -> Tensor:
        """Return scores [N, classes], given maps. They are logits before ``calibrated`` removes label smoothing."""
        return self.head(self.pool(self.groups[2](maps)).flatten(1).to(self.head.weight.dtype)) / 9

    def scores(self, pixels: Tensor) -> Tensor:
        """Return scores [N, classes], given pixels [N, channels, image, image] from 0 to 255."""
        return self.classified(self.maps(pixels))

    def calibrated(self, scores: Tensor) -> Tensor:
        """Return logits [N, classes], given scores [N, classes] of one view."""
        return unsmoothed(scores, self.sizes.label_smoothing) / self.temperature

    def tta_logits(self, pixels: Tensor) -> Tensor:
        """Return logits [N, classes] from six views of each image, given pixels [N, channels, image, image], 0 to 255.

        Three views are the image, the image shifted one pixel up and left, and the image shifted one pixel down and
        right. The shifted images have reflected edges. The other three views are the mirror images of these three
        views. The two unshifted views have half of the weight.
        """
        wide = F.pad(pixels.to(self.head.weight.dtype), (1, 1, 1, 1), mode="reflect")  # [N, channels, S + 2, S + 2]
        moved = [wide[..., 1:-1, 1:-1], wide[..., :-2, :-2], wide[..., 2:, 2:]]
        shown = torch.cat([view for image in moved for view in (image, image.flip(-1))])  # [6 N, channels, S, S]
        centre, up, down = self.scores(shown).unflatten(0, (3, 2, -1)).mean(dim=1).unbind()  # of [3, N, classes]
        scores = centre / 2 + (up + down) / 4
        return unsmoothed(scores, self.sizes.label_smoothing) / self.views_temperature


# Width of the bend of the hyperbola in ``unsmoothed``, relative to the probability that smoothing gives each class.
BEND = 0.2


def unsmoothed(logits: Tensor, smoothing: float) -> Tensor:
    """Remove the effect of label smoothing: return log-probabilities [N, classes], given logits [N, classes].

    If the labels of an image have probabilities p, the network learns q = (1 - s) p + s / classes (Szegedy et al. 2016,
    section 7). This function solves for p. A temperature cannot remove the effect, because it scales the logits of all
    classes by the same factor. A hyperbola maps negative solutions to small positive values, so that no class has
    probability 0.
    """
    if not smoothing:
        return logits
    floor = smoothing / logits.shape[1]
    excess = logits.softmax(dim=1) - floor
    return (excess + excess.square().add((BEND * floor) ** 2).sqrt()).div(2 * (1 - smoothing)).log()


def scaled(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in [-1, 1], given pixels from 0 to 255.

    The function allocates only one tensor. On the CPU, allocating a second tensor would take longer than the
    arithmetic.
    """
    return torch.sub(pixels, 127.5).to(dtype).div_(127.5)


SMALL_BATCH = 4  # images; largest batch for which ``conv2d`` uses matrix products


def conv2d(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution with few channels to x [N, C, H, W].

    For at most SMALL_BATCH images without gradients on the CPU, this function uses matrix products. With so few images,
    the set-up of each oneDNN call takes longer than the computation. For one image, LeNet takes 0.62 times as long as
    with oneDNN.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or len(x) > SMALL_BATCH:
        return convolution(x)
    weight, bias = convolution.weight, convolution.bias
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    return torch.ops.aten.thnn_conv2d(x, weight, kernel, bias, stride, padding)


def max_pool(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] after max-pooling by 2, as a tensor [N, C, H // 2, W // 2].

    For more than SMALL_BATCH images without gradients on the CPU, this function takes the maximum of four strided
    slices. ``max_pool2d`` takes ten times as long, so LeNet would take twice as long for 64 images.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or len(x) <= SMALL_BATCH:
        return F.max_pool2d(x, 2)
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
    return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def probabilities(logits: Tensor) -> Tensor:
    """Return probabilities [N, classes], each row summing to 1, given logits [N, classes]."""
    return torch.softmax(logits.double(), dim=1)
