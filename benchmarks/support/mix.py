"""A seeded mix of requests of all kinds, and the comparison of their answers."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from benchmarks.support.load import Answer, Connection, Request, arrivals, connect
from benchmarks.support.servers import ROOT

KINDS = {  # kind: weight in the mix
    **{"classify": 30, "continue": 15, "forecast": 12, "sample": 12, "stream": 10, "bad": 9},
    **{"complete": 4, "infer": 4, "timeseries": 4},  # the other protocols
}
EXACT = ("continue", "sample", "stream", "bad", "complete")  # compared bit by bit; other kinds up to NEAR
OWN = (
    "version",
    "model_version",
    "system_fingerprint",
    "id",
    "created",
    "created_at",
)  # fields that differ between equal answers
NEAR = 1e-4  # absolute and relative tolerance: batches of another size round differently
SCENES = ("ROMEO:\n", "First Citizen:\nBefore we proceed", "To be, or not", "\n", "KING HENRY:\nOnce more")
BAD = (
    Request("/v1/text/continue", b'{"temperature": -1}'),
    Request("/v1/text/continue", b"[" * 10_000),
    Request("/v1/series/forecast", b'{"values": [1, NaN]}'),
    Request("/v1/images/sample", b'{"model": "../etc"}'),
    Request("/v1/images/classify", b"no image", "image/png"),
    Request("/v1/nothing", b"{}"),
)


@dataclass(frozen=True)
class Ask:
    """A request and its kind."""

    kind: str
    request: Request


def asks(number: int, seed: int) -> list[Ask]:
    """Return ``number`` requests. The same seed gives the same requests."""
    chance = random.Random(seed)
    pictures = [path.read_bytes() for path in sorted((ROOT / "tests/images/cifar10").glob("*.png"))]
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=number)
    return [Ask(kind, _request(kind, chance, pictures)) for kind in kinds]


def _request(kind: str, chance: random.Random, pictures: Sequence[bytes]) -> Request:
    if kind == "bad":
        return chance.choice(BAD)
    if kind == "classify":
        model = chance.choice(("cifar10-lenet", "cifar10-whitened"))
        return Request(f"/v1/images/classify?model={model}", chance.choice(pictures), "image/png")
    if kind == "infer":
        image = [chance.randrange(256) for _ in range(3072)]
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": image}
        return _json("/v2/models/cifar10-lenet/infer", inputs=[tensor])
    if kind in ("forecast", "timeseries"):
        shift, series = chance.random(), range(chance.randint(60, 200))
        values = [math.sin(0.02 * i + shift) + chance.gauss(0, 0.1) for i in series]
        horizon = chance.randint(1, 48)
        if kind == "forecast":
            return _json("/v1/series/forecast", values=values, horizon=horizon)
        item = {"type": "univariate_time_series", "series": values, "frequency": "D", "start_timestamp": "2026-01-31"}
        return _json("/v1/timeseries/forecast", inputs=[item], options={"horizon": horizon, "quantiles": [0.1, 0.9]})
    seed = chance.randrange(2**32)
    if kind == "sample":
        return _json("/v1/images/sample", count=chance.choice((1, 4, 16)), seed=seed)
    more = {"stream": True} if kind == "stream" else {"n": chance.choice((1, 1, 4))}
    characters = chance.randint(1, 120)
    if kind == "complete":
        requested = {
            "prompt": chance.choice(SCENES),
            "max_tokens": characters,
            "seed": seed,
            "logprobs": chance.randrange(3),
        }
        return _json("/v1/completions", model="shakespeare-rnn", echo=chance.random() < 0.5, **requested)
    return _json("/v1/text/continue", prompt=chance.choice(SCENES), max_characters=characters, seed=seed, **more)


def _json(path: str, **body: Any) -> Request:
    return Request(path, json.dumps(body).encode())


def read(ask: Ask, answer: Answer) -> Any:
    """Return the content of an answer without version, id and time. Status 0 means no answer."""
    if ask.kind == "stream" and answer.status == 200:
        whole = answer.body.rstrip(b"0\r\n").endswith(b"data: [DONE]")
        return "".join(character for _, character in arrivals(answer)) if whole else "cut off"
    try:
        said = json.loads(answer.body)
    except ValueError:
        said = None
    return [answer.status, _plain(said)]


def _plain(said: Any) -> Any:
    """Remove the fields that differ between equal answers."""
    if isinstance(said, dict):
        return {key: _plain(value) for key, value in said.items() if key not in OWN}
    return [_plain(each) for each in said] if isinstance(said, list) else said


def same(kind: str, result: Any, right: Any) -> bool:
    """Return whether two answers are equal: bit by bit, or up to NEAR."""
    if kind in EXACT:
        return bool(result == right)
    if isinstance(result, dict) and isinstance(right, dict):
        return result.keys() == right.keys() and all(same(kind, result[key], right[key]) for key in right)
    if isinstance(result, list) and isinstance(right, list):
        return len(result) == len(right) and all(same(kind, *pair) for pair in zip(result, right, strict=True))
    if isinstance(result, float) and isinstance(right, float):
        return math.isclose(result, right, rel_tol=NEAR, abs_tol=NEAR)
    return bool(result == right)


async def kept(connection: Connection | None, port: int) -> Connection:
    """Return a usable connection: the given one, or a new one if it is closed."""
    if connection is None or connection.transport is None or connection.last:
        if connection is not None and connection.transport is not None:
            connection.transport.close()
        return await connect(port)
    return connection


async def answers(port: int, wanted: Sequence[Ask], callers: int) -> list[Any]:
    """Send all requests with ``callers`` concurrent callers. Return the contents of the answers."""
    result: list[Any] = [None] * len(wanted)
    turn = count()

    async def caller() -> None:
        connection: Connection | None = None
        while (at := next(turn)) < len(wanted):
            connection = await kept(connection, port)
            result[at] = read(wanted[at], await connection.ask(wanted[at].request.bytes()))
        if connection and connection.transport:
            connection.transport.close()

    await asyncio.gather(*(caller() for _ in range(callers)))
    return result
