"""Image generation: make images from random seeds and class labels."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.errors import BadValue, quote_value
from app.limits import Limits
from app.store import StoreError
from app.store.version import Version
from app.tasks.job import Job
from app.tasks.precision import batch_invariant, pad
from app.tasks.predictor import SplittingPredictor

MAX_BATCH = 64  # images per matrix product; larger products might add up terms in another order


@dataclass(frozen=True)
class LatentBatch:
    """The images of a request: latents [count, latent], and class indices [count] if the network has classes."""

    latents: np.ndarray
    classes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.latents)


@dataclass
class SampleJob(Job):
    """``count`` images of a label, of random labels (None), or of the given ``latents`` and ``classes``.

    With ``end_seed``, the images show a path from the first image of ``seed`` to the first image of ``end_seed``.
    """

    count: int = 1
    label: str | None = None
    seed: int = -1  # replaced by a random seed if it is negative
    end_seed: int | None = None
    size: str | None = None  # rejected unless it is the size of the images, such as "28x28"
    latents: np.ndarray | None = None
    classes: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.seed = secrets.randbelow(2**32) if self.seed < 0 else self.seed

    @property
    def rows(self) -> int:
        return self.count

    @property
    def prepare_size(self) -> int:
        return 100 * self.count  # about the number of latents

    def answer_size(self, outputs: Sequence[Any]) -> int:
        return 200 * self.count

    def check(self, limits: Limits) -> None:
        self.check_at_most("count", limits.max_samples)


@dataclass(frozen=True)
class SampleAnswer:
    """Pixels uint8 [N, channels, height, width], and the label of each image (None for a network without labels)."""

    pixels: np.ndarray
    labels: Sequence[str | None]
    seed: int


class ImageSampler(SplittingPredictor):
    """Predictor for networks that generate images. ``labels`` has a name for each class, if the network has classes.

    ``size`` is the width and height of the images, such as "28x28".

    An image does not depend on the batch in which it is generated. ``warm_up`` tests whether the processor's rounding
    depends on the batch size. If so, the network computes in float64, in which the differences are too small to change
    a pixel.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.labels = version.card.labels or []
        self.device = device
        self.network = version.network().to(device)
        expected = getattr(self.network.sizes, "classes", 0)
        if len(self.labels) != expected:
            raise StoreError(f"{version.label}: there are {len(self.labels)} labels, expected {expected}")
        self.dtype = torch.float32
        self.latent: int = self.network.sizes.latent
        side = self.network.sizes.image
        self.size = f"{side}x{side}"

    def prepare(self, job: SampleJob) -> list[LatentBatch]:
        """Return the latents and classes of the images. Raises BadValue for an unknown label.

        Image i of a seed does not depend on ``count``, and the latents do not depend on the label.
        """
        if job.size not in (None, self.size):
            problem = f"{self.card.name} generates images of {self.size}; auto is also allowed"
            raise BadValue(f"size is {quote_value(job.size)}; {problem}", "size")
        if job.latents is not None:
            return [LatentBatch(job.latents, job.classes)]
        if job.label is not None and job.label not in self.labels:
            allowed = f"allowed values: {', '.join(self.labels)}" if self.labels else f"{self.card.name} has no labels"
            raise BadValue(f"{job.name('label')} is {quote_value(job.label)}; {allowed}", job.name("label"))
        if job.end_seed is None:
            return [LatentBatch(self._latents(job.count, job.seed), self._classes(job.count, job.label, job.seed))]
        start, end = self._latents(1, job.seed)[0], self._latents(1, job.end_seed)[0]
        classes = self._classes(1, job.label, job.seed)
        return [LatentBatch(arc(start, end, job.count), None if classes is None else classes.repeat(job.count))]

    def parse(self, count: int, label: str | None, seed: int) -> LatentBatch:
        """Return the latents and classes of ``count`` images of a seed, as ``prepare`` does."""
        return self.prepare(SampleJob(count=count, label=label, seed=seed))[0]

    def _classes(self, count: int, label: str | None, seed: int) -> np.ndarray | None:
        """Return class indices [count], or None for a network without labels.

        If ``label`` is None and there are L labels, the first L images show each label once, in random order. The next
        L images do the same.
        """
        if not self.labels:
            return None
        if label is not None:
            return np.full(count, self.labels.index(label))
        rounds = math.ceil(count / len(self.labels))
        order = np.random.Generator(np.random.Philox([seed, 1])).random((rounds, len(self.labels))).argsort(axis=1)
        return order.reshape(-1)[:count]

    def _latents(self, count: int, seed: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(seed)).standard_normal((count, self.latent))

    def finish(self, job: SampleJob, items: Sequence[LatentBatch], outputs: Sequence[np.ndarray]) -> SampleAnswer:
        """Return the answer, given the result of ``predict`` for the item."""
        (batch,), (pixels,) = items, outputs
        return SampleAnswer(pixels, self.names(batch), job.seed)

    def names(self, item: LatentBatch) -> list[str | None]:
        """Return the label of each image, or None for each image if there are no labels."""
        return [None] * len(item) if item.classes is None else [self.labels[index] for index in item.classes]

    def predict(self, items: Sequence[LatentBatch]) -> list[np.ndarray]:
        """Return the pixels of each request, uint8 [count, channels, side, side]."""
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

    def split(self, item: LatentBatch, rows: int) -> list[LatentBatch]:
        """Split the images of a request into parts of at most ``rows`` images."""
        arrays = [item.latents] if item.classes is None else [item.latents, item.classes]
        return [LatentBatch(*(array[start : start + rows] for array in arrays)) for start in range(0, len(item), rows)]

    def join(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """Join the pixels of all parts of a request."""
        return np.concatenate(results)

    def rows(self, item: LatentBatch) -> int:
        """Return the number of batch rows that an item takes."""
        return len(item)

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy images."""
        self.predict([self.parse(rows, None, 0)])

    def warm_up(self, rows: int) -> None:
        """Choose the precision, and measure the duration of batches of 1 to ``rows`` rows."""
        latents = torch.randn(MAX_BATCH, self.latent, generator=torch.Generator().manual_seed(0)).to(self.device)
        classes = [torch.arange(MAX_BATCH, device=self.device) % len(self.labels)] if self.labels else []
        if not batch_invariant(
            lambda rows: self.network(rows, *(indices[: len(rows)] for indices in classes)), latents
        ):
            self.dtype = torch.float64
            self.network = self.network.double()
        super().warm_up(rows)


def arc(start: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
    """Return latents [count, latent] on the arc from ``start`` to ``end``, both [latent] (slerp, Shoemake 1985).

    On a straight line, the latents in the middle would be shorter than those that the network saw in training.
    """
    cosine = float(start @ end / (np.linalg.norm(start) * np.linalg.norm(end)))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    fraction = np.linspace(0.0, 1.0, count)[:, None]
    if math.sin(angle) < 1e-6:  # almost the same direction: the arc is a line
        return (1 - fraction) * start + fraction * end
    path = (np.sin((1 - fraction) * angle) * start + np.sin(fraction * angle) * end) / math.sin(angle)
    path[-1], path[0] = end, start  # exact ends; a path of one image has only the start
    return path
