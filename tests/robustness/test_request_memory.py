"""The memory of all requests together is limited. Large responses count until the client has read them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from support.fake_network import fake_networks, publish_fake
from support.images import image_bytes, save_image
from support.processes import ServiceProcess, memory_mib, reset_memory_peak, serving
from support.responses import CLASSIFY, assert_rejected, assert_still_serves
from support.service import Serve
from support.waiting import wait_until

from app.api.middleware.body_memory import PART_BYTES, BodyMemoryLimit
from app.errors import CallerGone
from app.limits import Limits

LIMIT = 10 * PART_BYTES


class Client:
    """Sends a request to an ASGI application, and reads the response only while ``reads`` is set."""

    def __init__(self) -> None:
        self.started, self.reads = asyncio.Event(), asyncio.Event()
        self.messages: list[Message] = []

    async def request(self, app: Any, body: bytes = b"") -> bytes:
        """Send a request, and return the body of the response."""

        async def receive() -> Message:
            return {"type": "http.request", "body": body}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                self.started.set()
                await self.reads.wait()
            self.messages.append(message)

        try:
            await app({"type": "http", "path": "/", "method": "POST", "headers": []}, receive, send)
        except CallerGone:
            if self.status == 200:
                raise
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])


def answering(size: int, **limits: float) -> BodyMemoryLimit:
    """Return an application with the memory limit that reads the body and answers with ``size`` bytes."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await Response(bytes(size))(scope, receive, send)

    return BodyMemoryLimit(app, LIMIT, limits=Limits(**limits))


async def start(app: BodyMemoryLimit, size: int) -> tuple[Client, asyncio.Task[bytes]]:
    """Start a request whose response the client does not read; return the client and the task of the request."""
    client = Client()
    task = asyncio.create_task(client.request(app))
    await client.started.wait()
    assert app.held_bytes >= size
    return client, task


@pytest.mark.anyio
async def test_a_response_that_is_not_read_counts_until_it_is() -> None:
    size = 4 * PART_BYTES + 1
    app = answering(size)
    waiting = [await start(app, size), await start(app, size)]
    client = Client()
    client.reads.set()
    answer = await client.request(app)
    assert (client.status, json.loads(answer)["error"]["code"]) == (429, "memory_full")
    for reader, task in waiting:
        reader.reads.set()
        assert await task == bytes(size)
        assert [len(message["body"]) for message in reader.messages[1:]] == [PART_BYTES] * 4 + [1]
    assert app.held_bytes == 0
    again = Client()
    again.reads.set()
    assert await again.request(app) == bytes(size)


@pytest.mark.anyio
async def test_one_larger_response_is_accepted_while_others_need_little() -> None:
    app = answering(2 * LIMIT)
    client, task = await start(app, 2 * LIMIT)
    other = Client()
    other.reads.set()
    await other.request(app)
    assert other.status == 429
    client.reads.set()
    assert len(await task) == 2 * LIMIT


@pytest.mark.anyio
async def test_a_stream_counts_the_part_that_is_not_read() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(50):
            await send({"type": "http.response.body", "body": bytes(LIMIT // 2), "more_body": i < 49})
            assert limited.held_bytes == 0

    limited, client = BodyMemoryLimit(app, LIMIT), Client()
    client.reads.set()
    assert len(await client.request(limited)) == 25 * LIMIT


@pytest.mark.anyio
async def test_a_client_that_reads_a_large_response_too_slowly_is_disconnected() -> None:
    client = Client()
    app = answering(PART_BYTES + 1, slow_read_seconds=0.01, min_read_bytes_per_second=2.0**40)
    with pytest.raises(CallerGone):
        await client.request(app)
    assert app.held_bytes == 0


def test_failed_requests_are_freed_without_garbage_collection(serve: Serve, tiny_store: Path) -> None:
    """Reference cycles through the traceback of an error kept hundreds of request bodies in memory."""
    long = {"max_characters": 4000, "n": 16}
    rows: list[tuple[str, Any, str, set[int]]] = [
        ("/v1/images/sample", {"model": "nothing"}, "60", {404}),
        ("/v1/images/sample", {"model": "broken"}, "60", {500}),
        (CLASSIFY, {"images": ["AAAA"]}, "60", {415}),
        ("/v1/text/continue", long, "0.1", {504}),
        ("/v1/text/continue", {**long, "stream": True}, "0.1", {504, 200}),
        ("/v2/models/tiny-gan/infer", {"inputs": []}, "60", {400}),
    ]

    def requests() -> int:
        return sum(type(each) is Request for each in gc.get_objects())

    with fake_networks() as control:
        publish_fake(tiny_store, "broken", 7)
        with serve() as client:
            control.broken.add(7)
            gc.collect()
            gc.disable()
            try:
                for path, body, timeout, statuses in rows:
                    answer = client.post(path, json=body, headers={"x-request-timeout": timeout})
                    assert answer.status_code in statuses, answer.text
                    wait_until(lambda: requests() == 0)
            finally:
                gc.enable()


def flood(service: ServiceProcess, head: bytes, chunk: bytes) -> bytes:
    """Send a head and 64 chunks; return the answer, or nothing if it was lost when the service disconnected."""
    received = b""
    with service.connect() as connection, contextlib.suppress(ConnectionError):
        try:
            connection.sendall(head + chunk)
            for _ in range(63):
                connection.sendall(chunk)
        finally:
            received = connection.recv(65536)
    return received


def test_large_bodies_and_images_take_limited_memory_and_without_memory_give_503(tiny_store: Path) -> None:
    mebibyte, small = b" " * 2**20, image_bytes("JPEG", size=(300, 300))
    large, tall = (save_image(Image.new("RGBA", size), compress_level=1) for size in ((4470, 4470), (300, 65_535)))
    with (
        serving(tiny_store, workers=1, max_pixels=20_000_000, max_body_bytes=2**20) as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        assert_still_serves(client)
        assert client.post(CLASSIFY, content=small).status_code == 200
        process = service.process.pid
        limit = int((memory_mib(process, "VmSize") + 10) * 2**20)
        resource.prlimit(process, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        answer = client.post(CLASSIFY, content=large)
        assert_rejected(answer, 503, "body", "there is not enough memory for body now")
        assert answer.json()["error"]["code"] == "out_of_memory"
        resource.prlimit(process, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for content in (large, tall):
            before = reset_memory_peak(process)
            assert client.post(CLASSIFY, content=content).status_code == 200
            assert memory_mib(process, "VmHWM") < before + 4 * 20 + 20  # 4 bytes for each allowed pixel
        for path in (CLASSIFY, "/v1/completions"):
            head = b"POST %s HTTP/1.1\r\nHost: x\r\n" % path.encode()
            before = reset_memory_peak(process)
            for answer in (
                flood(service, head + b"Content-Length: 67108864\r\n\r\n", mebibyte),
                flood(service, head + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + mebibyte + b"\r\n"),
            ):
                assert not answer or answer.startswith(b"HTTP/1.1 413"), answer[:200]
            assert memory_mib(process, "VmHWM") < before + 30
