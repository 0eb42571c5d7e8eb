"""A simple FastAPI server without batching, for comparison with Quartet. Each handler calls the network directly.

    QUARTET_STORE=models_store uvicorn benchmarks.support.plain:app --workers 1

The code is as simple as in a FastAPI tutorial. The server uses the newest version of each model in the store. Requests
and answers have Quartet's format. The server checks only the types of the inputs. ``PLAIN_THREADS`` is the number of
torch threads in each process. By default, torch chooses this number.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file

from app.networks import build

if "PLAIN_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["PLAIN_THREADS"]))


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load the newest version of a model. Return the network and its card."""
    newest = max((entry for entry in folder.iterdir() if entry.name.isdigit()), key=lambda entry: int(entry.name))
    card = json.loads((newest / "card.json").read_text())
    network = build(card["kind"], card["sizes"])
    network.load_state_dict(load_file(newest / "model.safetensors"))
    return network.eval(), card


STORE = Path(os.environ.get("QUARTET_STORE", "models_store"))
NETWORKS = {folder.name: load(folder) for folder in STORE.iterdir() if folder.is_dir()}
app = FastAPI()


class Prompt(BaseModel):
    model: str = "shakespeare-rnn"
    prompt: str
    max_characters: int = 200
    temperature: float = 0.8
    stream: bool = False


class History(BaseModel):
    model: str = "sine-lstm"
    values: list[float]
    horizon: int = 24


class Draw(BaseModel):
    model: str = "mnist-gan"
    count: int = 16


@app.post("/v1/images/classify")
async def classify(request: Request, model: str = "cifar10-lenet") -> dict[str, Any]:
    network, card = NETWORKS[model]
    sizes = network.sizes
    image = Image.open(io.BytesIO(await request.body())).convert("RGB" if sizes.channels == 3 else "L")
    image = image.resize((sizes.image, sizes.image))
    pixels = torch.from_numpy(np.array(image)).view(1, sizes.image, sizes.image, sizes.channels)
    with torch.inference_mode():
        probabilities = network(pixels.permute(0, 3, 1, 2)).softmax(dim=1)[0]
    values, indices = probabilities.topk(5)
    best = zip(values.tolist(), indices.tolist(), strict=True)
    predictions = [{"label": card["labels"][index], "index": index, "probability": value} for value, index in best]
    return {"model": model, "results": [{"predictions": predictions}]}


def characters(body: Prompt) -> Iterator[str]:
    """Yield the text character by character."""
    network, card = NETWORKS[body.model]
    vocabulary = card["vocabulary"]
    read = torch.tensor([[vocabulary.index(character) for character in body.prompt]])
    state = network.zero_state(1)
    for _ in range(body.max_characters):
        with torch.inference_mode():
            logits, state = network(read, state)
            logits[:, -1, -1] = -torch.inf  # <unk> is never generated
            read = (logits[:, -1] / body.temperature).softmax(dim=1).multinomial(1)
        yield vocabulary[int(read)]


async def events(body: Prompt) -> AsyncIterator[str]:
    for character in characters(body):
        yield f"data: {json.dumps({'index': 0, 'text': character})}\n\n"
        await asyncio.sleep(0)  # let the event loop run the other streams
    yield "data: [DONE]\n\n"


@app.post("/v1/text/continue", response_model=None)
async def continue_text(body: Prompt) -> dict[str, Any] | StreamingResponse:
    if body.stream:
        return StreamingResponse(events(body), media_type="text/event-stream")
    return {"model": body.model, "results": [{"text": "".join(characters(body))}]}


@app.post("/v1/series/forecast")
async def forecast(body: History) -> dict[str, Any]:
    network, _ = NETWORKS[body.model]
    window = torch.tensor([body.values[-network.sizes.window :]])
    with torch.inference_mode():
        outputs, state = network.steps((window - network.location) / network.scale)
        forecasts = [outputs[:, -1:]]
        while len(forecasts) < body.horizon:
            value, state = network.steps(forecasts[-1], state)
            forecasts.append(value)
        mean = torch.cat(forecasts, dim=1)[0] * network.scale + network.location
    return {"model": body.model, "results": [{"mean": mean.tolist()}]}


@app.post("/v1/images/sample")
async def sample(body: Draw) -> dict[str, Any]:
    network, _ = NETWORKS[body.model]
    with torch.inference_mode():
        images = network.pixels(torch.randn(body.count, network.sizes.latent)).squeeze(1).numpy()
    results = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        results.append({"image": base64.b64encode(file.getvalue()).decode()})
    return {"model": body.model, "results": results}
