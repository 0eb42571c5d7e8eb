"""Seeds to images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.errors import BadValue, quote_value
from app.store import StoreError, Version
from app.tasks.latency_model import LatencyModel
from app.tasks.precision import batch_invariant, pad

MAX_BATCH = 64  # images in one matrix product, however many are drawn: more would be computed in another order


@dataclass(frozen=True)
class LatentBatch:
    """What a request wants drawn: latents [count, latent], and class indices [count] where the network has classes."""

    latents: np.ndarray
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.latents)


class ImageSampler:
    """A generator of the store. With ``labels``, in the order of its classes, it draws what it is asked for.

    An image does not depend on how many are drawn together: where the processor's rounding does, which is tried at
    the start, it computes in double precision, in which no pixel is tipped by it.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.labels = version.card.labels or []
        self.device = device
        self.network = version.network().to(device)
        expected = getattr(self.network.sizes, "classes", 0)
        if len(self.labels) != expected:
            raise StoreError(f"{version.label}: labels are {len(self.labels)}, expected {expected}: one for each class")
        self.dtype = torch.float32
        self.latent: int = self.network.sizes.latent
        self.latency = LatencyModel(0.0, 0.0)

    def parse(self, count: int, label: str | None, seed: int) -> LatentBatch:
        """What to draw. Image i of a seed is the same for every count. Raises BadValue.

        Without a label each ten (or as many as there are labels) in a row are one of each, in an order of their own;
        with one, the latents are the same.
        """
        if label is not None and label not in self.labels:
            allowed = (
                f"allowed are {', '.join(self.labels)}" if self.labels else f"{self.card.name} draws without labels"
            )
            raise BadValue(f"label is {quote_value(label)}; {allowed}", "label")
        if label is not None:
            return self.for_labels([label] * count, seed)
        latents = self._latents(count, seed)
        if not self.labels:
            return LatentBatch(latents)
        rounds = math.ceil(count / len(self.labels))
        order = np.random.Generator(np.random.Philox([seed, 1])).random((rounds, len(self.labels))).argsort(axis=1)
        return LatentBatch(latents, order.reshape(-1)[:count])

    def for_labels(self, labels: Sequence[str], seed: int) -> LatentBatch:
        """An image of each label, with the latents that image i of the seed always has."""
        indices = {label: index for index, label in enumerate(self.labels)}
        return LatentBatch(self._latents(len(labels), seed), np.array([indices[label] for label in labels]))

    def _latents(self, count: int, seed: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(seed)).standard_normal((count, self.latent))

    def names(self, item: LatentBatch) -> list[str | None]:
        """The label of each image."""
        return [None] * len(item) if item.classes is None else [self.labels[index] for index in item.classes]

    def walk(self, count: int, label: str | None, seed: int, walk_to: int) -> LatentBatch:
        """What to draw on the way from the first image of one seed to the first one of another. Raises BadValue.

        Without a label all have that of the first.
        """
        start, end = self.parse(1, label, seed), self.parse(1, label, walk_to)
        latents = arc(start.latents[0], end.latents[0], count)
        return LatentBatch(latents, None if start.classes is None else start.classes.repeat(count))

    def predict(self, items: Sequence[LatentBatch]) -> list[np.ndarray]:
        """What to draw, of each request -> pixels [count, channels, side, side] of each, uint8."""
        latents = torch.from_numpy(np.concatenate([item.latents for item in items])).to(self.device, self.dtype)
        inputs = [latents]
        if self.labels:
            classes = [item.classes for item in items if item.classes is not None]
            inputs.append(torch.from_numpy(np.concatenate(classes)).to(self.device))
        with torch.inference_mode():
            parts = zip(*(rows.split(MAX_BATCH) for rows in inputs), strict=True)
            pixels = torch.cat([self._pixels(*part) for part in parts]).cpu().numpy()
        return np.split(pixels, np.cumsum([len(item) for item in items])[:-1])

    def _pixels(self, *inputs: Tensor) -> Tensor:
        return self.network.pixels(*map(pad, inputs))[: len(inputs[0])]

    def rows(self, item: LatentBatch) -> int:
        """How much of a batch an item takes."""
        return len(item)

    def seconds(self, items: Sequence[LatentBatch]) -> float:
        """How long a batch should take."""
        return self.latency(sum(map(len, items)))

    def dummy_run(self, rows: int) -> None:
        """Compute so many images of no meaning: to warm up, and to be timed."""
        self.predict([self.parse(rows, None, 0)])

    def warm_up(self, rows: int) -> None:
        """Choose the precision; compute alone, in a full batch and between, and measure it."""
        latents = torch.randn(MAX_BATCH, self.latent, generator=torch.Generator().manual_seed(0)).to(self.device)
        classes = [torch.arange(MAX_BATCH, device=self.device) % len(self.labels)] if self.labels else []
        if not batch_invariant(lambda rows: self.network(rows, *(each[: len(rows)] for each in classes)), latents):
            self.dtype = torch.float64
            self.network = self.network.double()
        self.latency = LatencyModel.measure(self.dummy_run, rows)


def arc(start: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
    """Latents [latent] and [latent] -> [count, latent] from one to the other (slerp, Shoemake 1985).

    On the straight line they would be shorter midway than any latent that a generator was trained on.
    """
    cosine = float(start @ end / (np.linalg.norm(start) * np.linalg.norm(end)))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    done = np.linspace(0.0, 1.0, count)[:, None]
    if math.sin(angle) < 1e-6:  # the same direction, so that the arc is no longer than the line
        return (1 - done) * start + done * end
    path = (np.sin((1 - done) * angle) * start + np.sin(done * angle) * end) / math.sin(angle)
    path[-1], path[0] = end, start  # to the last bit; of one image it is the start that counts
    return path
