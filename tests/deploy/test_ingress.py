"""The Ray ingress checks keys and limits bodies before it forwards a request, and finds the task of a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Scope
from support.disk import WatchedDisk
from support.networks import publish_tiny

from app.key_file import add
from app.main import create_app
from app.settings import Settings
from app.store import Store, TaskName
from deploy.forward import ForwardedResponse
from deploy.ingress import IngressApp, ModelTasks, task_of_path

pytestmark = pytest.mark.anyio
SAMPLE = "/v1/images/sample"
ADMIN = "the-admin-key-of-the-test"


class Replica:
    """A stub of a replica that answers every request, and records its task, path and body size."""

    def __init__(self) -> None:
        self.requests: list[tuple[str | None, str, int]] = []
        self.release = asyncio.Event()
        self.release.set()

    def forward_to(self, task: TaskName | None, max_body_bytes: int) -> ASGIApp:
        def call(scope: Scope, body: bytes) -> Any:
            self.requests.append((task, scope["path"], len(body)))
            return Answer(self.release)

        return ForwardedResponse(call, max_body_bytes, 30.0, (), OSError)


class Answer:
    def __init__(self, release: asyncio.Event) -> None:
        self.release = release

    async def __aiter__(self) -> AsyncIterator[list[Any]]:
        await self.release.wait()
        yield [{"type": "http.response.start", "status": 200, "headers": []}]
        yield [{"type": "http.response.body", "body": b"answer"}]

    def cancel(self) -> None: ...


def client(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError("the body was read before the key was checked")
    yield b""


async def test_a_key_is_checked_before_the_body_is_read(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    key, replica = add(tmp_path / "keys", "alice"), Replica()
    settings = Settings(store=tmp_path / "store", keys_file=tmp_path / "keys", admin_key=ADMIN)
    metrics = PlainTextResponse("metrics")
    async with client(IngressApp(settings, replica.forward_to, {"/metrics": metrics})) as through:
        for path in (SAMPLE, "/metrics", "/v1/admin/import", "/v2/repository/models/x/load"):
            for headers in ({}, {"authorization": "Bearer other"}):
                answer = await through.post(path, content=unread(), headers=headers)
                assert answer.status_code == 401
                assert ("admin key" in answer.text) == path.startswith(("/v1/admin", "/v2/repository"))
        assert (await through.post("/v1/admin/import", content=unread(), headers=bearer(key))).status_code == 401
        assert replica.requests == []

        assert (await through.post(SAMPLE, content=b"123", headers=bearer(key))).text == "answer"
        assert (await through.post(SAMPLE, content=b"1", headers={"x-api-key": key})).text == "answer"
        assert (await through.get("/metrics", headers=bearer(key))).text == "metrics"
        assert (await through.post("/v1/admin/import", content=b"12", headers=bearer(ADMIN))).text == "answer"
        assert (await through.get("/health/ready")).text == "answer"
    assert replica.requests == [
        ("sample", SAMPLE, 3),
        ("sample", SAMPLE, 1),
        (None, "/v1/admin/import", 2),
        (None, "/health/ready", 0),
    ]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_bodies_are_limited_each_and_together(tmp_path: Path) -> None:
    replica = Replica()
    settings = Settings(store=tmp_path, max_body_bytes=200_000, max_buffered_bytes=300_000)
    async with client(IngressApp(settings, replica.forward_to, {})) as through:
        answer = await through.post(SAMPLE, content=b"x" * 200_001)
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            413,
            "the body has 200,001 bytes; the maximum is 200,000",
        )
        answer = await through.post("/health/live", content=b"x" * 100_000)  # the path needs no key, but allows no body
        assert (answer.status_code, replica.requests) == (413, [])

        replica.release.clear()
        first = asyncio.create_task(through.post(SAMPLE, content=b"x" * 150_001))
        while not replica.requests:  # noqa: ASYNC110  # the replica has the first body
            await asyncio.sleep(0)
        answer = await through.post(SAMPLE, content=b"x" * 150_000)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        replica.release.set()
        assert (await first).text == "answer"
        assert (await through.post(SAMPLE, content=b"x" * 150_000)).text == "answer"


async def test_a_preflight_request_needs_no_key(tmp_path: Path) -> None:
    add(tmp_path / "keys", "alice")
    (tmp_path / "store").mkdir()
    settings = Settings(store=tmp_path / "store", keys_file=tmp_path / "keys", cors_origins="https://a.b")
    async with client(IngressApp(settings, Replica().forward_to, {})) as through:
        preflight = {"origin": "https://a.b", "access-control-request-method": "POST"}
        assert (await through.options(SAMPLE, headers=preflight)).status_code == 200
        refused = await through.post(SAMPLE, headers={"origin": "https://a.b"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.b")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


async def test_each_card_is_read_once(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    publish_tiny(tmp_path, "tiny-rnn")
    clock, cards, scans = Clock(), list[str](), list[Path]()

    def before(call: str, path: Path) -> None:
        if call == "open":
            cards.append(path.parent.parent.name)
        elif path == tmp_path:
            scans.append(path)

    models = ModelTasks(Store(tmp_path, disk=WatchedDisk(before)), poll_seconds=2.0, clock=lambda: clock.now)
    assert [await models.find(name) for name in ("tiny-gan", "tiny-rnn")] == ["sample", "continue"]
    for number in range(100):
        assert await models.find(f"unknown-{number}") is None
    assert (len(cards), len(scans)) == (2, 1)

    publish_tiny(tmp_path, "tiny-cnn")
    scans.clear()
    (tmp_path / "broken" / "1").mkdir(parents=True)
    assert (await models.find("tiny-cnn"), scans) == (None, [])
    clock.now += 2.0
    assert (await models.find("tiny-cnn"), len(scans)) == ("classify", 1)
    assert cards[2:] == ["broken", "tiny-cnn"]


async def test_a_stalled_store_delays_no_known_model(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    clock, answers = Clock(), threading.Event()
    answers.set()
    store = Store(tmp_path, disk=WatchedDisk(lambda *_: answers.wait()))
    models = ModelTasks(store, poll_seconds=2.0, scan_wait_seconds=0.01, clock=lambda: clock.now)
    assert await models.find("tiny-gan") == "sample"
    answers.clear()
    clock.now += 2.0
    try:
        assert await models.find("unknown") is None
        assert await models.find("tiny-gan") == "sample"
    finally:
        answers.set()


async def test_a_store_that_cannot_be_read_has_no_models(tmp_path: Path) -> None:
    models = ModelTasks(Store(tmp_path / "missing"), poll_seconds=2.0)
    assert await models.find("tiny-gan") is None


async def test_the_path_determines_the_task(tmp_path: Path) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    paths = create_app(Settings(store=tmp_path)).openapi()["paths"]
    find = ModelTasks(Store(tmp_path), poll_seconds=0).find
    tasks = {path: await task_of_path(path, find) for path, methods in paths.items() if "post" in methods}
    expected = {"classify": "classify", "continue": "continue", "forecast": "forecast", "sample": "sample"}
    for path, task in tasks.items():
        if path in ("/v1/images/classify", "/v1/text/continue", "/v1/series/forecast", "/v1/images/sample"):
            assert task == expected.pop(path.rsplit("/")[-1])
    assert not expected
    assert await task_of_path("/v2/models/tiny-gan/infer", find) == "sample"
    assert await task_of_path("/v2/models/tiny-gan@1/versions/1/infer", find) == "sample"
    assert await task_of_path("/v2/repository/models/tiny-gan@1/load", find) == "sample"  # where it serves afterwards
    for path in ("/v2/repository/index", "/v2/models/none/infer", "/v1/models"):
        assert await task_of_path(path, find) is None
