"""The workshop's CNN in BentoML, with one worker and adaptive batching."""

# mypy: disable-error-code="import-not-found, untyped-decorator"
from __future__ import annotations

from typing import Any

import bentoml
import torch

from benchmarks.peers import network


@bentoml.service(workers=1)
class Classifier:
    def __init__(self) -> None:
        self.classifier = network.Classifier()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def classify(self, images: list[str]) -> list[dict[str, Any]]:
        return self.classifier.predict(torch.stack([self.classifier.decode(image) for image in images]))
