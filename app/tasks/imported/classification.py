"""Image classification with an imported network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from app.errors import BadValue
from app.store import CARD, StoreError, TensorSpec
from app.store.version import Version
from app.tasks.classification import Classifier, check_thresholds
from app.tasks.imported.tensors import TensorPredictor

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class ImportedClassifier(Classifier):
    """Predictor for imported networks that classify images. The card has ``labels``, in the order of the output.

    ``tensors`` runs the network, also for requests of tensors.

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
        self.tensors = TensorPredictor(version, device)
        self.card, self.device = version.card, device
        self.options, self.labels = self.tensors.sizes.options, self.card.labels or []
        self._path = version.path_of(CARD)
        if not self.labels:
            raise StoreError(f"{self._path}: the task 'classify' needs labels; --labels FILE sets them")
        check_thresholds(version)
        self.input = self._tensor("input", self.tensors.inputs, 4, ("float", "uint8"))
        self.output = self._tensor("output", self.tensors.outputs, 2, ("float",))
        if unused := [name for name in self.tensors.inputs if name != self.input.name]:
            raise self._mismatch(self.tensors.inputs[unused[0]], "is not an input of this task")
        if not self.tensors.sizes.batched and self.tensors.sizes.inputs[self.input.name][0] != 1:
            expected = "should have a first dimension that is 1, or that counts rows which do not affect each other"
            raise self._mismatch(self.input, expected)
        side = self._set_layout()
        if self.output.shape[1] not in (-1, len(self.labels)):
            raise self._mismatch(self.output, f"should have one value for each of the {len(self.labels)} labels")
        resize = int(self.options.get("resize") or 0)
        if resize and resize < side:
            raise StoreError(f"{self._path}: option resize is {resize}; it should be at least the size {side}")
        super().__init__(self.channels, side, resize, FILTERS[self.options.get("interpolation", "bilinear")])
        self.raw = self.input.dtype == "uint8"  # the network scales pixels itself
        mean, std = self._per_channel("mean", 0.0), self._per_channel("std", 1.0)
        if self.raw and (self.options.get("mean") or self.options.get("std")):
            raise self._mismatch(self.input, "should be a float, because mean or std are given")
        self.factor = (1 / (255 * torch.tensor(std)))[:, None, None]
        self.shift = (-torch.tensor(mean) / torch.tensor(std))[:, None, None]

    def _mismatch(self, spec: TensorSpec, expected: str) -> StoreError:
        """Return the error for a tensor that does not fit the task."""
        return StoreError(
            f"{self._path}: for the task 'classify', tensor {spec.name!r} {expected}; it is {spec.dtype} {spec.shape}"
        )

    def _tensor(self, role: str, specs: Mapping[str, TensorSpec], rank: int, dtypes: tuple[str, ...]) -> TensorSpec:
        """Return the tensor that an option on the card names, or else the only one. Raises StoreError."""
        name = self.options.get(role, next(iter(specs)) if len(specs) == 1 else None)
        if (spec := specs.get(str(name))) is None:
            raise StoreError(f"{self._path}: option {role} is {name!r}; known tensors: {', '.join(specs)}")
        if len(spec.shape) != rank or not spec.dtype.startswith(dtypes):
            raise self._mismatch(spec, f"should be {' or '.join(dtypes)}, with {rank} dimensions")
        return spec

    def _set_layout(self) -> int:
        """Find out where the channels are, and return the height and width of the images. Raises StoreError."""
        _, first, height, last = self.input.shape
        self.channels_last = first not in (1, 3) and last in (1, 3)
        self.channels, sides = (last, (first, height)) if self.channels_last else (first, (height, last))
        if self.channels not in (1, 3):
            raise self._mismatch(self.input, "should have 1 or 3 channels")
        side = int(self.options.get("size") or max(sides))
        if side < 1:
            raise self._mismatch(self.input, "has a varying height and width; option size sets them")
        if min(sides) > 0 and sides[0] != sides[1]:
            raise self._mismatch(self.input, "should have equal height and width")
        if any(length not in (-1, side) for length in sides):
            raise self._mismatch(self.input, f"should have height and width {side}; option size sets them")
        return side

    def _per_channel(self, key: str, default: float) -> list[float]:
        """Return the values of an option, one for each channel. Raises StoreError."""
        values = [float(value) for value in self.options.get(key) or [default]]
        if len(values) not in (1, self.channels) or (key == "std" and not all(value > 0 for value in values)):
            raise StoreError(f"{self._path}: option {key} is {values}; it should be one value, or {self.channels}")
        return values * (self.channels // len(values))

    def predict(self, items: Sequence[Tensor]) -> list[list[float]]:
        """Return the probabilities [classes] of each image, given its pixels uint8 [channels, side, side]."""
        with torch.inference_mode():
            images = torch.stack(list(items))
            if not self.raw:
                images = images.float().mul_(self.factor).add_(self.shift).to(getattr(torch, self.input.dtype))
            if self.channels_last:
                images = images.permute(0, 2, 3, 1)
            outputs = self.tensors.run({self.input.name: images.numpy()}, len(items))[self.output.name]
            scores = torch.from_numpy(outputs).double()
            result = scores.softmax(dim=1) if self.options.get("softmax", True) else scores
        if not math.isfinite(float(result.sum())):  # not a fault of the machine, as it would be for other networks
            raise BadValue(f"{self.card.name} returns no finite probabilities for this input")
        rows: list[list[float]] = result.tolist()
        return rows

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` rows of zeros."""
        self.tensors.dummy_run(rows)

    def warm_up(self, rows: int) -> None:
        """Measure the duration of batches of 1 to ``rows`` rows."""
        self.tensors.warm_up(rows)
        self.latency = self.tensors.latency
