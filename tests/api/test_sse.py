"""Streamed texts equal unstreamed texts, and every stream ends with a finish reason or an error."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.requests import Request
from support.responses import RUNNING_TEXTS, metric_samples
from support.service import Serve
from support.waiting import wait_until

from app.api.deadline import DEADLINE
from app.api.middleware.body_memory import PART_BYTES, BodyMemoryLimit
from app.api.sse import EventStream
from app.errors import BadValue, CallerGone

PATH = "/v1/text/continue"
LONG = {"prompt": "a", "max_characters": 4000, "n": 16, "stream": True}


def test_generation_ends_when_the_client_leaves_a_stream(serve: Serve, steps: list[int]) -> None:
    body = json.dumps(LONG).encode()
    with serve() as client:
        steps.clear()
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
            connection.sendall(
                b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (PATH.encode(), len(body), body)
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        disconnected = ("quartet_requests_total", ("method", "POST"), ("route", PATH), ("status", "499"))
        wait_until(lambda: disconnected in metric_samples(client))
        assert metric_samples(client)["quartet_errors_total", ("reason", "caller_gone"), ("route", PATH)] == 1
        client.post(PATH, json={"max_characters": 1}).raise_for_status()
        wait_until(lambda: metric_samples(client)[RUNNING_TEXTS] == 0)
        assert len(steps) < 3000  # of 4,000 steps


def test_a_slow_reader_delays_no_other_client_and_gets_all_events(serve: Serve) -> None:
    body = json.dumps({**LONG, "max_characters": 2000}).encode()
    with serve() as client, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((client.base_url.host, client.base_url.port or 0))
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (PATH.encode(), len(body), body)
        )
        connection.recv(10)
        for _ in range(5):
            client.post(PATH, json={"max_characters": 100}).raise_for_status()
        content = b""
        while not content.endswith(b"0\r\n\r\n"):
            content += connection.recv(65536)
    assert content.count(b'"finish_reason":"length"') == 16
    assert b"error" not in content


@pytest.mark.anyio
async def test_no_event_is_generated_while_the_reader_is_slow() -> None:
    generated, sent, gate = 0, 0, asyncio.Event()

    async def generate_events() -> AsyncGenerator[bytes, None]:
        nonlocal generated
        for _ in range(100):
            generated += 1
            yield b"data: x\n\n"

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            await gate.wait()

    sending = asyncio.ensure_future(stream(generate_events())({}, receive_nothing, send))
    for _ in range(10):
        await asyncio.sleep(0)
    assert generated == 2
    gate.set()
    await sending
    assert generated == 100


async def receive_nothing() -> Any:
    return await asyncio.Event().wait()


def stream(events: AsyncGenerator[bytes, None], **options: Any) -> EventStream:
    scope = {"type": "http", "headers": [], DEADLINE: asyncio.get_running_loop().time() + 30}
    return EventStream(Request(scope, receive_nothing), events, **options)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("before", "error", "status", "message"),
    [
        ([], BadValue("x is wrong", "x"), 400, b"x is wrong"),
        ([b"data: x\n\n"], BadValue("x is wrong", "x"), 200, b"x is wrong"),
        ([b"data: x\n\n"], MemoryError("secret"), 200, b"the service failed; see its log"),
        ([b"data: x\n\n"], asyncio.CancelledError(), 200, b"the service stopped before the answer was complete"),
    ],
)
async def test_a_failure_is_an_error_response_or_the_last_event(
    before: list[bytes], error: BaseException, status: int, message: bytes
) -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        for each in before:
            yield each
        raise error

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await stream(failing())({"type": "http", "path": PATH}, receive_nothing, send)
    assert messages[0]["status"] == status
    assert message in messages[-1]["body"]
    assert b"secret" not in messages[-1]["body"]


@pytest.mark.anyio
async def test_a_client_that_does_not_read_the_final_error_is_given_up() -> None:
    unread: list[Any] = []

    async def failing() -> AsyncGenerator[bytes, None]:
        yield b"data: x\n\n"
        raise BadValue("x is wrong", "x")

    async def send(message: Any) -> None:
        if b"x is wrong" in message.get("body", b""):
            unread.append(message)
            await asyncio.Event().wait()

    with pytest.raises(CallerGone, match="the client no longer reads"):
        async with asyncio.timeout(30):
            await stream(failing(), close_seconds=0.01)({"type": "http", "path": PATH}, receive_nothing, send)
    assert unread


@pytest.mark.anyio
async def test_a_stream_ends_when_its_response_is_rejected() -> None:
    generated: list[bytes] = []
    statuses: list[int] = []

    async def large_events() -> AsyncGenerator[bytes, None]:
        for _ in range(50):
            generated.append(b"data: " + bytes(PART_BYTES) + b"\n\n")
            yield generated[-1]

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    app = BodyMemoryLimit(stream(large_events()), 2 * PART_BYTES)
    app.held_bytes = 2 * PART_BYTES
    with pytest.raises(CallerGone):
        await app({"type": "http", "path": PATH, "headers": []}, Mock(), send)
    assert statuses == [429, 0]
    assert len(generated) == 1
