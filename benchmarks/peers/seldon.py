"""The workshop's CNN in MLServer, with one process. The batching delay is 1 ms, the shortest delay of MLServer."""

# mypy: disable-error-code="import-not-found, misc"
from __future__ import annotations

import asyncio
import json
import os

import torch
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.peers.network import Classifier


class Model(MLModel):
    async def load(self) -> bool:
        self.classifier = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        texts = payload.inputs[0].data.root
        pixels = torch.stack([self.classifier.decode(text) for text in texts])
        answers = [json.dumps(answer) for answer in self.classifier.predict(pixels)]
        output = ResponseOutput(name="answer", shape=[len(answers), 1], datatype="BYTES", data=answers)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    port = int(os.environ["PEER_PORT"])
    settings = Settings(host="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2)
    settings.parallel_workers, settings.debug = 0, False
    model = ModelSettings(name="cnn", implementation=Model, max_batch_size=64, max_batch_time=0.001)
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(main())
