"""Compute the answers of a published model: in this process, or by a running service.

Both backends take the fields of the service's endpoint for the task, and return the results of its JSON response. For
images, the request has the field ``file``, a path.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from heapq import nlargest
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import torch

from app.errors import BadValue, QuartetError
from app.store import Card, StoreError
from app.store.card import parse
from app.tasks import TASKS
from app.tasks.classification import ClassifyJob
from app.tasks.forecasting import ForecastJob
from app.tasks.image_codecs import png
from app.tasks.image_generation import SampleJob
from app.tasks.text_generation import ContinueJob
from training.options import read_version

Request = dict[str, Any]
Answer = list[dict[str, Any]] | Exception  # the results, or the error of this request
BATCH = 64  # requests that are computed together, as in the service
MAX_PIXELS = 10**8
MAX_ATTEMPTS = 100  # for one request that the service rejects with Retry-After
MAX_SECONDS = 120  # for the response to one request
JOBS: dict[str, Callable[..., Any]] = {
    "classify": ClassifyJob,
    "continue": lambda prompt, **fields: ContinueJob([prompt], **fields),
    "forecast": lambda values, **fields: ForecastJob([values], has_many=False, **fields),
    "sample": SampleJob,
}


class Backend:
    """Computes the answers of the version that ``card`` describes."""

    card: Card
    threads: int

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order. An exception is the answer to a request that cannot succeed."""
        remaining = iter(requests)
        with ThreadPoolExecutor(self.threads) as pool:
            while batch := list(islice(remaining, BATCH)):
                yield from self.computed(pool.map(self.begun, batch))

    def begun(self, request: Request) -> Any:
        """Do the part of the work that runs in threads."""
        raise NotImplementedError

    def computed(self, begun: Iterator[Any]) -> Iterator[Answer]:
        """Yield the answers of a batch, given the results of ``begun``."""
        return begun


class Process(Backend):
    """Computes the answers with the predictors of the service, in this process."""

    threads = os.cpu_count() or 1  # for decoding images, which releases the GIL

    def __init__(self, model: str, models: Path, device: str) -> None:
        """Load ``model``, which is NAME or NAME@VERSION, from the store ``models``. Exits with a message on errors."""
        try:
            version = read_version(models, model)
            self.predictor = TASKS[version.card.task].load(version, torch.device(device))
        except StoreError as error:
            sys.exit(f"{model}: {error}")
        self.card = version.card
        self.predictor.warm_up(BATCH)  # chooses the same precision as the service

    def begun(self, request: Request) -> tuple[Any, list[Any]]:
        """Return the job and its items, or the error and no items."""
        try:
            if self.card.task == "classify":
                pixels = self.predictor.parse(request["file"].read_bytes(), MAX_PIXELS, "the file")
                request = {"pixels": [pixels], "top_k": request["top_k"]}
            job = JOBS[self.card.task](**request)
            return job, list(self.predictor.prepare(job))
        except (QuartetError, OSError) as error:
            return error, []

    def computed(self, begun: Iterator[tuple[Any, list[Any]]]) -> Iterator[Answer]:
        jobs = list(begun)
        outputs = iter(self._outputs([item for _, items in jobs for item in items]))
        for job, items in jobs:
            if isinstance(job, Exception):
                yield job
            else:
                yield self._results(job, self.predictor.finish(job, items, list(islice(outputs, len(items)))))

    def _outputs(self, items: list[Any]) -> Any:
        if self.card.task == "continue":
            while texts := [text for text in items if not text.finished]:
                self.predictor.step(texts[:BATCH])
            return items
        return self.predictor.predict(items) if items else []

    def _results(self, job: Any, answer: Any) -> list[dict[str, Any]]:
        if self.card.task == "classify":
            (row,), labels, thresholds = answer.probabilities, self.card.labels or [], self.card.thresholds
            predictions = [
                {"label": labels[at], "probability": round(row[at], 8)}
                | ({"selected": row[at] >= thresholds[at]} if thresholds else {})
                for at in nlargest(job.top_k, range(len(row)), row.__getitem__)
            ]
            return [{"predictions": predictions}]
        if self.card.task == "forecast":
            (own,) = answer.forecasts
            bounds = {
                repr(level).removesuffix(".0"): {"lower": lower.tolist(), "upper": upper.tolist()}
                for level, (lower, upper) in own.bounds.items()
            }
            return [{"mean": own.mean.tolist(), "median": own.median.tolist(), "intervals": bounds}]
        if self.card.task == "continue":
            return [{"text": text.text, "seed": text.seed} for text in answer.texts]
        images = [base64.b64encode(png(image)).decode() for image in answer.pixels]
        return [{"label": label, "image": image} for label, image in zip(answer.labels, images, strict=True)]


class Service(Backend):
    """Sends the requests to a running service. Several requests are under way at the same time."""

    threads = 8

    def __init__(self, model: str, client: httpx.Client) -> None:
        """Read the card of ``model``. Later requests name its version. Exits with a message on errors."""
        self._client = client
        self._not_before = 0.0  # the time of the monotonic clock before which no request is sent
        described = self._send("GET", f"/v1/models/{model}")
        if "card" not in described:
            sys.exit(f"{client.base_url}: {model} has the state {described['state']}")
        self.card = parse(Card, json.dumps(described["card"]).encode(), model)
        self._model = f"{self.card.name}@{self.card.version}"

    def begun(self, request: Request) -> Answer:
        try:
            content: dict[str, Any] = {"json": {"model": self._model, **request}}
            if self.card.task == "classify":
                parameters = {"model": self._model, "top_k": request["top_k"]}
                content = {"params": parameters, "content": request["file"].read_bytes()}
            results: list[dict[str, Any]] = self._send("POST", TASKS[self.card.task].paths[0], **content)["results"]
            return results
        except (QuartetError, OSError) as error:
            return error

    def _send(self, method: str, path: str, **content: Any) -> Any:
        """Return the JSON response to a request, after as many attempts as the service asks for with Retry-After.

        Raises BadValue if the service rejects this request. Exits with a message if no request can succeed.
        """
        for _ in range(MAX_ATTEMPTS):
            time.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                response = self._client.request(method, path, **content)
            except httpx.TransportError as error:
                sys.exit(f"{self._client.base_url}: {error or type(error).__name__}; the same command continues later")
            wait = response.headers.get("retry-after")
            if response.status_code not in (429, 503) or wait is None:
                break
            seconds = float(wait) if wait.isdecimal() else 1.0
            self._not_before = max(self._not_before, time.monotonic() + seconds)  # for all requests
        if response.is_success:
            return response.json()
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text[:200]
        if method == "GET" or response.status_code in (401, 403, 404, 429, 502, 503):
            sys.exit(f"{self._client.base_url}: {response.status_code} {message}")
        raise BadValue(message)


@contextlib.contextmanager
def open_backend(model: str, models: Path, device: str, url: str | None, key: str | None) -> Iterator[Backend]:
    """Yield the backend for a model: the service at ``url`` or, without one, this process. Exits on errors."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url or "", headers=headers, timeout=MAX_SECONDS) as client:
        backend: Backend = Service(model, client) if url else Process(model, models, device)
        if backend.card.task not in JOBS:
            sys.exit(f"{model} is for the task {backend.card.task}; allowed are {', '.join(JOBS)}")
        yield backend
