"""HTTP/1.0 clients get no chunked bodies (RFC 9112, 6.1)."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from support.responses import CONTINUE
from support.stubs.http import Application, Connection


class Streaming(Application):
    """Answers each request with ``parts``, and states their total length if ``with_length`` is true."""

    def __init__(self, parts: list[bytes], with_length: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.headers = [(b"Content-Length", b"%d" % sum(map(len, parts)))] if with_length else []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})


def answer(
    application: Application, version: bytes, method: bytes = b"GET", headers: bytes = b""
) -> tuple[bytes, bytes]:
    """Return the head and the body of the answer to a request. The connection must be closed after HTTP/1.0."""
    connection = Connection(application)
    connection.send(method + b" / HTTP/" + version + b"\r\nHost: x\r\n" + headers + b"\r\n")
    connection.loop.answer()
    assert connection.transport.closed == (version == b"1.0")
    head, _, body = connection.transport.written.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("headers", [b"", b"Connection: keep-alive\r\n"])
def test_the_end_of_the_connection_ends_a_response_without_a_length(headers: bytes) -> None:
    head, body = answer(Streaming([b"one, ", b"two"]), b"1.0", headers=headers)
    assert b"transfer-encoding" not in head
    assert b"\r\nconnection: close" in head
    assert body == b"one, two"


def test_http_1_1_clients_get_chunks() -> None:
    head, body = answer(Streaming([b"one"]), b"1.1")
    assert b"\r\ntransfer-encoding: chunked" in head
    assert body == b"3\r\none\r\n0\r\n\r\n"


def test_a_response_with_a_length_stays_as_it_is() -> None:
    head, body = answer(Streaming([b"one, ", b"two"], with_length=True), b"1.0")
    assert b"\r\ncontent-length: 8" in head
    assert body == b"one, two"


def test_a_response_without_a_body_has_no_body() -> None:
    assert answer(Streaming([b"one"]), b"1.0", method=b"HEAD")[1] == b""


def test_an_http_1_0_client_gets_the_events_of_a_streamed_text(tiny: httpx.Client) -> None:
    body = b'{"prompt": "a", "max_characters": 3, "stream": true}'
    with socket.create_connection((tiny.base_url.host, tiny.base_url.port or 80), 60) as connection:
        connection.sendall(b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (CONTINUE.encode(), len(body), body))
        content = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, events = content.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head
    for event in events.removesuffix(b"data: [DONE]\n\n").removesuffix(b"\n\n").split(b"\n\n"):
        json.loads(event.removeprefix(b"data: "))
