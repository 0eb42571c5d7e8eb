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


def answering_version(client: httpx.Client, model: str = NAME, request_id: str = "", **headers: str) -> int:
    """Send an image request; return the version that answers it."""
    id_header = {"x-request-id": request_id} if request_id else {}
    answer = client.post("/v1/images/sample", json={"count": 1, "model": model}, headers={**headers, **id_header})
    version: int = answer.raise_for_status().json()["version"]
    return version


def model_entry(client: httpx.Client, name: str = NAME) -> dict[str, object]:
    entry: dict[str, object] = client.get(f"/v1/models/{name}").json()
    return entry


def test_a_canary_gets_its_share_and_a_repeated_request_the_same_version(serve: Serve, tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    Store(tiny_store).activate(NAME, 1)
    with serve(store_poll_seconds=POLL_SECONDS) as client:
        assert {answering_version(client, request_id=f"r{i}") for i in range(20)} == {1}
        Store(tiny_store).activate(NAME, 2, share=25)
        wait_until(lambda: model_entry(client)["canary"] == {"version": 2, "share": 25.0})
        first = [answering_version(client, request_id=f"r{i}") for i in range(200)]
        assert 30 <= first.count(2) <= 70
        assert [answering_version(client, request_id=f"r{i}") for i in range(40)] == first[:40]
        assert (
            answering_version(client, f"{NAME}@1", request_id=f"r{first.index(2)}") == 1
        )  # a version that the request names is used in any case
        assert {answering_version(client) for _ in range(60)} == {1, 2}  # requests without request ids are divided, too
        samples = metric_samples(client)
        by_version = [
            samples["quartet_queue_seconds_count", ("model", NAME), ("version", str(number))] for number in (1, 2)
        ]
        assert sum(by_version) == 20 + 200 + 40 + 1 + 60
        assert by_version[1] >= first.count(2)
        for _ in range(6):  # without a version, not that of a random version
            rows = client.get(f"/v2/models/{NAME}/stats").raise_for_status().json()["model_stats"]
            assert [row["version"] for row in rows] == ["1", "2"]
        Store(tiny_store).rollback(NAME)
        wait_until(lambda: model_entry(client)["canary"] is None)
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
