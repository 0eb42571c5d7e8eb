"""A simple FastAPI server without batching, for comparison with Quartet. Each handler calls the network directly.

    QUARTET_STORE=models_store uvicorn benchmarks.support.plain:app --workers 1

Requests and answers have Quartet's format. ``PLAIN_THREADS`` is the number of torch threads in each process.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from benchmarks.peers import network

if "PLAIN_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["PLAIN_THREADS"]))

for folder in network.STORE.iterdir():
    if folder.is_dir():
        network.load(folder.name)
app = FastAPI()
classifier = cache(network.Classifier)


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
    if request.headers["content-type"].startswith("multipart/"):
        async with request.form() as form:
            content = await form["file"].read()  # type: ignore[union-attr]
    else:
        content = await request.body()
    return classifier(model).predict(classifier(model).pixels(content)[None])[0]


async def events(body: Prompt) -> AsyncIterator[str]:
    for (character,) in islice(network.characters([body.model_dump()]), body.max_characters):
        yield f"data: {json.dumps({'index': 0, 'text': character})}\n\n"
        await asyncio.sleep(0)  # let the event loop run the other streams
    yield "data: [DONE]\n\n"


@app.post("/v1/text/continue", response_model=None)
async def continue_text(body: Prompt) -> dict[str, Any] | StreamingResponse:
    if body.stream:
        return StreamingResponse(events(body), media_type="text/event-stream")
    return network.texts([body.model_dump()])[0]


@app.post("/v1/series/forecast")
async def forecast(body: History) -> dict[str, Any]:
    return network.forecast([body.model_dump()], body.model)[0]


@app.post("/v1/images/sample")
async def sample(body: Draw) -> dict[str, Any]:
    return network.images([body.count], body.model)[0]
