"""The workshop's CNN in LitServe, with one worker. A batch contains all queued requests."""

# mypy: disable-error-code="import-not-found, misc"
# Annotations are not postponed, because LitServe evaluates the annotation of the request.

import base64
import os
from typing import Any

import litserve
import torch
from torch import Tensor

from benchmarks.peers.network import Classifier


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: dict[str, Any]) -> Tensor:
        return self.classifier.pixels(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, x: Tensor) -> list[dict[str, Any]]:
        return self.classifier.predict(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=64, batch_timeout=0), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ["PEER_PORT"]), generate_client_file=False, log_level="warning")
