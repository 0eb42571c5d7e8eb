"""The exact limits of the HTTP protocol. Stubs replace the event loop, the transport and the application."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from support.stubs.http import Application, Connection

from app.api.connection import CONNECTION
from app.server import http_protocol
from app.server.http_protocol import (
    DISCARD_SECONDS,
    FIRST_REQUEST_SECONDS,
    FRAMING_BYTES,
    HEAD_BYTES,
    IDLE_SECONDS,
    MAX_PIPELINED,
    SLICE_BYTES,
    TRAILER_BYTES,
    BoundedHttpProtocol,
)

CLOSING = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
EXPECTING = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def connect() -> Iterator[Callable[[], Connection]]:
    """Return a function that opens a connection. At the end, the requests that were not answered are cancelled."""
    connections: list[Connection] = []

    def connect() -> Connection:
        connections.append(Connection())
        return connections[-1]

    yield connect
    for connection in connections:
        for request in connection.loop.requests:
            request.close()


@pytest.fixture
def connection(connect: Callable[[], Connection]) -> Connection:
    return connect()


@pytest.mark.parametrize(("version", "hosts"), [(b"1.1", 0), (b"1.1", 2), (b"1.0", 2)])
def test_a_request_without_one_host_is_rejected(connection: Connection, version: bytes, hosts: int) -> None:
    request = b"GET / HTTP/%s\r\n%s\r\n" % (version, b"Host: x\r\n" * hosts)
    head, _, body = connection.send(request).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["message"] == f"the request has {hosts} Host headers; HTTP requires exactly one"
    assert connection.transport.is_closing()


def test_an_http_1_0_request_needs_no_host(connection: Connection) -> None:
    connection.send(b"GET / HTTP/1.0\r\n\r\n")
    connection.loop.answer()
    assert connection.transport.written.startswith(b"HTTP/1.1 204 ")


def test_a_rejected_request_is_recorded_without_its_query_and_with_the_id_of_its_answer(connection: Connection) -> None:
    answer = connection.send(b"GET /v2?a=b?c HTTP/1.1\r\n", b"nonsense\r\n\r\n")
    head, _, body = answer.decode().partition("\r\n\r\n")
    status, *headers = head.split("\r\n")
    assert status == "HTTP/1.1 400 Bad Request"
    assert json.loads(body) == {"error": "the request is not valid HTTP: Invalid HTTP request received."}
    request_id = dict(header.split(": ", 1) for header in headers)["x-request-id"]
    assert connection.application.rejected == [("/v2", "invalid_value", request_id)]
    assert connection.transport.closed


def test_line_breaks_before_a_request_count_towards_its_head(connection: Connection) -> None:
    """The protocol has no path yet when it rejects them."""
    assert connection.send(b"\r\n" * (HEAD_BYTES // 2)) == b""
    assert connection.send(b"\r\n").startswith(b"HTTP/1.1 431 ")
    assert [rejected[:2] for rejected in connection.application.rejected] == [("", "head_too_large")]


@pytest.mark.parametrize(
    ("before", "start", "limit", "message"),
    [
        ([], b"GET / HTTP/1.1\r\nx: ", HEAD_BYTES, "the request head has more than 65,536 bytes, the maximum"),
        (
            [CHUNKED, b"5\r\nhello\r\n"],
            b"1;",
            FRAMING_BYTES,
            "chunk sizes and extensions have 524,288 bytes more than the body, the maximum",
        ),
        (
            [CHUNKED, b"0\r\n"],
            b"x: ",
            TRAILER_BYTES,
            "the request head with its trailers has more than 65,536 bytes, the maximum",
        ),
    ],
    ids=["head", "framing", "trailers"],
)
def test_one_byte_more_than_a_limit_is_rejected(
    connection: Connection, before: list[bytes], start: bytes, limit: int, message: str
) -> None:
    assert connection.send(*before, start.ljust(limit, b"y")) == b""
    head, _, body = connection.send(b"y").partition(b"\r\n\r\n")
    assert b"\r\nconnection: close\r\n" in head
    assert json.loads(body)["error"]["message"] == message


@pytest.mark.parametrize(
    ("parts", "answers", "seconds", "written"),
    [
        ([], 0, 10, b""),
        ([b"GET / HT"], 0, 10, b""),
        ([CHUNKED, b"0\r\n", b"x"], 0, 20, b"the trailers of the body did not end within 20 seconds"),
        ([CHUNKED, b"2\r\nx"], 1, 40, b"HTTP/1.1 204 "),
        ([GET], 1, 5, b"HTTP/1.1 204 "),
        ([GET, b"GET"], 1, 10, b"HTTP/1.1 204 "),
    ],
    ids=["new", "head", "trailers", "rest of a body", "idle", "next head"],
)
def test_each_state_has_its_own_time_limit(
    connect: Callable[[], Connection],
    monkeypatch: pytest.MonkeyPatch,
    parts: list[bytes],
    answers: int,
    seconds: float,
    written: bytes,
) -> None:
    for name, value in (("HEAD", 10), ("TRAILER", 20), ("DISCARD", 40)):
        monkeypatch.setattr(http_protocol, f"{name}_SECONDS", value)
    connection = connect()
    connection.send(*parts[:1])
    for _ in range(answers):
        connection.loop.answer()
    connection.send(*parts[1:])
    connection.loop.wait(seconds - 1)
    assert not connection.transport.closed
    connection.loop.wait(1)
    assert connection.transport.closed
    assert written in connection.transport.written


@pytest.mark.parametrize(
    ("parts", "seconds"),
    [([], FIRST_REQUEST_SECONDS), ([GET], IDLE_SECONDS), ([GET, b"GET"], FIRST_REQUEST_SECONDS)],
    ids=["new", "idle", "next head"],
)
def test_a_server_that_stops_waits_for_a_request(connection: Connection, parts: list[bytes], seconds: float) -> None:
    for part in parts:
        connection.send(part)
        if part == GET:
            connection.loop.answer()
    connection.protocol.shutdown()
    connection.loop.wait(seconds * 0.9)
    assert not connection.transport.closed
    connection.loop.wait(seconds * 0.2)
    assert connection.transport.closed


def test_a_request_that_arrives_while_the_server_stops_is_the_last_one(connection: Connection) -> None:
    connection.protocol.shutdown()
    connection.send(GET)
    connection.loop.wait(FIRST_REQUEST_SECONDS)
    assert not connection.transport.closed
    connection.loop.answer()
    assert b"connection: close" in connection.transport.written
    assert connection.transport.closed


def test_the_rest_of_an_answered_body_is_not_kept(connection: Connection) -> None:
    connection.send(CHUNKED, b"9\r\nx")
    connection.loop.answer()
    connection.send(b"12345678\r\n")
    assert connection.protocol.cycle.body == b"x"


@pytest.mark.parametrize(
    ("start", "rest"),
    [
        (CLOSING + b"Content-Length: 9\r\n\r\nx", [b"1234567", b"8"]),
        (CLOSING + b"Transfer-Encoding: chunked\r\n\r\n9\r\nx", [b"12345678\r\n", b"0\r\n", b"x: y\r\n", b"\r\n"]),
    ],
    ids=["content-length", "chunks and trailers"],
)
def test_a_connection_that_ends_with_a_response_is_closed_after_the_body(
    connect: Callable[[], Connection], start: bytes, rest: list[bytes]
) -> None:
    """Otherwise the system would reset the connection, and the client might not receive the response."""
    for answered_after in range(len(rest)):
        connection = connect()
        connection.send(start, *rest[:answered_after])
        connection.loop.answer()
        assert b"\r\nconnection: close\r\n" in connection.transport.written
        for part in rest[answered_after:-1]:
            connection.send(part)
            assert not connection.transport.closed
        assert connection.send(rest[-1] + GET) == b""
        assert connection.transport.closed
        assert not connection.loop.requests


def test_a_connection_that_ends_with_a_response_does_not_wait_for_other_bodies(
    connect: Callable[[], Connection],
) -> None:
    complete, pipelined = connect(), connect()
    complete.send(CLOSING + b"Content-Length: 1\r\n\r\nx")
    pipelined.send(CLOSING + b"Content-Length: 1\r\n\r\nx" + CHUNKED)
    for connection in (complete, pipelined):
        connection.loop.answer()
        assert connection.transport.closed
        assert not connection.loop.requests


def test_the_rest_of_a_body_before_the_end_of_a_connection_is_limited(
    connect: Callable[[], Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        http_protocol, "STATE_BYTES", http_protocol.STATE_BYTES | {http_protocol.State.DISCARD: 100_000}
    )
    silent, slow, large = (connect() for _ in range(3))
    for connection in (silent, slow, large):
        connection.send(CLOSING + b"Content-Length: 999999\r\n\r\nx")
        connection.loop.answer()
    silent.loop.wait(5)
    assert silent.transport.closed
    for _ in range(int(DISCARD_SECONDS) - 1):
        slow.loop.wait(1)
        slow.send(b"x")
    assert not slow.transport.closed
    slow.loop.wait(1)
    assert slow.transport.closed
    large.send(bytes(100_000))
    assert not large.transport.closed
    large.send(b"x")
    assert large.transport.closed


def test_a_response_that_fails_closes_the_connection_without_waiting_for_the_body() -> None:
    class Failing(Application):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ZeroDivisionError

    connection = Connection(Failing())
    connection.send(CLOSING + b"Content-Length: 9\r\n\r\nx")
    connection.loop.answer()
    assert connection.transport.closed


def test_small_chunks_are_delayed_until_the_body_is_complete_or_the_connection_ends(
    connect: Callable[[], Connection],
) -> None:
    body = bytes(range(256)) * 300  # so large that no more is read until the application takes it
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    complete, lost = connect(), connect()
    for connection in (complete, lost):
        connection.send(CHUNKED, chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :] + b"0\r\n\r\n")
        assert 0 < len(connection.protocol.cycle.body) <= SLICE_BYTES // 5
        assert connection.transport.paused
    assert BoundedHttpProtocol.delayed >= {complete.protocol, lost.protocol}
    complete.loop.wait(10)
    lost.protocol.connection_lost(None)
    assert not BoundedHttpProtocol.delayed & {complete.protocol, lost.protocol}
    assert complete.transport.paused
    assert complete.protocol.take_body() == body
    assert not complete.transport.paused
    complete.loop.answer()
    complete.send(GET)
    assert len(complete.loop.requests) == 1


def test_a_body_is_taken_only_if_it_is_complete_and_can_be_received(connection: Connection) -> None:
    protocol = connection.protocol
    connection.send(EXPECTING + b"x")
    assert protocol.take_body() is None  # the client waits for the status 100
    connection.loop.answer()
    connection.send(CHUNKED, b"1\r\nx\r\n")
    assert protocol.take_body() is None  # incomplete
    connection.send(b"0\r\n\r\n")
    assert protocol.take_body() == b"x"
    connection.loop.answer()
    assert protocol.take_body() is None  # the request has been answered
    connection.send(GET)
    protocol.connection_lost(None)
    assert protocol.take_body() is None  # the client has disconnected


def test_an_http_1_0_client_gets_no_status_100(connection: Connection) -> None:
    connection.send(EXPECTING.replace(b"HTTP/1.1", b"HTTP/1.0") + b"x")
    assert connection.protocol.take_body() == b"x"


def test_waiting_requests_are_answered_in_turn(connection: Connection) -> None:
    connection.send(b"".join(GET.replace(b"/ ", b"/%d " % number) for number in range(3)))
    for number in range(3):
        running = connection.protocol.running
        assert (running.scope["path"], running.scope[CONNECTION]) == (f"/{number}", connection.protocol)
        assert len(connection.loop.requests) == 1
        connection.loop.answer()
    assert connection.transport.written.count(b"HTTP/1.1 204 ") == 3


@pytest.mark.parametrize(
    ("parts", "answers"),
    [([GET], 1), ([GET, GET], 2), ([GET, GET, GET], 3), ([GET, CHUNKED], 1), ([GET, GET, CHUNKED], 2)],
)
def test_complete_requests_before_an_invalid_one_are_answered(
    connection: Connection, parts: list[bytes], answers: int
) -> None:
    assert connection.send(*parts, b"nonsense\r\n\r\n") == b""
    for number in range(answers):
        assert not connection.transport.closed, number
        connection.loop.answer()
    assert connection.transport.closed
    assert connection.transport.written.count(b"HTTP/1.1 204 ") == connection.transport.written.count(b"HTTP/1.1 ")
    assert not connection.loop.requests


def test_the_request_after_the_largest_number_of_waiting_requests_is_not_answered(connection: Connection) -> None:
    connection.send(GET * (1 + MAX_PIPELINED + 1))
    for _ in range(1 + MAX_PIPELINED):
        assert not connection.transport.closed
        connection.loop.answer()
    assert connection.transport.closed
    assert not connection.loop.requests


def test_a_running_request_is_told_that_its_client_has_disconnected(connect: Callable[[], Connection]) -> None:
    running, answered = connect(), connect()
    answered.send(GET)
    answered.loop.answer()
    running.send(GET)
    for connection in (running, answered):
        connection.protocol.watch_disconnect(on_disconnect := Mock())
        connection.protocol.connection_lost(None)
        assert on_disconnect.call_count == (connection is running)
        assert CONNECTION not in connection.protocol.running.scope
