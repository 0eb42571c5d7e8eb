"""The workshop's CNN, forecasts, texts and digits in mosec, with ``PEER_WORKERS`` Python processes for each route.

A front end written in Rust queues the requests and forms batches. A request waits up to ``PEER_WAIT`` milliseconds for
other requests that join its batch. Texts are also batched: the texts of one batch are generated together.
"""

# mypy: disable-error-code="import-not-found, misc"
from __future__ import annotations

import os
import sys
from typing import Any

import torch
from mosec import Server, Worker
from torch import Tensor

from benchmarks.peers.network import Classifier, Forecaster, ImageGenerator, TextGenerator

WORKERS = int(os.environ.get("PEER_WORKERS", "1"))
MAX_BATCH = 64
MAX_TEXTS = 32  # texts in a batch
MAX_IMAGE_REQUESTS = 16  # requests for digits in a batch


def limit_threads() -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))


class Classify(Worker):
    def __init__(self) -> None:
        limit_threads()
        self.classifier = Classifier()

    def deserialize(self, data: bytes) -> Tensor:
        return self.classifier.pixels(data)

    def forward(self, data: list[Tensor]) -> list[dict[str, Any]]:
        return self.classifier.predict(torch.stack(data))


class Forecast(Worker):
    def __init__(self) -> None:
        limit_threads()
        self.forecaster = Forecaster()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        longest = self.forecaster.predict([body["values"] for body in data], max(body["horizon"] for body in data))
        for body, answer in zip(data, longest, strict=True):
            del answer["results"][0]["mean"][body["horizon"] :]
        return longest


class ContinueText(Worker):
    def __init__(self) -> None:
        limit_threads()
        self.generator = TextGenerator()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.generator.predict(data)


class GenerateImages(Worker):
    def __init__(self) -> None:
        limit_threads()
        self.generator = ImageGenerator()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.generator.predict([body["count"] for body in data])


def main() -> None:
    wait = int(os.environ.get("PEER_WAIT", "0"))
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", os.environ["PEER_PORT"], "--log-level", "warning"]
    sys.argv += ["--timeout", "120000", "--wait", "0"]  # a max_wait_time of 0 means the value of --wait
    server = Server()
    routes = {"/classify": Classify, "/forecast": Forecast, "/text": ContinueText, "/digits": GenerateImages}
    for route, worker in routes.items():
        size = {"/text": MAX_TEXTS, "/digits": MAX_IMAGE_REQUESTS}.get(route, MAX_BATCH)
        server.append_worker(worker, num=WORKERS, max_batch_size=size, max_wait_time=wait, route=route)
    server.run()


if __name__ == "__main__":
    main()
