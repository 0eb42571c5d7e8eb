"""What the same work comes to in one process without a server: the network called eagerly on whole batches.

What a server can at best reach with that network, that batch and so many threads, when all else costs nothing.
"""

from __future__ import annotations

import base64
import io
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from PIL import Image

from app import store

Batch = Callable[[], object]  # computes one batch


@dataclass(frozen=True)
class Limit:
    """``work``: a function below; ``rows``: requests in a batch."""

    work: str
    model: str
    rows: int
    threads: int

    @property
    def name(self) -> str:
        return f"in process, {self.threads} thread{'s' * (self.threads > 1)}, batch {self.rows}"


def newest(folder: Path, model: str) -> store.Version:
    return store.read_version(
        folder, model, max(number for name, number in store.all_versions(folder) if name == model)
    )


def classify(version: store.Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """Decode, forward, the five likeliest as JSON."""
    network, labels = version.network(), version.card.labels or []
    contents = [bodies[i % len(bodies)] for i in range(rows)]

    def batch() -> list[bytes]:
        images = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        values, indices = network(pixels).softmax(dim=1).topk(5)
        return [
            orjson.dumps([{"label": labels[i], "index": i, "probability": p} for p, i in zip(*row, strict=True)])
            for row in zip(values.tolist(), indices.tolist(), strict=True)
        ]

    return batch


def text(version: store.Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """Read the prompts, which are of one length, in one call; then step and draw, the drawn character read next."""
    network, vocabulary = version.network(), version.card.vocabulary or []
    asked = [orjson.loads(bodies[i % len(bodies)]) for i in range(rows)]
    prompts = torch.tensor([[vocabulary.index(character) for character in body["prompt"]] for body in asked])

    def batch() -> list[str]:
        texts: list[list[int]] = []
        read, state = prompts, network.zero_state(rows)
        for _ in range(asked[0]["max_characters"]):
            logits, state = network(read, state)
            logits[:, -1, -1] = -torch.inf
            read = (logits[:, -1] / asked[0]["temperature"]).softmax(dim=1).multinomial(1)
            texts.append(read.squeeze(1).tolist())
        return ["".join(vocabulary[index] for index in indices) for indices in zip(*texts, strict=True)]

    return batch


def forecast(version: store.Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """The bodies parsed, all steps in the network's own one call, the means as JSON."""
    network: Any = version.network()
    contents = [bodies[i % len(bodies)] for i in range(rows)]

    def batch() -> list[bytes]:
        asked = [orjson.loads(content) for content in contents]
        windows = torch.tensor([body["values"][-network.sizes.window :] for body in asked])
        means = network((windows - network.location) / network.scale, asked[0]["horizon"])
        return [orjson.dumps(mean) for mean in (means * network.scale + network.location).tolist()]

    return batch


def sample(version: store.Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """Draw, and encode each image as PNG and base64."""
    network: Any = version.network()
    images = sum(orjson.loads(bodies[i % len(bodies)])["count"] for i in range(rows))

    def batch() -> list[bytes]:
        pixels = network.pixels(torch.randn(images, network.sizes.latent)).squeeze(1).numpy()
        encoded = []
        for image in pixels:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            encoded.append(base64.b64encode(file.getvalue()))
        return encoded

    return batch


WORKS = {"classify": classify, "text": text, "forecast": forecast, "sample": sample}


def serve_turns(limit: Limit, folder: Path, bodies: Sequence[bytes], line: Connection) -> None:
    """In a process of its own: for every number of seconds that comes, give the requests a second of a turn."""
    torch.set_num_threads(limit.threads)
    torch.set_grad_enabled(False)
    batch = WORKS[limit.work](newest(folder, limit.model), limit.rows, bodies)
    batch()
    while seconds := line.recv():
        batches, begun = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begun) < seconds:
            batch()
            batches += 1
        line.send(batches * limit.rows / elapsed)


class Process:
    """A limit that waits for its turns."""

    def __init__(self, limit: Limit, folder: Path, bodies: Sequence[bytes]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.line, there = spawn.Pipe()
        self.process: BaseProcess = spawn.Process(target=serve_turns, args=(limit, folder, bodies, there), daemon=True)
        self.process.start()
        there.close()  # so that a process that dies is noticed
        self.turn(0.2)

    def turn(self, seconds: float) -> float:
        """Requests a second over whole batches that last at least so long."""
        self.line.send(seconds)
        reached: float = self.line.recv()
        return reached

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
