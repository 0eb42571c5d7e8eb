"""The networks that all other servers use: the newest version of each model in ``QUARTET_STORE``, called directly."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from app.networks import build

STORE = Path(os.environ.get("QUARTET_STORE", "models_store"))
Answer = dict[str, Any]  # in Quartet's format


@cache
def load(name: str) -> tuple[Any, dict[str, Any]]:
    """Load the newest version of a model. Return the network and its card."""
    folder = max((entry for entry in (STORE / name).iterdir() if entry.name.isdigit()), key=lambda it: int(it.name))
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

    def predict(self, pixels: Tensor) -> list[Answer]:
        """Classify pixels [N, 3, 32, 32]. Return one answer per image."""
        with torch.inference_mode():
            values, indices = self.network(pixels).softmax(dim=1).topk(5)
        return [self._answer(*row) for row in zip(values.tolist(), indices.tolist(), strict=True)]

    def _answer(self, values: Sequence[float], indices: Sequence[int]) -> Answer:
        best = zip(values, indices, strict=True)
        predictions = [{"label": self.labels[index], "index": index, "probability": value} for value, index in best]
        return {"results": [{"predictions": predictions}]}


def forecast(bodies: Sequence[dict[str, Any]], name: str = "sine-lstm") -> list[Answer]:
    """Forecast all series together, for the longest horizon. Return one answer per body."""
    network, _ = load(name)
    window = torch.tensor([body["values"][-network.sizes.window :] for body in bodies])
    with torch.inference_mode():
        outputs, state = network.steps((window - network.location) / network.scale)
        forecasts = [outputs[:, -1:]]
        while len(forecasts) < max(body["horizon"] for body in bodies):
            value, state = network.steps(forecasts[-1], state)
            forecasts.append(value)
        means = (torch.cat(forecasts, dim=1) * network.scale + network.location).tolist()
    return [{"results": [{"mean": mean[: body["horizon"]]}]} for mean, body in zip(means, bodies, strict=True)]


def characters(bodies: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Continue prompts of the same length together. Yield the next character of each text, without end."""
    network, card = load(bodies[0]["model"])
    vocabulary = card["vocabulary"]
    read = torch.tensor([[vocabulary.index(character) for character in body["prompt"]] for body in bodies])
    temperature = torch.tensor([[body["temperature"]] for body in bodies])
    state = network.zero_state(len(bodies))
    while True:
        with torch.inference_mode():
            logits, state = network(read, state)
            logits[:, -1, -1] = -torch.inf  # <unk> is never generated
            read = (logits[:, -1] / temperature).softmax(dim=1).multinomial(1)
        yield [vocabulary[index] for index in read[:, 0].tolist()]


def texts(bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Continue prompts; those of the same length are computed together. Return one answer per body."""
    answers: list[Answer] = [{}] * len(bodies)
    for length in {len(body["prompt"]) for body in bodies}:
        rows = [row for row, body in enumerate(bodies) if len(body["prompt"]) == length]
        longest = max(bodies[row]["max_characters"] for row in rows)
        steps = islice(characters([bodies[row] for row in rows]), longest)
        for row, text in zip(rows, zip(*steps, strict=True), strict=True):
            answers[row] = {"results": [{"text": "".join(text)[: bodies[row]["max_characters"]]}]}
    return answers


def images(counts: Sequence[int], name: str = "mnist-gan") -> list[Answer]:
    """Generate the images of all requests together. Return one answer per request."""
    network, _ = load(name)
    with torch.inference_mode():
        pixels = network.pixels(torch.randn(sum(counts), network.sizes.latent)).squeeze(1)
    return [{"results": [{"image": _png(image.numpy())} for image in part]} for part in pixels.split([*counts])]


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
