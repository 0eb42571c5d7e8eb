"""The workshop's CNN in NVIDIA Triton, through PyTriton.

The server uses ``PEER_WORKERS`` Python processes, and dynamic batching without a delay.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator"
from __future__ import annotations

import json
import os

import numpy as np
import torch
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.network import Classifier
from benchmarks.support.servers import free_port

WORKERS = int(os.environ.get("PEER_WORKERS", "1"))
MAX_BATCH = 64


class Classify:
    """Classifies images in base64. The first call loads the network, because calls run in the process that computes."""

    classifier: Classifier | None = None

    @batch
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        if self.classifier is None:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))
            self.classifier = Classifier()
        pixels = torch.stack([self.classifier.decode(content.decode()) for content in image[:, 0]])
        answers = [json.dumps(answer).encode() for answer in self.classifier.predict(pixels)]
        return {"answer": np.array(answers, dtype=object)[:, None]}


def main() -> None:
    ports = {"http_port": int(os.environ["PEER_PORT"]), "grpc_port": free_port(), "metrics_port": free_port()}
    with Triton(config=TritonConfig(http_address="127.0.0.1", **ports)) as triton:
        triton.bind(
            model_name="cnn",
            infer_func=[Classify() for _ in range(WORKERS)],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=MAX_BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    main()
