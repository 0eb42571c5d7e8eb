"""The network of all other servers: the workshop's CNN of the store, called eagerly as in ``plain.py``."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from app.networks import build


class Classifier:
    def __init__(self, name: str = "cifar10-lenet") -> None:
        folder = max((Path(os.environ["PEER_STORE"]) / name).iterdir(), key=lambda entry: int(entry.name))
        card = json.loads((folder / "card.json").read_text())
        network = build(card["kind"], card["sizes"])
        network.load_state_dict(load_file(folder / "model.safetensors"))
        self.network, self.labels = network.eval(), card["labels"]

    def pixels(self, content: bytes) -> Tensor:
        """Decode the bytes of an image file to pixels [3, 32, 32]."""
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((32, 32))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def decode(self, text: str) -> Tensor:
        """Decode an image file in base64 to pixels [3, 32, 32]."""
        return self.pixels(base64.b64decode(text))

    def predict(self, pixels: Tensor) -> list[dict[str, Any]]:
        """Classify pixels [N, 3, 32, 32]. Returns one answer per image, in Quartet's format."""
        with torch.inference_mode():
            values, indices = self.network(pixels).softmax(dim=1).topk(5)
        return [self._answer(*row) for row in zip(values.tolist(), indices.tolist(), strict=True)]

    def _answer(self, values: Sequence[float], indices: Sequence[int]) -> dict[str, Any]:
        best = zip(values, indices, strict=True)
        predictions = [{"label": self.labels[index], "index": index, "probability": value} for value, index in best]
        return {"results": [{"predictions": predictions}]}
