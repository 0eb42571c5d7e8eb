"""Image classification: compute class probabilities of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app.store import StoreError
from app.store.version import Version
from app.tasks.image_codecs import ImageDecoder
from app.tasks.job import Job
from app.tasks.precision import check_finite, fast_bfloat16
from app.tasks.predictor import BatchPredictor


def check_thresholds(version: Version) -> None:
    """Raise StoreError if the card has thresholds, or the network needs them, but not one for each label."""
    card = version.card
    thresholds, labels = len(card.thresholds or []), len(card.labels or [])
    if (card.thresholds is not None or card.sizes.get("multi_label")) and thresholds != labels:
        raise StoreError(f"{version.label}: there are {thresholds} thresholds, expected {labels}")


@dataclass
class ClassifyJob(Job):
    """Images [N, channels, side, side] that fit the network, and the number of labels that the answer shows."""

    pixels: Sequence[Tensor]
    top_k: int = 5


@dataclass(frozen=True)
class ClassifyAnswer:
    """The probabilities [classes] of each image."""

    probabilities: Sequence[Sequence[float]]


class Classifier(ImageDecoder, BatchPredictor):
    """The steps before and after ``predict`` that all predictors for images share."""

    def prepare(self, job: ClassifyJob) -> Sequence[Tensor]:
        """Return one item for each image."""
        return job.pixels

    def finish(self, job: ClassifyJob, items: Sequence[Tensor], outputs: Sequence[list[float]]) -> ClassifyAnswer:
        """Return the answer, given the result of ``predict`` for each item."""
        return ClassifyAnswer(outputs)


class ImageClassifier(Classifier):
    """Predictor for networks that classify images.

    Args:
        version: a version with ``labels`` on its card, in the order of the logits.
        device: the device of the network.
        tta: test-time augmentation: average over shifted and mirrored views of each image, if the network supports it.
    """

    def __init__(self, version: Version, device: torch.device, tta: bool = False) -> None:
        self.card, self.labels = version.card, version.card.labels or []
        classes = version.card.sizes.get("classes", 10)
        if len(self.labels) != classes:
            raise StoreError(f"{version.label}: there are {len(self.labels)} labels, expected {classes}")
        check_thresholds(version)
        self.device = device
        network = version.network()
        self.network = network.to(device, memory_format=network.memory_format)
        if device.type == "cpu" and fast_bfloat16(device) and hasattr(self.network, "to_bfloat16"):
            self.network.to_bfloat16()
        super().__init__(self.network.sizes.channels, self.network.sizes.image)
        self.tta = tta and hasattr(self.network, "tta_logits")

    def predict(self, items: Sequence[Tensor]) -> list[list[float]]:
        """Return the probabilities [classes] of each image, given its pixels uint8 [channels, side, side]."""
        with torch.inference_mode():
            pixels = torch.stack(list(items)).to(self.device)
            logits = self.network.tta_logits(pixels) if self.tta else self.network(pixels)
            result = self.network.probabilities(logits)  # [N, classes]
            check_finite(float(result.sum()), "probabilities")
            rows: list[list[float]] = result.tolist()
        return rows

    def explain(self, items: Sequence[Tensor]) -> list[tuple[list[float], np.ndarray]]:
        """Return two values for each image: its probabilities [classes], and a heat map [h, w] for its likeliest class.

        The values of the heat map are from 0 to 1. It is computed by Grad-CAM (Selvaraju et al. 2017), as a weighted
        sum of the feature maps. The weight of a feature map is the mean gradient of the class score with respect to the
        map. Negative values of the sum become 0, and its maximum is scaled to 1.
        """
        pixels = torch.stack(list(items)).to(self.device)
        with torch.no_grad():
            maps = self.network.maps(pixels)
            tta_logits = self.network.tta_logits(pixels) if self.tta else None
        maps.requires_grad_()
        with torch.enable_grad():
            scores = self.network.classified(maps)
            likeliest = (scores if tta_logits is None else tta_logits).argmax(dim=1, keepdim=True)
            (gradients,) = torch.autograd.grad(scores.gather(1, likeliest).sum(), maps)
        with torch.no_grad():
            heat = F.relu((gradients.float().mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1))  # [N, h, w]
            heat /= heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
            result = self.network.probabilities(self.network.calibrated(scores) if tta_logits is None else tta_logits)
            check_finite(float(result.sum() + heat.sum()), "probabilities or heat maps")
            rows: list[list[float]] = result.tolist()
        return list(zip(rows, heat.cpu().numpy(), strict=True))

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy images."""
        self.predict([torch.zeros(self.channels, self.side, self.side, dtype=torch.uint8)] * rows)
