"""Invalid methods, headers, paths and forms are rejected. After each of them, a valid request succeeds."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from support.responses import (
    ADMIN_HEADERS,
    ADMIN_KEY,
    CLASSIFY,
    CONTINUE,
    HOSTILE_NAMES,
    PNG,
    SAMPLE,
    assert_harmless,
    assert_rejected,
    assert_still_serves,
    metric_samples,
    send_raw,
)
from support.service import Serve
from support.waiting import wait_until

POST = b"POST /v1/images/sample HTTP/1.1\r\nHost: x\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
RAW: dict[str, bytes] = {
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a length of almost 2^63": POST + b"Content-Length: 9223372036854775807\r\n\r\n",
    "a length that looks like digits": POST + b"Content-Length: \xb2\r\n\r\n",
    "a chunk that overflows": POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    "an unknown encoding": POST + b"Transfer-Encoding: gzip\r\n\r\n",
    "a header with NUL": LIVE + b"x-a: a\0b\r\n\r\n",
    "an unknown HTTP version": b"GET /health/live HTTP/9.9\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
    "an unknown method": b"BREW /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "another host's address": b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\n\r\n",
    "a query of bytes": b"GET /nothing?\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    **{
        path: b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode("latin-1")
        for path in (
            "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/v1/models/\xff\xfe", "/v1/models/a%0d%0ab",
            "/v1/models/" + "a" * 10_000, "/v1/models/%zz", "/docs/../v1", "/health/ live",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RAW, ids=lambda name: name[:40])
def test_a_malformed_request_gets_a_4xx_with_the_documented_schema(tiny: httpx.Client, name: str) -> None:
    answer = send_raw(tiny, RAW[name])
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    assert 400 <= status < 500, answer[:300]
    assert b"\r\nx-content-type-options: nosniff" in head.lower()
    assert sorted(json.loads(body)["error"]) == ["code", "message", "param", "type"]
    assert_still_serves(tiny)


def test_hostile_headers_are_harmless(tiny: httpx.Client) -> None:
    hostile: list[dict[str, bytes]] = [
        {"content-type": b"\xff\xfe"}, {"content-type": b"multipart/form-data; boundary=" + b"x" * 9000},
        {"content-type": b"multipart/form-data; boundary=\xff"}, {"content-type": b"multipart/form-data; boundary=\"x"},
        {"accept": b"image/png;q=" + b"9" * 1000}, {"accept": b"," * 5000}, {"x-request-timeout": b"1e400"}, {"content-encoding": b"\xff"}, {"expect": b"100-continue"},
        {"range": b"bytes=0-18446744073709551615"}, {"upgrade": b"h2c", "connection": b"Upgrade, HTTP2-Settings"},
        {"x-request-id": b"\xc3\xa9"}, {"connection": b"close, keep-alive, x-request-id"},
    ]  # fmt: skip
    for headers in hostile:
        for path, body in ((CLASSIFY, PNG), (CONTINUE, b'{"max_characters":1}'), (SAMPLE, b'{"count":1}')):
            assert_harmless(tiny.post(path, content=body, headers=list(headers.items())))
        assert_harmless(tiny.get("/v1/models", headers=list(headers.items())))
    assert_still_serves(tiny)


FORM = {"content-type": "multipart/form-data; boundary=x"}


def form(name: bytes, filename: bytes, content: bytes = PNG, parameters: bytes = b"") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="%s"%s\r\n\r\n' % (name, filename, parameters)
    return head + content + b"\r\n--x--\r\n"


def test_a_hostile_filename_is_harmless(tiny: httpx.Client) -> None:
    valid = (b"../../etc/passwd", b"C:\\x.png", b"\xff\xfe", "é😀.png".encode(), b"<script>", b"x;y=z", b" ")
    for name in (*valid, b"a" * 5000):
        answer = tiny.post(CLASSIFY, content=form(b"file", name), headers=FORM)
        assert_harmless(answer)
        assert answer.status_code == (200 if name in valid else 400), name
    assert_still_serves(tiny)


def form_type(charset: str) -> tuple[str, str]:
    return "content-type", f"multipart/form-data; boundary=x; charset={charset}"


def test_a_form_may_state_the_charset_utf_8(tiny: httpx.Client) -> None:
    for charset in ("utf-8", '"UTF-8"', "us-ascii"):
        answer = tiny.post(CLASSIFY, content=form(b"file", b"a.png"), headers=[form_type(charset)])
        assert answer.json()["results"][0]["filename"] == "a.png"


def test_malformed_forms_are_harmless(tiny: httpx.Client) -> None:
    valid = form(b"file", b"a.png")
    bodies = [
        valid[:60], b"--x" * 20_000, b"--x\r\n" * 20_000 + b"--x--", b"--x\r\n" + b"a: b\r\n" * 5000 + b"\r\n\r\n--x--\r\n",
        form(b"file", b"a", parameters=b"; " + b"y" * 50_000), form(b"file\0", b"a.png"), valid * 3,
        valid.replace(b"form-data", b"attachment"), b"--x\r\n\r\n" + PNG + b"\r\n--x--\r\n",
        form(b"file", b"a.png", parameters=b"\r\nContent-Type: text/html; charset=nonsense"),
        b'--x\r\nContent-Disposition: form-data; name="_charset_"\r\n\r\nnonsense\r\n' + valid,
    ]  # fmt: skip
    for body in bodies:
        assert_harmless(tiny.post(CLASSIFY, content=body, headers=FORM))
    two = valid.removesuffix(b"--x--\r\n") + valid
    assert len(tiny.post(CLASSIFY, content=two, headers=FORM).json()["results"]) == 2
    answer = tiny.post(CLASSIFY, content=two[:-9], headers=FORM)  # the client ended the body too early
    assert_rejected(answer, 400, None, "the closing boundary is missing")
    assert_still_serves(tiny)


def test_requests_rejected_by_the_http_parser_are_counted(tiny: httpx.Client) -> None:
    def count(status: str) -> float:
        key = ("quartet_requests_total", ("method", "OTHER"), ("route", "unknown"), ("status", status))
        return metric_samples(tiny).get(key, 0.0)

    before = count("400"), count("431")
    assert send_raw(tiny, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert send_raw(tiny, b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000).startswith(b"HTTP/1.1 431")
    assert (count("400"), count("431")) == (before[0] + 1, before[1] + 1)


@pytest.fixture
def admin_client(serve: Serve) -> Iterator[httpx.Client]:
    """Start a service with all routes, and yield a client that sends the admin key."""
    with serve(admin_key=ADMIN_KEY) as client:
        client.headers.update(ADMIN_HEADERS)
        yield client


def test_hostile_names_and_wrong_methods_are_harmless_on_every_path(admin_client: httpx.Client) -> None:
    paths = admin_client.get("/openapi.json").json()["paths"]
    with_name = [path for path in paths if "{" in path]
    assert {path.split("/")[1:3][-1] for path in with_name} >= {"models", "admin", "repository"}
    for path in with_name:
        for name in HOSTILE_NAMES:
            for method in paths[path]:
                concrete_path = re.sub(r"\{\w+\}", quote(name, safe=""), path)
                answer = admin_client.request(method.upper(), concrete_path, content=b"{}")
                assert_harmless(answer)
                if name.strip("./"):
                    assert answer.status_code in (400, 404, 405, 409), (method, concrete_path, answer.text)
    for path, methods in paths.items():
        for method in {"get", "put", "post", "patch", "delete"} - set(methods):
            answer = admin_client.request(method.upper(), path.replace("{name}", "tiny-rnn").replace("{file}", "x.png"))
            assert answer.status_code in (404, 405), (method, path, answer.text)
    assert_still_serves(admin_client)


def test_a_disconnect_during_a_body_counts_as_499_and_frees_its_memory(serve: Serve) -> None:
    with serve(max_buffered_bytes=50_000, max_body_bytes=50_000) as client:
        disconnected = ("quartet_requests_total", ("method", "POST"), ("route", CLASSIFY), ("status", "499"))
        for time in range(1, 4):
            with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
                head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: x\r\nContent-Length: 45000\r\n\r\n"
                connection.sendall(head.encode() + bytes(40_000))
                # This request and the one for /metrics are running.
                wait_until(lambda: metric_samples(client)["quartet_requests_running",] >= 2)
            wait_until(lambda time=time: metric_samples(client).get(disconnected, 0) == time)
        answer = client.post(CLASSIFY, content=PNG + bytes(40_000))  # the incomplete bodies were released, so it fits
        assert answer.status_code == 200, answer.text
