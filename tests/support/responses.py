"""Requests to the native endpoints, and checks of responses."""

from __future__ import annotations

import socket
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from support.images import image_bytes
from support.service import ROOT


def metric_samples(client: httpx.Client) -> dict[tuple[object, ...], float]:
    """Return the values at /metrics by metric name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def captures(client: httpx.Client, model: str, result: str) -> float:
    """Return the number of requests to a model that were captured with a result, such as ``stored``."""
    return metric_samples(client).get(("quartet_captured_requests_total", ("model", model), ("result", result)), 0)


def ask(client: httpx.Client, request_id: str, path: str, **body: Any) -> httpx.Response:
    """Send a request with an id that must succeed."""
    headers = {"x-request-id": request_id} | body.pop("headers", {})
    return client.post(path, headers=headers, **body).raise_for_status()


RUNNING_TEXTS = ("quartet_running_rows", ("model", "tiny-rnn"), ("version", "1"))

ADMIN_KEY = "k" * 32

ADMIN_HEADERS = {"authorization": f"Bearer {ADMIN_KEY}"}

CLASSIFY, CONTINUE = "/v1/images/classify", "/v1/text/continue"

FORECAST, SAMPLE = "/v1/series/forecast", "/v1/images/sample"

PNG = image_bytes()

SERIES = [float(i % 7) for i in range(20)]


def assert_rejected(answer: httpx.Response, status: int, param: str | None, sentence: str) -> None:
    """Check that an answer is an error with this status, this ``param`` and a message that contains ``sentence``."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["param"] == param, error
    assert sentence in error["message"]
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 600


def assert_still_serves(client: httpx.Client) -> None:
    assert client.post(CLASSIFY, content=PNG).status_code == 200
    assert client.post(CONTINUE, json={"prompt": "abc", "max_characters": 3}).status_code == 200
    assert client.post(FORECAST, json={"values": SERIES}).status_code == 200
    assert client.post(SAMPLE, json={"count": 1}).status_code == 200
    tensor = {"name": "values", "datatype": "FP64", "shape": [1, len(SERIES)], "data": SERIES}
    assert client.post("/v2/models/tiny-lstm/infer", json={"inputs": [tensor]}).status_code == 200
    assert client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3}).status_code == 200


def send_raw(client: httpx.Client, request: bytes) -> bytes:
    """Send bytes and return the response.

    The response ends when the service closes the connection, or when a JSON body is complete.
    """
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.settimeout(30)
        connection.sendall(request)
        received = b""
        while not (b"\r\n\r\n" in received and received.endswith(b"}")) and (chunk := connection.recv(65536)):
            received += chunk
        return received


HOSTILE_NAMES = [
    "../etc/passwd", "..\\..\\windows", "/etc/passwd", "tiny-rnn\0", "tiny-rnn\n", " tiny-rnn", "TINY-RNN", "tiny‐rnn",
    "tіny-rnn", "tiny-rnn@", "tiny-rnn@-1", "tiny-rnn@1@1", "tiny-rnn@١", "tiny-rnn@" + "9" * 150, "@1", "%2e%2e%2f",
    "", ".", "CON", "defaults.json", "tiny-rnn/1", "😀" * 50,
]  # fmt: skip


def assert_harmless(answer: httpx.Response) -> None:
    """Check that the status of an answer is below 500, and that the answer shows no internal details.

    An error must have the documented schema.
    """
    assert answer.status_code < 500, answer.text
    for leak in (str(ROOT), "site-packages", "Traceback", "/tmp/", ".py"):
        assert leak not in answer.text.replace("/v1/", "")
    if answer.status_code >= 400 and answer.request.url.path.startswith("/v2/"):
        assert list(answer.json()) == ["error"]
        assert len(answer.json()["error"]) < 700
    elif answer.status_code >= 400:
        assert sorted(answer.json()["error"]) == ["code", "message", "param", "type"]
        assert len(answer.json()["error"]["message"]) < 700
