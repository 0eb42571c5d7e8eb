"""Upgrade requests, which ask to change the protocol, are answered in HTTP/1.1, with their bodies (RFC 9110, 7.8)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from support.responses import SAMPLE
from support.stubs.http import Connection, ReadingApplication

from app.server.http_protocol import HEAD_BYTES

# what the HTTP client of the JDK adds to each request to an http URL
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\nUpgrade: h2c\r\n"
GET = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"


def post(body: bytes, headers: bytes = b"") -> bytes:
    head = b"POST /a?b=c HTTP/1.1\r\nHost: x\r\n" + UPGRADE + headers
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def application() -> ReadingApplication:
    return ReadingApplication()


@pytest.fixture
def connection(application: ReadingApplication) -> Iterator[Connection]:
    connection = Connection(application)
    yield connection
    for request in connection.loop.requests:
        request.close()


def requests(application: ReadingApplication) -> list[tuple[str, str, bytes]]:
    """Return the method, the path and the body of each answered request."""
    return [(scope["method"], scope["path"], body) for scope, body in application.received]


def test_the_body_is_read_wherever_a_packet_ends(application: ReadingApplication) -> None:
    request = post(b"hello") + GET
    for end in range(len(request) + 1):
        application.received.clear()
        connection = Connection(application)
        connection.send(*filter(None, (request[:end], request[end:])))
        connection.loop.answer()
        connection.loop.answer()
        assert requests(application) == [("POST", "/a", b"hello"), ("GET", "/next", b"")], end
        assert not connection.loop.requests
        assert not connection.transport.closed
    assert application.rejected == []


def test_a_request_that_arrives_byte_by_byte_is_read(application: ReadingApplication, connection: Connection) -> None:
    connection.send(*(bytes([byte]) for byte in post(b"hello")))
    connection.loop.answer()
    assert requests(application) == [("POST", "/a", b"hello")]


def test_a_body_that_looks_like_a_request_is_not_a_request(
    application: ReadingApplication, connection: Connection
) -> None:
    for packets in ([post(GET)], [post(GET)[: -len(GET)], GET]):
        application.received.clear()
        connection.send(*packets)
        connection.loop.answer()
        assert requests(application) == [("POST", "/a", GET)]
        assert not connection.loop.requests


def test_a_chunked_body_and_its_trailers_are_read(application: ReadingApplication, connection: Connection) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + UPGRADE + b"\r\n"
    connection.send(head + b"5\r\nhello\r\n0\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" + GET)
    for _ in range(2):
        connection.loop.answer()
    assert requests(application) == [("POST", "/a", b"hello"), ("GET", "/next", b"")]


def test_pipelined_upgrade_requests_are_answered_in_turn(
    application: ReadingApplication, connection: Connection
) -> None:
    connection.send(GET + b"".join(post(b"%d" % number) for number in range(20)) + GET)
    for _ in range(22):
        connection.loop.answer()
    expected = [("POST", "/a", b"%d" % number) for number in range(20)]
    assert requests(application) == [("GET", "/next", b""), *expected, ("GET", "/next", b"")]


def test_the_application_gets_the_same_headers_as_without_upgrade(application: ReadingApplication) -> None:
    request = post(b"", b"Accept:\r\nX-A:  b \r\nx-a: c:d\r\nX-B: \xff\tb\r\n")
    for sent in (request, request.replace(b"Upgrade: h2c\r\n", b"")):
        connection = Connection(application)
        connection.send(sent)
        connection.loop.answer()
    upgraded, without = (scope for scope, _ in application.received)
    assert upgraded["headers"] == without["headers"]
    for key in ("http_version", "path", "query_string"):
        assert upgraded[key] == without[key]


def test_the_connection_is_closed_after_the_response_if_the_client_asks_for_it(
    application: ReadingApplication, connection: Connection
) -> None:
    connection.send(post(b"hello", b"Connection: close\r\n"))
    connection.loop.answer()
    assert requests(application) == [("POST", "/a", b"hello")]
    assert b"\r\nconnection: close\r\n" in connection.transport.written
    assert connection.transport.closed


def test_an_upgrade_request_with_an_ambiguous_body_is_rejected(
    application: ReadingApplication, connection: Connection
) -> None:
    answer = connection.send(post(b"hello", b"Transfer-Encoding: chunked\r\n"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert connection.transport.closed
    assert not connection.loop.requests


@pytest.mark.parametrize("headers", [b"", UPGRADE])
@pytest.mark.parametrize("target", [b"example.com:443", b"/health/live"])
def test_connect_is_rejected(connection: Connection, target: bytes, headers: bytes) -> None:
    answer = connection.send(b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + GET)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["message"].startswith("the request is not valid HTTP")
    assert connection.transport.closed
    assert not connection.loop.requests


def test_no_request_after_connect_is_answered(application: ReadingApplication, connection: Connection) -> None:
    connection.send(GET + b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", GET)
    connection.loop.answer()
    assert requests(application) == [("GET", "/next", b"")]
    assert connection.transport.closed
    assert not connection.loop.requests


def test_the_head_of_an_upgrade_request_is_limited(connection: Connection) -> None:
    assert connection.send((b"GET / HTTP/1.1\r\n" + UPGRADE + b"x: ").ljust(HEAD_BYTES, b"y")) == b""
    assert connection.send(b"y").startswith(b"HTTP/1.1 431 ")
    assert connection.transport.closed


def test_the_service_answers_upgrade_requests_to_h2c(tiny: httpx.Client) -> None:
    start = b"POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: 11\r\n" % (SAMPLE.encode(), UPGRADE)
    body = b'{"count":1}'
    with socket.create_connection((tiny.base_url.host, tiny.base_url.port or 80), 60) as client:
        for packets in ([start + b"\r\n" + body], [start + b"\r\n", body]):
            for packet in packets:
                client.sendall(packet)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(start + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
