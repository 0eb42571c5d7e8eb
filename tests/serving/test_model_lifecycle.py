"""Versions in a running service: canary, loading on demand, eviction, partial copies, damaged files."""

from __future__ import annotations

from pathlib import Path

import httpx
from support.networks import publish_tiny
from support.responses import metric_samples
from support.service import Serve
from support.waiting import wait_until

from app.store import Store

NAME = "tiny-gan"
POLL_SECONDS = 0.02  # time between two scans of the store


def answering_version(client: httpx.Client, model: str = NAME, request_id: str = "") -> int:
    """Send an image request; return the version that answers it."""
    headers = {"x-request-id": request_id} if request_id else {}
    answer = client.post("/v1/images/sample", json={"count": 1, "model": model}, headers=headers)
    version: int = answer.raise_for_status().json()["version"]
    return version


def test_a_canary_gets_its_share_and_a_repeated_request_the_same_version(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    Store(tiny_store).activate(NAME, 1)
    with serve(store_poll_seconds=POLL_SECONDS) as client:

        def canary() -> object:
            return client.get(f"/v1/models/{NAME}").json()["canary"]

        Store(tiny_store).activate(NAME, 2, share=25)
        wait_until(lambda: canary() == {"version": 2, "share": 25.0})
        first = [answering_version(client, request_id=f"r{i}") for i in range(100)]
        assert 10 <= first.count(2) <= 40
        assert [answering_version(client, request_id=f"r{i}") for i in range(20)] == first[:20]
        assert answering_version(client, f"{NAME}@1", f"r{first.index(2)}") == 1  # the request names its version
        assert {answering_version(client) for _ in range(60)} == {1, 2}  # requests without request ids are divided, too
        samples = metric_samples(client)
        by_version = [
            samples["quartet_queue_seconds_count", ("model", NAME), ("version", str(number))] for number in (1, 2)
        ]
        assert sum(by_version) == 100 + 20 + 1 + 60
        assert by_version[1] >= first.count(2)
        rows = client.get(f"/v2/models/{NAME}/stats").raise_for_status().json()["model_stats"]
        assert [row["version"] for row in rows] == ["1", "2"]  # those of all versions
        Store(tiny_store).rollback(NAME)
        wait_until(lambda: canary() is None)
        assert {answering_version(client, request_id=f"r{i}") for i in range(20)} == {1}


def test_a_retired_version_finishes_its_running_requests(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, "tiny-rnn")
    body = {"prompt": "a", "max_characters": 1500, "n": 16, "stream": True, "model": "tiny-rnn@1"}
    with (
        serve(store_poll_seconds=POLL_SECONDS) as client,
        client.stream("POST", "/v1/text/continue", json=body) as answer,
    ):
        chunks = answer.iter_bytes()
        first_chunk = next(chunks)
        Store(tiny_store).retire("tiny-rnn", 1)
        wait_until(lambda: client.get("/v1/models/tiny-rnn@1").status_code == 404)
        content = first_chunk + b"".join(chunks)
    assert content.count(b'"finish_reason":"length"') == 16
