"""The workshop's CNN, forecasts, texts and digits in mosec, with ``PEER_WORKERS`` Python processes for each route.

A front end written in Rust queues the requests and forms batches. The texts of a batch are generated together.
"""

# mypy: disable-error-code="import-not-found, misc"
from __future__ import annotations

import os
import sys
from typing import Any

import torch
from mosec import Server, Worker
from torch import Tensor

from benchmarks.peers import network

WORKERS = int(os.environ.get("PEER_WORKERS", "1"))
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))


class Classify(Worker):
    def __init__(self) -> None:
        self.classifier = network.Classifier()

    def deserialize(self, data: bytes) -> Tensor:
        return self.classifier.pixels(data)

    def forward(self, data: list[Tensor]) -> list[dict[str, Any]]:
        return self.classifier.predict(torch.stack(data))


class Forecast(Worker):
    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return network.forecast(data)


class ContinueText(Worker):
    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return network.texts(data)


class GenerateImages(Worker):
    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return network.images([body["count"] for body in data])


def main() -> None:
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", os.environ["PEER_PORT"], "--log-level", "warning"]
    sys.argv += ["--timeout", "120000", "--wait", "0"]
    server = Server()
    for route, worker, size in (  # the size of the largest batch
        ("/classify", Classify, 64),
        ("/forecast", Forecast, 64),
        ("/text", ContinueText, 32),
        ("/digits", GenerateImages, 16),
    ):
        server.append_worker(worker, num=WORKERS, max_batch_size=size, max_wait_time=0, route=route)
    server.run()


if __name__ == "__main__":
    main()
