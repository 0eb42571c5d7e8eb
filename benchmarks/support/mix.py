"""Random requests of all kinds, which depend only on a seed, and functions that compare their answers."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from benchmarks.support.load import Answer, Client, Request, arrivals
from benchmarks.support.servers import ROOT

KINDS = {  # kind: weight in the mix
    **{"classify": 30, "continue": 15, "forecast": 12, "sample": 12, "stream": 10, "bad": 9},
    **{"complete": 4, "infer": 4, "timeseries": 4},  # the other protocols
}
EXACT = ("continue", "sample", "stream", "bad", "complete")  # bit by bit equal; other kinds are equal up to TOLERANCE
# Two answers count as equal even if these fields differ.
VARYING_FIELDS = ("version", "model_version", "system_fingerprint", "id", "created", "created_at")
TOLERANCE = 1e-4  # absolute and relative; batches of different sizes round differently
PROMPTS = ("ROMEO:\n", "First Citizen:\nBefore we proceed", "To be, or not", "\n", "KING HENRY:\nOnce more")
INVALID = (
    Request("/v1/text/continue", b'{"temperature": -1}'),
    Request("/v1/text/continue", b"[" * 10_000),
    Request("/v1/series/forecast", b'{"values": [1, NaN]}'),
    Request("/v1/images/sample", b'{"model": "../etc"}'),
    Request("/v1/images/classify", b"no image", "image/png"),
    Request("/v1/nothing", b"{}"),
)


@dataclass(frozen=True)
class MixRequest:
    """A request and its kind."""

    kind: str
    request: Request


def requests(number: int, seed: int) -> list[MixRequest]:
    """Return ``number`` requests. The same seed gives the same requests."""
    generator = random.Random(seed)
    images = [path.read_bytes() for path in sorted((ROOT / "tests/images/cifar10").glob("*.png"))]
    kinds = generator.choices(list(KINDS), list(KINDS.values()), k=number)
    return [MixRequest(kind, _request(kind, generator, images)) for kind in kinds]


def _request(kind: str, generator: random.Random, images: Sequence[bytes]) -> Request:
    if kind == "bad":
        return generator.choice(INVALID)
    if kind == "classify":
        model = generator.choice(("cifar10-lenet", "cifar10-whitened"))
        return Request(f"/v1/images/classify?model={model}", generator.choice(images), "image/png")
    if kind == "infer":
        image = [generator.randrange(256) for _ in range(3072)]
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": image}
        return _json("/v2/models/cifar10-lenet/infer", inputs=[tensor])
    if kind in ("forecast", "timeseries"):
        shift, series = generator.random(), range(generator.randint(60, 200))
        values = [math.sin(0.02 * i + shift) + generator.gauss(0, 0.1) for i in series]
        horizon = generator.randint(1, 48)
        if kind == "forecast":
            model = generator.choice(("series-lstm", "sine-lstm"))
            return _json("/v1/series/forecast", model=model, values=values, horizon=horizon)
        item = {"type": "univariate_time_series", "series": values, "frequency": "D", "start_timestamp": "2026-01-31"}
        return _json("/v1/timeseries/forecast", inputs=[item], options={"horizon": horizon, "quantiles": [0.1, 0.9]})
    seed = generator.randrange(2**32)
    if kind == "sample":
        return _json("/v1/images/sample", count=generator.choice((1, 4, 16)), seed=seed)
    options = {"stream": True} if kind == "stream" else {"n": generator.choice((1, 1, 4))}
    characters = generator.randint(1, 120)
    if kind == "complete":
        fields = {
            "prompt": generator.choice(PROMPTS),
            "max_tokens": characters,
            "seed": seed,
            "logprobs": generator.randrange(3),
        }
        return _json("/v1/completions", model="shakespeare-rnn", echo=generator.random() < 0.5, **fields)
    return _json("/v1/text/continue", prompt=generator.choice(PROMPTS), max_characters=characters, seed=seed, **options)


def _json(path: str, **body: Any) -> Request:
    return Request(path, json.dumps(body).encode())


def read(request: MixRequest, answer: Answer) -> Any:
    """Return the content of an answer without version, id and time. Status 0 means that there was no complete answer.

    The content of a complete stream is its text. The content of other answers is a list: the status and the JSON.
    """
    if request.kind == "stream" and answer.status == 200:
        if answer.stream_end != "finished":
            return [0, answer.stream_end]
        return "".join(character for _, character in arrivals(answer))
    try:
        content = json.loads(answer.body)
    except ValueError:
        content = None
    return [answer.status, _plain(content)]


def _plain(content: Any) -> Any:
    """Return the content without VARYING_FIELDS."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items() if key not in VARYING_FIELDS}
    return [_plain(each) for each in content] if isinstance(content, list) else content


def same(kind: str, result: Any, expected: Any) -> bool:
    """Return whether two answers are equal. Kinds in EXACT are compared bit by bit, other kinds up to TOLERANCE."""
    if kind in EXACT:
        return bool(result == expected)
    if isinstance(result, dict) and isinstance(expected, dict):
        return result.keys() == expected.keys() and all(same(kind, result[key], expected[key]) for key in expected)
    if isinstance(result, list) and isinstance(expected, list):
        return len(result) == len(expected) and all(same(kind, *pair) for pair in zip(result, expected, strict=True))
    if isinstance(result, float) and isinstance(expected, float):
        return math.isclose(result, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(result == expected)


async def answers(port: int, mix_requests: Sequence[MixRequest], callers: int) -> list[Any]:
    """Send all requests with ``callers`` concurrent callers. Return the contents of the answers."""
    contents: list[Any] = [None] * len(mix_requests)
    indices = count()

    async def caller() -> None:
        client = Client(port)
        while (index := next(indices)) < len(mix_requests):
            contents[index] = read(mix_requests[index], await client.send(mix_requests[index].request))
        client.close()

    await asyncio.gather(*(caller() for _ in range(callers)))
    return contents


async def repeat(
    port: int, mix_requests: Sequence[MixRequest], seed: int, stop: asyncio.Event, report: Callable[[int, Answer], None]
) -> None:
    """Send random requests until ``stop`` is set. ``report`` receives the index of each request, and its answer."""
    generator, client = random.Random(seed), Client(port)
    while not stop.is_set():
        index = generator.randrange(len(mix_requests))
        report(index, await client.send(mix_requests[index].request))
    client.close()


async def expected_answers(port: int, mix_requests: Sequence[MixRequest]) -> list[Any]:
    """Send all requests, one after the other. Return the contents of the answers.

    Raises RuntimeError if a valid request fails, or if an invalid request gets a status below 400 or above 499.
    Otherwise, a service that answers only errors would seem to be right.
    """
    contents = await answers(port, mix_requests, 1)
    for request, content in zip(mix_requests, contents, strict=True):
        status = content[0] if isinstance(content, list) else 200
        if status // 100 != (4 if request.kind == "bad" else 2):
            raise RuntimeError(f"{request.request.path} failed: {str(content)[:200]}")
    return contents
