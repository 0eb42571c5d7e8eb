"""Images in any format to class probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.cnn import probabilities
from app.store import StoreError, Version
from app.tasks.image_codecs import ImageDecoder
from app.tasks.latency_model import LatencyModel
from app.tasks.precision import check_finite, fast_bfloat16


class ImageClassifier(ImageDecoder):
    """A CNN of the store. ``labels`` are in the order of its logits; with ``views`` it looks at each image several
    times, moved and mirrored, if it is one that can.
    """

    def __init__(self, version: Version, device: torch.device, tta: bool = False) -> None:
        card = version.card
        if not card.labels or len(card.labels) != card.sizes.get("classes", 10):
            raise StoreError(f"{version.label}: labels are {len(card.labels or [])}, expected one for each class")
        self.card = card
        self.labels = card.labels
        self.device = device
        network = version.network()
        self.network = network.to(device, memory_format=network.order)
        if device.type == "cpu" and fast_bfloat16(device) and hasattr(self.network, "halve"):
            self.network.halve()
        super().__init__(self.network.sizes.channels, self.network.sizes.image)
        self.tta = tta and hasattr(self.network, "views")
        self.latency = LatencyModel(0.0, 0.0)

    def predict(self, items: Sequence[Tensor]) -> list[list[float]]:
        """Pixels [channels, side, side] of each image -> probabilities [classes] of each."""
        with torch.inference_mode():
            pixels = torch.stack(list(items)).to(self.device)
            logits = self.network.views(pixels) if self.tta else self.network(pixels)
            found = probabilities(logits)
            check_finite(float(found.sum()), "probabilities")
            answers: list[list[float]] = found.tolist()
        return answers

    def explain(self, items: Sequence[Tensor]) -> list[tuple[list[float], np.ndarray]]:
        """Pixels of each image -> its probabilities [classes], and where what speaks for the likeliest class is seen:
        [h, w], 0 to 1.

        Grad-CAM (Selvaraju et al. 2017): the maps of the last convolution, each weighted by the mean slope of the
        likeliest class's score along it.
        """
        pixels = torch.stack(list(items)).to(self.device)
        with torch.no_grad():
            maps = self.network.maps(pixels)
            seen = self.network.views(pixels) if self.tta else None
        maps.requires_grad_()
        with torch.enable_grad():
            scores = self.network.classified(maps)
            likeliest = (scores if seen is None else seen).argmax(dim=1, keepdim=True)
            (slopes,) = torch.autograd.grad(scores.gather(1, likeliest).sum(), maps)
        with torch.no_grad():
            heat = F.relu((slopes.float().mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1))  # [N, h, w]
            heat /= heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
            likely = probabilities(self.network.calibrated(scores) if seen is None else seen)
            check_finite(float(likely.sum() + heat.sum()), "probabilities or heat")
            found: list[list[float]] = likely.tolist()
        return list(zip(found, heat.cpu().numpy(), strict=True))

    def rows(self, item: Tensor) -> int:
        """How much of a batch an item takes."""
        return 1

    def seconds(self, items: Sequence[Tensor]) -> float:
        """How long a batch should take."""
        return self.latency(len(items))

    def dummy_run(self, rows: int) -> None:
        """Compute so many images of no meaning: to warm up, and to be timed."""
        self.predict([torch.zeros(self.channels, self.side, self.side, dtype=torch.uint8)] * rows)

    def warm_up(self, rows: int) -> None:
        """Compute alone, in a full batch and between, and measure it."""
        self.latency = LatencyModel.measure(self.dummy_run, rows)
