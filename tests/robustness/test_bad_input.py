"""The size of request bodies, the memory of requests, and the time in which a body must arrive are limited."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from support.responses import (
    CLASSIFY,
    CONTINUE,
    FORECAST,
    PNG,
    SERIES,
    assert_rejected,
    assert_still_serves,
    send_raw,
)
from support.service import Serve
from support.waiting import wait_until


@pytest.mark.parametrize(("path", "limit", "form_limit"), [(CLASSIFY, 2**25, 2**25), (FORECAST, 2_665_536, 10_065_536)])
def test_a_body_over_the_limit_is_rejected_with_and_without_a_length(
    tiny: httpx.Client, path: str, limit: int, form_limit: int
) -> None:
    announced = tiny.post(path, content=b" " * (limit + 1))
    assert_rejected(announced, 413, None, f"the body has {limit + 1:,} bytes; the maximum is {limit:,}")
    chunked = tiny.post(path, content=iter([b" " * limit, b" "]))
    assert_rejected(chunked, 413, None, f"more than {limit:,} bytes")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    form = tiny.post(path, content=iter([head, *[b" " * 2**20] * 33]), headers=headers)  # for a forecast, a table
    assert_rejected(form, 413, None, f"more than {form_limit:,} bytes")
    assert_still_serves(tiny)


def test_bodies_over_the_limit_on_all_running_bodies_are_rejected(serve: Serve) -> None:
    with serve(max_buffered_bytes=50_000, max_body_bytes=50_000) as client:
        host = client.base_url.host, client.base_url.port or 80
        with socket.create_connection(host) as connection, socket.create_connection(host) as other:
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 45000\r\n\r\n" % CLASSIFY.encode()
            connection.sendall(head + bytes(40_000))
            wait_until(lambda: client.post(CLASSIFY, content=PNG + bytes(20_000)).status_code != 200)
            assert_rejected(
                client.post(CLASSIFY, content=PNG + bytes(20_000)),
                429,
                None,
                "all running requests together would hold more than 50,000 bytes",
            )
            other.sendall(head.replace(b"45000", b"20000") + bytes(20_000))  # arrives at once
            assert b" 429 " in other.recv(100)
            assert client.post(CLASSIFY, content=PNG).status_code == 200
        wait_until(lambda: client.post(CLASSIFY, content=PNG + bytes(40_000)).status_code == 200)


def test_memory_besides_the_body_counts_towards_the_same_limit(serve: Serve) -> None:
    with serve(max_buffered_bytes=50_000, max_body_bytes=50_000) as client:
        message = "all running requests together would hold more than 50,000 bytes"
        echo = {"prompt": "a" * 5000, "echo": True, "logprobs": 5, "max_tokens": 0}
        assert_rejected(client.post("/v1/completions", json=echo), 429, None, message)
        assert_rejected(client.post("/v1/completions", json={**echo, "stream": True}), 429, None, message)
        assert client.post("/v1/completions", json={**echo, "logprobs": None}).status_code == 200
        assert_rejected(client.post(CONTINUE, json={"max_characters": 4000, "n": 16}), 429, None, message)
        tensor = {"name": "values", "datatype": "FP64", "shape": [1, len(SERIES)], "data": SERIES}
        for padding, status in ((0, 200), (47_000, 429)):  # the body counts before and after decompression
            spaces = bytes(random.Random(0).choices(b" \n", k=padding))
            content = gzip.compress(json.dumps({"inputs": [tensor]}).encode() + spaces)
            assert len(content) < 10_000
            answer = client.post("/v2/models/tiny-lstm/infer", content=content, headers={"content-encoding": "gzip"})
            assert answer.status_code == status, answer.text
        assert_still_serves(client)


def test_a_body_that_stops_arriving_gives_408(serve: Serve) -> None:
    with serve(body_seconds=0.05) as client:
        answer = send_raw(client, b"POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"no byte of the body arrived for 0.05 seconds" in answer


def send_slowly(client: httpx.Client, start: bytes, drop: bytes) -> bytes:
    """Send ``start``, then ``drop`` every 20 ms; return the response, or nothing if the service disconnects."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 30) as connection:
        connection.sendall(start)
        connection.settimeout(0.02)
        for _ in range(1500):  # 30 s
            with contextlib.suppress(ConnectionError):  # the service may have answered and closed the connection
                connection.sendall(drop)
            try:
                return connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                return b""
    raise AssertionError("the service neither answered nor disconnected")


def test_a_slowly_sent_body_gives_408_at_the_deadline(serve: Serve) -> None:
    key = "k" * 32
    admin_paths = ("/v1/admin/models/tiny-gan/activate", "/v2/repository/models/a/unload")
    paths = (CLASSIFY, CONTINUE, "/v1/completions", "/v2/models/tiny-gan/infer", "/v2/repository/index", *admin_paths)

    def send(path: str) -> bytes:
        start = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n".encode()
        start += b"Content-Length: %d\r\n\r\n" % (5000 if path in admin_paths else 60_000)
        return send_slowly(client, start, b" ")

    with serve(body_seconds=30, request_seconds=1, admin_key=key) as client, ThreadPoolExecutor(len(paths)) as pool:
        for path, answer in zip(paths, pool.map(send, paths), strict=True):
            assert answer.startswith(b"HTTP/1.1 504 "), (path, answer)
            assert b"x-should-retry: false" in answer
            assert b"the deadline passed before the body was complete" in answer
        assert_still_serves(client)
