"""Image generation with an imported network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from app.store import StoreError, TensorSpec, Version
from app.tasks.image_generation import ImageSampler, LatentBatch
from app.tasks.imported.tensors import TaskPredictor, TensorRows


class ImportedSampler(TaskPredictor, ImageSampler):
    """Predictor for imported networks that turn latents into images. The card has ``labels`` if there are classes.

    Options on the card:
        latents: name of the input [N, latent] or [N, latent, 1, 1], whose values are drawn from N(0, 1).
        classes: name of the input [N] with the class indices, if the network has one.
        output: name of the tensor with the images, [N, channels, height, width].
        low: value of black in the output; -1 by default.
        high: value of white in the output; 1 by default.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        super().__init__(version, device)
        self.labels = self.card.labels or []
        self.classes = self.options.get("classes")
        self.latents = self.tensor("latents", self._others(), (2, 4), "float")
        self.latent = self.latents.shape[1]
        if self.latent < 1 or any(size != 1 for size in self.latents.shape[2:]):
            raise self.mismatch(self.latents.name, "should have the shape [N, latent] or [N, latent, 1, 1]")
        if self.classes is not None:
            self.tensor("classes", self.inputs, (1,), "int")
        if bool(self.classes) != bool(self.labels):
            raise StoreError(
                f"{self._card}: option classes is {self.classes!r} and there are {len(self.labels)} labels"
            )
        self.reject_inputs_except(self.latents.name, self.classes)
        self.output = self.tensor("output", self.outputs, (4,), "float uint8")
        if self.output.shape[1] not in (1, 3):
            raise self.mismatch(self.output.name, "should have 1 or 3 channels")
        height, width = self.output.shape[2:]
        self.size = None if -1 in (height, width) else f"{width}x{height}"
        self.low, self.high = float(self.options.get("low", -1)), float(self.options.get("high", 1))
        if not self.low < self.high:
            raise StoreError(f"{self._card}: option low is {self.low:g}; it should be below high, {self.high:g}")

    def _others(self) -> dict[str, TensorSpec]:
        return {name: spec for name, spec in self.inputs.items() if name != self.classes}

    def predict_task(self, items: Sequence[LatentBatch]) -> list[np.ndarray]:
        """Return the pixels uint8 [count, channels, height, width] of each request."""
        latents = np.concatenate([item.latents for item in items]).astype(self.latents.dtype)
        inputs = {self.latents.name: latents.reshape(len(latents), *self.latents.shape[1:])}
        if self.classes:
            classes = np.concatenate([item.classes for item in items if item.classes is not None])
            inputs[self.classes] = classes.astype(self.inputs[self.classes].dtype)
        images = self.run_rows(inputs, len(latents))[self.output.name]
        if images.dtype != np.uint8:
            scaled = (np.nan_to_num(images.astype(np.float32)) - self.low) * (255 / (self.high - self.low))
            images = scaled.round().clip(0, 255).astype(np.uint8)
        return np.split(images, np.cumsum([len(item) for item in items])[:-1])

    def split(self, item: Any, rows: int) -> list[Any]:
        """Split an item into parts of at most ``rows`` rows."""
        kind = TaskPredictor if isinstance(item, TensorRows) else ImageSampler
        return list(kind.split(self, item, rows))

    def join(self, results: Sequence[Any]) -> Any:
        """Join the results of all parts of an item."""
        return (TaskPredictor if isinstance(results[0], dict) else ImageSampler).join(self, results)

    def rows(self, item: LatentBatch | TensorRows) -> int:
        """Return the number of batch rows that an item takes."""
        return item.rows if isinstance(item, TensorRows) else len(item)
