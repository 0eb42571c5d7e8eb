"""Metrics, logs and traces of one process and of several."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support.faults import Fault, raising
from support.networks import publish_tiny
from support.responses import CLASSIFY, CONTINUE, PNG, SAMPLE, metric_samples, send_raw
from support.service import ROOT, Serve
from support.waiting import wait_until

from app.observability.access_log import AccessLog
from app.observability.logs import JsonFormatter
from app.observability.metrics import Metrics
from app.observability.middleware import RequestTelemetry
from app.observability.tracing import create_tracer
from app.settings import Settings, SettingsError

# Bytes of tiny-gan: its layers have 4 latents, 8 hidden units and 28 x 28 pixels.
SIZE = 4 * (4 * 8 + 8 + 8 * 784 + 784)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def labels(model: str, version: int = 1) -> tuple[tuple[str, str], ...]:
    return (("model", model), ("version", str(version)))


def test_time_to_first_token_and_inter_token_time_are_measured(serve: Serve) -> None:
    with serve() as client:
        for body in ({"max_characters": 40, "n": 3}, {"max_characters": 1, "stream": True}):
            assert "error" not in client.post(CONTINUE, json={"prompt": "abc", **body}).raise_for_status().text
        samples = metric_samples(client)
    assert samples["quartet_time_to_first_token_seconds_count", *labels("tiny-rnn")] == 4
    assert samples["quartet_inter_token_seconds_count", *labels("tiny-rnn")] == 3  # a text of one character has no gap
    request_labels = ("method", "POST"), ("route", CONTINUE), ("status", "200")
    assert (
        0
        < samples["quartet_inter_token_seconds_sum", *labels("tiny-rnn")]
        < samples["quartet_request_seconds_sum", *request_labels]
    )


def test_loaded_bytes_are_measured_by_version(serve: Serve, tiny_store: Path) -> None:
    with serve(store_poll_seconds=0.02) as client:
        size = metric_samples(client)["quartet_loaded_bytes", *labels("tiny-gan")]
        assert size == SIZE
        newer = publish_tiny(tiny_store, "tiny-gan").folder
        wait_until(lambda: metric_samples(client).get(("quartet_loaded_bytes", *labels("tiny-gan", 2))) == size)
        wait_until(lambda: metric_samples(client)["quartet_versions", ("state", "ready")] == 5)  # reported later
        assert metric_samples(client)["quartet_failures_total", *labels("tiny-gan")] == 0
        newer.rename(tiny_store / ".gone")
        wait_until(lambda: ("quartet_loaded_bytes", *labels("tiny-gan", 2)) not in metric_samples(client))
        assert metric_samples(client)["quartet_versions", ("state", "ready")] == 4


def test_a_request_is_counted_before_its_answer_is_complete() -> None:
    """So no count is lost if the process ends right after the answer."""
    metrics, counts = Metrics(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        for more_body in (True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more_body})

    async def send(message: Any) -> None:
        sample_labels = {"route": "unknown", "method": "GET", "status": "200"}
        counts.append(metrics.registry.get_sample_value("quartet_requests_total", sample_labels) or 0)

    telemetry = RequestTelemetry(app, metrics, AccessLog(), lambda error, path: app)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(telemetry(scope, no_message, send))
    asyncio.run(telemetry(scope, no_message, send))
    assert counts == [0, 0, 1, 1, 1, 2]


async def no_message() -> Any:
    raise AssertionError


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Return a function that returns the JSON lines of the access log, after the service has stopped."""
    logging.getLogger("quartet.access").setLevel(logging.INFO)
    yield lambda: [line for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    logging.getLogger("quartet.access").setLevel(logging.NOTSET)


def test_the_access_log_can_be_json(serve: Serve, lines: Any) -> None:
    with serve(log_format="json") as client:
        client.post(f"{CLASSIFY}?model=tiny-cnn", files=[("file", ("x.png", PNG))] * 3)
        client.post(CONTINUE, json={"prompt": "a", "max_characters": 5, "n": 2}, headers={"x-request-id": "mine"})
        client.post(SAMPLE, json={"count": 0})
        client.get("/odd%20path/%C3%A9%22%0A")
    entries = {line["path"]: line for line in map(json.loads, lines())}
    image, text, rejected = entries[CLASSIFY], entries[CONTINUE], entries[SAMPLE]
    assert (image["model"], image["version"], image["rows"], image["status"]) == ("tiny-cnn", 1, 3, 200)
    assert re.fullmatch("[0-9a-f]{32}", image["id"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", image["time"])
    assert 0 <= image["queue_seconds"] < image["seconds"]
    assert 0 < image["compute_seconds"] < image["seconds"]
    assert (text["id"], text["model"], text["rows"]) == ("mine", "tiny-rnn", 2)
    assert 0 < text["time_to_first_token_seconds"] <= text["queue_seconds"] + text["compute_seconds"] + 0.001
    assert (rejected["status"], rejected["reason"], "model" in rejected) == (400, "invalid_value", False)
    assert '/odd path/é"\n' in entries


def test_a_failed_request_is_logged_with_its_model_and_counted_as_failed(
    serve: Serve, lines: Any, faults: dict[str, Fault]
) -> None:
    with serve(log_format="json") as client:
        faults["sample"] = raising(ValueError("the network fails"))
        client.post(SAMPLE, json={"count": 3})
        del faults["sample"]
        for label in ("wrong", None):
            client.post(SAMPLE, json={"count": 3, "label": label})
        ((stats,),) = client.get("/v2/models/tiny-gan/stats").json().values()
        samples = metric_samples(client)
    entry, wrong, _ = [entry for entry in map(json.loads, lines()) if entry.get("path") == SAMPLE]
    assert (entry["model"], entry["version"], entry["rows"]) == ("tiny-gan", 1, 3)
    assert (entry["status"], entry["reason"], "compute_seconds" in entry) == (500, "inference_failed", False)
    assert 0 <= entry["queue_seconds"] < entry["seconds"]
    assert (wrong["model"], wrong["version"], wrong["status"], "rows" in wrong) == ("tiny-gan", 1, 400, False)
    counts = {name: stats["inference_stats"][name]["count"] for name in ("success", "fail", "queue")}
    assert counts == {"success": 1, "fail": 2, "queue": 2}
    labels = ("model", "tiny-gan"), ("result", "invalid_value"), ("version", "1")
    assert samples["quartet_version_request_seconds_count", *labels] == 1


@pytest.mark.parametrize(
    ("rest", "status", "reason", "own_id"),
    [
        (b"ZZ\r\n", 400, "invalid_value", ""),
        (b"0\r\n" + b"x: y\r\n" * 3000, 431, "head_too_large", "x-request-id: mine\r\n"),
    ],
    ids=["chunk", "trailers"],
)
def test_a_request_whose_body_is_not_http_is_recorded_with_the_id_and_status_of_its_answer(
    serve: Serve, lines: Any, rest: bytes, status: int, reason: str, own_id: str
) -> None:
    head = f"POST {SAMPLE} HTTP/1.1\r\nHost: x\r\n{own_id}Transfer-Encoding: chunked\r\n\r\n".encode()
    with serve(log_format="json") as client:
        answers = [send_raw(client, head + rest).decode()]  # before the request runs
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), 30) as connection:
            connection.sendall(head)
            wait_until(lambda: metric_samples(client)["quartet_requests_running",] >= 2)
            connection.sendall(rest)
            answers.append(connection.recv(65536).decode())
        count = ("quartet_requests_total", ("method", "POST"), ("route", SAMPLE), ("status", str(status)))
        wait_until(lambda: metric_samples(client).get(count) == 2)
    ids = [re.findall(r"\r\nx-request-id: (\S+)\r\n", answer)[0] for answer in answers]
    assert (ids == ["mine", "mine"]) == bool(own_id)
    entries = [entry for entry in map(json.loads, lines()) if entry.get("path") == SAMPLE]
    assert [(entry["id"], entry["status"], entry["reason"]) for entry in entries] == [
        (request_id, status, reason) for request_id in ids
    ]


def test_other_log_records_are_json_with_their_traceback() -> None:
    try:
        raise ValueError("zwölf\n")
    except ValueError:
        record = logging.LogRecord("quartet", logging.ERROR, "", 0, "%s failed", ("request",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("ERROR", "quartet", "request failed")
    assert "ValueError: zwölf" in entry["traceback"]


def test_an_unknown_log_format_or_endpoint_is_rejected() -> None:
    for settings in ({"log_format": "xml"}, {"otlp_endpoint": "localhost:4318"}):
        with pytest.raises(SettingsError, match=r"QUARTET_(LOG_FORMAT|OTLP_ENDPOINT) is"):
            Settings(**settings)  # type: ignore[arg-type]


class Collector(ThreadingHTTPServer):
    """An OTLP collector that stores the received spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service = ""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                    collector.service = names["service.name"]
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}


def test_requests_queueing_computation_and_batches_are_traced(serve: Serve, collector: Collector) -> None:
    with serve(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}") as client:
        answer = client.post(SAMPLE, json={"count": 4}, headers={"traceparent": PARENT})
        traceparent = answer.headers["traceparent"].split("-")
        assert traceparent[:2] == PARENT.split("-")[:2]
        assert traceparent[2] != PARENT.split("-")[2]
        client.post(
            CONTINUE, json={"prompt": "a", "max_characters": 30, "n": 2}, headers={"traceparent": PARENT[:-1] + "0"}
        )
        other = client.post(CONTINUE, json={"prompt": "a", "max_characters": 30, "n": 2})
        assert other.headers["traceparent"].split("-")[1] != traceparent[1]
        client.post(SAMPLE, json={"count": 0})
    assert collector.service == "quartet"
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == traceparent[1]}
    assert set(spans) == {f"POST {SAMPLE}", "queue", "compute"}  # the unsampled request has no spans
    request = spans[f"POST {SAMPLE}"]
    assert (request.span_id.hex(), request.parent_span_id.hex()) == (traceparent[2], PARENT.split("-")[2])
    fields = attributes(request)
    assert (fields["http.response.status_code"], fields["quartet.model"], fields["quartet.rows"]) == (
        200,
        "tiny-gan",
        4,
    )
    for name in ("queue", "compute"):
        assert spans[name].parent_span_id == request.span_id
    assert spans["queue"].end_time_unix_nano == spans["compute"].start_time_unix_nano
    # The times come from two clocks, which differ slightly.
    assert request.start_time_unix_nano <= spans["queue"].start_time_unix_nano + 1_000_000
    (batch,) = [span for span in collector.spans if span.span_id == spans["compute"].links[0].span_id]
    assert batch.name == "batch"
    assert [link.span_id for link in batch.links] == [request.span_id]
    texts = [
        span for span in collector.spans if span.name == "batch" and attributes(span)["quartet.model"] == "tiny-rnn"
    ]
    assert [attributes(span)["quartet.rows"] for span in texts] == [2]
    rejected = [attributes(span) for span in collector.spans if attributes(span).get("error.type")]
    assert [fields["error.type"] for fields in rejected] == ["invalid_value"]


def test_an_invalid_tracestate_of_a_client_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise clients could write control characters to the log."""
    tracer = create_tracer("http://127.0.0.1:9")
    assert tracer
    for state in (b"a=1", b"forged", b"a" * 9000, b"x\x852026-11-29 06:00:00"):
        span, traceparent = tracer.begin("GET", [(b"traceparent", PARENT.encode()), (b"tracestate", state)])
        assert traceparent.decode()[:36] == PARENT[:36]
        assert dict(span.get_span_context().trace_state) == ({"a": "1"} if state == b"a=1" else {})
    tracer.close()
    assert caplog.messages == []


@pytest.mark.slow
def test_without_a_collector_opentelemetry_is_not_imported(serve: Serve) -> None:
    code = "import sys, app.main; app.main.create_app(); print('opentelemetry.sdk' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "False"
    with serve() as client:
        assert "traceparent" not in client.get("/health/live", headers={"traceparent": PARENT}).headers
    assert create_tracer("") is None


def test_tracing_without_opentelemetry_gives_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"needs the extra \[tracing\]"):
        create_tracer("http://localhost:4318")
