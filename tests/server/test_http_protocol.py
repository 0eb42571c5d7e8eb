"""Each state of a connection has a limit on bytes and on time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import socket
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from support.responses import CLASSIFY, PNG, SAMPLE, assert_still_serves
from support.service import HeldGenerator, Serve
from support.waiting import wait_until
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.server import http_protocol, write_limit
from app.server.http_protocol import FRAMING_BYTES, HEAD_BYTES, MAX_PIPELINED, BoundedHttpProtocol
from app.server.uvicorn_server import Server
from app.settings import Settings

PACKET = 64 * 1024
CHUNKED = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'b\r\n{"count":1}\r\n'
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), 60) as connection:
        yield connection


def received(connection: socket.socket) -> bytes:
    """Return all bytes that arrive until the service closes the connection."""
    content = b""
    try:
        while part := connection.recv(2**20):
            content += part
    except ConnectionResetError:  # the service has not read everything
        pass
    return content


def sent_until_closed(connection: socket.socket, part: bytes, max_bytes: int) -> int:
    """Send ``part`` repeatedly until the service closes the connection. Return the number of bytes that were sent."""
    sent = 0
    try:
        while sent < max_bytes:
            connection.sendall(part)
            sent += len(part)
    except (ConnectionResetError, BrokenPipeError):
        pass
    return sent


@pytest.mark.parametrize("head", [CHUNKED % SAMPLE.encode() + BODY, CHUNKED % b"/nowhere" + b"1\r\n\n\r\n"])
def test_trailers_without_end_are_rejected(tiny: httpx.Client, head: bytes) -> None:
    """One request is answered at the end of its body, the other request before the end."""
    with connected(tiny) as connection:
        connection.sendall(head + b"0\r\n")
        connection.sendall(b"x-a: ")
        assert sent_until_closed(connection, b"a" * PACKET, 2**26) < 2**25
        answer = received(connection)
    assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 404 ") if b"nowhere" in head else b"HTTP/1.1 431 "), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert_still_serves(tiny)


def test_many_short_trailers_are_rejected(tiny: httpx.Client) -> None:
    with connected(tiny) as connection:
        connection.sendall(CHUNKED % SAMPLE.encode() + BODY + b"0\r\n" + b"x-a: b\r\n" * (HEAD_BYTES // 8))
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 431 "), answer
    assert b"the request head with its trailers has more than 65,536 bytes" in answer
    assert_still_serves(tiny)


def test_many_short_headers_are_rejected(tiny: httpx.Client) -> None:
    with connected(tiny) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\n" + b"a:b\r\n" * 3000 + b"\r\n")
        assert received(connection).startswith(b"HTTP/1.1 431 ")
    assert tiny.get("/health/live", headers=[(f"x-{i}", "y") for i in range(1000)]).status_code == 200


def test_the_trailers_of_a_small_request_are_accepted(tiny: httpx.Client) -> None:
    """Trailers are accepted even if they arrive byte by byte."""
    with connected(tiny) as connection:
        for byte in CHUNKED % SAMPLE.encode() + BODY + b"0\r\nx-checksum: abc\r\n\r\n":
            connection.sendall(bytes([byte]))
        connection.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answer = received(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 2, answer


def test_trailers_that_do_not_end_in_time_are_rejected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "TRAILER_SECONDS", 0.2)
    with serve() as client, connected(client) as connection:
        connection.sendall(CHUNKED % SAMPLE.encode() + BODY + b"0\r\nx-a: b")
        connection.settimeout(0.01)
        answer = b""
        while not answer:
            with contextlib.suppress(ConnectionError):  # the service may have answered and closed the connection
                connection.sendall(b"b")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert b"the trailers of the body did not end within 0.2 seconds" in answer


@pytest.mark.parametrize(
    "framing", [b"1;" + b"a" * 1000 + b"\r\nx\r\n", b"1\r\nx\r\n"], ids=["extensions", "chunks of one byte"]
)
def test_chunks_with_more_framing_than_data_are_rejected(tiny: httpx.Client, framing: bytes) -> None:
    with connected(tiny) as connection:
        connection.sendall(CHUNKED % CLASSIFY.encode())
        sent_until_closed(connection, framing * (PACKET // len(framing)), 2**26)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert b"chunk sizes and extensions have 524,288 bytes more than the body" in answer
    assert_still_serves(tiny)


def test_small_chunks_are_accepted(tiny: httpx.Client) -> None:
    """A large body in chunks of six bytes has more bytes of chunk framing than the fixed limit for framing."""
    image = PNG + bytes(700_000)
    chunks = [image[i : i + 6] for i in range(0, len(image), 6)]
    assert 5 * len(chunks) > FRAMING_BYTES
    assert tiny.post(CLASSIFY, content=iter(chunks)).status_code == 200


def test_many_small_chunks_are_parsed_in_turn_with_other_connections(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, four clients that send chunks of one byte would repeatedly delay every other request by 30 ms."""
    parse, received, largest = BoundedHttpProtocol._parse, BoundedHttpProtocol.data_received, [0]
    parsed: dict[BoundedHttpProtocol, int] = {}

    def count(self: BoundedHttpProtocol, data: bytes) -> None:
        chunks = self.chunks
        parse(self, data)
        parsed[self] = parsed.get(self, 0) + self.chunks - chunks

    def in_one_turn(self: BoundedHttpProtocol, data: bytes) -> None:
        parsed[self] = 0
        received(self, data)
        largest[0] = max(largest[0], parsed[self])

    monkeypatch.setattr(BoundedHttpProtocol, "_parse", count)
    monkeypatch.setattr(BoundedHttpProtocol, "data_received", in_one_turn)
    content = PNG.ljust(100_000, b"\0")
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serve() as client, connected(client) as connection:
        expected = client.post(CLASSIFY, content=content, headers={"content-type": "image/png"}).json()
        connection.sendall(head % CLASSIFY.encode() + chunks + b"0\r\n\r\n")
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == expected
    assert 0 < largest[0] <= http_protocol.SLICE_BYTES / 5


def test_the_rest_of_an_answered_body_is_limited(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "STATE_BYTES", http_protocol.STATE_BYTES | {http_protocol.State.DISCARD: 2**20})
    with serve(max_body_bytes=10_000) as client, connected(client) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n" % CLASSIFY.encode())
        assert sent_until_closed(connection, bytes(PACKET), 2**28) < 2**26
        assert received(connection).startswith(b"HTTP/1.1 413 ")
        assert_still_serves(client)


def test_a_client_that_closes_the_connection_gets_the_answer_to_a_body_that_is_too_large(serve: Serve) -> None:
    """urllib always sends ``Connection: close``, and reads the answer only after it has sent the whole body."""
    with serve(max_body_bytes=10_000) as client:
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError) as rejection:
                urllib.request.urlopen(f"{client.base_url}{CLASSIFY}", data=bytes(8_000_000), timeout=60)
            assert rejection.value.code == 413
            assert json.load(rejection.value)["error"]["code"] == "too_large"


def test_a_rejected_head_waits_for_the_response_before_it(serve: Serve, held: HeldGenerator) -> None:
    with serve(inline_seconds=0) as client, connected(client) as connection:
        held.armed.set()
        connection.sendall(b'POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":1}' % SAMPLE.encode())
        assert held.entered.wait(30)
        connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 2 * HEAD_BYTES)
        assert client.get("/health/live").status_code == 200  # the service has read the head
        held.release.set()
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_slow_next_head_does_not_end_a_running_request(
    serve: Serve, held: HeldGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(inline_seconds=0) as client, connected(client) as connection:
        held.armed.set()
        connection.sendall(b'POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":1}' % SAMPLE.encode())
        assert held.entered.wait(30)
        monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.1)
        connection.sendall(b"GET /hea")
        with connected(client) as idle:
            assert received(idle) == b""  # more time has passed than a request head may take
        held.release.set()
        connection.sendall(b"lth/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = received(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 2, answer


def test_pipelined_requests_are_limited_and_the_waiting_ones_are_answered(tiny: httpx.Client) -> None:
    with connected(tiny) as connection:
        connection.sendall(GET * 5 * MAX_PIPELINED)
        answer = received(connection)
    assert MAX_PIPELINED + 1 <= answer.count(b"HTTP/1.1 200 ") < 5 * MAX_PIPELINED
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200 ")
    assert_still_serves(tiny)


def test_settings_change_the_timeouts_of_idle_connections_and_of_the_shutdown() -> None:
    config = Server(Mock(), Settings(keep_alive_seconds=65, shutdown_grace_seconds=0.2)).config
    assert (config.timeout_keep_alive, config.timeout_graceful_shutdown) == (65, 0.2)


OPENAPI = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def unread(client: httpx.Client) -> Iterator[socket.socket]:
    """Yield a connection with more responses than the system can buffer. The last response closes the connection."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect((client.base_url.host, client.base_url.port or 80))
        count = 8 * 2**20 // len(client.get("/openapi.json").content)
        connection.sendall(OPENAPI * count + OPENAPI.replace(b"Host: x", b"Host: x\r\nConnection: close"))
        yield connection


def is_reset(connection: socket.socket) -> bool:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_a_client_that_reads_too_slowly_is_disconnected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_limit, "STALLED_WRITE_SECONDS", 0.2)

    def reads() -> bool:
        with contextlib.suppress(BlockingIOError):
            connection.recv(100, socket.MSG_DONTWAIT)
        return is_reset(connection)

    with serve() as client, unread(client) as connection:
        wait_until(reads)


def test_a_closed_connection_does_not_wait_for_a_client_that_reads_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_limit, "STALLED_WRITE_SECONDS", 0.2)
    connection_made = BoundedHttpProtocol.connection_made

    def with_large_buffer(self: BoundedHttpProtocol, transport: asyncio.BaseTransport) -> None:
        connection_made(self, transport)
        self.transport.set_write_buffer_limits(2**30)  # responses are not delayed by unsent bytes

    monkeypatch.setattr(BoundedHttpProtocol, "connection_made", with_large_buffer)
    with serve() as client, unread(client) as connection:
        wait_until(lambda: is_reset(connection))


def test_a_body_in_one_packet_needs_no_asgi_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    receive, received_paths = RequestResponseCycle.receive, []

    async def recorded_receive(self: RequestResponseCycle) -> Any:
        received_paths.append(self.scope["path"])
        return await receive(self)

    monkeypatch.setattr(RequestResponseCycle, "receive", recorded_receive)
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n%s\r\n"
    body, close = b'{"count":1}', b"Connection: close\r\n"
    with serve() as client, connected(client) as connection:
        connection.sendall(head % (SAMPLE.encode(), b"") + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert received_paths == []
        connection.sendall(head % (SAMPLE.encode(), b"Expect: 100-continue\r\n"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(head % (SAMPLE.encode(), b"") + body + head % (SAMPLE.encode(), close) + body)  # pipelined
        assert received(connection).count(b"HTTP/1.1 200 ") == 2
    assert received_paths == [SAMPLE]  # the request whose body arrived later


def test_a_body_in_one_packet_that_is_too_large_is_rejected(serve: Serve) -> None:
    chunk = b"x" * 2000
    with serve(max_body_bytes=1024) as client, connected(client) as connection:
        connection.sendall(CHUNKED % CLASSIFY.encode() + b"%x\r\n%s\r\n0\r\n\r\n" % (len(chunk), chunk))
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert b"the maximum is" in answer


def test_a_closed_connection_is_freed_without_garbage_collection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    protocols: list[weakref.ref[BoundedHttpProtocol]] = []
    connection_made = BoundedHttpProtocol.connection_made

    def recorded(self: BoundedHttpProtocol, transport: asyncio.BaseTransport) -> None:
        protocols.append(weakref.ref(self))
        connection_made(self, transport)

    monkeypatch.setattr(BoundedHttpProtocol, "connection_made", recorded)
    with serve() as client:
        gc.disable()
        try:
            for _ in range(3):
                with connected(client) as connection:
                    connection.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" % SAMPLE.encode())
                    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            wait_until(lambda: not any(protocol() for protocol in protocols))
        finally:
            gc.enable()


def test_requests_that_arrive_while_the_server_stops_are_answered(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle connection is closed. New connections, and connections with a partial head or unread bytes, stay open."""
    shutdown, connections = BoundedHttpProtocol.shutdown, []
    sent_late = threading.Event()

    def send_before_shutdown(self: BoundedHttpProtocol) -> None:
        if not sent_late.is_set():
            sent_late.set()
            unread.sendall(GET)
        shutdown(self)

    def send_after_shutdown() -> None:
        assert idle.recv(65536) == b""
        new.sendall(GET)
        begun.sendall(GET[10:])

    monkeypatch.setattr(BoundedHttpProtocol, "shutdown", send_before_shutdown)
    monkeypatch.setattr(http_protocol, "FIRST_REQUEST_SECONDS", 60.0)
    with ThreadPoolExecutor(1) as pool:
        with serve(shutdown_grace_seconds=60) as client:
            address = client.base_url.host, client.base_url.port or 80
            connections = [socket.create_connection(address, 60) for _ in range(4)]
            new, begun, unread, idle = connections
            begun.sendall(GET[:10])
            for used in (unread, idle):
                used.sendall(GET)
                assert used.recv(65536).startswith(b"HTTP/1.1 200 ")
            sending = pool.submit(send_after_shutdown)
        sending.result()
    for connection in (new, begun, unread):
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert b"\r\nconnection: close\r\n" in answer
    for connection in connections:
        connection.close()
