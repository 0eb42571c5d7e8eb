"""Invalid input gives a 4xx error that names the field, its value and the allowed values. Later requests succeed."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image
from support.images import image_bytes, png_with_size, save_image
from support.responses import (
    CLASSIFY,
    CONTINUE,
    FORECAST,
    PNG,
    SAMPLE,
    SERIES,
    assert_rejected,
    assert_still_serves,
    send_raw,
)
from support.service import Serve
from support.waiting import wait_until


def tiff_with_tile_of(side: int) -> bytes:
    """Return a TIFF of 32 x 32 pixels whose only tile has ``side`` x ``side`` pixels."""
    content = zlib.compress(bytes(1000))
    tags = {256: 32, 257: 32, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 1000, 325: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)).ljust(1000, b"\0") + content


def tiff_with_strips(count: int) -> bytes:
    """Return a TIFF of 1 x 9 pixels that lists ``count`` strips."""
    tags = {256: 1, 257: 9, 258: 8, 259: 1, 262: 1, 273: 1000, 277: 1, 278: 1, 279: 1000}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, count if tag in (273, 279) else 1, value) for tag, value in tags.items()
    )
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)).ljust(1000, b"\0") + bytes(4 * count)


IMAGES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 415, "0 bytes"),
    ("text", b"hello", 415, "5 bytes are not an image; allowed formats: PNG, JPEG"),
    ("half a png", PNG[: len(PNG) // 2], 415, "the PNG image is damaged"),
    ("half a jpeg", image_bytes("JPEG")[:1000], 415, "the JPEG image is damaged"),
    ("a pixel bomb", png_with_size(20_000, 20_000), 413, "20,000 x 20,000 pixels; the maximum is 50,000,000 in all"),
    ("a wide bomb", png_with_size(2**31 - 1, 1), 413, "2,147,483,647 x 1 pixels"),
    ("a tiff with a tile larger than it", tiff_with_tile_of(29_984), 413, "tiles of 899,040,256 pixels; the maximum is 16,777,216"),
    ("a tall image", png_with_size(1, 49_999_999), 413, "1 x 49,999,999 pixels; the maximum of a side is 65,535"),
    ("a tiff with 16,385 strips", tiff_with_strips(16_385), 413, "16,385 strips; the maximum is 16,384"),
    ("a tiff with 16 bits", save_image(Image.new("I;16", (9, 9)), "TIFF"), 415, "more than 8 bits per channel"),
    ("a tiff of floats", save_image(Image.new("F", (9, 9)), "TIFF"), 415, "more than 8 bits per channel"),
    ("a jpeg with a thousand scans", image_bytes("JPEG")[:-2] + b"\xff\xda\0\2" * 1000, 413, "scans; the maximum is 100"),
]  # fmt: skip

JSON: list[tuple[str, str, str | bytes, int, str | None, str]] = [
    (CONTINUE, "10^400 characters", '{"max_characters": 1%s}' % ("0" * 400), 400, "max_characters", ""),
    (CONTINUE, "half a surrogate", '{"prompt": "\\ud800"}', 400, None, "the body is not JSON"),
    (CONTINUE, "a long name", json.dumps({"a" * 10**5: 1}), 400, "a" * 100, "(100,000 characters)"),
    (CONTINUE, "a million line breaks", json.dumps({"prompt": "\n" * 100_001}), 400, "prompt", "(100,001 characters)"),
    (CONTINUE, "hostile version", '{"model": "tiny-rnn@²"}', 404, "model", "tiny-rnn@1"),
    (CONTINUE, "250,000 brackets", "[" * 250_000, 400, None, "the body is not JSON"),
    (CONTINUE, "250,000 objects", '{"a":' * 250_000, 400, None, ""),
    (CONTINUE, "a million names", "{" + ",".join(f'"a{i}":1' for i in range(10**5 + 5000)) + "}", 400, None, "values and names; the maximum is"),
    (FORECAST, "a million values", json.dumps({"values": [0] * 10**6}, separators=(",", ":")), 400, None, "999,999 commas, which separate values and names; the maximum is"),
    (SAMPLE, "a thousand fields", "{" + ",".join(f'"a{i}":1' for i in range(1000)) + "}", 400, "a0", "unknown field 'a0'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    from support.networks import TINY, publish_tiny
    from support.service import TEST, serving

    from app.settings import Settings

    folder = tmp_path_factory.mktemp("tiny") / "store"
    for name in TINY:
        publish_tiny(folder, name)
    with serving(Settings(store=folder, max_body_bytes=4 * 2**20, **TEST)) as client:
        yield client


@pytest.mark.parametrize("row", JSON, ids=[f"{row[0].split('/')[-1]}: {row[1]}" for row in JSON])
def test_an_invalid_body_is_rejected(service: httpx.Client, row: Any) -> None:
    path, _, content, status, param, sentence = row
    assert_rejected(service.post(path, content=content), status, param, sentence)
    assert_still_serves(service)


@pytest.mark.parametrize("row", IMAGES, ids=[row[0] for row in IMAGES])
def test_an_invalid_image_is_rejected(service: httpx.Client, row: Any) -> None:
    _, content, status, sentence = row
    answer = service.post(CLASSIFY, content=content, headers={"content-type": "image/png"})
    assert_rejected(answer, status, "body", sentence)
    assert_rejected(service.post(CLASSIFY, files={"file": ("a.png", content)}), status, "file", sentence)
    two = [("file", ("good.png", PNG)), ("file", ("a.png", content))]
    assert_rejected(service.post(CLASSIFY, files=two), status, "file.1", sentence)
    encoded = {"images": [base64.b64encode(each).decode() for each in (PNG, content)]}
    assert_rejected(service.post(CLASSIFY, json=encoded), status, "images.1", sentence)
    assert_still_serves(service)


@pytest.mark.parametrize(
    ("path", "limit"), [(CLASSIFY, 4 * 2**20), (CONTINUE, 2_665_536), (FORECAST, 2_665_536), (SAMPLE, 2_665_536)]
)
def test_a_body_over_the_limit_is_rejected_with_and_without_a_length(
    service: httpx.Client, path: str, limit: int
) -> None:
    announced = service.post(path, content=b" " * (limit + 1))
    assert_rejected(announced, 413, None, f"the body has {limit + 1:,} bytes; the maximum is {limit:,}")
    chunked = service.post(path, content=iter([b" " * limit, b" "]))
    assert_rejected(chunked, 413, None, f"more than {limit:,} bytes")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    form = service.post(path, content=(head if i == 0 else b" " * 2**16 for i in range(100)), headers=headers)
    form_limit = 4 * 2**20 if path == FORECAST else limit  # a form is a table
    assert_rejected(form, 413, None, f"more than {form_limit:,} bytes")
    assert_still_serves(service)


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
    admin_paths = (
        "/v1/admin/models/tiny-gan/activate",
        "/v1/admin/models/tiny-gan/retire",
        "/v2/repository/models/a/unload",
    )
    others = ("/v1/completions", "/v2/models/tiny-gan/infer", "/v2/repository/index", *admin_paths)
    paths = (CLASSIFY, CONTINUE, FORECAST, SAMPLE, *others)

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


def test_a_million_invalid_values_are_rejected_quickly(service: httpx.Client) -> None:
    bodies = [
        (b'{"values":[' + b",".join([b"true"] * 500_000) + b"]}", None),
        (b'{"values":[' + b",".join([b"[]"] * 800_000) + b"]}", None),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}", None),
        (b'{"values":[' + b",".join([b"true"] * 99_000) + b"]}", "values.0"),
        (b'{"values":[' + b",".join([b"[]"] * 99_000) + b"]}", "values"),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(99_000)) + b"}", None),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(1900)) + b"}", "k0"),
    ]
    for content, param in bodies:
        started = time.process_time()  # the service runs in this process
        assert_rejected(service.post(FORECAST, content=content), 400, param, "")
        assert time.process_time() - started < 5  # below 0.5 s on an idle machine
    assert_still_serves(service)
