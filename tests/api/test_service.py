"""The parts of the service beside the tasks: health, models, metrics, documentation, settings, and broken stores."""

from __future__ import annotations

import asyncio
import re
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.faults import Hold
from support.images import image_bytes
from support.networks import publish_tiny, rewrite_card
from support.processes import start_python
from support.responses import CLASSIFY, CONTINUE, PNG, SAMPLE, metric_samples
from support.service import TEST, Serve
from support.waiting import wait_until

from app import key_file
from app.api.middleware.shared_counters import SharedCounters
from app.main import create_app
from app.settings import Settings, SettingsError


def test_a_broken_version_is_listed_and_the_other_versions_serve(serve: Serve, tiny_store: Path) -> None:
    broken = publish_tiny(tiny_store, "tiny-gan").folder
    (broken / "model.safetensors").write_bytes(b"cut")
    rewrite_card(tiny_store / "tiny-cnn" / "1", sizes={"depth": 3})
    with serve() as client:
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        reasons = {f"{entry['model']}@{entry['version']}": entry["reason"] for entry in ready.json()["failed"]}
        assert re.fullmatch(r"tiny-gan/2/model\.safetensors: sha256 is .*", reasons["tiny-gan@2"])
        assert reasons["tiny-cnn@1"].startswith("tiny-cnn/1/card.json: sizes {'depth': 3} do not make a lenet")
        assert str(tiny_store) not in ready.text
        assert client.post(SAMPLE, json={"count": 1}).json()["version"] == 1
        model = client.get("/v1/models/tiny-cnn").json()
        assert (model["state"], model["failed"][0]["version"]) == ("failed", 1)
        answer = client.post(CLASSIFY, content=b"x")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert "do not make a lenet" in answer.json()["error"]["message"]
        answer = client.post("/v1/images/classify?model=tiny-cnn", content=b"x")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].endswith("; served models: tiny-gan, tiny-lstm, tiny-rnn")
        index = client.post("/v2/repository/index").json()
        assert {entry["reason"] for entry in index if entry["state"] == "UNAVAILABLE"} == {*reasons.values()}
        answer = client.get("/v2/models/tiny-cnn/ready")
        assert answer.status_code == 503
        assert answer.json()["error"].startswith(
            "model 'tiny-cnn' cannot be served: tiny-cnn/1/card.json: sizes {'depth': 3}"
        )


def test_an_empty_store_is_not_ready(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with serve(store=tmp_path / "empty") as client:
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["problems"]) == (503, ["no model in the store can be served"])
        assert ready.json()["ready"] is False
        assert client.get("/v1/models").json()["data"] == []


def test_a_hung_network_turns_readiness_off_and_then_liveness(serve: Serve, held: Hold) -> None:
    with (
        serve(unready_after_seconds=0.3, liveness_timeout_seconds=0.3, inline_seconds=0) as client,
        ThreadPoolExecutor(1) as caller,
    ):
        held.armed.set()
        answer = caller.submit(httpx.post, f"{client.base_url}/v1/images/sample", json={}, timeout=60)
        assert held.entered.wait(30)
        wait_until(lambda: client.get("/health/live").status_code == 503)
        ready = client.get("/health/ready")
        held.release.set()
        assert ready.status_code == 503
        assert "has not answered for" in ready.json()["problems"][0]
        assert answer.result().status_code == 200
        assert client.get("/health/ready").status_code == 200


def test_requests_of_disconnected_clients_count_as_499_and_leave_the_queue(serve: Serve, held: Hold) -> None:
    def send_request(client: httpx.Client) -> socket.socket:
        connection = socket.create_connection((client.base_url.host, client.base_url.port or 0))
        connection.sendall(b'POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{"count": 5}')
        return connection

    labels = ("model", "tiny-gan"), ("version", "1")
    with serve(inline_seconds=0) as client, ThreadPoolExecutor(1) as pool:
        before = client.post(SAMPLE, json={"count": 3, "seed": 1}).json()
        held.armed.set()
        running = send_request(client)
        assert held.entered.wait(30)
        waiting = send_request(client)
        wait_until(lambda: metric_samples(client)["quartet_queued_rows", *labels] == 5)
        other = pool.submit(client.post, SAMPLE, json={"count": 3, "seed": 1})
        wait_until(lambda: metric_samples(client)["quartet_queued_rows", *labels] == 8)
        for connection in (running, waiting):
            connection.close()
        disconnected = ("quartet_requests_total", ("method", "POST"), ("route", SAMPLE), ("status", "499"))
        wait_until(lambda: metric_samples(client).get(disconnected, 0) == 2)
        wait_until(lambda: metric_samples(client)["quartet_queued_rows", *labels] == 3)
        held.release.set()
        assert other.result().json() == before
        assert held.batches == [6, 4]  # with padding; the waiting request was not computed


def test_a_client_cannot_extend_the_deadline_beyond_the_setting(serve: Serve) -> None:
    with serve(request_seconds=0.02) as client:
        body = {"prompt": "a", "max_characters": 4000, "n": 16}
        longer = {"x-request-timeout": "100"}
        for headers in ({}, longer):  # the header cannot extend the deadline
            assert client.post(CONTINUE, json=body, headers=headers).status_code == 504


def test_every_response_has_a_request_id(serve: Serve) -> None:
    with serve() as client:
        assert client.get("/health/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        for hostile in ("a b", "x" * 500, "é"):
            answer = client.get("/nothing", headers={"x-request-id": hostile.encode()})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
            assert abs(int(answer.headers["x-request-id"][:12], 16) - time.time() * 1000) < 60_000


class FailingCounters(SharedCounters):
    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise RuntimeError("secret")


@pytest.mark.anyio
async def test_an_unexpected_error_gives_500_without_its_details(tiny_store: Path, tmp_path: Path) -> None:
    key = key_file.add(tmp_path / "keys", "alice", "1/minute")
    settings = Settings(store=tiny_store, keys_file=tmp_path / "keys", cors_origins="https://a.example", **TEST)
    app = create_app(settings, FailingCounters(slots=1))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        for path in ("/v1/models", "/v2"):
            for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
                answer = await client.get(path, headers={"origin": origin, "x-api-key": key})
                assert answer.status_code == 500
                error = answer.json()["error"]
                assert answer.headers["x-request-id"] in (error if path == "/v2" else error["message"])
                assert "secret" not in answer.text
                assert answer.headers.get("access-control-allow-origin") == allowed


def test_an_incomplete_request_gets_503_when_the_service_stops(serve: Serve) -> None:
    with serve(cors_origins="https://a.example") as client:
        caller = socket.create_connection((client.base_url.host, client.base_url.port or 0))
        headers = b"Host: x\r\nOrigin: https://a.example\r\nContent-Length: 10\r\n\r\n"
        caller.sendall(b"POST /v1/images/sample HTTP/1.1\r\n" + headers + b"{")
        assert client.get("/health/live").status_code == 200  # the request above has started by now
    with caller, caller.makefile("rb") as answer:
        content = answer.read()
    assert content.startswith(b"HTTP/1.1 503 ")
    assert b"the service stopped before it could answer" in content
    assert b"access-control-allow-origin: https://a.example\r\n" in content


def test_the_default_number_of_images_keeps_to_its_limit(serve: Serve) -> None:
    with serve(max_samples=2) as client:
        assert len(client.post(SAMPLE, json={}).json()["results"]) == 2


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("QUARTET_PORT", "http", "QUARTET_PORT is 'http': input should be a valid integer"),
        ("QUARTET_MAX_PIXELS", "0", "QUARTET_MAX_PIXELS is '0': input should be greater than or equal to 1"),
        ("QUARTET_THREADS", "1025", "QUARTET_THREADS is '1025': input should be less than or equal to 1024"),
        ("QUARTET_REQUEST_SECONDS", "nan", "QUARTET_REQUEST_SECONDS is 'nan'"),
        ("QUARTET_MAX_TEXTS", "9", "QUARTET_MAX_TEXTS is now a limit; set QUARTET_LIMITS='{\"max_texts\": 9}' instead"),
        ("QUARTET_STORE", "", "QUARTET_STORE is '': the path should not be empty"),
        (
            "QUARTET_MAX_BUFFERED_BYTES",
            "50000",
            "QUARTET_MAX_BODY_BYTES is 33554432: the maximum is 50000, the value of QUARTET_MAX_BUFFERED_BYTES",
        ),
        ("QUARTET_DEVICE", "cuda:01", "QUARTET_DEVICE is 'cuda:01'"),
        ("QUARTET_DEVICE", "cuda:\u0663", "QUARTET_DEVICE is 'cuda:\u0663'"),
        ("QUARTET_DEVCE", "cpu", "QUARTET_DEVCE is not a setting; did you mean QUARTET_DEVICE?"),
        ("quartet_port", "9000", "quartet_port is not a setting; did you mean QUARTET_PORT?"),
        ("QUARTET_FOO", "1", "QUARTET_FOO is not a setting; known settings: QUARTET_ADMIN_KEY, "),
    ],
)
def test_an_invalid_setting_is_rejected_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as rejection:
        Settings()
    assert sentence in str(rejection.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("QUARTET_SERVICE_PORT", "80"),
        ("QUARTET_PORT_80_TCP", "tcp://10.0.0.2:80"),
        ("QUARTET_PREDICTOR_PORT_53_UDP_PROTO", "udp"),
    ],
)
def test_variables_that_kubernetes_sets_for_a_service_are_explained(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=rf"^{variable} is not a setting: .* set enableServiceLinks to false"):
        Settings()


def test_the_largest_limits_are_accepted(tiny_store: Path) -> None:
    names = [name for name, field in Settings.model_fields.items() if "le=1000000000000" in repr(field)]
    assert len(names) == 5
    settings = Settings(store=tiny_store, threads=1, **dict.fromkeys(names, 10**12))
    assert create_app(settings).openapi()


@pytest.mark.parametrize(
    ("options", "settings", "sentences"),
    [
        ((), {"QUARTET_PORT": "x"}, ["QUARTET_PORT is 'x'"]),
        ((), {"QUARTET_STORE": "none"}, ["there is no such folder"]),
        (("--port", "8111"), {}, ["usage: QUARTET_PORT=8111 quartet serve", "unrecognized arguments: --port 8111"]),
    ],
)
def test_an_invalid_start_gives_one_message_and_no_traceback(
    options: tuple[str, ...], settings: dict[str, str], sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    with tempfile.TemporaryFile("w+") as file:
        process = start_python(["-m", "app.main", *options], output=file)
        process.join()
        file.seek(0)
        output = file.read()
    assert process.exitcode
    assert all(sentence in output for sentence in sentences)
    assert "Traceback" not in output


@pytest.mark.slow
def test_no_callback_blocks_the_event_loop_for_50_ms(serve: Serve) -> None:
    """The test measures the processor time of the event loop between two callbacks that are 1 ms apart.

    Other processes may pause this process, so the second of two attempts counts as well.
    """
    times: list[float] = []

    def measure(loop: asyncio.AbstractEventLoop, before: float) -> None:
        now = time.thread_time()
        times.append(now - before)
        loop.call_later(0.001, measure, loop, now)

    async def start_to_measure() -> None:
        measure(asyncio.get_running_loop(), time.thread_time())

    photo = image_bytes("JPEG", size=(2000, 1500))
    requests: list[tuple[str, dict[str, Any]]] = [
        (CLASSIFY, {"content": photo}),
        (CLASSIFY, {"files": [("file", ("x.png", PNG))] * 16}),
        (CONTINUE, {"json": {"prompt": "a" * 30_000, "max_characters": 20}}),
        (CONTINUE, {"json": {"prompt": "a", "max_characters": 100, "n": 16, "stream": True}}),
        ("/v1/series/forecast", {"json": {"values": [[0.5, -1.25] * 700] * 64, "horizon": 500}}),
        (SAMPLE, {"json": {"count": 1024}}),
    ]
    with serve(start_to_measure) as client:
        for path, body in requests:
            longest = []
            for _ in range(2):
                times.clear()
                client.post(path, **body).raise_for_status()
                longest.append(max(times))
            assert min(longest) < 0.05, path


BODY = b'{"prompt": "a", "max_characters": 4000, "n": 16}'
HEAD = b"POST /v1/text/continue HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)


@pytest.mark.parametrize("pipelined", [b"", HEAD + BODY])
def test_a_disconnect_after_a_body_in_two_parts_ends_the_request(serve: Serve, pipelined: bytes) -> None:
    with serve() as client:
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as caller:
            caller.sendall(HEAD + BODY[:1])
            wait_until(lambda: metric_samples(client)["quartet_requests_running",] >= 2)
            caller.sendall(BODY[1:] + pipelined)
            queued = ("quartet_queue_seconds_count", ("model", "tiny-rnn"), ("version", "1"))
            wait_until(lambda: metric_samples(client).get(queued, 0) >= 16)
        disconnected = ("quartet_requests_total", ("method", "POST"), ("route", CONTINUE), ("status", "499"))
        wait_until(lambda: disconnected in metric_samples(client))


@pytest.mark.anyio
async def test_a_proxy_may_serve_the_application_under_a_path(tiny_store: Path, tmp_path: Path) -> None:
    key_file.add(tmp_path / "keys", "alice")
    app = create_app(Settings(store=tiny_store, keys_file=tmp_path / "keys", **TEST))
    transport = httpx.ASGITransport(app, root_path="/q")
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://a") as client:
        assert (await client.get("/q/health/live")).status_code == 200
        models_v2 = await client.get("/q/v2/models")
        assert (models_v2.status_code, list(models_v2.json())) == (401, ["error"])
        assert isinstance(models_v2.json()["error"], str)
        assert (await client.get("/q/v1/models")).json()["error"]["code"] == "missing_api_key"
        assert (await client.get("/q/openapi.json")).json()["servers"] == [{"url": "/q"}]
