"""Image classification with an imported network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from app.store import StoreError, Version
from app.tasks.classification import check_thresholds
from app.tasks.image_codecs import ImageDecoder
from app.tasks.imported.tensors import TaskPredictor

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class ImportedClassifier(TaskPredictor, ImageDecoder):
    """Predictor for imported networks that classify images. The card has ``labels``, in the order of the output.

    Options on the card:
        input: name of the tensor with the images, [N, C, H, W] or [N, H, W, C].
        output: name of the tensor with a value for each label, [N, labels].
        size: height and width of the images that the network reads; by default, those of the input tensor.
        resize: length to which the shorter side is scaled before the centre is cropped; by default, nothing is cropped.
        interpolation: ``bilinear`` (the default) or ``bicubic``.
        mean: one value, or one for each channel, which is subtracted from the pixels after their scaling to 0 to 1.
        std: one value, or one for each channel, by which the difference is divided.
        softmax: true (the default) if the network returns logits, false if it returns probabilities.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        super().__init__(version, device)
        options, self.labels = self.options, self.card.labels or []
        if not self.labels:
            raise StoreError(f"{self._card}: the task {self.card.task!r} needs labels")
        check_thresholds(version)
        self.input = self.tensor("input", self.inputs, (4,), "float uint8")
        self.reject_inputs_except(self.input.name)
        self.output = self.tensor("output", self.outputs, (2,), "float")
        _, first, height, last = self.input.shape
        self.channels_last = first not in (1, 3) and last in (1, 3)
        channels, sides = (last, (first, height)) if self.channels_last else (first, (height, last))
        if channels not in (1, 3):
            raise self.mismatch(self.input.name, "should have 1 or 3 channels")
        side = int(options.get("size") or max(sides))
        if side < 1:
            raise self.mismatch(self.input.name, "has a varying height and width; option size sets them")
        if min(sides) > 0 and sides[0] != sides[1]:
            raise self.mismatch(self.input.name, "should have equal height and width")
        if any(length not in (-1, side) for length in sides):
            raise self.mismatch(self.input.name, f"should have height and width {side}; option size sets them")
        shape = (1, side, side, channels) if self.channels_last else (1, channels, side, side)
        if self.sizes.problem({self.input.name: shape}):
            raise self.mismatch(self.input.name, f"does not take images of {side} x {side}; option size sets the size")
        if self.output.shape[1] not in (-1, len(self.labels)):
            raise self.mismatch(self.output.name, f"should have one value for each of the {len(self.labels)} labels")
        resize = int(options.get("resize") or 0)
        if resize and resize < side:
            raise StoreError(f"{self._card}: option resize is {resize}; it should be at least the size {side}")
        ImageDecoder.__init__(self, channels, side, resize, FILTERS[options.get("interpolation", "bilinear")])
        self.softmax = bool(options.get("softmax", True))
        mean, std = (self._per_channel(key, default) for key, default in (("mean", 0.0), ("std", 1.0)))
        self.raw = self.input.dtype == "uint8"  # the network scales pixels itself
        if self.raw and (options.get("mean") or options.get("std")):
            raise self.mismatch(self.input.name, "should be a float, because mean or std are given")
        self.dtype = getattr(torch, self.input.dtype)
        self.factor = (1 / (255 * torch.tensor(std))).to(device)[:, None, None]
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).to(device)[:, None, None]

    def _per_channel(self, key: str, default: float) -> list[float]:
        """Return the values of an option, one for each channel. Raises StoreError."""
        values = [float(value) for value in self.options.get(key) or [default]]
        if len(values) not in (1, self.channels) or (key == "std" and not all(value > 0 for value in values)):
            raise StoreError(f"{self._card}: option {key} is {values}; it should be one value, or {self.channels}")
        return values * (self.channels // len(values))

    def predict_task(self, items: Sequence[Tensor]) -> list[list[float]]:
        """Return the probabilities [classes] of each image, given its pixels uint8 [channels, side, side]."""
        with torch.inference_mode():
            images = torch.stack(list(items))
            if not self.raw:
                images = images.to(self.device, torch.float32).mul_(self.factor).add_(self.shift).to(self.dtype)
            if self.channels_last:
                images = images.permute(0, 2, 3, 1)
            outputs = self.run_rows({self.input.name: images.cpu().numpy()}, len(items))[self.output.name]
            scores = torch.from_numpy(outputs).double()
            result = scores.softmax(dim=1) if self.softmax else scores
        self.check_finite(float(result.sum()), "probabilities")
        rows: list[list[float]] = result.tolist()
        return rows
