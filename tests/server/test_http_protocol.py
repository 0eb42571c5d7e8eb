"""The limits of a connection (SECURITY.md), and the parts of HTTP/1.1 that uvicorn leaves out."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.faults import Hold
from support.processes import GET_LIVE, request_live, serving
from support.responses import CLASSIFY, PNG, SAMPLE, assert_still_serves, metric_samples
from support.service import Serve
from support.waiting import wait_until

PACKET = 64 * 1024
POST = b"POST %s HTTP/1.1\r\nHost: x\r\n" % SAMPLE.encode()
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = b'{"count":1}'
CHUNK = b'b\r\n{"count":1}\r\n'
COMPLETE = POST + b"Content-Length: 11\r\n\r\n" + BODY
CLOSING = b"Connection: close\r\n"
# What the HTTP client of the JDK adds to each request to an http URL
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\nUpgrade: h2c\r\n"


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), 30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def received(connection: socket.socket) -> bytes:
    """Return all bytes that arrive until the service closes the connection."""
    content = b""
    with contextlib.suppress(ConnectionError):  # the service has not read everything
        while part := connection.recv(2**20):
            content += part
    return content


def answers(client: httpx.Client, *parts: bytes) -> bytes:
    """Send each part after the service has read the one before. Return all bytes until the connection ends."""
    with connected(client) as connection:
        for part in parts:
            with contextlib.suppress(ConnectionError):  # the service may have rejected an earlier part
                connection.sendall(part)
            assert client.get("/health/live").status_code == 200
        return received(connection)


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def message(answer: bytes) -> str:
    return str(json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["message"])


def sent_until_closed(connection: socket.socket, part: bytes, max_bytes: int) -> int:
    """Send ``part`` repeatedly until the service closes the connection. Return the number of bytes that were sent."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < max_bytes:
            connection.sendall(part)
            sent += len(part)
    return sent


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 3000 + b"\r\n"],
        [b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 70_000)],
        [b"GET / HTTP/1.1\r\nx: ".ljust(65_536, b"y"), b"y"],
        [b"\r\n" * 32_768, b"\r\n"],
        [CHUNKED + CHUNK + b"0\r\n" + b"x-a: b\r\n" * 2000],
    ],
    ids=["many headers", "a long path", "a head without end", "line breaks", "many trailers"],
)
def test_a_head_that_is_too_large_is_rejected(tiny: httpx.Client, parts: list[bytes]) -> None:
    answer = answers(tiny, *parts)
    assert statuses(answer) == [431]
    assert message(answer) == "the request head has more than 65,536 bytes, the maximum"
    assert_still_serves(tiny)


def test_a_head_just_below_the_limit_is_accepted(tiny: httpx.Client) -> None:
    assert tiny.get("/health/live", headers=[(f"x-{i}", "y") for i in range(1500)]).status_code == 200
    assert tiny.get("/health/live", headers={"x": "y" * 60_000}).status_code == 200


def test_a_connection_without_a_complete_request_is_closed(serve: Serve) -> None:
    begun = (b"", b"GET", GET_LIVE[:-2], POST + CLOSING + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{")
    with serve(body_seconds=0.2, head_seconds=1) as client, contextlib.ExitStack() as opened:
        connections = [opened.enter_context(connected(client)) for _ in begun]
        for connection, part in zip(connections, begun, strict=True):
            connection.sendall(part)
        assert client.get("/health/live").status_code == 200
        assert [statuses(received(connection)) for connection in connections] == [[], [], [], [408]]


def test_the_rest_of_an_answered_body_must_arrive_in_time(serve: Serve) -> None:
    get = GET_LIVE[:-2] + b"Content-Length: 3\r\n\r\n"
    with serve() as client, connected(client) as connection:
        assert request_live(connection, get)
        assert request_live(connection, b"xyz" + get)  # a complete body keeps the connection open
    with serve(keep_alive_seconds=60, head_seconds=1) as client, connected(client) as connection:
        assert request_live(connection, get)
        connection.sendall(b"x")
        assert received(connection) == b""


@pytest.mark.parametrize(
    "framing", [b"1;" + b"a" * 1000 + b"\r\nx\r\n", b"1\r\nx\r\n"], ids=["extensions", "chunks of one byte"]
)
def test_chunks_with_much_more_framing_than_data_are_rejected(tiny: httpx.Client, framing: bytes) -> None:
    with connected(tiny) as connection:
        connection.sendall(CHUNKED.replace(SAMPLE.encode(), CLASSIFY.encode()))
        assert sent_until_closed(connection, framing * (PACKET // len(framing)), 2**26) < 2**24
        answer = received(connection)
    assert not answer or statuses(answer) == [400]
    assert_still_serves(tiny)


def test_the_error_for_framing_states_the_limit(serve: Serve) -> None:
    with serve(framing_bytes=1000) as client:
        answer = answers(client, CHUNKED, b"1\r\nx\r\n" * 300)
    assert statuses(answer) == [400]
    assert "chunk sizes, extensions and trailers have 1,000 bytes more than the body" in message(answer)


def test_small_chunks_are_accepted(tiny: httpx.Client) -> None:
    image = PNG + bytes(2_000_000)
    chunks = (image[i : i + 40] for i in range(0, len(image), 40))
    assert tiny.post(CLASSIFY, content=chunks).status_code == 200


def test_trailers_are_accepted_and_ignored(tiny: httpx.Client) -> None:
    end = b"0\r\nx-request-id: second\r\nx-request-timeout: -1\r\n\r\n"
    with connected(tiny) as connection:
        for byte in CHUNKED.replace(b"\r\n\r\n", b"\r\nx-request-id: first\r\n\r\n") + CHUNK + end:
            connection.sendall(bytes([byte]))
        connection.sendall(GET_LIVE[:-2] + CLOSING + b"\r\n")
        answer = received(connection)
    assert statuses(answer) == [200, 200]
    assert b"\r\nx-request-id: first\r\n" in answer


@pytest.mark.parametrize("path", [SAMPLE, "/nowhere"])  # the second one is answered before the end of its body
def test_trailers_without_end_are_rejected(tiny: httpx.Client, path: str) -> None:
    with connected(tiny) as connection:
        connection.sendall(CHUNKED.replace(SAMPLE.encode(), path.encode()) + CHUNK + b"0\r\nx-a: ")
        assert sent_until_closed(connection, b"a" * PACKET, 2**26) < 2**25
        assert len(statuses(received(connection))) <= 1
    assert_still_serves(tiny)


def test_trailers_that_do_not_end_in_time_give_408(serve: Serve) -> None:
    with serve(body_seconds=0.2, keep_alive_seconds=1) as client:
        assert statuses(answers(client, CHUNKED + CHUNK + b"0\r\nx-a: b")) == [408]


def test_a_client_that_closes_the_connection_gets_the_answer_to_a_body_that_is_too_large(serve: Serve) -> None:
    """urllib always sends ``Connection: close``, and reads the answer only after it has sent the whole body."""
    with serve(max_body_bytes=10_000) as client:
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError) as rejection:
                urllib.request.urlopen(f"{client.base_url}{CLASSIFY}", data=bytes(8_000_000), timeout=60)
            assert rejection.value.code == 413
            assert json.load(rejection.value)["error"]["code"] == "too_large"


def test_no_request_after_the_last_one_of_a_connection_is_answered(tiny: httpx.Client) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\n" + CLOSING + b"Content-Length: 5\r\n\r\n"
    assert statuses(answers(tiny, head, b"12345" + GET_LIVE)) == [404]


def test_pipelined_requests_are_answered_in_turn(tiny: httpx.Client) -> None:
    requests = [b"GET /%d HTTP/1.1\r\nHost: x\r\nx-request-id: %d\r\n\r\n" % (i, i) for i in range(300)]
    answer = answers(tiny, b"".join(requests) + COMPLETE + GET_LIVE[:-2] + CLOSING + b"\r\n")
    assert statuses(answer) == [404] * 300 + [200, 200]
    ids = [part.partition(b"\r\n")[0] for part in answer.split(b"\r\nx-request-id: ")[1:301]]
    assert ids == [b"%d" % i for i in range(300)]


@pytest.mark.parametrize("rest", [b"GET / HTTP/1.1\r\nx: " + b"y" * 2 * PACKET, b"nonsense\r\n\r\n"])
def test_a_rejected_head_waits_for_the_response_before_it(serve: Serve, held: Hold, rest: bytes) -> None:
    with serve(inline_seconds=0) as client, connected(client) as connection:
        held.armed.set()
        connection.sendall(COMPLETE)
        assert held.entered.wait(30)
        connection.sendall(rest)
        assert client.get("/health/live").status_code == 200  # the service has read the head
        held.release.set()
        assert statuses(received(connection)) == [200]


def test_a_slow_next_head_does_not_end_a_running_request(serve: Serve, held: Hold) -> None:
    with (
        serve(inline_seconds=0, head_seconds=1) as client,
        connected(client) as connection,
    ):
        held.armed.set()
        connection.sendall(COMPLETE + b"GET /hea")
        assert held.entered.wait(30)
        with connected(client) as idle:
            assert received(idle) == b""  # more time has passed than a head may take
        connection.sendall(b"lth/live HTTP/1.1\r\nHost: x\r\n" + CLOSING + b"\r\n")
        held.release.set()
        assert statuses(received(connection)) == [200, 200]


def test_a_running_request_with_an_invalid_body_is_rejected_and_recorded(tiny: httpx.Client) -> None:
    count = ("quartet_requests_total", ("method", "POST"), ("route", SAMPLE), ("status", "400"))
    before = metric_samples(tiny).get(count, 0.0)
    assert statuses(answers(tiny, CHUNKED, b"ZZ\r\n")) == [400]
    wait_until(lambda: metric_samples(tiny).get(count, 0.0) == before + 1)


def test_a_client_that_expects_the_status_100_gets_it(tiny: httpx.Client) -> None:
    with connected(tiny) as connection:
        connection.sendall(POST + CLOSING + b"Expect: 100-continue\r\nContent-Length: 11\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert statuses(received(connection)) == [200]


# Requests to change the protocol


def test_requests_that_ask_for_h2c_are_answered_with_their_body(tiny: httpx.Client) -> None:
    length = b"Content-Length: 11\r\n\r\n"
    first, last = POST + UPGRADE + length + BODY, POST + UPGRADE + CLOSING + length + BODY
    assert statuses(answers(tiny, first, GET_LIVE, last[:-11], last[-11:])) == [200, 200, 200]


def test_the_body_of_an_upgrade_request_is_never_a_request(tiny: httpx.Client) -> None:
    """Wherever a packet ends, the body reaches the application, or the request is rejected."""
    body = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
    request = POST + UPGRADE + CLOSING + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    ends = random.Random(0).sample(range(1, len(request)), 40)
    inside = range(request.index(b"Upgrade: h2c"), request.index(b"Upgrade: h2c") + 9)
    for end in (*ends, *inside):
        assert statuses(answers(tiny, request[:end], request[end:])) == [400], end


@pytest.mark.parametrize("headers", [b"", UPGRADE])
@pytest.mark.parametrize("target", [b"example.com:443", b"/health/live"])
def test_connect_is_rejected(tiny: httpx.Client, target: bytes, headers: bytes) -> None:
    answer = answers(tiny, b"CONNECT %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (target, headers) + GET_LIVE)
    assert statuses(answer) == [400]


# Clients that do not read, and the stop

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


@pytest.mark.parametrize("read_bytes", [0, 100])
def test_a_client_that_reads_too_slowly_is_disconnected(serve: Serve, read_bytes: int) -> None:
    def reads() -> bool:
        with contextlib.suppress(BlockingIOError):
            connection.recv(read_bytes, socket.MSG_DONTWAIT)
        return is_reset(connection)

    with serve(stalled_write_seconds=0.2) as client, unread(client) as connection:
        wait_until(reads)


def test_a_client_that_reads_slowly_but_steadily_is_not_disconnected(serve: Serve) -> None:
    """The buffer of the system has megabytes, so it is long before the service can write more."""
    with serve(stalled_write_seconds=2.0, stalled_write_bytes=1) as client, unread(client) as connection:
        end = time.monotonic() + 3  # longer than the limit
        while time.monotonic() < end:
            assert connection.recv(1000)
            assert client.get("/health/live").status_code == 200


def test_requests_that_arrive_while_the_server_stops_are_answered(tiny_store: Path) -> None:
    """New connections, idle ones, and connections with a part of a head may send one more request."""
    with serving(tiny_store, workers=1, last_request_seconds=60) as service, contextlib.ExitStack() as opened:
        new, begun, idle, used = (opened.enter_context(service.connect()) for _ in range(4))
        begun.sendall(GET_LIVE[:10])
        for connection in (idle, used):
            assert request_live(connection)
        service.process.terminate()
        wait_until(lambda: not is_accepting(service.url))
        for connection, request in ((new, GET_LIVE), (begun, GET_LIVE[10:]), (used, GET_LIVE)):
            connection.sendall(request)
            answer = received(connection)
            assert statuses(answer) == [200]
            assert b"\r\nconnection: close\r\n" in answer
        idle.close()
        assert service.process.wait(30) == 0


def is_accepting(url: str) -> bool:
    try:
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 0), 30):
            return True
    except OSError:
        return False


def test_an_idle_tls_client_does_not_delay_the_stop(tiny_store: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    context = ssl.create_default_context(cafile=str(cert))
    with serving(tiny_store, tls_cert=cert, tls_key=key, workers=1) as service:
        plain = service.connect()
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            assert request_live(connection)  # type: ignore[arg-type]
            assert service.stop() == 0  # waits for less time than the event loop would wait for the end of TLS
