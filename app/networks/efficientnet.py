"""EfficientNet-Lite: a convolutional network for photographs, pretrained on ImageNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.networks.cnn import Classifier, probabilities

# For each stage: kernel size, stride of the first block, and expansion factor (Tan and Le 2019, table 1).
STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
CHUNK = 4  # images that are computed together on the CPU
MEAN, DEVIATION = 127.0, 128.0  # mean and deviation of the pixels, as used in the training on ImageNet


@dataclass(frozen=True)
class EfficientNetSizes:
    """Sizes of ``EfficientNetLite``. The defaults are those of EfficientNet-Lite0.

    ``widths``: channels of the first convolution, of the seven stages, and of the last convolution. ``blocks``: number
    of blocks in each stage. ``multi_label``: whether an image may have any number of labels instead of exactly one.
    """

    classes: int = 1000
    channels: int = 3
    image: int = 224
    widths: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192, 320, 1280)
    blocks: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    multi_label: bool = False


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME".

    With stride 2, the right edge may get one column of zeros more than the left edge. The lower edge may get one row
    more than the upper edge.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(channels_in, channels_out, kernel, stride, padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor [N, out, ceil(H / stride), ceil(W / stride)], given x [N, in, H, W]."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        if stride > 1:
            height, width = (max(0, kernel - stride + (-side) % stride) for side in x.shape[2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class Block(nn.Module):
    """An inverted bottleneck of three convolutions: 1x1 to more channels, depthwise, and 1x1 to fewer channels."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expand = SameConv2d(channels_in, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv2d(inner, channels_out, 1)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor [N, out, ceil(H / stride), ceil(W / stride)], given x [N, in, H, W]."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        result = self.project(F.relu6(self.depthwise(inner)))
        return x + result if self.residual else result


class EfficientNetLite(Classifier):
    """EfficientNet-Lite: EfficientNet (Tan and Le 2019) with ReLU6 and without squeeze-and-excitation.

    The batch norms are merged into the convolutions, so the network computes the same function in less time.
    """

    memory_format = torch.channels_last

    def __init__(self, sizes: EfficientNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        stem, *widths, last = sizes.widths
        self.stem = SameConv2d(sizes.channels, stem, 3, stride=2)
        blocks, before = [], stem
        for (kernel, stride, expansion), width, count in zip(STAGES, widths, sizes.blocks, strict=True):
            for index in range(count):
                blocks.append(Block(before, width, kernel, stride if index == 0 else 1, expansion))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.last = SameConv2d(before, last, 1)
        self.head = nn.Linear(last, sizes.classes)

    def scaled(self, pixels: Tensor) -> Tensor:
        """Return the scaled input of the first convolution, given pixels [N, channels, image, image] from 0 to 255."""
        x = torch.sub(pixels, MEAN).to(self.stem.weight.dtype).div_(DEVIATION)
        return x.contiguous(memory_format=torch.channels_last)

    def to_bfloat16(self) -> None:
        """Convert all convolutions to bfloat16. The mean over the maps and the last layer stay in float32.

        On a CPU with bfloat16 instructions, four images take 0.3 times as long as in float32.
        """
        for layer in (self.stem, self.blocks, self.last):
            layer.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def maps(self, pixels: Tensor) -> Tensor:
        """Return maps [N, 1280, 7, 7] of the last convolution, given pixels [N, channels, image, image] from 0 to 255.

        Without gradients on the CPU, only CHUNK images are computed at a time, so that their maps fit into the cache.
        """
        if torch.is_grad_enabled() or pixels.device.type != "cpu" or len(pixels) <= CHUNK:
            return self._maps(pixels)
        return torch.cat([self._maps(part) for part in pixels.split(CHUNK)])

    def _maps(self, pixels: Tensor) -> Tensor:
        return F.relu6(self.last(self.blocks(F.relu6(self.stem(self.scaled(pixels))))))

    def pooled(self, maps: Tensor) -> Tensor:
        """Return features [N, 1280], given maps."""
        return maps.to(self.head.weight.dtype).mean(dim=(2, 3))

    def features(self, pixels: Tensor) -> Tensor:
        """Return features [N, 1280], the input of the last layer, given pixels [N, channels, image, image]."""
        return self.pooled(self.maps(pixels))

    def classified(self, maps: Tensor) -> Tensor:
        """Return scores [N, classes], given maps."""
        return self.head(self.pooled(maps))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities [N, classes], given logits. With ``multi_label``, the labels are independent."""
        return logits.double().sigmoid() if self.sizes.multi_label else probabilities(logits)
