"""Forwarding requests to replicas: equal answers, unbuffered streams, and another replica after a replica dies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send
from support.images import image_bytes
from support.service import TEST

from app.main import create_app
from app.observability.metrics import Metrics
from app.settings import Settings
from deploy.forward import MAX_HELD_BYTES, ForwardedResponse, HostedApp, render_metrics

pytestmark = pytest.mark.anyio
CONTINUE = "/v1/text/continue"
LONG = {"prompt": "a", "max_characters": 4000, "n": 16, "stream": True}


class ReplicaDied(Exception): ...


class ReplicasFull(Exception): ...


class ReplicaResponse:
    """A response like a response of Ray Serve, which fails after ``dies_after`` lists of messages."""

    def __init__(
        self, messages: AsyncGenerator[list[Message], None], dies_after: int | None = None, apart: bool = False
    ) -> None:
        self.messages = one_by_one(messages) if apart else messages
        self.dies_after = dies_after

    async def __aiter__(self) -> AsyncIterator[list[Message]]:
        count = 0
        try:
            while count != self.dies_after:
                yield await anext(self.messages)
                count += 1
            raise ReplicaDied
        except StopAsyncIteration:
            return
        finally:
            await self.messages.aclose()

    def cancel(self) -> None: ...


async def one_by_one(messages: AsyncGenerator[list[Message], None]) -> AsyncGenerator[list[Message], None]:
    """Yield each message in its own list, like a busy replica."""
    async for batch in messages:
        for message in batch:
            yield [message]


@pytest.fixture
async def hosted(tiny_store: Path) -> AsyncIterator[HostedApp]:
    hosted = HostedApp(create_app(Settings(store=tiny_store, **TEST)))
    await hosted.start()
    yield hosted
    await hosted.stop()


def client(call: Callable[[Scope, bytes], Any], max_body_bytes: int = 10**6) -> httpx.AsyncClient:
    async def ingress(scope: Scope, receive: Receive, send: Send) -> None:
        response = ForwardedResponse(call, max_body_bytes, 30.0, (ReplicaDied,), ReplicasFull)
        await response(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(ingress), base_url="http://x")


async def test_answers_are_the_same_with_and_without_the_ingress(hosted: HostedApp) -> None:
    direct = httpx.AsyncClient(transport=httpx.ASGITransport(hosted.app), base_url="http://x")
    async with direct, client(lambda scope, body: ReplicaResponse(hosted.answer(scope, body))) as through:
        for path, request in (
            ("/v1/images/sample", {"json": {"count": 3, "seed": 5}}),
            ("/v1/images/sample", {"json": {"count": 3, "seed": 5}, "headers": {"accept": "image/png"}}),
            ("/v1/images/classify?top_k=2", {"files": [("file", ("x.png", image_bytes()))]}),
            (CONTINUE, {"json": {"prompt": "abc", "seed": 1, "stream": True, "max_characters": 20}}),
            (CONTINUE, {"json": {"temperature": -1}}),
            ("/nothing", {"json": {}}),
        ):
            answers = [await http_client.post(path, **{"headers": {}, **request}) for http_client in (direct, through)]  # type: ignore[arg-type]
            assert answers[0].status_code == answers[1].status_code
            assert answers[0].headers["content-type"] == answers[1].headers["content-type"]
            if CONTINUE not in path:
                assert answers[0].content == answers[1].content
            texts = ["".join(line for line in answer.text.splitlines() if "error" in line) for answer in answers]
            assert texts[0] == texts[1]
        model_list = await through.get("/v1/models")
        assert (model_list.status_code, len(model_list.json()["data"])) == (200, 4)


async def test_a_stream_is_not_buffered_and_a_disconnect_frees_its_slots(hosted: HostedApp) -> None:
    scope = {"type": "http", "method": "POST", "path": CONTINUE, "query_string": b"", "headers": []}
    answer = hosted.answer(scope, json.dumps(LONG).encode())
    first = await anext(answer)
    assert first[0]["type"] == "http.response.start"
    (engine,) = [model.engine for model in hosted.app.state.models.loaded() if model.card.name == "tiny-rnn"]
    assert engine.row_counts[1] == 16  # the texts are still running
    await answer.aclose()
    async with asyncio.timeout(30):
        while engine.row_counts != (0, 0):  # noqa: ASYNC110  # the engine has no event for this
            await asyncio.sleep(0.005)  # with 0, this loop would keep the GIL from the engine's thread


SAMPLE, IMAGES = "/v1/images/sample", {"count": 2, "seed": 1}


@pytest.mark.parametrize(
    ("path", "body", "end", "dies_after", "calls"),
    [
        *((SAMPLE, IMAGES, "}]}", dies_after, calls) for dies_after, calls in ((0, 2), (1, 2), (2, 1))),
        (CONTINUE, {**LONG, "max_characters": 5}, "data: [DONE]\n\n", 1, 2),
    ],
)
async def test_an_incomplete_answer_is_replaced_by_another_replica(
    hosted: HostedApp, path: str, body: dict[str, Any], end: str, dies_after: int, calls: int
) -> None:
    bodies = []

    def call(scope: Scope, body: bytes) -> ReplicaResponse:
        bodies.append(body)  # the first replica dies before its answer, after the head of it, or after all of it
        return ReplicaResponse(
            hosted.answer(scope, body), dies_after=dies_after if len(bodies) == 1 else None, apart=True
        )

    async with client(call) as through:
        answer = await through.post(path, json=body)
    assert (answer.status_code, "error" in answer.text) == (200, False)
    assert answer.text.endswith(end)
    assert bodies == bodies[:1] * calls


async def nothing() -> AsyncGenerator[list[Message], None]:
    """Yield nothing, like a replica that dies before its answer."""
    return
    yield []


async def test_a_request_kills_at_most_two_replicas() -> None:
    calls = []

    def call(scope: Scope, body: bytes) -> ReplicaResponse:
        calls.append(scope["path"])
        return ReplicaResponse(nothing(), dies_after=0)

    async with client(call) as through:
        answer = await through.post("/v1/images/sample", json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
        assert answer.json()["error"]["message"] == "2 replicas died while they answered this request"
        assert answer.headers["x-should-retry"] == "false"  # OpenAI's client would send it three times
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("path", "tries"),
    [
        ("/v1/admin/models/tiny-gan/rollback", 1),
        ("/v1/admin/import", 1),
        ("/v2/repository/models/tiny-gan/unload", 1),
        ("/v2/models/tiny-gan/infer", 2),
        ("/v1/completions", 2),
    ],
)
async def test_only_requests_that_change_nothing_are_repeated(path: str, tries: int) -> None:
    calls = []

    def call(scope: Scope, body: bytes) -> ReplicaResponse:
        calls.append(scope["path"])
        return ReplicaResponse(nothing(), dies_after=0)

    async with client(call) as through:
        answer = await through.post(path, json={})
        assert answer.status_code == 500
        assert ("check whether it made the change before you repeat the request" in answer.text) == (tries == 1)
        assert len(calls) == tries
        assert (await through.get("/v1/admin/models")).status_code == 500
    assert len(calls) == tries + 2  # requests that only read are repeated


async def test_full_replicas_give_429() -> None:

    def full(scope: Scope, body: bytes) -> ReplicaResponse:
        raise ReplicasFull

    async with client(full) as through:
        answer = await through.post("/v1/images/sample", json={})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


async def test_a_stream_ends_with_an_error_event_when_its_replica_dies(hosted: HostedApp) -> None:
    async with client(lambda scope, body: ReplicaResponse(hosted.answer(scope, body), dies_after=2)) as through:
        answer = await through.post(CONTINUE, json=LONG)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert answer.status_code == 200
    assert json.loads(events[-2])["error"]["message"] == "the replica that generated this answer died"
    assert events[-1] == "[DONE]"


async def test_a_large_answer_is_cut_off_when_its_replica_dies() -> None:
    """The client has received a part of the answer, so no other replica can answer."""
    calls = []

    async def large() -> AsyncGenerator[list[Message], None]:
        yield [{"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/zip")]}]
        yield [{"type": "http.response.body", "body": bytes(MAX_HELD_BYTES + 1), "more_body": True}]

    def call(scope: Scope, body: bytes) -> ReplicaResponse:
        calls.append(scope["path"])
        return ReplicaResponse(large(), dies_after=2)

    async with client(call) as through:
        with pytest.raises(ConnectionError, match="the replica died while sending its response"):
            await through.get("/v1/admin/models/tiny-gan/export")
    assert len(calls) == 1


async def test_a_body_that_is_too_large_is_rejected_before_all_of_it_arrives() -> None:
    sent = []

    def call(scope: Scope, body: bytes) -> ReplicaResponse:
        raise AssertionError("a replica gets no body that is too large")

    async def chunks() -> AsyncIterator[bytes]:
        for number in range(10):
            sent.append(number)
            yield b"x" * 500

    async with client(call, max_body_bytes=1000) as through:
        answer = await through.post("/v1/images/classify", content=chunks())
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        413,
        "the body has more than 1,000 bytes, the allowed maximum",
    )
    assert sent == [0, 1, 2]


async def test_metrics_of_all_replicas_are_rendered_on_one_page() -> None:
    families_by_replica = {}
    for replica in ("a", "b"):
        metrics = Metrics()
        metrics.for_version("m", 1).on_batch(3, 0.1)
        families_by_replica[replica] = list(metrics.registry.collect())
    families = {
        family.name: family for family in text_string_to_metric_families(render_metrics(families_by_replica).decode())
    }
    rows = [sample for sample in families["quartet_batch_rows"].samples if sample.name.endswith("_sum")]
    assert {sample.labels["replica"]: sample.value for sample in rows} == {"a": 3, "b": 3}
    assert families["quartet_workers"].type == "gauge"
