"""The networks that all competing servers use: the newest version of each model, called directly as in ``plain.py``."""

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


def load(name: str) -> tuple[Any, dict[str, Any]]:
    """Load the newest version of a model. Return the network and its card."""
    folder = max((Path(os.environ["PEER_STORE"]) / name).iterdir(), key=lambda entry: int(entry.name))
    card = json.loads((folder / "card.json").read_text())
    network = build(card["kind"], card["sizes"])
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval(), card


class Classifier:
    def __init__(self, name: str = "cifar10-lenet") -> None:
        self.network, card = load(name)
        self.labels = card["labels"]

    def pixels(self, content: bytes) -> Tensor:
        """Decode the bytes of an image file to pixels [3, 32, 32]."""
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((32, 32))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def decode(self, text: str) -> Tensor:
        """Decode an image file in base64 to pixels [3, 32, 32]."""
        return self.pixels(base64.b64decode(text))

    def predict(self, pixels: Tensor) -> list[dict[str, Any]]:
        """Classify pixels [N, 3, 32, 32]. Return one answer per image, in Quartet's format."""
        with torch.inference_mode():
            values, indices = self.network(pixels).softmax(dim=1).topk(5)
        return [self._answer(*row) for row in zip(values.tolist(), indices.tolist(), strict=True)]

    def _answer(self, values: Sequence[float], indices: Sequence[int]) -> dict[str, Any]:
        best = zip(values, indices, strict=True)
        predictions = [{"label": self.labels[index], "index": index, "probability": value} for value, index in best]
        return {"results": [{"predictions": predictions}]}


class Forecaster:
    def __init__(self, name: str = "sine-lstm") -> None:
        self.network, _ = load(name)

    def predict(self, histories: Sequence[Sequence[float]], horizon: int) -> list[dict[str, Any]]:
        """Forecast ``horizon`` values after each history. Return one answer per history, in Quartet's format."""
        network = self.network
        window = torch.tensor([values[-network.sizes.window :] for values in histories])
        with torch.inference_mode():
            outputs, state = network.steps((window - network.location) / network.scale)
            forecasts = [outputs[:, -1:]]
            while len(forecasts) < horizon:
                value, state = network.steps(forecasts[-1], state)
                forecasts.append(value)
            means = torch.cat(forecasts, dim=1) * network.scale + network.location
        return [{"results": [{"mean": mean}]} for mean in means.tolist()]


class TextGenerator:
    def __init__(self, name: str = "bench-rnn") -> None:
        self.network, card = load(name)
        self.vocabulary = card["vocabulary"]
        self.indices = {character: index for index, character in enumerate(self.vocabulary)}

    def predict(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Continue prompts of the same length together. Return one answer per body, in Quartet's format."""
        lengths = {len(body["prompt"]) for body in bodies}
        answers: list[dict[str, Any]] = [{}] * len(bodies)
        for length in lengths:
            rows = [row for row, body in enumerate(bodies) if len(body["prompt"]) == length]
            for row, text in zip(rows, self._continue([bodies[row] for row in rows]), strict=True):
                answers[row] = {"results": [{"text": text}]}
        return answers

    def _continue(self, bodies: Sequence[dict[str, Any]]) -> list[str]:
        read = torch.tensor([[self.indices[character] for character in body["prompt"]] for body in bodies])
        temperature = torch.tensor([[body["temperature"]] for body in bodies])
        state, sampled = self.network.zero_state(len(bodies)), []
        with torch.inference_mode():
            for _ in range(max(body["max_characters"] for body in bodies)):
                logits, state = self.network(read, state)
                logits[:, -1, -1] = -torch.inf  # <unk> is never generated
                read = (logits[:, -1] / temperature).softmax(dim=1).multinomial(1)
                sampled.append(read)
        texts = ["".join(self.vocabulary[index] for index in row) for row in torch.cat(sampled, dim=1).tolist()]
        return [text[: body["max_characters"]] for text, body in zip(texts, bodies, strict=True)]


class ImageGenerator:
    def __init__(self, name: str = "mnist-gan") -> None:
        self.network, _ = load(name)

    def predict(self, counts: Sequence[int]) -> list[dict[str, Any]]:
        """Generate the images of all requests together. Return one answer per request, in Quartet's format."""
        with torch.inference_mode():
            images = self.network.pixels(torch.randn(sum(counts), self.network.sizes.latent)).squeeze(1)
        return [
            {"results": [{"image": self._png(image.numpy())} for image in part]} for part in images.split([*counts])
        ]

    def _png(self, pixels: np.ndarray) -> str:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()
