"""Limits of the throughput: one process does the work of a server, but receives no requests over HTTP.

The process calls the network on whole batches. A server with the same computation reaches this rate only if it needs no
time to receive requests, to form batches and to send answers. The process computes in float32 with the stored weights.
The service prepares the weights, and uses bfloat16 where bfloat16 is faster, so it can exceed a limit.
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

from app.store import Store
from app.store.version import Version

Batch = Callable[[], object]  # computes one batch


@dataclass(frozen=True)
class Limit:
    """One limit of the throughput. ``workload`` is a key of WORKLOADS. ``rows``: requests in a batch."""

    workload: str
    model: str
    rows: int
    threads: int

    @property
    def name(self) -> str:
        return f"in process, {self.threads} thread{'s' * (self.threads > 1)}, batch {self.rows}"


def newest(folder: Path, model: str) -> Version:
    return Store(folder).read(model, max(number for name, number in Store(folder).versions() if name == model))


def classify(version: Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """Return a function that decodes and classifies images, and encodes the five most probable labels as JSON."""
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


def text(version: Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """Return a function that generates texts from prompts of the same length.

    It reads the prompts in one call, and then samples one character of each text in each step.
    """
    network, vocabulary = version.network(), version.card.vocabulary or []
    requested = [orjson.loads(bodies[i % len(bodies)]) for i in range(rows)]
    prompts = torch.tensor([[vocabulary.index(character) for character in body["prompt"]] for body in requested])

    def batch() -> list[str]:
        texts: list[list[int]] = []
        read, state = prompts, network.zero_state(rows)
        for _ in range(requested[0]["max_characters"]):
            logits, state = network(read, state)
            logits[:, -1, -1] = -torch.inf
            read = (logits[:, -1] / requested[0]["temperature"]).softmax(dim=1).multinomial(1)
            texts.append(read.squeeze(1).tolist())
        return ["".join(vocabulary[index] for index in indices) for indices in zip(*texts, strict=True)]

    return batch


def forecast(version: Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """Return a function that parses the bodies, forecasts all steps in one call, and encodes the means as JSON."""
    network: Any = version.network()
    contents = [bodies[i % len(bodies)] for i in range(rows)]

    def batch() -> list[bytes]:
        requested = [orjson.loads(content) for content in contents]
        windows = torch.tensor([body["values"][-network.sizes.window :] for body in requested])
        means = network((windows - network.location) / network.scale, requested[0]["horizon"])
        return [orjson.dumps(mean) for mean in (means * network.scale + network.location).tolist()]

    return batch


def sample(version: Version, rows: int, bodies: Sequence[bytes]) -> Batch:
    """Return a function that generates images, and encodes each image as PNG and base64."""
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


WORKLOADS = {"classify": classify, "text": text, "forecast": forecast, "sample": sample}


def serve_measurements(limit: Limit, folder: Path, bodies: Sequence[bytes], pipe: Connection) -> None:
    """Receive durations in seconds from ``pipe``. For each duration, measure and send the requests per second.

    This function runs in a separate process.
    """
    torch.set_num_threads(limit.threads)
    torch.set_grad_enabled(False)
    batch = WORKLOADS[limit.workload](newest(folder, limit.model), limit.rows, bodies)
    batch()
    while seconds := pipe.recv():
        batches, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            batch()
            batches += 1
        pipe.send(batches * limit.rows / elapsed)


class Process:
    """A separate process that measures one limit each time ``measure`` is called."""

    def __init__(self, limit: Limit, folder: Path, bodies: Sequence[bytes]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, worker_end = spawn.Pipe()
        self.process: BaseProcess = spawn.Process(
            target=serve_measurements, args=(limit, folder, bodies, worker_end), daemon=True
        )
        self.process.start()
        worker_end.close()  # otherwise ``recv`` does not notice the end of the process
        self.measure(0.2)

    def measure(self, seconds: float) -> float:
        """Return the requests per second, measured over complete batches for at least ``seconds``."""
        self.pipe.send(seconds)
        rate: float = self.pipe.recv()
        return rate

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
